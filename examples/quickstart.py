"""Train a small CNN on scikit-learn's digits with AdaFisher, AdamW and SGD, side by side.

    python examples/quickstart.py [--out quickstart.png] [--json quickstart.json] [--tune]

Every optimizer gets the same initial parameters, batches and learning-rate schedule. They take
turns at each step, so that their times compare whatever else the machine is doing.
"""

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from typing import NamedTuple

import flax
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from tqdm import tqdm

import adafisher_jax as af

STEPS, BATCH, SEEDS, EVALUATE_EVERY = 300, 64, 3, 20

# name: (constructor, peak learning rate). The rates are those of GRID with the lowest final
# training loss, for every optimizer alike; `--tune` runs the whole grid again.
RECOMMENDED = "AdaFisher, centered"
OPTIMIZERS = {
    RECOMMENDED: (lambda rate, layout: af.adafisher(rate, layout, rule="centered"), 3e-2),
    "AdaFisher, paper": (lambda rate, layout: af.adafisher(rate, layout, rule="paper"), 1e-2),
    "AdamW, b2 0.99": (lambda rate, layout: optax.adamw(rate, b2=0.99), 3e-2),
    "SGD, momentum 0.9": (lambda rate, layout: optax.sgd(rate, momentum=0.9), 1e-1),
}
GRID = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1e0]


class CNN(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(16, (3, 3))(images))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def loss_fn(params, images, labels):
    logits = CNN().apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_train_step(tx, layout):
    """The jitted step, one for all: AdamW and SGD ignore `factors`, and XLA drops unused ones."""
    tx = optax.with_extra_args_support(tx)
    grad_fn = af.value_and_grad(loss_fn, layout)

    @jax.jit
    def train_step(params, opt_state, images, labels):
        loss, grads, factors = grad_fn(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
        return optax.apply_updates(params, updates), opt_state, loss

    return train_step


@jax.jit
def evaluate(params, train, test):
    images, labels = test
    predicted = CNN().apply({"params": params}, images).argmax(-1)
    return loss_fn(params, *train), (predicted == labels).mean()


class Record(NamedTuple):
    """How one optimizer did at one learning rate."""

    train_loss: np.ndarray  # (seed, evaluation), on the whole training set
    test_accuracy: np.ndarray  # (seed, evaluation)
    step_ms: float  # median over all steps
    state_bytes: int


def compare(entrants, layout, train, test):
    """Train every (name, learning rate) of `entrants`; return a Record for each."""
    txs = {}
    for name, rate in entrants:
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, STEPS // 20, STEPS)
        txs[name, rate] = OPTIMIZERS[name][0](schedule, layout)
    train_steps = {entrant: make_train_step(tx, layout) for entrant, tx in txs.items()}

    curves, seconds = defaultdict(list), defaultdict(list)
    with tqdm(
        total=SEEDS * STEPS, desc="training (step 1 compiles)", unit="step", mininterval=1
    ) as progress:
        for seed in range(SEEDS):
            batches = np.random.default_rng(seed)
            params = CNN().init(jax.random.key(seed), train[0][:1])["params"]
            states = {entrant: (params, tx.init(params)) for entrant, tx in txs.items()}
            for step in range(1, STEPS + 1):
                chosen = batches.choice(len(train[0]), BATCH, replace=False)
                batch = [array[chosen] for array in train]
                for entrant, train_step in train_steps.items():
                    start = time.perf_counter()
                    *state, _ = jax.block_until_ready(train_step(*states[entrant], *batch))
                    seconds[entrant].append(time.perf_counter() - start)
                    states[entrant] = state
                    if step % EVALUATE_EVERY == 0:
                        curves[entrant].append(evaluate(state[0], train, test))
                progress.update()

    records = {}
    for entrant, (_, opt_state) in states.items():
        train_loss, test_accuracy = np.reshape(curves[entrant], (SEEDS, -1, 2)).transpose(2, 0, 1)
        step_ms = 1e3 * float(np.median(seconds[entrant]))
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
        records[entrant] = Record(train_loss, test_accuracy, step_ms, state_bytes)
    return records


def print_table(records):
    headings = "optimizer", "peak rate", "training loss", "test accuracy", "ms/step", "state bytes"
    rows = [
        (
            name,
            rate,
            record.train_loss[:, -1].mean(),
            record.test_accuracy[:, -1].mean(),
            *record[2:],
        )
        for (name, rate), record in records.items()
    ]
    print(tabulate(rows, headings, intfmt=",", floatfmt=("", "g", ".2e", ".3f", ".2f")))


def conclusion(records, test_size):
    """What the table shows, in a sentence."""
    losses = {name: record.train_loss[:, -1].mean() for (name, _), record in records.items()}
    first, second = sorted(losses, key=losses.get)[:2]
    accuracies = [record.test_accuracy[:, -1].mean() for record in records.values()]
    mean = np.mean(accuracies)
    error = np.sqrt(mean * (1 - mean) / test_size)
    return (
        f"{first} ends with the lowest training loss, {losses[first] / losses[second]:.2f} times"
        f" that of {second}; test accuracies differ by up to {np.ptp(accuracies):.3f}, and one"
        f" standard error is {error:.3f}."
    )


def write_json(records, path):
    """The table, with what it was made on."""
    versions = {package.__name__: package.__version__ for package in (jax, flax, optax)}
    rows = [
        {
            "optimizer": name,
            "peak_rate": rate,
            "train_loss": float(record.train_loss[:, -1].mean()),
            "test_accuracy": round(float(record.test_accuracy[:, -1].mean()), 4),
            "step_ms": round(record.step_ms, 3),
            "state_bytes": record.state_bytes,
        }
        for (name, rate), record in records.items()
    ]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}"
    with open(path, "w") as file:
        json.dump({"machine": machine, "versions": versions, "rows": rows}, file, indent=1)


def plot(records, path):
    steps = np.arange(EVALUATE_EVERY, STEPS + 1, EVALUATE_EVERY)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, rate in records:
        record = records[name, rate]
        left.semilogy(steps, record.train_loss.mean(0))
        right.plot(steps, record.test_accuracy.mean(0), label=f"{name}, lr {rate:g}")
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="test accuracy", ylim=(0.9, 1.0))
    right.legend(frameon=False, loc="lower right")
    figure.suptitle(f"digits, small CNN, mean of {SEEDS} seeds")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="quickstart.png", help="where to write the curves")
    parser.add_argument("--json", help="where to write the table, with versions")
    parser.add_argument("--tune", action="store_true", help="run the learning-rate grid (minutes)")
    arguments = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    split = train_test_split(images, labels, test_size=500, random_state=0, stratify=labels)
    train, test = split[::2], split[1::2]

    params = CNN().init(jax.random.key(0), images[:1])["params"]
    layout = af.trace_layout(loss_fn, params, images[:BATCH], labels[:BATCH])
    print(layout)

    if arguments.tune:
        print_table(compare([(n, r) for n in OPTIMIZERS for r in GRID], layout, train, test))
        return

    records = compare([(n, r) for n, (_, r) in OPTIMIZERS.items()], layout, train, test)
    print_table(records)
    plot(records, arguments.out)
    if arguments.json:
        write_json(records, arguments.json)
    print(f"curves in {arguments.out}")
    recommended = records[RECOMMENDED, OPTIMIZERS[RECOMMENDED][1]]
    print(f"{RECOMMENDED}: test accuracy {recommended.test_accuracy[:, -1].mean():.3f}")
    print(conclusion(records, len(test[0])))


if __name__ == "__main__":
    main()
