"""Takes and times training steps."""

import time
from typing import Any

import jax

from examples.training import devices
from examples.training.steps import Optimizer
from examples.training.task import Task


class Stepper:
    """A task in training.

    Attributes:
      state: parameters, model state and optimizer's state.
      step: the number of steps taken.
      seconds: the time of the steps with their batches, without the first step of this object,
        which compiles.
    """

    def __init__(self, task: Task, optimizer: Optimizer, seed: int):
        self._task, self._optimizer = task, optimizer
        self._key = jax.random.key(seed)  # folded with 0 for the parameters, else with the step
        key = jax.random.fold_in(self._key, 0)
        batch = devices.put_training(next(task.train_batches(0)))
        init = jax.jit(task.init, out_shardings=devices.everywhere())
        params, model_state = init(key)
        # Placed like the result of a step; otherwise the second step would compile again.
        opt_state = jax.device_put(
            optimizer.init(params, model_state, batch, key), devices.everywhere()
        )
        self.state: Any = params, model_state, opt_state
        self.step, self.seconds = 0, 0.0
        self._batches: Any = None

    def go_on(self, state: Any, step: int, seconds: float) -> None:
        """Continues from a checkpoint."""
        self.state, self.step, self.seconds = state, step, seconds

    def advance(self, step: int) -> list[dict[str, float]]:
        """Takes all steps up to `step`; returns the loss and the metrics of each."""
        found = []
        start = time.perf_counter()
        while self.step < step:
            first = self._batches is None
            if first:
                self._batches = self._task.train_batches(self.step)
            batch = devices.put_training(next(self._batches))
            self.step += 1
            key = jax.random.fold_in(self._key, self.step)
            *self.state, loss, metrics = self._optimizer.step(*self.state, batch, key)
            found.append({**metrics, "loss": loss})
            if first:
                jax.block_until_ready(self.state)
                start = time.perf_counter()
        jax.block_until_ready(self.state)
        self.seconds += time.perf_counter() - start
        return [{name: float(x) for name, x in one.items()} for one in jax.device_get(found)]
