"""The interface between a model with its data and the training programs."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

import adafisher_jax as af

Params = Any
ModelState = Any
Batch = Any  # a pytree of arrays, examples along their first axis
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its loss and its data.

    Attributes:
      name: the name of the task, for messages and folders.
      init: `(key)` to the parameters and the other collections of the model (`{}` if none).
      loss: `(params, model_state, batch, key)` to `(loss, (model_state, metrics))`, in training. A
        pure function. The loss and the metrics are means over the batch.
      evaluate: `(params, model_state, batch)` to the sums of the metrics over the examples, and
        the number of examples as `"count"`. The last batch of a pass may be smaller.
      train_batches: `(start)` to an endless iterator over the batches of step `start`, `start + 1`
        and so on. A batch depends only on the seed and the step, so that a run can resume.
      eval_batches: `()` to the batches of one pass over the held-out data.
      steps_per_epoch: the number of batches in one pass over the training data.
    """

    name: str
    init: Callable[[jax.Array], tuple[Params, ModelState]]
    loss: Callable[
        [Params, ModelState, Batch, jax.Array], tuple[jax.Array, tuple[ModelState, Metrics]]
    ]
    evaluate: Callable[[Params, ModelState, Batch], Metrics]
    train_batches: Callable[[int], Iterator[Batch]]
    eval_batches: Callable[[], Iterator[Batch]]
    steps_per_epoch: int

    @functools.cached_property
    def layout(self) -> af.Layout:
        """The layout of the loss, for AdaFisher and for printing."""
        key = jax.random.key(0)
        return af.trace_layout(
            self.loss, *jax.eval_shape(self.init, key), next(self.train_batches(0)), key
        )
