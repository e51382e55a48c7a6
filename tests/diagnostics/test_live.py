"""What a report says of a step is what the optimizer does in it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adafisher_jax as af
from adafisher_jax.diagnostics import LayerReport, report, scalars, table
from tests.optimizer.test_optax_wrappers import HAND_ON, TX
from tests.optimizer.test_wrappers import LAYOUT, PARAMS, A, B, data, inside
from tests.rules.test_rules import blocks
from tests.support import nnx_reference
from tests.support.every_rule import every_rule
from tests.support.hand_made import (
    LAYERS,
    curvatures,
    layout_of,
    make_layer,
    random_factor,
    random_factors,
    random_tree,
)
from tests.support.reference import random_like, random_params

RULES = ("paper", "official", "centered")
LAMBDA, TAU, B1, RATE = 1e-3, 0.01, 0.9, 0.25
QUANTILES = (0.05, 0.5, 0.95)
REFRESHED = (False, True, True, False, True)  # the steps that bring new factors

close = functools.partial(np.testing.assert_allclose, rtol=1e-9)


# A column has one singular value, of which "centered" cuts nothing: its steps are a product.
SOME = "dense no_bias general groups batch stacks norm stacked_norm"
ALL = {name: LAYERS[name] for name in SOME.split()} | {
    "column": make_layer("column", "dense", (6, 1), "in0 out0"),
    "biased_column": make_layer("biased_column", "dense", (6, 1), "in0 out0", "out0"),
    "only_shift": af.Layer("only_shift", "norm", None, af.Leaf("only_shift/bias", (5,), ("out0",))),
}
EVERY = layout_of(*ALL.values())


def reported(layer, tree):
    """Of a tree like the parameters, the array that a layer's report is about."""
    of_layer = tree[layer.path]
    return np.asarray(of_layer["weight" if layer.weight else "bias"])


@functools.cache
def trajectory(rule):
    """Of a few steps: the gradients, the updates, the state after them and its report."""
    rng = np.random.default_rng(sum(map(ord, rule)))
    steps = []
    with jax.enable_x64(True):
        params = random_tree(rng, *ALL.values())
        tx = af.adafisher(RATE, EVERY, rule=rule)
        state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
        look = jax.jit(
            lambda state, updates: report(
                state, EVERY, rule=rule, learning_rate=RATE, params=params, updates=updates
            )
        )
        for refreshed in REFRESHED:
            grads = random_tree(rng, *ALL.values())
            # The step of a weight in centered coordinates has a share of its bias: here, none.
            grads["biased_column"]["bias"] = jnp.zeros(1)
            found = random_factors(rng, *ALL.values())
            factors = found if refreshed else {x.path: x.zeros() for x in EVERY.layers}
            updates, state = update(grads, state, params, factors=factors)
            steps.append((grads, updates, inside(state), look(state, updates)))
    return params, steps


def rates_of(rule, layer, step, grads, updates, state):
    """What each entry of the momentum was multiplied by, with the learning rate."""
    momentum, ahead = reported(layer, state.mu), 0
    if rule == "centered":  # Nesterov's
        momentum, ahead = B1 * momentum + (1 - B1) * reported(layer, grads), 1
    return -reported(layer, updates) / (momentum / (1 - B1 ** (step + 1 + ahead)))


@pytest.mark.parametrize("name", ALL)
@every_rule
def test_effective_rates_are_those_of_the_updates(rule, name):
    _, steps = trajectory(rule)
    product = name.endswith("column") or ALL[name].kind == "norm"
    for step, (grads, updates, state, found) in enumerate(steps):
        if rule == "centered" and step > 0 and not product:
            break
        rates = rates_of(rule, ALL[name], step, grads, updates, state)
        got = found[name].rate_low, found[name].rate_median, found[name].rate_high
        close(got, np.quantile(rates, QUANTILES))
        if rule != "centered":  # a term above its damping takes the divisor above twice that
            share = np.mean(rates < RATE / (2 * LAMBDA)) if step > 0 else 0
            close(found[name].above_damping, share, rtol=1e-6)


def terms(layer, state):
    """Of "centered": Ĥ and Ŝ of each block, by their formulas, and the first with its damping."""
    factor, slot, _ = curvatures(state, layout_of(layer))[layer.path]
    weight = blocks(slot, layer.axes)
    s = blocks(factor.s, layer.axes) / weight
    s = s / s.mean((1, 2), keepdims=True)
    if layer.kind == "norm":
        return 1, s, 1
    h = blocks(factor.h, layer.axes) / weight
    if layer.bias:
        h = h - (blocks(factor.mean, layer.axes) / weight) ** 2
    h = h / h.mean((1, 2), keepdims=True)
    return h, s, h + TAU


@pytest.mark.parametrize("name", ALL)
def test_the_share_above_damping_of_centered_is_its_formula(name):
    for step, (_, _, state, found) in enumerate(trajectory("centered")[1]):
        share = 0
        if step > 0:
            h, s, damped = terms(ALL[name], state)
            share = np.mean(h * s > damped * (s + TAU) - h * s)
        close(found[name].above_damping, share, rtol=1e-6)


@pytest.mark.slow
def test_shares_above_damping_are_not_all_alike():
    for rule in RULES:
        shares = {float(f[name].above_damping) for *_, f in trajectory(rule)[1] for name in f}
        assert len(shares) > 1, rule


def test_quantiles_of_centered_follow_from_its_terms():
    """Of layers with an excess too: the rates before it is cut, up to their one size."""
    for _, _, state, found in trajectory("centered")[1][1:]:
        for name, layer in ALL.items():
            _, s, damped = terms(layer, state)
            shape = np.quantile((damped * (s + TAU)) ** -0.5, QUANTILES)
            got = np.array(found[name][1:4])
            if len(s) == 1:  # of stacked layers each has its own size
                close(got / got[1], shape / shape[1])


@pytest.mark.parametrize("name", ALL)
@every_rule
def test_conditions_are_those_of_the_averages(rule, name):
    layer = ALL[name]
    for _, _, state, found in trajectory(rule)[1]:
        h, s = (blocks(part, layer.axes) for part in curvatures(state, EVERY)[name].factor[:2])
        if layer.kind == "norm":  # one of a pair: it is alike for all channels
            h = np.ones_like(s[:, :1, :1])
        products = h * s
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = products.max((1, 2)) / products.min((1, 2))
        expected = np.inf if np.isnan(ratios).any() else ratios.max()
        close(found[name].condition, expected)


@every_rule
def test_relative_steps_are_ratios_of_root_mean_squares(rule):
    params, steps = trajectory(rule)
    for _, updates, _, found in steps:
        for name, layer in ALL.items():
            squares = [np.mean(reported(layer, tree) ** 2) for tree in (updates, params)]
            close(found[name].relative_step, (squares[0] / squares[1]) ** 0.5)


def test_ages_and_skipped_refreshes_are_counted_where_they_are():
    tx = af.adafisher(RATE, LAYOUT, rule="paper")
    state, seen = tx.init(PARAMS), []
    for refresh in ("good", None, None, "good", "bad", "bad"):
        grads, factors = data(0)
        if refresh == "bad":
            factors = factors | {"a": factors["a"]._replace(s=factors["a"].s.at[0, 1].set(np.nan))}
        _, state = tx.update(grads, state, PARAMS, factors=factors if refresh else None)
        found = report(state, LAYOUT, rule="paper")
        seen.append([(int(found[name].age), int(found[name].skipped)) for name in "ab"])
        assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(found))
    of_a, of_b = zip(*seen, strict=True)
    assert of_a == ((0, 0), (1, 0), (2, 0), (0, 0), (1, 1), (2, 2))
    assert of_b == ((0, 0), (1, 0), (2, 0), (0, 0), (0, 0), (0, 0))


@every_rule
def test_before_any_step_nothing_is_known(rule):
    found = report(af.adafisher(RATE, LAYOUT, rule=rule).init(PARAMS), LAYOUT, rule=rule)
    for one in found.values():
        rate = 0 if rule == "centered" else 1  # its scale has seen no step
        assert (one.above_damping, *one[1:4]) == (0, rate, rate, rate)
        assert one.condition == (1 if rule == "official" else np.inf)
        assert one.relative_step is None


# Wide layers.

WIDE = make_layer("wide", "dense", (2, 150, 70), "stack0 in0 out0", "stack0 out0")


def test_quantiles_of_wide_layers_are_off_by_a_thirty_second_in_rank_at_most():
    rng = np.random.default_rng(0)
    layout = layout_of(WIDE)
    tx = af.adafisher(RATE, layout, rule="paper")
    grads = random_tree(rng, WIDE)
    updates, state = tx.update(grads, tx.init(grads), factors={"wide": random_factor(rng, WIDE)})
    found = report(state, layout, rule="paper", learning_rate=RATE)["wide"]
    rates = np.asarray(-updates["wide"]["weight"] / grads["wide"]["weight"])
    for quantile, got in zip(QUANTILES, found[1:4], strict=True):
        assert abs(np.mean(rates < got) - quantile) <= 1 / 32
    assert found.rate_low < found.rate_median < found.rate_high
    close(found.above_damping, np.mean(rates < RATE / (2 * LAMBDA)), rtol=1e-5)


# In wrappers.


@pytest.mark.parametrize("wrap", HAND_ON.values(), ids=HAND_ON)
def test_the_state_is_found_in_any_wrapper(wrap):
    state = jax.tree.map(lambda leaf: leaf + 1, wrap(TX).init(PARAMS))
    found = report(state, LAYOUT, rule="centered")
    expected = report(inside(state), LAYOUT, rule="centered")
    assert found.keys() == {"a", "b"}
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def stepped(tx, seed=0):
    grads, factors = data(seed)
    return tx.update(grads, tx.init(PARAMS), PARAMS, factors=factors)


def test_each_part_of_a_partition_reports_its_own_layers():
    """One layout of both may be given to each, or to each its own."""
    for layouts in ((LAYOUT, LAYOUT), (layout_of(A), layout_of(B))):
        parts = {
            name: af.adafisher(RATE, of, rule="paper")
            for name, of in zip("ab", layouts, strict=True)
        }
        _, state = stepped(optax.partition(parts, {"a": "a", "b": "b"}))
        whole = report(stepped(af.adafisher(RATE, LAYOUT, rule="paper"))[1], LAYOUT, rule="paper")
        jax.tree.map(np.testing.assert_array_equal, report(state, LAYOUT, rule="paper"), whole)


@every_rule
def test_layers_whose_weight_is_masked_are_left_out(rule):
    mask = {"a": {"weight": False, "bias": True}, "b": True}
    state = optax.masked(af.adafisher(RATE, LAYOUT, rule=rule), mask).init(PARAMS)
    assert inside(state).factors.keys() == {"a", "b"}
    assert report(state, LAYOUT, rule=rule).keys() == {"b"}


def test_a_weight_whose_bias_is_masked_is_stepped_and_reported_without_it():
    """In "centered" that makes a difference: the inputs' variance is their second moment then."""
    rng = np.random.default_rng(0)
    layer = ALL["biased_column"]
    layout = layout_of(layer)
    mask = {layer.path: {"weight": True, "bias": False}}
    tx = optax.masked(af.adafisher(RATE, layout, rule="centered"), mask)
    grads, factors = random_tree(rng, layer), random_factors(rng, layer)
    updates, state = tx.update(grads, tx.init(grads), grads, factors=factors)
    rates = rates_of("centered", layer, 0, grads, updates, inside(state))
    found = report(state, layout, rule="centered", learning_rate=RATE)[layer.path]
    close(found[1:4], np.quantile(rates, QUANTILES), rtol=1e-5)


def test_injected_hyperparameters_are_handed_on():
    tx = optax.inject_hyperparams(af.adafisher)(
        learning_rate=lambda count: 0.5 / (1 + count), damping=0.02, layout=LAYOUT, rule="paper"
    )
    updates, state = stepped(tx)
    values = state.hyperparams
    found = report(
        state,
        LAYOUT,
        rule="paper",
        damping=values["damping"],
        learning_rate=values["learning_rate"],
    )
    rates = -updates["a"]["weight"] / data(0)[0]["a"]["weight"]
    close(found["a"][1:4], np.quantile(rates, QUANTILES), rtol=1e-5)


def test_a_train_state_is_read():
    state = af.TrainState.create(
        apply_fn=None, params=PARAMS, tx=af.adafisher(RATE, LAYOUT, rule="paper")
    )
    grads, factors = data(0)
    state = state.apply_gradients(grads=grads, factors=factors)
    expected = report(stepped(af.adafisher(RATE, LAYOUT, rule="paper"))[1], LAYOUT, rule="paper")
    for given in (state, state.opt_state):
        jax.tree.map(np.testing.assert_array_equal, report(given, LAYOUT, rule="paper"), expected)


def test_an_nnx_optimizer_is_read():
    """From within `nnx.jit` too, its parameters being a module's."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(3, 4, rngs=rngs)
            self.down = nnx.Linear(4, 2, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    model = Net(nnx.Rngs(0))
    layout = af.nnx.trace_layout(nnx_reference.loss_of, model, jnp.ones((8, 3)))
    tx = af.adafisher(RATE, layout, rule="paper")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = random_like(nnx.state(model, nnx.Param))
    factors = random_factors(np.random.default_rng(0), *layout.layers)
    before, pure = nnx.clone(model), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    updates = optimizer.update(model, grads, factors=factors)
    found = nnx.jit(lambda *args: look(layout, *args))(optimizer, before, updates)

    plain, state = tx.update(nnx.to_pure_dict(grads), tx.init(pure), pure, factors=factors)
    expected = look(layout, state, pure, plain)
    assert found.keys() == {"up", "down"}
    jax.tree.map(functools.partial(close, rtol=1e-6), found, expected)
    again = look(layout, optimizer.opt_state, before, updates)
    jax.tree.map(functools.partial(close, rtol=1e-6), again, expected)


def look(layout, state, params, updates):
    return report(state, layout, rule="paper", learning_rate=RATE, params=params, updates=updates)


# In a training step.


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(4)(nn.LayerNorm()(x))), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 4)(tokens)
        scan = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="layers")(x, None)
        return nn.Dense(40, use_bias=False, name="head")(x)


def test_a_report_in_a_compiled_step_is_traced_once_and_stays_on_the_device():
    tokens = jnp.arange(10).reshape(2, 5) % 7
    params = jax.tree.map(jnp.float32, random_params(Model(), tokens))

    def loss_fn(params, tokens):
        return jnp.mean(jnp.square(Model().apply({"params": params}, tokens)))

    layout = af.trace_layout(loss_fn, params, tokens)
    tx, traces = af.adafisher(RATE, layout, rule="paper"), []

    @jax.jit
    def step(params, state, tokens):
        traces.append(tokens)
        _, grads, factors = af.value_and_grad(loss_fn, layout)(params, tokens)
        updates, state = tx.update(grads, state, params, factors=factors)
        found = look(layout, state, params, updates)
        return optax.apply_updates(params, updates), state, found, updates

    state = tx.init(params)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            before = params
            params, state, found, updates = step(params, state, tokens)
    assert len(traces) == 1
    assert "callback" not in step.lower(params, state, tokens).as_text()
    expected = look(layout, state, before, updates)
    jax.tree.map(functools.partial(close, rtol=2e-5), found, expected)

    flat = scalars(found)
    assert len(flat) == 4 * len(LayerReport._fields)
    assert {"layers/Dense_0/rate_low", "head/age", "Embed_0/condition"} <= flat.keys()
    assert {jnp.shape(value) for value in flat.values()} == {()}
    lines = table(found).splitlines()
    assert [line.split()[0] for line in lines[2:]] == sorted(found)
    assert len({len(line) for line in lines}) == 1


# As text and as numbers.


def made_up(**fields):
    """A report of one layer."""
    values = dict.fromkeys(LayerReport._fields, jnp.float32(0.12345))
    return LayerReport(**values | {"age": jnp.int32(1234), "skipped": jnp.int32(0)} | fields)


def test_a_table_has_a_line_for_each_layer():
    lines = table(
        {"": made_up(relative_step=None), "a/b": made_up(condition=jnp.float32(np.inf))}
    ).splitlines()
    assert lines[0].split()[:3] == ["layer", "above", "damping"]
    cells = [line.split() for line in lines[2:]]
    assert cells[0] == ["(root)", *["0.123"] * 5, "-", "1234", "0"]
    assert cells[1] == ["a/b", *["0.123"] * 4, "inf", "0.123", "1234", "0"]


def test_scalars_leave_out_what_there_is_not():
    flat = scalars({"": made_up(relative_step=None), "a": made_up()})
    assert "relative_step" not in flat
    assert flat.keys() >= {"age", "a/age", "a/relative_step"}
    assert len(flat) == 7 + 8


# Errors.


def test_errors_say_what_is_missing():
    state = stepped(af.adafisher(RATE, LAYOUT, rule="paper"))[1]
    with pytest.raises(ValueError, match="none with AdaFisher's factors"):
        report(optax.adam(0.1).init(PARAMS), LAYOUT, rule="paper")
    with pytest.raises(ValueError, match="none with AdaFisher's factors"):
        report(state, layout_of(ALL["column"]), rule="paper")
    with pytest.raises(ValueError, match="none with AdaFisher's factors"):
        report(af.adafisher(RATE, None, rule="paper").init(PARAMS), LAYOUT, rule="paper")
    with pytest.raises(ValueError, match="rule: got 'adam'"):
        report(state, LAYOUT, rule="adam")
    with pytest.raises(ValueError, match="'a/weight' has shape"):
        report(
            state, LAYOUT, rule="paper", params=PARAMS, updates={"a": {"weight": jnp.ones((3, 5))}}
        )
    several = jax.vmap(TX.init)(jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), PARAMS))
    with pytest.raises(ValueError, match=r"opt_state: the momentum of 'a/weight' has shape \(4, "):
        report(several, LAYOUT, rule="paper")
    with pytest.raises(TypeError, match="layout: got NoneType, wanted a Layout"):
        report(state, None, rule="paper")


@every_rule
def test_another_rules_state_is_refused_where_that_shows(rule):
    state = af.adafisher(RATE, LAYOUT, rule=rule).init(PARAMS)
    for other in RULES:
        if (rule == "centered") != (other == "centered"):
            with pytest.raises(ValueError, match=f"'a/weight', '{other}' wants"):
                report(state, LAYOUT, rule=other)
