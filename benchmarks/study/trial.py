"""One run: a problem, an optimizer with its settings, and how it came out."""

import collections
import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adafisher_jax import diagnostics
from benchmarks.measure import nbytes
from benchmarks.study import controls
from benchmarks.study.ladders import RUNGS
from benchmarks.study.problems import PROBLEMS, in_order
from examples.training import divergence

POINTS = 25  # of a curve
KNOWN = collections.ChainMap(PROBLEMS, RUNGS)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A rate that rises for a share of the steps, then falls along a cosine."""

    rate: Any
    steps: int
    warm_up: float = 0.05

    def __call__(self, step: Any) -> Any:
        rising = int(self.warm_up * self.steps)
        return self.rate * optax.warmup_cosine_decay_schedule(0.0, 1.0, rising, self.steps)(step)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What identifies a run; `options`: the optimizer's own, by name."""

    problem: str
    optimizer: str
    rate: float
    seed: int
    steps: int
    batch: int
    options: tuple[tuple[str, Any], ...] = ()


def begin(trial: Trial, folder: pathlib.Path) -> tuple[Any, ...]:
    """The trial's task, its state, its step (of the rate, that state, batch, key) and batches."""
    data = _data(trial.problem, folder)
    task = KNOWN[trial.problem].task(trial.problem, data, trial.batch, trial.seed)
    first, key = jax.random.split(jax.random.key(trial.seed))
    params, model_state = _model(trial.problem, folder)[0](first)
    start, step = _programs(
        trial.problem, trial.optimizer, trial.steps, trial.batch, trial.options, folder
    )
    batches = task.train_batches(0)
    example = next(task.train_batches(0))
    opt_state = start(trial.rate, params, model_state, example, key)
    return task, (params, model_state, opt_state), step, batches, key


@functools.lru_cache(maxsize=4)
def _data(problem, folder):
    return KNOWN[problem].read(folder)


@functools.lru_cache(maxsize=4)
def _model(problem, folder):
    """What does not depend on the optimizer: the parameters' start, and an evaluation."""
    task = KNOWN[problem].task(problem, _data(problem, folder), KNOWN[problem].batch, seed=0)
    return jax.jit(task.init), jax.jit(task.evaluate)


@functools.lru_cache(maxsize=32)
def _programs(problem, optimizer, steps, batch, options, folder):
    """An optimizer's start and step, compiled once for all learning rates and seeds."""
    task = KNOWN[problem].task(problem, _data(problem, folder), batch, seed=0)

    def at(rate):
        return controls.make(optimizer, Schedule(rate, steps), task, **dict(options))

    if optimizer == "kfac":  # compiles its own step, of which the rate is a constant
        at = functools.cache(at)
        return lambda rate, *args: at(rate).init(*args), lambda rate, *args: at(rate).step(*args)
    return (
        jax.jit(lambda rate, *args: at(rate).init(*args)),
        jax.jit(lambda rate, *args: at(rate).step(*args), donate_argnums=(1, 2, 3)),
    )


def interval(trial: Trial) -> int:
    """How many steps are between the points of its curve."""
    return math.ceil(trial.steps / POINTS)


def run(trial: Trial, folder: pathlib.Path) -> dict[str, Any]:
    """How it came out: the way there, and losses at its end unless it diverged.

    `curve` has the mean loss of each `interval` steps, `above_damping` a share after each.
    """
    task, state, step, batches, key = begin(trial, folder)
    found = {"state_bytes": nbytes(state[2])}
    watch, losses, shares = divergence.Watch(), [], []
    share, every = _above_damping(trial, task), interval(trial)
    for number in range(trial.steps):
        *state, loss, _ = step(trial.rate, *state, next(batches), jax.random.fold_in(key, number))
        losses.append(float(loss))
        watch.see(number, losses[-1])
        if watch.verdict:
            break
        if share and (number + 1) % every == 0:
            shares.append(round(float(share(state[2])), 5))
    found["diverged"] = watch.verdict
    found["curve"] = _means(losses, every)
    if shares:
        found["above_damping"] = shares
    if not watch.verdict:
        params, model_state, _ = state
        _, evaluate = _model(trial.problem, folder)
        data, most = _data(trial.problem, folder), KNOWN[trial.problem].measured
        train = in_order(data.train, most)
        for split, batches in {"train": train, "held_out": task.eval_batches()}.items():
            sums = [evaluate(params, model_state, batch) for batch in batches]
            total = {name: float(sum(part[name] for part in sums)) for name in sums[0]}
            count = total.pop("count")
            found |= {
                f"{split}_{name}": float(f"{value / count:.7g}")  # they are single precision
                for name, value in total.items()
            }
    return found


def _above_damping(trial, task):
    """Of an optimizer's state, the share of entries whose Fisher term exceeds the damping."""
    method, _, rule = trial.optimizer.partition(":")
    if method != "adafisher" or trial.problem in RUNGS:
        return None
    damping, layers = dict(trial.options).get("damping"), task.layout.layers
    sizes = np.array([layer.leaves[0].size for layer in layers])

    @jax.jit
    def share(opt_state):
        found = diagnostics.report(opt_state, task.layout, rule=rule, damping=damping)
        return (
            jnp.stack([found[layer.path].above_damping for layer in layers]) @ sizes / sizes.sum()
        )

    return share


def _means(losses, every):
    """The mean of each so many losses."""
    return [
        float(f"{np.mean(losses[stop - every : stop]):.5g}")
        for stop in range(every, len(losses) + 1, every)
    ]
