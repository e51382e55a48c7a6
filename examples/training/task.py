"""What is trained: the one interface between a model with its data and everything else here."""

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
      name: for messages and folders.
      init: of a random key: the parameters, and the model's other collections (`{}` if none).
      loss: of parameters, model state, a batch and a random key, in training: `(loss,
        (model_state, metrics))`. Pure. The loss and the metrics are means over the batch.
      evaluate: of parameters, model state and a batch: metrics as sums over its examples, and
        their number as `"count"`. The last batch of a pass may be smaller.
      train_batches: the batches of step `start`, `start + 1` and so on, without end. A batch
        depends only on the seed and its step, so that a run that goes on sees what it would have.
      eval_batches: the batches of one pass over the held-out data.
      steps_per_epoch: how many training batches are a pass over the training data.
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
        """The layers that the loss calls, for AdaFisher and to be printed."""
        key = jax.random.key(0)
        return af.trace_layout(
            self.loss, *jax.eval_shape(self.init, key), next(self.train_batches(0)), key
        )
