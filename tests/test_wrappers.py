"""AdaFisher among optax's own wrappers: chains, masks, partitions, schedules and decay."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import adafisher_jax as af
from tests.hand_made import layout_of, make_layer, quick_jit, random_factors, random_tree

RULES = ("paper", "official", "centered")
A = make_layer("a", "dense", (3, 4), "in0 out0", "out0")
B = make_layer("b", "dense", (4, 2), "in0 out0")
LAYOUT = layout_of(A, B)
any_rule = pytest.mark.parametrize("rule", RULES)
both = pytest.mark.parametrize("make", [af.adafisher, af.adafisherw])


@functools.cache
def data(seed):
    rng = np.random.default_rng(seed)
    return random_tree(rng, A, B), random_factors(rng, A, B)


PARAMS, _ = data(99)


def run(tx, steps=2, params=PARAMS, change=lambda tree: tree):
    """The updates of a few steps, with the state they led to."""
    update = quick_jit(lambda g, s, p, f: tx.update(g, s, p, factors=f))
    state, found = tx.init(params), []
    for seed in range(steps):
        grads, factors = data(seed)
        updates, state = update(change(grads), state, params, factors)
        found.append(updates)
    return found, state


@functools.cache
def updates_of(make, **options):
    """The updates of an alias at a learning rate of 0.1; made once."""
    return run(make(0.1, LAYOUT, **options))[0]


def close(a, b, rtol=1e-5, **options):
    compare = functools.partial(np.testing.assert_allclose, rtol=rtol, **options)
    jax.tree.map(lambda a, b: compare(np.float64(a), np.float64(b)), a, b)


# Aliases.


@any_rule
@both
def test_the_aliases_are_the_building_block_and_the_learning_rate(make, rule):
    options = {"rule": rule, "b1": 0.8, "curvature_ema": 0.7, "damping": 0.02}
    plain, _ = run(af.scale_by_adafisher(LAYOUT, **options))
    found, _ = run(make(0.1, LAYOUT, weight_decay=0.0, **options))
    close(found, jax.tree.map(lambda d: -0.1 * d, plain))


def test_coupled_decay_joins_the_gradient():
    def decayed(grads):
        return jax.tree.map(lambda g, p: g + 0.3 * p, grads, PARAMS)

    expected, _ = run(af.adafisher(0.1, LAYOUT), change=decayed)
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
    masked, _ = run(make(0.1, LAYOUT, weight_decay=0.3, mask=MASKS[mask]))
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
    tx = make(0.1, LAYOUT, weight_decay=0.0)
    grads, factors = data(0)
    updates, _ = tx.update(grads, tx.init(PARAMS), factors=factors)
    close(updates, updates_of(make, weight_decay=0.0)[0])
    with pytest.raises(ValueError, match="params"):
        make(0.1, LAYOUT, weight_decay=0.1).update(
            grads, make(0.1, LAYOUT, weight_decay=0.1).init(PARAMS), factors=factors
        )


@both
def test_the_learning_rate_may_be_a_schedule(make):
    schedule = optax.piecewise_constant_schedule(0.1, {1: 0.5})
    found, _ = run(make(schedule, LAYOUT))
    for rate, updates, one in zip((1.0, 0.5), found, updates_of(make), strict=True):
        close(updates, jax.tree.map(lambda u, rate=rate: rate * u, one))


# Numbers.


@any_rule
def test_the_momentum_may_be_stored_in_bfloat16(rule):
    found, state = run(af.adafisher(0.1, LAYOUT, rule=rule, mu_dtype=jnp.bfloat16))
    expected, wide = run(af.adafisher(0.1, LAYOUT, rule=rule))
    assert {leaf.dtype for leaf in jax.tree.leaves(scale_state(state).mu)} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    close(scale_state(state).factors, scale_state(wide).factors, rtol=0)
    for updates, exact in zip(found, expected, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (updates, exact)), strict=True):
            np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())
    assert not np.array_equal(found[1]["a"]["weight"], expected[1]["a"]["weight"])


def scale_state(state):
    return next(s for s in state if isinstance(s, af.ScaleByAdaFisherState))


@any_rule
def test_bfloat16_parameters_keep_float32_averages(rule):
    half = functools.partial(jax.tree.map, lambda a: a.astype(jnp.bfloat16))
    found, state = run(af.adafisher(0.1, LAYOUT, rule=rule), params=half(PARAMS), change=half)
    expected = updates_of(af.adafisher, rule=rule)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    kept = jax.tree.leaves(scale_state(state)._replace(mu=(), count=()))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype(jnp.float32)}
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(np.float32(a), b, atol=0.05 * np.abs(b).max())


@flax.struct.dataclass
class Bag:
    a: dict
    b: dict


@pytest.mark.parametrize("box", [FrozenDict, lambda tree: Bag(**tree)], ids=["FrozenDict", "Bag"])
def test_parameters_keep_their_container(box):
    found, state = run(af.adafisherw(0.1, LAYOUT), params=box(PARAMS), change=box)
    expected = updates_of(af.adafisherw)
    assert jax.tree.structure(found[0]) == jax.tree.structure(box(PARAMS))
    close(jax.tree.leaves(found), jax.tree.leaves(expected))
    assert sorted(scale_state(state).factors) == ["a", "b"]


# Wrappers.


def test_a_chain_hands_the_factors_on():
    expected = updates_of(af.adafisher)
    chained = optax.chain(
        optax.scale(2.0), af.scale_by_adafisher(LAYOUT), optax.scale_by_learning_rate(0.05)
    )
    close(run(chained)[0], expected)


def test_a_wrapper_that_drops_extra_arguments_still_works():
    tx = af.adafisher(0.1, LAYOUT)
    dropped = optax.GradientTransformation(tx.init, lambda g, s, p=None: tx.update(g, s, p))
    wrapped = optax.chain(optax.clip_by_global_norm(1e9), dropped)
    found, _ = run(optax.with_extra_args_support(wrapped))
    expected, _ = run(af.adafisher(0.1))  # no refresh ever: the fallback
    close(found, expected)


@any_rule
def test_a_masked_transform_keeps_only_its_own_layers(rule):
    mask = {"a": {"weight": True, "bias": False}, "b": False}
    masked = optax.masked(af.scale_by_adafisher(LAYOUT, rule=rule), mask)
    found, state = run(masked)
    assert sorted(state.inner_state.factors) == ["a"]
    for seed, updates in enumerate(found):
        close(
            (updates["a"]["bias"], updates["b"]), (data(seed)[0]["a"]["bias"], data(seed)[0]["b"])
        )
    if rule != "centered":  # which centers a weight with its bias
        expected, _ = run(af.scale_by_adafisher(LAYOUT, rule=rule))
        for updates, full in zip(found, expected, strict=True):
            close(updates["a"]["weight"], full["a"]["weight"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((found, state)))


@pytest.mark.parametrize("rule", ["paper", "centered"])
def test_hyperparameters_may_be_injected(rule):
    values = {"learning_rate": 0.1, "b1": 0.8, "curvature_ema": 0.7, "damping": 0.02}
    make = optax.inject_hyperparams(af.adafisherw)
    scheduled = {**values, "damping": lambda count: 0.02 + count}
    found, state = run(make(layout=LAYOUT, rule=rule, weight_decay=0.1, **scheduled))
    np.testing.assert_allclose(state.hyperparams["damping"], 1.02)
    assert values.keys() <= state.hyperparams.keys()
    for step, damping in enumerate((0.02, 1.02)):
        values["damping"] = damping
        expected, _ = run(af.adafisherw(layout=LAYOUT, rule=rule, weight_decay=0.1, **values))
        close(found[step], expected[step], rtol=1e-4)


@pytest.mark.parametrize("layouts", [(LAYOUT, LAYOUT), (layout_of(A), layout_of(B))])
def test_a_partition_over_two_models_is_each_by_itself(layouts):
    """With one layout of both, or with one for each."""
    parts = {
        "a": af.adafisher(0.1, layouts[0], rule="centered"),
        "b": af.adafisher(0.2, layouts[1], rule="paper"),
    }
    found, state = run(optax.partition(parts, {"a": "a", "b": "b"}))
    for name, layer in (("a", A), ("b", B)):
        alone = af.adafisher(
            {"a": 0.1, "b": 0.2}[name], layout_of(layer), rule={"a": "centered", "b": "paper"}[name]
        )
        expected, _ = run(alone, params={name: PARAMS[name]}, change=lambda g, n=name: {n: g[n]})
        close([updates[name] for updates in found], [updates[name] for updates in expected])
        assert list(scale_state(state.inner_states[name].inner_state).factors) == [name]


def test_a_part_may_stand_still():
    parts = {"train": af.adafisher(0.1, LAYOUT), "freeze": optax.set_to_zero()}
    found, _ = run(optax.partition(parts, {"a": "train", "b": "freeze"}))
    expected = updates_of(af.adafisher)
    close([u["a"] for u in found], [u["a"] for u in expected])
    assert not np.any(found[-1]["b"]["weight"])


def test_gradients_may_be_gathered_over_several_steps():
    """`MultiSteps` hands on the factors of the step that updates."""
    tx = optax.MultiSteps(af.adafisher(0.1, LAYOUT), every_k_schedule=2)
    found, _ = run(optax.GradientTransformationExtraArgs(tx.init, tx.update))
    mean = jax.tree.map(lambda *g: sum(g) / 2, data(0)[0], data(1)[0])
    plain = af.adafisher(0.1, LAYOUT)
    expected, _ = plain.update(mean, plain.init(PARAMS), PARAMS, factors=data(1)[1])
    close(found, [jax.tree.map(jnp.zeros_like, PARAMS), expected])
