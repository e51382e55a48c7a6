"""A training step, for any optimizer."""

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
      init: `(params, model_state, batch, key)` to the optimizer's state.
      step: `(params, model_state, opt_state, batch, key)` to `(params, model_state, opt_state,
        loss, metrics)`. Compiled; the first three arguments are donated.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]


def of_transformation(tx: Any, find: Callable[..., Any]) -> Optimizer:
    """An optimizer from an optax transformation.

    Args:
      tx: the transformation.
      find: `(params, model_state, opt_state, batch, key)` to `((loss, (model_state, metrics)),
        grads, extra)`, where `extra` is a dict of extra arguments for `tx.update`.
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

    # With fixed shardings the results of the first step fit the second; otherwise the second would
    # compile again.
    pinned = jax.jit(step, donate_argnums=(0, 1, 2), out_shardings=devices.everywhere())
    return Optimizer(init, pinned)


def of_gradients(task: Task) -> Callable[..., Any]:
    """The `find` for transformations that need only gradients."""
    value_and_grad = jax.value_and_grad(task.loss, has_aux=True)

    def find(params, model_state, opt_state, batch, key):
        return *value_and_grad(params, model_state, batch, key), {}

    return find


def of_factors(task: Task, refresh_every: int = 1) -> Callable[..., Any]:
    """The `find` for AdaFisher, with factors at the first step and every `refresh_every`-th."""

    def find(params, model_state, opt_state, batch, key):
        due = refresh_every == 1 or _steps(opt_state) % refresh_every == 0
        with_factors = af.value_and_grad(task.loss, task.layout, has_aux=True, when=due)
        value, grads, factors = with_factors(params, model_state, batch, key)
        return value, grads, {"factors": factors}

    return find


def _steps(opt_state: Any) -> Any:
    return optax.tree.get(opt_state, af.ScaleByAdaFisherState.__name__).count
