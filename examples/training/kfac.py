"""kfac-jax's optimizer, which compiles its own step and needs to know the loss function."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from examples.training import compatibility, losses
from examples.training.steps import Optimizer
from examples.training.task import Task


def kfac(
    task: Task,
    rate: Callable[[Any], Any],
    weight_decay: float,
    momentum: float = 0.9,
    damping: float = 1e-3,
    **options: Any,
) -> Optimizer:
    """K-FAC with kfac-jax's defaults: curvature at each step, inverses at every fifth.

    Weight decay is coupled: it is a part of the loss and of the curvature.
    """
    kfac_jax = compatibility.kfac()
    unit_normal = functools.partial(kfac_jax.register_normal_predictive_distribution, variance=1.0)
    reports = {
        losses.cross_entropy: kfac_jax.register_softmax_cross_entropy_loss,
        losses.squared_error: unit_normal,
    }

    def loss(params, model_state, key, batch):
        with losses.reported_to(reports):
            return task.loss(params, model_state, batch, key)

    def value_and_grad(params, *args):
        value, grads = jax.value_and_grad(loss, has_aux=True)(params, *args)
        return value, jax.tree.map(lambda g, p: g + weight_decay * p, grads, params)

    optimizer = kfac_jax.Optimizer(
        value_and_grad,
        l2_reg=weight_decay,
        value_func_has_aux=True,
        value_func_has_state=True,
        value_func_has_rng=True,
        learning_rate_schedule=rate,
        momentum_schedule=lambda _: jnp.asarray(momentum),
        damping_schedule=lambda _: jnp.asarray(damping),
        num_burnin_steps=0,
        **options,
    )

    def init(params, model_state, batch, key):
        return optimizer.init(params, key, batch, model_state)

    def step(params, model_state, opt_state, batch, key):
        params, opt_state, model_state, stats = optimizer.step(
            params, opt_state, key, batch=batch, func_state=model_state
        )
        return params, model_state, opt_state, stats["loss"], stats["aux"]

    return Optimizer(init, step)
