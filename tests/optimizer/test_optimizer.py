"""The optax transformations: their state, their manners, and what disturbs them not."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adafisher_jax as af
from adafisher_jax import optimizer
from tests.support.every_rule import every_rule
from tests.support.hand_made import curvatures, layout_of, make_layer, random_factors, random_tree
from tests.support.trees import close, equal

DENSE = make_layer("dense", "dense", (3, 4), "in0 out0", "out0")
STACK = make_layer("stack", "dense", (2, 3, 4), "stack0 in0 out0", "stack0 out0")
NORM = make_layer("norm", "norm", (4,), "out0", "out0")
LAYERS = (DENSE, STACK, NORM)
LAYOUT = layout_of(*LAYERS, free=(6,))


class Setup(NamedTuple):
    """One rule on the layers above and a parameter outside them, with compiled functions."""

    tx: optax.GradientTransformationExtraArgs
    update: object
    state: af.ScaleByAdaFisherState


def gradients(seed=0):
    rng = np.random.default_rng(seed)
    return random_tree(rng, *LAYERS) | {"free": jnp.asarray(rng.normal(size=6))}


def statistics(seed=0):
    return random_factors(np.random.default_rng(seed), *LAYERS)


def build(rule="paper", **options):
    tx = af.scale_by_adafisher(LAYOUT, rule=rule, **options)
    return Setup(tx, jax.jit(tx.update), jax.jit(tx.init)(gradients()))


setup = functools.cache(build)


def averages(state):
    """Factors and slots, by layer path."""
    found = curvatures(state, layout_of(*LAYERS))
    return tuple({path: one[i] for path, one in found.items()} for i in range(2))


class Small(nn.Module):
    """A scanned layer, a normalization and a head."""

    @nn.compact
    def __call__(self, x):
        block = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = block(name="blocks")(x, None)
        return nn.Dense(2)(nn.LayerNorm()(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(x.shape[-1])(x)), None


X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)))
MODEL = Small()
PARAMS = MODEL.init(jax.random.key(0), X)["params"]


def loss_fn(params, x):
    return jnp.mean(jnp.square(MODEL.apply({"params": params}, x) - 1))


def train_step(tx, layout):
    grad_fn = af.value_and_grad(loss_fn, layout)

    def step(params, state, x):
        loss, grads, factors = grad_fn(params, x)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, loss

    return step


# The state.


@every_rule
def test_the_factors_in_the_state_are_typed_as_those_captured(rule):
    layout = af.trace_layout(loss_fn, PARAMS, X)
    state = jax.eval_shape(af.scale_by_adafisher(layout, rule=rule).init, PARAMS)
    assert state._fields[:3] == ("count", "mu", "factors")
    _, _, factors = jax.eval_shape(af.value_and_grad(loss_fn, layout), PARAMS, X)
    assert sorted(factors) == ["Dense_0", "LayerNorm_0", "blocks/Dense_0"]
    assert all(isinstance(factor, af.Factor) for factor in state.factors.values())
    stored = jax.eval_shape(lambda state: af.diagnostics.averages(state, layout), state)
    types = [jax.tree.map(lambda a: (a.shape, a.dtype), f) for f in (stored, factors)]
    assert types[0] == types[1]


@every_rule
def test_nothing_but_the_momentum_has_a_parameters_size(rule):
    big = [
        make_layer("dense", "dense", (300, 200), "in0 out0", "out0"),
        make_layer("stack", "dense", (3, 300, 200), "stack0 in0 out0", "stack0 out0"),
        make_layer("embed", "embedding", (300, 200), "in0 out0"),
    ]
    params = {
        layer.path: {
            leaf.path.split("/")[1]: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
            for leaf in layer.leaves
        }
        for layer in big
    } | {"free": jax.ShapeDtypeStruct((50, 50), jnp.float32)}
    state = jax.eval_shape(
        af.scale_by_adafisher(layout_of(*big, free=(50, 50)), rule=rule).init, params
    )
    assert jax.tree.map(jnp.shape, state.mu) == jax.tree.map(jnp.shape, params)
    rest = jax.tree.leaves(state._replace(mu=()))
    directions = 32 if rule == "centered" else 0  # along the shorter side
    vectors = 5 * (2 * 300 + 200 + directions * 200)  # h, mean and s of five blocks
    assert sum(leaf.size for leaf in rest) <= vectors + 40
    assert max(leaf.size for leaf in rest) == 3 * max(300, directions * 200)


@every_rule
def test_the_states_types_never_change(rule):
    tx, update, state = setup(rule)
    typed = lambda tree: jax.tree.map(lambda a: str(jax.typeof(a)), tree)  # noqa: E731
    eager = tx.init(gradients())
    assert typed(eager) == typed(state)
    shapes = jax.eval_shape(tx.init, gradients())
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype, a.weak_type), eager
    )
    compiled = update._cache_size()
    for seed in range(3):
        _, state = update(gradients(seed), state, factors=statistics(seed))
        assert typed(state) == typed(eager)
    assert update._cache_size() <= compiled + 1
    assert state.count == 3


@every_rule
@pytest.mark.parametrize("ema", [np.float64(0.9), jnp.float32(0.9)])
def test_the_states_types_are_not_those_of_the_settings(rule, ema, x64):
    grads, factors = jax.tree.map(jnp.float32, (gradients(), statistics()))
    tx = af.scale_by_adafisher(LAYOUT, rule=rule, curvature_ema=ema, b1=ema)
    state = tx.init(grads)
    _, after = jax.jit(tx.update)(grads, state, factors=factors)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


@every_rule
def test_the_state_can_be_donated(rule):
    tx, update, state = setup(rule)
    donated = jax.jit(tx.update, donate_argnums=(0, 1))
    own = tx.init(gradients())
    for seed in range(2):
        expected, state = update(gradients(seed), state, factors=statistics(seed))
        updates, own = donated(gradients(seed), own, factors=statistics(seed))
        close(updates, expected, rtol=2e-4, atol=1e-6)


@every_rule
def test_a_scan_over_train_steps_is_a_loop_over_them(rule):
    layout = af.trace_layout(loss_fn, PARAMS, X)
    tx = af.adafisherw(1e-3, layout, rule=rule)
    step = train_step(tx, layout)
    batches = X[None] + jnp.arange(3.0)[:, None, None]

    def body(carry, x):
        params, state, loss = step(*carry, x)
        return (params, state), loss

    scanned, losses = jax.jit(lambda c: jax.lax.scan(body, c, batches))((PARAMS, tx.init(PARAMS)))
    params, state, compiled = PARAMS, tx.init(PARAMS), jax.jit(step)
    for x, loss in zip(batches, losses, strict=True):
        params, state, found = compiled(params, state, x)
        np.testing.assert_allclose(found, loss, rtol=1e-4)
    assert compiled._cache_size() == 1
    close(scanned, (params, state), rtol=1e-3, atol=1e-5)


# Factors, or none.


@every_rule
def test_without_factors_the_averages_stay_and_precondition(rule):
    _, update, state = setup(rule)
    direction, refreshed = update(gradients(), state, factors=statistics())
    _, other = update(gradients(), state, factors=statistics(seed=9))
    after, kept = update(gradients(), refreshed, factors=None)
    equal(averages(kept), averages(refreshed))
    assert (int(refreshed.count), int(kept.count)) == (1, 2)
    if rule != "centered":  # whose directions have moved on
        close(after, direction)  # the same gradient again, so the same momentum
    assert not np.allclose(
        after["dense"]["weight"], update(gradients(), other, factors=None)[0]["dense"]["weight"]
    )


@every_rule
def test_before_the_first_refresh_the_update_is_the_fallback(rule):
    _, update, state = setup(rule)
    plain = jax.jit(af.scale_by_adafisher(None, rule=rule).update)
    plain_state = af.scale_by_adafisher(None, rule=rule).init(gradients())
    for seed in range(2):
        updates, state = update(gradients(seed), state, factors=None)
        fallback, plain_state = plain(gradients(seed), plain_state)
        for name in ("dense", "norm", "free"):
            close(updates[name], fallback[name])
    if rule != "centered":
        close(updates["stack"], fallback["stack"])
    updates, state = update(gradients(), state, factors=statistics())
    fallback, _ = plain(gradients(), plain_state)
    close(updates["free"], fallback["free"])
    for name in ("dense", "stack", "norm"):
        for leaf, identity in zip(
            *map(jax.tree.leaves, (updates[name], fallback[name])), strict=True
        ):
            assert not np.any(np.isclose(leaf, identity))


@pytest.mark.parametrize("layout", [None, layout_of(DENSE, free=(2,))])
@every_rule
def test_the_fallback_is_the_momentum_or_its_ratio_to_the_gradients_size(rule, layout):
    tx = af.scale_by_adafisher(layout, rule=rule, b1=0.5)
    grads = {
        "free": jnp.array([3.0, 4.0]),
        "dense": {"weight": jnp.zeros((3, 4)), "bias": jnp.zeros(4)},
    }
    later = {**grads, "free": jnp.array([0.0, 2.0])}
    first, state = tx.update(grads, tx.init(grads), factors=None)
    second, _ = tx.update(later, state, factors=None)
    momentum = np.array([[3.0, 4.0], [0.25 * 3 / 0.75, (0.25 * 4 + 0.5 * 2) / 0.75]])
    if rule == "centered":
        momentum[1] = (0.125 * 3 / 0.875, (0.125 * 4 + 0.75 * 2) / 0.875)  # a step ahead
        mean_squares = [12.5, (0.99 * 0.01 * 12.5 + 0.01 * 2) / (1 - 0.99**2)]
        momentum /= np.sqrt(mean_squares)[:, None]
    np.testing.assert_allclose([first["free"], second["free"]], momentum, rtol=1e-6)
    close(second["dense"], jax.tree.map(jnp.zeros_like, grads["dense"]))


@every_rule
def test_a_parameter_may_be_a_number(rule):
    tx = af.scale_by_adafisher(None, rule=rule)
    updates, _ = tx.update({"a": jnp.ones([])}, tx.init({"a": 1.0}))
    assert updates["a"] > 0


@every_rule
def test_the_parameters_may_be_one_array(rule):
    """The path of a parameter that is no part of anything is empty."""
    bare = af.Layer("", "dense", af.Leaf("", (3, 4), ("in0", "out0")), None)
    inside = make_layer("", "dense", (3, 4), "in0 out0")
    found = []
    for layer, wrap in ((bare, lambda w: w), (inside, lambda w: {"": {"weight": w}})):
        tx = af.scale_by_adafisher(layout_of(layer), rule=rule)
        grads, factor = gradients()["dense"]["weight"], statistics()["dense"]
        updates, state = tx.update(wrap(grads), tx.init(wrap(grads)), factors={"": factor})
        assert list(state.factors) == [""]
        found += jax.tree.leaves(updates)
    close(*found)


def test_other_layers_factors_and_other_extra_arguments_are_ignored():
    _, update, state = setup("paper")
    expected = update(gradients(), state, factors=statistics())
    others = statistics() | {"elsewhere": random_factors(np.random.default_rng(1), NORM)["norm"]}
    tx = setup("paper").tx
    equal(jax.jit(tx.update)(gradients(), state, None, factors=others, value=1.0), expected)


@every_rule
def test_stacked_layers_are_stepped_each_for_itself(rule, x64):
    """A scanned layer gets exactly the updates its layers get unstacked."""
    parts = [make_layer(f"part{i}", "dense", (3, 4), "in0 out0", "out0") for i in range(2)]
    stacked = af.scale_by_adafisher(layout_of(STACK), rule=rule)
    apart = af.scale_by_adafisher(layout_of(*parts), rule=rule)
    grads = gradients()
    slices = [jax.tree.map(lambda a, i=i: a[i], grads["stack"]) for i in range(2)]
    state = stacked.init({"stack": grads["stack"]})
    states = apart.init({f"part{i}": part for i, part in enumerate(slices)})
    update, update_apart = jax.jit(stacked.update), jax.jit(apart.update)
    for seed in range(3):
        grads, factor = gradients(seed)["stack"], statistics(seed)["stack"]
        split = [jax.tree.map(lambda a, i=i: a[i], (grads, factor)) for i in range(2)]
        found, state = update({"stack": grads}, state, factors={"stack": factor})
        expected, states = update_apart(
            {f"part{i}": g for i, (g, _) in enumerate(split)},
            states,
            factors={f"part{i}": f for i, (_, f) in enumerate(split)},
        )
        for i in range(2):
            part = jax.tree.map(lambda a, i=i: a[i], found["stack"])
            close(part, expected[f"part{i}"], rtol=1e-13)


# What is not finite, and what took no part.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_rule
def test_a_gradient_that_is_not_finite_leaves_its_momentum_as_it_was(rule, bad):
    _, update, state = setup(rule)
    _, state = update(gradients(), state, factors=statistics())
    grads = gradients(1)
    grads["dense"]["weight"] = grads["dense"]["weight"].at[0, 1].set(bad)
    grads["free"] = grads["free"].at[2].set(bad)
    updates, after = update(grads, state, factors=statistics(1))
    good, _ = update(gradients(1), state, factors=statistics(1))
    assert after.mu["dense"]["weight"][0, 1] == state.mu["dense"]["weight"][0, 1]
    assert after.mu["free"][2] == state.mu["free"][2]
    moved = np.asarray(after.mu["free"] != state.mu["free"])
    np.testing.assert_array_equal(np.flatnonzero(~moved), [2])
    close({k: updates[k] for k in ("stack", "norm")}, {k: good[k] for k in ("stack", "norm")})
    for _ in range(2):
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, after)))
        updates, after = update(gradients(2), after, factors=statistics(2))


@pytest.mark.parametrize("field", af.Factor._fields)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@every_rule
def test_statistics_that_are_not_finite_leave_their_layers_averages(rule, bad, field):
    """Of the stacked layers only the one concerned."""
    _, update, state = setup(rule)
    _, state = update(gradients(), state, factors=statistics())
    factors = statistics(1)
    spoilt = getattr(factors["stack"], field).at[1].set(bad)
    factors["stack"] = factors["stack"]._replace(**{field: spoilt})
    factors["dense"] = jax.tree.map(lambda a: a.at[...].set(bad), factors["dense"])
    check_kept(rule, state, factors)


@every_rule
def test_an_update_can_be_differentiated(rule, x64):
    model = nn.Sequential([nn.Dense(3), nn.LayerNorm(), nn.Dense(2)])
    x = jax.random.normal(jax.random.key(0), (6, 3))
    params = jax.tree.map(jnp.float64, model.init(jax.random.key(1), x)["params"])

    def loss(params, x):
        return jnp.mean(jnp.square(model.apply({"params": params}, x) - x[:, :2]))

    layout = af.trace_layout(loss, params, x)
    tx = af.adafisher(1e-3, layout, rule=rule)

    def after_a_step(scale):
        scaled = jax.tree.map(lambda p: p * scale, params)
        _, grads, factors = af.value_and_grad(loss, layout)(scaled, x)
        updates, _ = tx.update(grads, tx.init(params), factors=factors)
        return loss(optax.apply_updates(scaled, updates), 2 * x)

    value = jax.jit(after_a_step)
    slope = (value(1 + 1e-6) - value(1 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.jit(jax.grad(after_a_step))(1.0), slope, rtol=1e-5)


@every_rule
def test_a_layer_without_rows_keeps_its_averages(rule):
    _, update, state = setup(rule)
    _, state = update(gradients(), state, factors=statistics())
    factors = statistics(1)
    factors["stack"] = jax.tree.map(lambda a: a.at[1].set(0), factors["stack"])
    factors["dense"] = jax.tree.map(jnp.zeros_like, factors["dense"])
    check_kept(rule, state, factors)


def check_kept(rule, state, factors):
    """`dense` and the second layer of `stack` keep their averages; the others change as ever."""
    _, update, _ = setup(rule)
    updates, after = update(gradients(1), state, factors=factors)
    _, good = update(gradients(1), state, factors=statistics(1))
    for old, new, ideal in zip(*map(averages, (state, after, good)), strict=True):
        equal(new["dense"], old["dense"])
        equal(*(jax.tree.map(lambda a: a[1], t["stack"]) for t in (new, old)))
        equal(*(jax.tree.map(lambda a: a[0], t["stack"]) for t in (new, ideal)))
        equal(new["norm"], ideal["norm"])
        assert not np.array_equal(
            jax.tree.leaves(new["stack"])[0][0], jax.tree.leaves(old["stack"])[0][0]
        )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, after)))


@pytest.mark.parametrize(("rule", "grows"), [("paper", True), ("centered", False)])
def test_the_losss_scale_drops_out(rule, grows):
    """Of the paper's preconditioner, and of the whole centered update."""
    layout = af.trace_layout(loss_fn, PARAMS, X)
    tx = af.scale_by_adafisher(layout, rule=rule)

    @jax.jit
    def step(scale):
        grad_fn = af.value_and_grad(lambda params, x: scale * loss_fn(params, x), layout)
        _, grads, factors = grad_fn(PARAMS, X)
        return tx.update(grads, tx.init(PARAMS), factors=factors)[0]

    for scale in (1e-6, 1e6):
        expected = jax.tree.map(lambda a, c=scale if grows else 1: c * a, step(1.0))
        close(step(scale), expected, rtol=1e-3, atol=1e-5 * (scale if grows else 1))


def test_parameters_outside_layers_are_stepped_in_the_order_of_the_tree(monkeypatch):
    """Otherwise each process would have a program of its own, and find none in a cache on disk."""
    order = []

    def step(rule, b1, correction, mu, grad, scale):
        order.append(len(grad))
        return mu, grad, scale

    monkeypatch.setattr(optimizer, "step_alone", step)
    grads = {f"parameter {n}": jnp.ones(n) for n in range(1, 10)}
    tx = af.scale_by_adafisher(None, rule="centered")
    tx.update(grads, tx.init(grads))
    assert order == sorted(order)
