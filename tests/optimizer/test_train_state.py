"""Flax's train state with factors: the same steps as optax by hand, nothing else changed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import adafisher_jax as af
from tests.support.hand_made import layout_of, make_layer, random_factors, random_tree
from tests.support.trees import equal

A = make_layer("a", "dense", (3, 4), "in0 out0", "out0")
B = make_layer("b", "dense", (4, 2), "in0 out0")
LAYOUT = layout_of(A, B)
any_rule = pytest.mark.parametrize("rule", ["paper", "official", "centered"])


@functools.cache
def data(seed):
    rng = np.random.default_rng(seed)
    return random_tree(rng, A, B), random_factors(rng, A, B)


PARAMS, _ = data(99)
STEPS = [data(0), (data(1)[0], None), data(2)]


def create(rule="paper", kind=af.TrainState, **fields):
    tx = af.adafisherw(optax.linear_schedule(0.1, 0.0, 9), LAYOUT, rule=rule)
    return kind.create(apply_fn=jnp.tanh, params=PARAMS, tx=tx, **fields)


@any_rule
def test_steps_are_those_of_optax(rule):
    state = create(rule)
    tx = state.tx
    params, opt_state = PARAMS, tx.init(PARAMS)
    for grads, factors in STEPS:
        state = state.apply_gradients(grads=grads, factors=factors)
        updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
        params = optax.apply_updates(params, updates)
    equal((state.params, state.opt_state), (params, opt_state))
    assert (state.step, state.tx, state.apply_fn) == (3, tx, jnp.tanh)
    assert not np.allclose(state.params["a"]["bias"], PARAMS["a"]["bias"])


@pytest.mark.parametrize("kind", [af.TrainState, train_state.TrainState])
def test_factors_left_out_are_an_error_of_any_train_state(kind):
    with pytest.raises(TypeError, match="got no keyword factors"):
        create(kind=kind).apply_gradients(grads=data(0)[0])


def test_factors_may_be_left_out_where_there_are_no_layers():
    tx, grads = af.adafisher(0.1, None, rule="centered"), data(0)[0]
    ours, flaxs = (
        kind.create(apply_fn=None, params=PARAMS, tx=tx).apply_gradients(grads=grads)
        for kind in (af.TrainState, train_state.TrainState)
    )
    equal((ours.params, ours.opt_state), (flaxs.params, flaxs.opt_state))


def test_it_is_carried_by_a_scan():
    """So a compiled step is compiled once: what comes out is typed as what went in."""
    state = create().replace(step=jnp.zeros([], jnp.int32))
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), data(0), data(1))

    def step(state, inputs):
        return state.apply_gradients(grads=inputs[0], factors=inputs[1]), None

    scanned, _ = jax.jit(lambda s: jax.lax.scan(step, s, stacked))(state)
    looped = state
    for seed in range(2):
        looped, _ = jax.jit(step)(looped, data(seed))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), scanned, looped)


class WithStatistics(af.TrainState):
    batch_stats: Any = None


def test_further_fields_are_replaced():
    state = create(kind=WithStatistics, batch_stats=1)
    state = state.apply_gradients(grads=data(0)[0], factors=data(0)[1], batch_stats=2)
    assert isinstance(state, WithStatistics)
    assert (state.batch_stats, int(state.opt_state[0].count)) == (2, 1)
    assert np.all(state.opt_state[0].slots["a"] > 0)


def test_other_optimizers_do_without_factors():
    state = af.TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.5))
    grads, factors = data(0)
    state = state.apply_gradients(grads=grads, factors=factors)
    equal(state.params, jax.tree.map(lambda p, g: p - 0.5 * g, PARAMS, grads))


def test_another_models_factors_are_an_error():
    grads, factors = data(0)
    with pytest.raises(ValueError, match=r"factors\['a'\]\.h"):
        create().apply_gradients(grads=grads, factors={**factors, "a": factors["b"]})
