"""AdaFisher inside optax's wrappers: which hand the factors on, which refuse or drop them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adafisher_jax as af
from adafisher_jax.step import step_alone
from tests.optimizer.test_wrappers import LAYOUT, PARAMS, A, B, close, data, inside, run, updates_of
from tests.support.every_rule import every_rule
from tests.support.hand_made import layout_of

# Wrappers that hand the factors on.

TX = af.adafisher(0.1, LAYOUT, rule="centered")
bare = functools.cache(lambda: run(TX))
ALL, NONE, SOME = ({"a": a, "b": b} for a, b in [(True, True), (False, False), (True, False)])

HAND_ON = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx, optax.scale(0.5)),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1e9)), ("adafisher", tx)),
    "with_extra_args_support": optax.with_extra_args_support,
    "masked": lambda tx: optax.masked(tx, ALL),
    "partition": lambda tx: optax.partition({True: tx}, ALL),
    "multi_transform": lambda tx: optax.multi_transform({True: tx}, ALL),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=NONE),
    "freeze": lambda tx: optax.chain(tx, optax.freeze({"a": False, "b": True})),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(rate=0.5),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, every_k_schedule=1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "mechanize": optax.contrib.mechanize,
    "reduce_on_plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()),
    "ema": lambda tx: optax.chain(tx, optax.ema(0.5)),
}


def some(cases, *by_default):
    """A test for each case; by default, for those named."""
    return [
        pytest.param(case, id=name, marks=() if name in by_default else pytest.mark.slow)
        for name, case in cases.items()
    ]


@pytest.mark.parametrize(
    "wrap", some(HAND_ON, "chain", "MultiSteps", "inject_hyperparams", "masked", "multi_transform")
)
def test_factors_reach_the_transform_inside(wrap):
    found, state = run(wrap(TX), value=1.0)
    plain, _ = run(wrap(TX), value=1.0, factors=None)
    close(inside(state).factors, inside(bare()[1]).factors)
    assert not np.allclose(found[1]["a"]["weight"], plain[1]["a"]["weight"], rtol=1e-3, atol=0)


def test_a_chain_keeps_the_order_of_its_links():
    chained = optax.chain(
        optax.scale(2.0),
        af.scale_by_adafisher(LAYOUT, rule="paper"),
        optax.scale_by_learning_rate(0.05),
    )
    close(run(chained)[0], updates_of(af.adafisher))


@every_rule
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


@every_rule
def test_hyperparameters_may_be_injected(rule):
    values = {"learning_rate": 0.1, "b1": 0.8, "curvature_ema": 0.7, "damping": 0.02}
    make = optax.inject_hyperparams(af.adafisherw)
    scheduled = {**values, "damping": lambda count: 0.02 + count}
    found, state = run(make(layout=LAYOUT, rule=rule, weight_decay=0.1, **scheduled))
    np.testing.assert_allclose(state.hyperparams["damping"], 1.02)
    assert values.keys() <= state.hyperparams.keys()
    expected = None
    for step, damping in enumerate((0.02, 1.02)):
        values["damping"] = damping
        tx = af.adafisherw(layout=LAYOUT, rule=rule, weight_decay=0.1, **values)
        before = expected or tx.init(PARAMS)
        grads, factors = data(step)
        updates, expected = tx.update(grads, before, PARAMS, factors=factors)
        close(found[step], updates, rtol=1e-4, atol=1e-6)


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
        assert list(inside(state.inner_states[name]).factors) == [name]


@pytest.mark.parametrize("layout", [layout_of(A, **{"b/weight": B.weight.shape}), None])
def test_a_part_may_have_no_layers(layout):
    """Its layout is that of the whole, or none."""
    alone = af.adafisher(0.1, None, rule="paper")
    parts = {"a": optax.sgd(0.1), "b": af.adafisher(0.1, layout, rule="paper")}
    found, _ = run(optax.partition(parts, {"a": "a", "b": "b"}))
    expected, _ = run(alone, params={"b": PARAMS["b"]}, change=lambda g: {"b": g["b"]})
    close([updates["b"] for updates in found], [updates["b"] for updates in expected])


def test_a_part_that_the_layout_does_not_know():
    parts = {"a": optax.sgd(0.1), "b": af.adafisher(0.1, layout_of(A), rule="paper")}
    with pytest.raises(
        ValueError, match="does not know the parameters 'b/weight'; it has 'a/bias'"
    ):
        optax.partition(parts, {"a": "a", "b": "b"}).init(PARAMS)


FREEZE = {
    "partition": lambda tx: optax.partition({True: tx, False: optax.set_to_zero()}, SOME),
    "selective_transform": lambda tx: optax.selective_transform(
        tx, freeze_mask={"a": False, "b": True}
    ),
    "freeze": lambda tx: optax.chain(tx, optax.freeze({"a": False, "b": True})),
}


@pytest.mark.parametrize("wrap", FREEZE.values(), ids=FREEZE)
def test_a_part_may_stand_still(wrap):
    found, _ = run(wrap(af.adafisher(0.1, LAYOUT, rule="paper")))
    expected = updates_of(af.adafisher)
    close([u["a"] for u in found], [u["a"] for u in expected])
    assert not np.any(found[-1]["b"]["weight"])


CLOSED = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step < 1),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step < 1),
}


@pytest.mark.parametrize("wrap", some(CLOSED, "apply_if_finite"))
def test_a_refused_step_averages_no_factors(wrap):
    tx = wrap(TX)
    _, open_ = run(tx, steps=1)
    grads = jax.tree.map(lambda g: g * jnp.nan, data(1)[0])
    _, closed = tx.update(grads, open_, PARAMS, factors=data(1)[1])
    close(inside(closed), inside(open_), rtol=0)
    assert np.all(inside(closed).slots["a"] > 0)


def test_schedule_free_averages_the_steps_of_the_transform_inside():
    base = af.adafisher(0.1, LAYOUT, rule="centered", b1=0.0)
    tx = optax.contrib.schedule_free(base, learning_rate=0.1, b1=0.9)
    params, state, z, visited = PARAMS, tx.init(PARAMS), PARAMS, []
    for seed, updates in enumerate(run(base, steps=3)[0]):
        grads, factors = data(seed)
        moved, state = tx.update(grads, state, params, factors=factors)
        params, z = optax.apply_updates(params, moved), optax.apply_updates(z, updates)
        visited.append(z)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *visited)
    close(optax.contrib.schedule_free_eval_params(state, params), mean, rtol=1e-4)


# Micro-batches.


def test_gradients_may_be_gathered_over_several_steps():
    """`MultiSteps` hands on the factors of the step that updates."""
    tx = optax.MultiSteps(af.adafisher(0.1, LAYOUT, rule="paper"), every_k_schedule=2)
    found, _ = run(tx)
    mean = jax.tree.map(lambda *g: sum(g) / 2, data(0)[0], data(1)[0])
    plain = af.adafisher(0.1, LAYOUT, rule="paper")
    expected, _ = plain.update(mean, plain.init(PARAMS), PARAMS, factors=data(1)[1])
    close(found, [jax.tree.map(jnp.zeros_like, PARAMS), expected])


SKIP = {
    "not finite": (optax.skip_not_finite, jnp.nan),
    "large": (functools.partial(optax.skip_large_updates, max_squared_norm=1e6), 1e9),
}


@pytest.mark.parametrize(("skip", "scale"), SKIP.values(), ids=SKIP)
def test_a_skipped_micro_batch_leaves_its_factors_out(skip, scale):
    tx = optax.MultiSteps(TX, every_k_schedule=2, should_skip_update_fn=skip)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    bad = jax.tree.map(lambda g: g * scale, data(2)[0])
    for grads, factors in (data(0), (bad, data(2)[1]), data(1)):
        updates, state = update(grads, state, PARAMS, factors=factors)
    (_, expected), without = run(optax.MultiSteps(TX, every_k_schedule=2))
    close((updates, inside(state)), (expected, inside(without)))


# Wrappers that do not: in a chain with our TypeError, by themselves with Python's.


def given(tx, factors):
    """`tx` with the factors of one step bound to it."""
    return optax.GradientTransformation(tx.init, functools.partial(tx.update, factors=factors))


LOOKAHEAD = functools.partial(optax.lookahead, sync_period=10, slow_step_size=0.5)
SPLIT = optax.contrib.split_real_and_imaginary
DROP = {
    "lookahead": (LOOKAHEAD, optax.LookaheadParams.init_synced(PARAMS)),
    "split_real_and_imaginary": (SPLIT, PARAMS),
}
any_drop = pytest.mark.parametrize(("wrap", "params"), DROP.values(), ids=DROP)


@any_drop
def test_what_takes_no_factors_says_so(wrap, params):
    with pytest.raises(TypeError, match="unexpected keyword argument 'factors'"):
        run(wrap(TX), params=params)


IN_A_CHAIN = DROP | {
    "MultiSteps": (lambda tx: optax.MultiSteps(tx, 1), PARAMS),
    "a transform of two arguments": (
        lambda tx: optax.GradientTransformation(tx.init, lambda g, s, p=None: tx.update(g, s, p)),
        PARAMS,
    ),
}


@pytest.mark.parametrize(("wrap", "params"), IN_A_CHAIN.values(), ids=IN_A_CHAIN)
def test_in_a_chain_they_drop_factors_and_adafisher_says_so(wrap, params):
    with pytest.raises(TypeError, match=r"got no keyword factors.*wrapper .* dropped it"):
        run(optax.chain(wrap(TX)), params=params)


@any_drop
def test_bound_to_the_transform_factors_pass_everything(wrap, params):
    state, expected = optax.chain(wrap(TX)).init(params), bare()
    for seed in range(2):
        grads, factors = data(seed)
        updates, state = optax.chain(wrap(given(TX, factors))).update(grads, state, params)
    close(getattr(updates, "fast", updates), expected[0][1])
    close(inside(state), inside(expected[1]))


def test_sam_refreshes_on_the_step_that_moves():
    wrap = functools.partial(optax.contrib.sam, adv_optimizer=optax.sgd(0.1), sync_period=2)
    for refused in (wrap(TX), optax.chain(wrap(TX))):
        with pytest.raises(TypeError, match="unexpected keyword argument 'factors'"):
            run(refused)
    state = wrap(TX).init(PARAMS)
    for seed in range(2):
        grads, factors = data(seed)
        _, state = wrap(given(TX, factors)).update(grads, state, PARAMS)
    _, expected = TX.update(data(1)[0], TX.init(PARAMS), PARAMS, factors=data(1)[1])
    close(inside(state), inside(expected), rtol=1e-4)


def test_a_flattened_model_has_no_layers():
    with pytest.raises(ValueError, match="does not know the parameters ''"):
        optax.flatten(TX).init(PARAMS)


def test_a_train_state_hands_factors_to_multi_steps():
    tx = optax.MultiSteps(TX, every_k_schedule=1)
    state = af.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    grads, factors = data(0)
    state = state.apply_gradients(grads=grads, factors=factors)
    close(inside(state.opt_state), inside(run(TX, steps=1)[1]))


# The state.

MAPPED = {
    "adafisher": (lambda tx: tx, 3),
    "masked": (lambda tx: optax.masked(tx, SOME), 2),
    "inject_hyperparams": (HAND_ON["inject_hyperparams"], 3),
}


@every_rule
@pytest.mark.parametrize("layout", [LAYOUT, None], ids=["layout", "no layout"])
@pytest.mark.parametrize(("wrap", "count"), MAPPED.values(), ids=MAPPED)
def test_map_params_finds_the_momentum_alone(wrap, count, layout, rule):
    tx = wrap(af.adafisher(0.1, layout, rule=rule))
    state = tx.init(PARAMS)
    marked = optax.tree.map_params(tx, lambda mu: "mu", state, transform_non_params=lambda _: None)
    assert jax.tree.leaves(marked) == ["mu"] * count
    same = optax.tree.map_params(tx, lambda mu: mu, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)


def test_the_state_is_read_and_set_by_name():
    _, state = run(TX)
    count = optax.tree.get(state, "count")
    assert count == 2
    fresh = inside(TX.init(PARAMS))
    forgetful = optax.tree.set(state, factors=fresh.factors, slots=fresh.slots)
    close(optax.tree.get(forgetful, "mu"), optax.tree.get(state, "mu"), rtol=0)
    grads = data(2)[0]
    updates, after = TX.update(grads, forgetful, PARAMS, factors=None)
    ahead = 0.9 * optax.tree.get(after, "mu")["b"]["weight"] + 0.1 * grads["b"]["weight"]
    ratio = np.asarray(updates["b"]["weight"] / ahead)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1, :1], ratio.shape), rtol=1e-4)


@every_rule
def test_eager_steps_with_injected_hyperparameters_compile_once(rule):
    """`inject_hyperparams` makes the transformation anew at every update."""
    params = {"layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "other": jnp.ones(4)}
    tx = optax.inject_hyperparams(af.adafisher)(1e-2, None, rule=rule, damping=0.1)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    compiled = step_alone._cache_size()
    for _ in range(2):
        _, state = tx.update(params, state, params)
    assert step_alone._cache_size() == compiled
