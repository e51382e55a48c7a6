"""Bad batches: what is stored stays finite, the next good step is finite, and skips are counted."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adafisher_jax as af
from tests.support.every_rule import every_rule
from tests.support.hand_made import layout_of, make_layer, random_factors, random_tree
from tests.support.trees import equal

any_rule = pytest.mark.parametrize("rule", ["paper", "official", "centered"])
RNG = np.random.default_rng(0)
X, LATER = (jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32) for _ in range(2))
W = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)
MODEL = nn.Sequential([nn.Dense(4), nn.tanh, nn.LayerNorm(), nn.Dense(2)])
PARAMS = MODEL.init(jax.random.key(0), X)["params"]
FIRST = "layers_0"


def loss_fn(params, x):
    return jnp.mean(jnp.square(MODEL.apply({"params": params}, x) - jnp.tanh(x @ W)))


@functools.cache
def layout():
    return af.trace_layout(loss_fn, PARAMS, X)


@functools.cache
def setting(rule, **options):
    """The first state, and a compiled step."""
    tx = af.adafisherw(1e-3, layout(), rule=rule, **options)

    @jax.jit
    def step(carry, x):
        params, state = carry
        _, grads, factors = af.value_and_grad(loss_fn, layout())(params, x)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state

    return (PARAMS, tx.init(PARAMS)), step


def averages(carry):
    state = carry[1][0]
    return state.factors, state.slots


def skipped(carry):
    return by_layer(carry[1][0], layout())


def by_layer(state, layout):
    assert state.skipped.dtype == jnp.int32
    paths = sorted(layer.path for layer in layout.layers)
    return dict(zip(paths, state.skipped.tolist(), strict=True))


def assert_finite(carry):
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(carry))


FAULTS = {
    "nan": lambda x: x.at[3, 1].set(jnp.nan),
    "inf": lambda x: x.at[3, 1].set(jnp.inf),
    "-inf": lambda x: x.at[:, 1].set(-jnp.inf),
    "its square is inf": lambda x: x.at[3, 1].set(1e30),
    "all nan": lambda x: x * jnp.nan,
}
any_fault = pytest.mark.parametrize("spoil", FAULTS.values(), ids=FAULTS)


@any_fault
@any_rule
def test_a_bad_batch_is_skipped_and_counted(rule, spoil):
    start, step = setting(rule)
    before = step(start, X)
    bad = step(before, spoil(X))
    assert_finite(bad)
    for old, new in zip(averages(before), averages(bad), strict=True):
        equal(new[FIRST], old[FIRST])
    assert (skipped(before)[FIRST], skipped(bad)[FIRST]) == (0, 1)
    good = step(bad, LATER)
    assert_finite(good)
    assert skipped(good) == skipped(bad)
    for old, new in zip(*map(jax.tree.leaves, (bad[0], good[0])), strict=True):
        assert np.any(old != new)


@any_fault
@any_rule
def test_the_first_batch_may_be_bad(rule, spoil):
    start, step = setting(rule)
    bad = step(start, spoil(X))
    assert_finite(bad)
    equal(*(jax.tree.map(lambda a: a, averages(c)[0][FIRST]) for c in (start, bad)))
    after = step(step(bad, X), LATER)
    assert_finite(after)
    assert skipped(after)[FIRST] == 1


OTHER_UNITS = {
    "all": lambda x: 1e3 * x,
    "one entry": lambda x: x.at[3, 1].set(1e6),
    "a feature": lambda x: x.at[:, 1].multiply(1e4),
}


@pytest.mark.parametrize("spoil", OTHER_UNITS.values(), ids=OTHER_UNITS)
def test_a_batch_in_other_units_does_not_decide_how_centered_steps_after_it(spoil):
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32), nn.relu, nn.Dense(2)])
    params = model.init(jax.random.key(0), X)

    def loss_fn(params, x):
        return jnp.mean(jnp.square(model.apply(params, x) - jnp.tanh(x @ W)))

    layout = af.trace_layout(loss_fn, params, X)
    tx = af.adafisherw(1e-2, layout, rule="centered")

    @jax.jit
    def step(carry, x):
        params, state = carry
        loss, grads, factors = af.value_and_grad(loss_fn, layout)(params, x)
        updates, state = tx.update(grads, state, params, factors=factors)
        return (optax.apply_updates(params, updates), state), loss

    carry, losses = (params, tx.init(params)), []
    for i in range(60):
        carry, loss = step(carry, spoil(X) if i == 40 else X)
        losses.append(loss.item())
    assert losses[39] < 0.2 * losses[0]
    assert max(losses[41:]) < 2 * losses[0]  # more than a thousand times that, if all counted


@pytest.mark.parametrize("first", [True, False])
@any_rule
def test_a_batch_of_zeros_is_a_batch(rule, first):
    """Its statistics are zeros, which are averaged like any others."""
    start, step = setting(rule)
    before = start if first else step(start, X)
    after = step(before, jnp.zeros_like(X))
    assert_finite(after)
    assert not np.array_equal(*(averages(carry)[1][FIRST] for carry in (before, after)))
    assert_finite(step(after, LATER))
    assert set(skipped(after).values()) == {0}


@any_rule
def test_without_damping_an_input_that_is_always_zero_is_not_stepped(rule):
    start, step = setting(rule, damping=0.0, weight_decay=0.0)
    x = X.at[:, 0].set(0)
    after = step(step(start, x), x)
    assert_finite(after)
    before, after = (carry[0][FIRST]["kernel"] for carry in (start, after))
    equal(before[0], after[0])
    assert np.any(before != after)


class Empty(nn.Module):
    """Layers without inputs, without outputs, without channels, and stacked ones without either."""

    @nn.compact
    def __call__(self, x):
        zeros = nn.initializers.zeros
        outputs = nn.Dense(0, kernel_init=zeros, name="no_outputs")(x)
        inputs = nn.Dense(2, kernel_init=zeros, name="no_inputs")(outputs)
        channels = nn.Conv(2, (2,), kernel_init=zeros, name="no_channels")(outputs[:, None])
        scan = functools.partial(nn.scan, variable_axes={"params": 0}, split_rngs={"params": True})
        stacked = scan(EmptyBlock, length=2)(name="stacked")(x, None)[0]
        return nn.Dense(2, name="full")(jnp.tanh(stacked)) + inputs + channels[:, 0]


class EmptyBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        nothing = nn.Dense(0, kernel_init=nn.initializers.zeros)(x)
        return nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros)(nothing) + x, None


@every_rule
def test_an_axis_of_length_zero_is_no_fault(rule):
    """Its layer is refreshed like any other; not even an intermediate result is nan."""
    params = Empty().init(jax.random.key(0), X)["params"]

    def loss(params, x):
        return jnp.mean(jnp.square(Empty().apply({"params": params}, x) - 1))

    layout = af.trace_layout(loss, params, X)
    tx = af.scale_by_adafisher(layout, rule=rule)
    state = start = tx.init(params)
    with jax.debug_nans(True):
        for _ in range(2):
            _, grads, factors = af.value_and_grad(loss, layout)(params, X)
            updates, state = tx.update(grads, state, factors=factors)
    assert set(by_layer(state, layout).values()) == {0}
    assert not np.any(state.ages)
    assert sum(map(len, state.slots.values())) == 6
    for path, slot in state.slots.items():
        assert np.all(slot != start.slots[path]), path
    assert_finite((start, state, updates))
    assert updates["no_inputs"]["kernel"].shape == (0, 2)
    assert np.all(updates["no_inputs"]["bias"] < 0)


@pytest.mark.parametrize(
    ("make", "dtype", "everywhere"),
    [
        (af.scale_by_adafisher, jnp.float32, False),
        (af.scale_by_adafisher, jnp.float16, True),
        (functools.partial(af.adafisherw, 10.0, weight_decay=0.1), jnp.float32, True),
        (functools.partial(af.adafisherw, 10.0, weight_decay=0.1), jnp.bfloat16, False),
    ],
)
@every_rule
def test_where_a_step_would_not_be_finite_there_is_none(rule, make, dtype, everywhere):
    """Of gradients as large as their type has room for."""
    shapes = {**random_tree(np.random.default_rng(0), *LAYERS), "free": jnp.ones((3, 2))}
    params = jax.tree.map(lambda a: a.astype(dtype), shapes)
    most = 0.98 * float(jnp.finfo(dtype).max)

    def spoil(a):
        return jnp.where(everywhere | (jnp.arange(a.size) < 1), most, a.ravel()).reshape(a.shape)

    huge = jax.tree.map(lambda a: spoil(a).astype(dtype), params)
    tx = make(layout=layout_of(*LAYERS, free=(3, 2)), rule=rule)
    factors = random_factors(np.random.default_rng(0), *LAYERS)
    update, state = jax.jit(tx.update), tx.init(params)
    for grads in (huge, huge, params):
        updates, state = update(grads, state, params, factors=factors)
        assert_finite((updates, state))
    assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
    if rule != "centered" and not everywhere:  # which has one size for all of a parameter
        assert np.all(np.asarray(updates["free"]).ravel()[1:] != 0)


@any_rule
def test_an_empty_micro_batch_takes_no_part(rule):
    """Its loss is nan and its gradients are zeros; the averages stay, and nothing was skipped."""
    start, step = setting(rule)
    before = step(start, X)
    after = step(before, X[:0])
    assert_finite(after)
    equal(averages(after), averages(before))
    assert set(skipped(after).values()) == {0}
    assert_finite(step(after, LATER))


@pytest.mark.parametrize(
    ("dtype", "bad"), [(jnp.float16, -1e6), (jnp.bfloat16, -np.inf), (jnp.float32, np.nan)]
)
@any_rule
def test_a_momentum_its_type_cannot_hold_is_not_stored(rule, dtype, bad):
    tx = af.scale_by_adafisher(None, rule=rule, mu_dtype=dtype)
    grads = {"w": jnp.array([1.0, -20.0, 5.0]), "v": jnp.ones(2)}
    update = jax.jit(tx.update)
    _, before = update(grads, tx.init(grads))
    updates, after = update({**grads, "w": jnp.array([2.0, bad, 7.0])}, before)
    assert after.mu["w"].dtype == dtype
    assert after.mu["w"][1] == before.mu["w"][1]
    assert np.all(np.asarray(after.mu["w"] != before.mu["w"])[[0, 2]])
    assert_finite((updates, after, update(grads, after)))


# What is counted.

DENSE = make_layer("dense", "dense", (3, 4), "in0 out0", "out0")
STACK = make_layer("stack", "dense", (2, 3, 4), "stack0 in0 out0", "stack0 out0")
NORM = make_layer("norm", "norm", (4,), "out0", "out0")
LAYERS = (DENSE, STACK, NORM)


@functools.cache
def counting(rule):
    """An update of layers made by hand, as a function of the factors."""
    tx = af.scale_by_adafisher(layout_of(*LAYERS), rule=rule)
    grads = random_tree(np.random.default_rng(0), *LAYERS)
    return jax.jit(lambda factors: tx.update(grads, tx.init(grads), factors=factors))


def count(factors, rule="paper"):
    """The layers' counts after one update with `factors`."""
    _, state = counting(rule)(factors)
    return by_layer(state, layout_of(*LAYERS))


def spoilt(path, field, bad):
    factors = random_factors(np.random.default_rng(0), *LAYERS)
    array = getattr(factors[path], field)
    spoilt = array.at[(-1,) * array.ndim].set(bad)
    return {**factors, path: factors[path]._replace(**{field: spoilt})}


NONE = {"dense": 0, "norm": 0, "stack": 0}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("field", af.Factor._fields)
@pytest.mark.parametrize("path", NONE)
def test_a_layers_refresh_is_counted_once_whatever_of_it_is_not_finite(path, field, bad):
    assert count(spoilt(path, field, bad)) == {**NONE, path: 1}


@any_rule
def test_both_layers_of_a_stack_count_once(rule):
    factors = random_factors(np.random.default_rng(0), *LAYERS)
    factors["stack"] = jax.tree.map(lambda a: a * jnp.nan, factors["stack"])
    assert count(factors, rule) == {**NONE, "stack": 1}


@any_rule
def test_good_statistics_no_rows_and_no_factors_are_not_counted(rule):
    factors = random_factors(np.random.default_rng(0), *LAYERS)
    assert count(factors, rule) == count(None, rule) == NONE
    assert count(jax.tree.map(jnp.zeros_like, factors), rule) == NONE


# A long run.

CLEAN, NAN, INF, HUGE, ZEROS, BAD_GRADIENT, ABSENT, NO_FACTORS = range(8)


def soak_step(tx, carry, inputs):
    """One step on a batch with the fault asked for; whether all is finite after it."""
    params, state = carry
    key, fault = inputs
    x = jax.random.normal(key, (8, 3))
    row, column = jax.random.randint(key, (2,), 0, 3)
    for kind, bad in ((NAN, jnp.nan), (INF, -jnp.inf), (HUGE, 1e30)):
        x = x.at[row, column].set(jnp.where(fault == kind, bad, x[row, column]))
    x = jnp.where(fault == ZEROS, 0, x)
    _, grads, factors = af.value_and_grad(loss_fn, layout())(params, x)
    grads[FIRST]["kernel"] = (
        grads[FIRST]["kernel"].at[column, row].add(jnp.where(fault == BAD_GRADIENT, jnp.inf, 0))
    )
    factors = jax.tree.map(lambda a: jnp.where(fault == ABSENT, 0, a), factors)
    updates, state = jax.lax.cond(
        fault == NO_FACTORS,
        lambda: tx.update(grads, state, params, factors=None),
        lambda: tx.update(grads, state, params, factors=factors),
    )
    params = optax.apply_updates(params, updates)
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((params, state, updates))]
    return (params, state), jnp.all(jnp.stack(finite))


@pytest.mark.slow
@any_rule
def test_twenty_thousand_steps_with_random_faults(rule):
    """One step in four is faulty; every step is finite, every skip counted, and it learns."""
    rates = {"paper": 1e-4, "official": 1e-4, "centered": 1e-2}
    tx = af.adafisherw(rates[rule], layout(), rule=rule, weight_decay=1e-4)
    chunk = jax.jit(functools.partial(jax.lax.scan, functools.partial(soak_step, tx)))
    rng = np.random.default_rng(1)
    faults = np.where(rng.random(20_000) < 0.25, rng.integers(1, 8, 20_000), CLEAN)
    keys = jax.random.split(jax.random.key(1), len(faults))
    carry = PARAMS, tx.init(PARAMS)
    for part in np.split(np.arange(len(faults)), 20):
        carry, finite = chunk(carry, (keys[part], jnp.asarray(faults[part])))
        assert np.all(finite), (np.flatnonzero(~finite), faults[part][~finite])
    params, state = carry
    assert state[0].count == 20_000
    assert skipped(carry)[FIRST] == np.isin(faults, (NAN, INF, HUGE)).sum()
    x = jax.random.normal(jax.random.key(2), (512, 3))
    assert loss_fn(params, x) < 0.1 * loss_fn(PARAMS, x)


def test_counts_are_in_the_order_of_paths_whatever_the_order_of_the_layers():
    layers = [make_layer(name, "dense", (3, 4), "in0 out0") for name in ("b", "a")]
    tx = af.scale_by_adafisher(af.Layout(tuple(layers)), rule="paper")
    grads = random_tree(np.random.default_rng(0), *layers)
    factors = random_factors(np.random.default_rng(0), *layers)
    factors["a"] = factors["a"]._replace(s=factors["a"].s * jnp.nan)
    _, state = jax.jit(tx.update)(grads, tx.init(grads), factors=factors)
    assert by_layer(state, layout_of(*layers)) == {"a": 1, "b": 0}
