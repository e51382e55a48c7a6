"""The steps that are timed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adafisher_jax as af
from benchmarks import optimizers
from benchmarks.measure import Contender
from benchmarks.tasks import Task


def gradient(task: Task, with_factors: bool) -> Callable[..., Any]:
    """Of parameters and a batch: the loss, its gradient and the factors, or None."""
    if with_factors:
        return af.value_and_grad(task.loss, task.layout)
    plain = jax.value_and_grad(task.loss)
    return lambda params, *batch: (*plain(params, *batch), None)


def train_step(task: Task, optimizer: str, with_factors: bool | None = None) -> Any:
    """A whole step, and the function that makes its state: parameters, optimizer's state, loss.

    By default the factors are there where the optimizer takes any.
    """
    if with_factors is None:
        with_factors = optimizer in optimizers.RULES
    tx = optimizers.make(optimizer, task.layout)
    find = gradient(task, with_factors)

    def step(state, *batch):
        params, opt_state, _ = state
        loss, grads, factors = find(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
        return optax.apply_updates(params, updates), opt_state, loss

    def start(params):
        return own(params), own(jax.jit(tx.init)(params)), jnp.zeros([])

    return step, start


def update_step(tx: Any) -> Callable[..., Any]:
    """An optimizer's part of a step, of its state and the parameters', gradients and factors."""

    def step(state, grads, factors):
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
        return optax.apply_updates(params, updates), opt_state

    return step


@jax.jit
def own(tree: Any) -> Any:
    """The tree with no array in two places, nor shared with another: it will be donated."""
    return jax.tree.map(jnp.copy, tree)


def kfac(task: Task, params: Any, batch: Any) -> Contender:
    """kfac-jax's step with its defaults: inverses every fifth step, curvature in each."""
    from examples.training import compatibility

    kfac_jax = compatibility.kfac()

    def loss(params, batch):
        logits = task.logits(params, batch[0]).reshape(-1, task.classes)
        labels = batch[1].reshape(-1)
        kfac_jax.register_softmax_cross_entropy_loss(logits, labels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=optimizers.DECAY,
        learning_rate_schedule=lambda _: optimizers.RATE,
        momentum_schedule=lambda _: 0.9,
        damping_schedule=lambda _: 1e-3,
        num_burnin_steps=0,
    )
    key = jax.random.key(0)

    def step(state):
        params, opt_state = state
        return optimizer.step(params, opt_state, key, batch=batch)[:2]

    params = own(params)
    return Contender(step, (params, optimizer.init(params, key, batch)), cycle=5)
