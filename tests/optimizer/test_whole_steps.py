"""A few train steps by every rule: a scan, a map and NNX change none of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adafisher_jax as af
from tests.support import nnx_reference
from tests.support.every_rule import every_rule
from tests.support.reference import Block, in_turn, loss_of, random_params, slices
from tests.support.trees import close

pytestmark = pytest.mark.usefixtures("x64")

RATES = {"paper": 1e-4, "official": 1e-5, "centered": 1e-2}
X = np.random.default_rng(0).normal(size=(4, 3))
STACKED = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        step = nn.scan(lambda block, x, _: (block(x), None), length=2, **STACKED)
        return step(Block(name="blocks"), x, None)[0]


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        each = nn.vmap(Block, in_axes=None, axis_size=2, **STACKED)
        return each(name="blocks")(x)


class Apart(nn.Module):
    """Two blocks, and how they are run."""

    run: callable

    @nn.compact
    def __call__(self, x):
        return self.run([Block(name=f"{i}") for i in range(2)], x)


def each(blocks, x):
    return jnp.stack([block(x) for block in blocks])


def trained(loss_fn, params, rule):
    """Parameters after three steps."""
    layout = af.trace_layout(loss_fn, params, X)
    tx = af.adafisherw(RATES[rule], layout, rule=rule)

    @jax.jit
    def step(params, state):
        _, grads, factors = af.value_and_grad(loss_fn, layout)(params, X)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    return params


@every_rule
@pytest.mark.parametrize(("stacked", "run"), [(Scanned, in_turn), (Mapped, each)])
def test_stacked_blocks_are_trained_as_blocks_apart(stacked, run, rule):
    params = random_params(stacked(), X)
    apart = {f"{i}": tree for i, tree in enumerate(slices(params["blocks"]))}
    found = trained(loss_of(stacked()), params, rule)
    expected = trained(loss_of(Apart(run)), apart, rule)
    for i, tree in enumerate(slices(found["blocks"])):
        close(tree, expected[f"{i}"], rtol=1e-9)


@every_rule
def test_a_model_of_nnx_is_trained_as_one_of_linen(rule):
    model = nnx_reference.random_model(nnx_reference.Block)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    expected = trained(loss_of(Block()), params, rule)
    loss_fn = nnx_reference.loss_of
    layout = af.nnx.trace_layout(loss_fn, model, X)
    tx = af.adafisherw(RATES[rule], layout, rule=rule)
    graphdef, ours = nnx.split((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))

    @jax.jit
    def step(state):
        model, optimizer = nnx.merge(graphdef, state)
        _, grads, factors = af.nnx.value_and_grad(loss_fn, layout)(model, X)
        optimizer.update(model, grads, factors=factors)
        return nnx.state((model, optimizer))

    for _ in range(3):
        ours = step(ours)
    found = nnx.to_pure_dict(nnx.state(nnx.merge(graphdef, ours)[0], nnx.Param))
    close(found, expected, rtol=1e-9)
