"""Train on eight devices, in one process or several, and compare with one device.

    python examples/many_devices.py                 # one process with 8 virtual CPU devices
    python examples/many_devices.py --processes 2   # two processes with 4 each, on this machine

Batches are split over the mesh axis `data`, parameters over the mesh axis `model`. On a cluster,
run `train` in one process on each machine, after `jax.distributed.initialize()`.
"""

import argparse
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import adafisher_jax as af

DEVICES, BATCH, STEPS = 8, 64, 20

model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])


def loss_fn(params, images, labels):
    logits = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_batches():
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    chosen = np.random.default_rng(0).choice(len(images), (STEPS, BATCH))
    return [(images[rows], labels[rows]) for rows in chosen]


def train(mesh, batches):
    """The loss at each step, and the optimizer's state after the last."""

    def place(leaf, *spec):
        """Places an array; each process reads only the part for its own devices."""
        leaf, sharding = np.asarray(leaf), NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)

    params = model.init(jax.random.key(0), batches[0][0])["params"]  # alike on every process
    layout = af.trace_layout(loss_fn, params, *batches[0])
    params = jax.tree.map(lambda leaf: place(leaf, *[None] * (leaf.ndim - 1), "model"), params)

    tx = af.adafisherw(3e-2, layout, rule="centered")
    grad_fn = af.value_and_grad(loss_fn, layout)

    @jax.jit
    def train_step(params, opt_state, images, labels):
        loss, grads, factors = grad_fn(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)  # momentum lies where its parameter does
    losses = []
    for batch in batches:
        placed = [place(array, "data") for array in batch]
        params, opt_state, loss = train_step(params, opt_state, *placed)
        losses.append(float(loss))
    return losses, opt_state[0]


def compare():
    """Trains on all devices and on one, and prints the difference."""
    batches, names = make_batches(), ("data", "model")
    axes = (AxisType.Auto,) * 2
    everything = jax.make_mesh((DEVICES // 2, 2), names, axes)
    single = jax.make_mesh((1, 1), names, axes, devices=jax.local_devices()[:1])

    losses, state = train(everything, batches)
    expected, _ = train(single, batches)
    # In layers this narrow a rounding error of 1e-7 becomes one of 1e-3 to 1e-2 in twenty steps.
    np.testing.assert_allclose(losses[: STEPS // 2], expected[: STEPS // 2], rtol=5e-3)
    np.testing.assert_allclose(losses, expected, rtol=5e-2)
    if jax.process_index() == 0:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices")
        print(f"momentum of a kernel: {state.mu['layers_0']['kernel'].sharding.spec}")
        print(f"its factors: h {state.factors['layers_0'].h.sharding.spec}, ", end="")
        print(f"s {state.factors['layers_0'].s.sharding.spec}")
        print(f"loss from {losses[0]:.4f} to {losses[-1]:.4f}")
        print(
            f"largest difference to one device {np.max(np.abs(np.subtract(losses, expected))):.1e}"
        )


def launch(processes):
    """Starts this script once for each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--processes", str(processes), "--address", address]
    running = [subprocess.Popen([*command, "--index", str(i)]) for i in range(processes)]
    codes = [process.wait() for process in running]
    sys.exit(any(codes))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2, 4, 8])
    parser.add_argument("--address", help="of the first process; set by the script itself")
    parser.add_argument("--index", type=int, help="of this process; set by the script itself")
    arguments = parser.parse_args()

    if arguments.processes > 1 and arguments.index is None:
        launch(arguments.processes)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // arguments.processes)
    if arguments.processes > 1:
        jax.distributed.initialize(arguments.address, arguments.processes, arguments.index)
    compare()


if __name__ == "__main__":
    main()
