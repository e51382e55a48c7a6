"""One training step, of whatever optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import adafisher_jax as af
from examples.training import devices
from examples.training.task import Task


class Optimizer(NamedTuple):
    """An optimizer for a task.

    Attributes:
      init: of parameters, model state, a batch and a key: the optimizer's state.
      step: of parameters, model state, optimizer's state, a batch and a key: `(params,
        model_state, opt_state, loss, metrics)`. Compiled; the first three are given away.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]


def of_transformation(tx: Any, find: Callable[..., Any]) -> Optimizer:
    """An optimizer whose updates are those of an optax transformation.

    Args:
      tx: the transformation.
      find: of parameters, model state, optimizer's state, batch and key: `((loss, (model_state,
        metrics)), grads, extra)`, the last a dict of further arguments of `tx.update`.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params, model_state, batch, key):
        return jax.jit(tx.init)(params)

    def step(params, model_state, opt_state, batch, key):
        (loss, (model_state, metrics)), grads, extra = find(
            params, model_state, opt_state, batch, key
        )
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), model_state, opt_state, loss, metrics

    # Pinned, or the first step would leave its results where the second, compiled again for it,
    # might put them elsewhere.
    pinned = jax.jit(step, donate_argnums=(0, 1, 2), out_shardings=devices.everywhere())
    return Optimizer(init, pinned)


def of_gradients(task: Task) -> Callable[..., Any]:
    """The `find` of transformations that want gradients alone."""
    value_and_grad = jax.value_and_grad(task.loss, has_aux=True)

    def find(params, model_state, opt_state, batch, key):
        return *value_and_grad(params, model_state, batch, key), {}

    return find


def of_factors(task: Task, refresh_every: int = 1) -> Callable[..., Any]:
    """The `find` of AdaFisher, with factors in every so-many-th step, the first included."""

    def find(params, model_state, opt_state, batch, key):
        due = refresh_every == 1 or _steps(opt_state) % refresh_every == 0
        with_factors = af.value_and_grad(task.loss, task.layout, has_aux=True, when=due)
        value, grads, factors = with_factors(params, model_state, batch, key)
        return value, grads, {"factors": factors}

    return find


def _steps(opt_state: Any) -> Any:
    return optax.tree.get(opt_state, af.ScaleByAdaFisherState.__name__).count
