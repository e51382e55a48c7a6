"""The aliases among optax's transformations: decay, masks and schedules, and stored types."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import adafisher_jax as af
from tests.support.every_rule import every_rule
from tests.support.hand_made import layout_of, make_layer, random_factors, random_tree
from tests.support.trees import close

A = make_layer("a", "dense", (3, 4), "in0 out0", "out0")
B = make_layer("b", "dense", (4, 2), "in0 out0")
LAYOUT = layout_of(A, B)
both = pytest.mark.parametrize("make", [af.adafisher, af.adafisherw])


@functools.cache
def data(seed):
    rng = np.random.default_rng(seed)
    return random_tree(rng, A, B), random_factors(rng, A, B)


PARAMS, _ = data(99)


def run(tx, steps=2, params=PARAMS, change=lambda tree: tree, **extra):
    """The updates of a few steps, with the state they led to."""
    update = jax.jit(lambda g, s, p, f: tx.update(g, s, p, **{"factors": f} | extra))
    state, found = tx.init(params), []
    for seed in range(steps):
        grads, factors = data(seed)
        updates, state = update(change(grads), state, params, factors)
        found.append(updates)
    return found, state


def inside(state):
    """AdaFisher's own state, however wrapped."""
    return optax.tree.get(state, "ScaleByAdaFisherState")


@functools.cache
def updates_of(make, rule="paper", **options):
    """The updates of an alias at a learning rate of 0.1; made once."""
    return run(make(0.1, LAYOUT, rule=rule, **options))[0]


# Aliases.


@every_rule
@both
def test_the_aliases_are_the_building_block_and_the_learning_rate(make, rule):
    options = {"rule": rule, "b1": 0.8, "curvature_ema": 0.7, "damping": 0.02}
    plain, _ = run(af.scale_by_adafisher(LAYOUT, **options))
    found, _ = run(make(0.1, LAYOUT, weight_decay=0.0, **options))
    close(found, jax.tree.map(lambda d: -0.1 * d, plain))


def test_coupled_decay_joins_the_gradient():
    def decayed(grads):
        return jax.tree.map(lambda g, p: g + 0.3 * p, grads, PARAMS)

    expected, _ = run(af.adafisher(0.1, LAYOUT, rule="paper"), change=decayed)
    found = updates_of(af.adafisher, weight_decay=0.3)
    close(found, expected)


def test_decoupled_decay_joins_the_direction():
    plain = updates_of(af.adafisher)
    expected = [jax.tree.map(lambda u, p: u - 0.1 * 0.3 * p, u, PARAMS) for u in plain]
    found = updates_of(af.adafisherw, weight_decay=0.3)
    close(found, expected)
    default = updates_of(af.adafisherw)
    close(default, updates_of(af.adafisherw, weight_decay=1e-2), rtol=0)
    assert not np.allclose(default[0]["a"]["weight"], plain[0]["a"]["weight"], rtol=1e-6)


MASKS = {
    "tree": {"a": {"weight": True, "bias": False}, "b": {"weight": False}},
    "prefix": {"a": True, "b": False},
    "function": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
}


@pytest.mark.parametrize("mask", MASKS)
@both
def test_a_mask_says_what_decays(make, mask):
    plain = updates_of(make, weight_decay=0.0)
    masked, _ = run(make(0.1, LAYOUT, rule="paper", weight_decay=0.3, mask=MASKS[mask]))
    everywhere = updates_of(make, weight_decay=0.3)
    decays = MASKS[mask](PARAMS) if callable(MASKS[mask]) else MASKS[mask]
    decays = {"a/weight": True, "a/bias": False, "b/weight": False} | {
        "tree": {},
        "prefix": {"a/bias": True},
        "function": {"b/weight": True},
    }[mask]
    for path, expected in decays.items():
        layer, name = path.split("/")
        wanted = everywhere if expected else plain
        close(masked[0][layer][name], wanted[0][layer][name])
        assert not np.allclose(plain[0][layer][name], everywhere[0][layer][name], rtol=1e-4)


@both
def test_without_decay_no_parameters_are_needed(make):
    tx = make(0.1, LAYOUT, rule="paper", weight_decay=0.0)
    grads, factors = data(0)
    updates, _ = tx.update(grads, tx.init(PARAMS), factors=factors)
    close(updates, updates_of(make, weight_decay=0.0)[0])
    decayed = make(0.1, LAYOUT, rule="paper", weight_decay=0.1)
    with pytest.raises(ValueError, match="params"):
        decayed.update(grads, decayed.init(PARAMS), factors=factors)


@both
def test_the_learning_rate_may_be_a_schedule(make):
    schedule = optax.piecewise_constant_schedule(0.1, {1: 0.5})
    found, _ = run(make(schedule, LAYOUT, rule="paper"))
    for rate, updates, one in zip((1.0, 0.5), found, updates_of(make), strict=True):
        close(updates, jax.tree.map(lambda u, rate=rate: rate * u, one))


# Numbers.


@every_rule
def test_the_momentum_may_be_stored_in_bfloat16(rule):
    found, state = run(af.adafisher(0.1, LAYOUT, rule=rule, mu_dtype=jnp.bfloat16))
    expected, wide = run(af.adafisher(0.1, LAYOUT, rule=rule))
    assert {leaf.dtype for leaf in jax.tree.leaves(inside(state).mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    close(inside(state).factors, inside(wide).factors, rtol=0)
    for updates, exact in zip(found, expected, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (updates, exact)), strict=True):
            np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())
    assert not np.array_equal(found[1]["a"]["weight"], expected[1]["a"]["weight"])


@every_rule
def test_bfloat16_parameters_keep_float32_averages(rule):
    half = functools.partial(jax.tree.map, lambda a: a.astype(jnp.bfloat16))
    found, state = run(af.adafisher(0.1, LAYOUT, rule=rule), params=half(PARAMS), change=half)
    expected = updates_of(af.adafisher, rule=rule)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    averages = inside(state)
    scales = [scale._replace(basis=None) for scale in averages.scales.values()]
    kept = jax.tree.leaves((averages.factors, averages.slots, scales))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype(jnp.float32)}
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(np.float32(a), b, atol=0.05 * np.abs(b).max())


@pytest.mark.parametrize("rate", [0.1, np.float32(0.1), jnp.float32(0.1), lambda count: 0.1])
@both
def test_updates_have_the_gradients_types(make, rate):
    """Also where the decay and the rate are in another, and the parameters."""
    half = functools.partial(jax.tree.map, lambda a: a.astype(jnp.bfloat16))
    tx = make(rate, LAYOUT, rule="centered", weight_decay=0.1)
    found, _ = run(tx, steps=1, change=half)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    exact, _ = run(tx, steps=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(exact)} == {jnp.dtype(jnp.float32)}
    for a, b in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        np.testing.assert_allclose(np.float32(a), b, atol=0.05 * np.abs(b).max())


@flax.struct.dataclass
class Bag:
    a: dict
    b: dict


@pytest.mark.parametrize("box", [FrozenDict, lambda tree: Bag(**tree)], ids=["FrozenDict", "Bag"])
def test_parameters_keep_their_container(box):
    found, state = run(af.adafisherw(0.1, LAYOUT, rule="paper"), params=box(PARAMS), change=box)
    expected = updates_of(af.adafisherw)
    assert jax.tree.structure(found[0]) == jax.tree.structure(box(PARAMS))
    close(jax.tree.leaves(found), jax.tree.leaves(expected))
    assert sorted(inside(state).factors) == ["a", "b"]
