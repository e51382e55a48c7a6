"""Small models, the steps that train them, and what a run on one device gives."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import adafisher_jax as af
from tests.support.reference import random_params

BATCH, STEPS = 16, 3
RATES = {"paper": 1e-5, "official": 1e-5, "centered": 1e-2}  # the first two divide by 1e-3


class Block(nn.Module):
    """No bias before attention's softmax, where its gradient is zero but for rounding."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False, name="attention")(y)
        y = nn.relu(nn.Dense(32, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(16, name="down")(y)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(24, name="head")(Block(name="block")(nn.Embed(24, 16)(tokens)))


class ConvNet(nn.Module):
    """`axis_name` has a `shard_map` normalize over the whole batch."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(images)
        norm = nn.BatchNorm(use_running_average=False, axis_name=self.axis_name, name="norm")
        return nn.Dense(8, name="head")(nn.relu(norm(x)).mean((1, 2)))


class Perceptron(nn.Module):
    """On explicit mesh axes a contraction over a sharded axis wants to know its result's."""

    out: Any = None

    @nn.compact
    def __call__(self, x):
        down = functools.partial(jax.lax.dot_general, out_sharding=self.out)
        x = nn.relu(nn.Dense(16, name="up")(x))
        return nn.Dense(8, dot_general=down if self.out else None, name="down")(x)


class Task(NamedTuple):
    loss_fn: Callable[..., Any]
    params: Any
    batches: list[np.ndarray]

    @property
    def layout(self):
        return af.trace_layout(self.loss_fn, self.params, self.batches[0])


def make_loss(model):
    def loss_fn(params, x):
        y, _ = model.apply({"params": params}, x, mutable=["batch_stats"])
        return jnp.mean(jnp.square(y - 1))

    return loss_fn


@functools.cache
def make_task(name, dtype="float64", model=None):
    rng = np.random.default_rng(0)
    if name == "transformer":
        default, batches = Transformer(), rng.integers(0, 24, (STEPS, BATCH, 6))
    else:
        shape = {"convnet": (6, 6, 2), "perceptron": (8,)}[name]
        default = {"convnet": ConvNet(), "perceptron": Perceptron()}[name]
        batches = 1 + rng.normal(size=(STEPS, BATCH, *shape)).astype(dtype)
    params = jax.tree.map(
        lambda leaf: np.asarray(0.3 * leaf, dtype), random_params(default, batches[0])
    )
    return Task(make_loss(model or default), params, list(batches))


def make_step(task, rule, **options):
    """A transformation, and its jitted train step; without `refresh` it reuses the factors."""
    tx = af.adafisherw(RATES[rule], task.layout, rule=rule)
    with_factors = af.value_and_grad(task.loss_fn, task.layout)
    plain = jax.value_and_grad(task.loss_fn)

    def train_step(params, state, x, refresh=True):
        loss, grads, *rest = (with_factors if refresh else plain)(params, x)
        updates, state = tx.update(grads, state, params, factors=rest[0] if rest else None)
        return optax.apply_updates(params, updates), state, loss

    return tx, jax.jit(train_step, static_argnames="refresh", **options)


class Run(NamedTuple):
    params: Any
    state: Any
    losses: list[Any]


@functools.cache
def on_one_device(name, dtype, rule, every=1):
    """The run that the others must equal."""
    task = make_task(name, dtype)
    tx, train_step = make_step(task, rule)
    params, state, losses = task.params, tx.init(task.params), []
    for step, x in enumerate(task.batches):
        params, state, loss = train_step(params, state, x, refresh=step % every == 0)
        losses.append(loss)
    return Run(*jax.tree.map(np.asarray, (params, state, losses)))


def assert_close(found, expected, rtol):
    """To a share of each array's largest entry, and to the rounding of its type."""

    def compare(path, want, got):
        floating = jnp.issubdtype(want.dtype, jnp.floating)
        share = max(rtol, float(jnp.finfo(want.dtype).eps)) if floating else rtol
        atol = share * max(np.max(np.abs(want)), 1e-3)
        np.testing.assert_allclose(got, want, share, atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, expected, found)
