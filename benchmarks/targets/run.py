"""One run, compiled as a whole: no optimizer pays for what surrounds its steps."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Contender
from benchmarks.study.problems import Data, Examples
from benchmarks.study.trial import Trial
from benchmarks.targets.rivals import RIVALS
from benchmarks.targets.tasks import TASKS

EVERY = 5  # steps between two measurements
TIMED = 20  # steps that are timed at once


class Start(NamedTuple):
    """What a run begins from; `order`: for each step the examples of its batch."""

    settings: dict[str, jax.Array]
    params: Any
    model_state: Any
    order: jax.Array
    key: jax.Array


class Programs(NamedTuple):
    """Of a task and an optimizer: its state at the start, some steps, and a whole run."""

    begin: Any
    steps: Any
    train: Any


def run(trial: Trial, folder: pathlib.Path) -> dict[str, list[float]]:
    """The losses on training and held-out examples after every fifth step."""
    train = _programs(trial.problem, trial.optimizer, trial.steps, folder).train
    curves = train(_start(trial, folder), *_data(trial.problem, folder))
    return {name: [float(f"{x:.5g}") for x in np.asarray(curve)] for name, curve in curves.items()}


def contender(trial: Trial, folder: pathlib.Path) -> Contender:
    """Steps like the trial's, to be timed: `TIMED` at once."""
    begin, steps, _ = _programs(trial.problem, trial.optimizer, trial.steps, folder)
    start, train = _start(trial, folder), _data(trial.problem, folder).train
    order = start.order[:TIMED]
    state = begin(start, train)
    return Contender(lambda state: steps(state, start, order, train), state)


def _start(trial, folder):
    params, model_state = _init(trial.problem, folder)(jax.random.key(trial.seed))
    rng, count = np.random.default_rng(trial.seed), len(_data(trial.problem, folder).train.inputs)
    epochs = -(-trial.steps * trial.batch // count)
    passes = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    order = passes[: trial.steps * trial.batch].reshape(trial.steps, trial.batch)
    settings = {"rate": trial.rate} | dict(trial.options)
    settings = {name: jnp.float32(value) for name, value in settings.items()}
    return Start(settings, params, model_state, jnp.asarray(order), jax.random.key(trial.seed))


@functools.lru_cache(maxsize=2)
def _data(name, folder):
    data = TASKS[name].read(folder)
    return Data(*(Examples(*map(jnp.asarray, split)) for split in data))


@functools.lru_cache(maxsize=2)
def _task(name, folder):
    data = Data(*(Examples(*map(np.asarray, split)) for split in _data(name, folder)))
    return TASKS[name].task(name, data, TASKS[name].batch, seed=0)


@functools.lru_cache(maxsize=2)
def _init(name, folder):
    return jax.jit(_task(name, folder).init)


@functools.lru_cache(maxsize=32)
def _programs(name, optimizer, length, folder):
    """One of each for all settings and seeds."""
    task, measured, rival = _task(name, folder), TASKS[name].measured, RIVALS[optimizer]

    def take(examples, chosen):
        return Examples(*(values[chosen] for values in examples))

    def begin(start, train):
        made = rival.make(task, start.settings, length)
        opt_state = made.init(
            start.params, start.model_state, take(train, start.order[0]), start.key
        )
        return start.params, start.model_state, opt_state

    def steps(state, start, order, train):
        made = rival.make(task, start.settings, length)

        def step(state, chosen):
            return made.step(*state, take(train, chosen), start.key)[:3], None

        return jax.lax.scan(step, state, order)[0]

    def run(start, train, held_out):
        fixed = {"train": train.head(measured), "held_out": held_out.head(measured)}

        def loss(params, model_state, examples):
            sums = task.evaluate(params, model_state, examples)
            return sums["loss"] / sums["count"]

        def stretch(state, order):
            state = steps(state, start, order, train)
            params = rival.measured(state[0], state[2])
            return state, {name: loss(params, state[1], part) for name, part in fixed.items()}

        stretches = start.order.reshape(-1, EVERY, start.order.shape[1])
        return jax.lax.scan(stretch, begin(start, train), stretches)[1]

    return Programs(*map(jax.jit, (begin, steps, run)))
