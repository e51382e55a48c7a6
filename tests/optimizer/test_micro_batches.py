"""Micro-batches: gradients and factors add up to those of the whole batch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adafisher_jax as af
from tests.support.every_rule import every_rule
from tests.support.reference import Dense, assert_factors, random_like, random_params

F64 = jnp.float64
ROWS = 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 3))
IMAGES = RNG.normal(size=(ROWS, 5, 4, 2))
TOKENS = RNG.integers(0, 7, (ROWS, 4))
ALL, SOME = np.ones(ROWS), np.array([1.0, 0, 1, 1, 1, 0])
EQUAL, UNEQUAL = (2, 2, 2), (1, 3, 2)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(Dense(3)(x)), None


def scanned(axis):
    return nn.scan(Body, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)


class Stack(nn.Module):
    """Three layers whose parameters lie stacked along an axis."""

    axis: int

    @nn.compact
    def __call__(self, x):
        return Dense(2)(scanned(self.axis)()(x, None)[0])


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = Dense(3)
        return layer(jnp.tanh(layer(x)))


class Normed(nn.Module):
    norm: nn.Module

    @nn.compact
    def __call__(self, x):
        return Dense(2)(self.norm(Dense(4)(x)))


conv = functools.partial(nn.Conv, param_dtype=F64)
MODELS = {
    "dense": (nn.Sequential([Dense(4), jnp.tanh, Dense(2, use_bias=False)]), X),
    "conv": (nn.Sequential([conv(4, (3, 2), strides=2), jnp.tanh, conv(2, (2, 2))]), IMAGES),
    "embedding": (nn.Sequential([nn.Embed(7, 3, param_dtype=F64), Dense(2)]), TOKENS),
    "scan over axis 0": (Stack(0), X),
    "scan over axis 1": (Stack(1), X),
    "shared": (Shared(), X),
}
any_model = pytest.mark.parametrize("name", MODELS)
MLP, _ = MODELS["dense"]


def waves(y):
    """A different derivative for each feature."""
    return jnp.sin(y + jnp.broadcast_to(jnp.arange(y.shape[-1]), y.shape))


def mean_loss(model):
    """The mean over unmasked rows."""

    def loss_fn(params, x, mask):
        y = model.apply({"params": params}, x)
        each = jnp.sum(waves(y), range(1, y.ndim))
        return jnp.sum(jnp.where(mask > 0, each, 0)) / jnp.sum(mask)

    return loss_fn


def capture_of(model, x, mask):
    """The gradient function of a model's mean loss, its layout, and parameters."""
    loss_fn, params = mean_loss(model), random_params(model, x)
    layout = af.trace_layout(loss_fn, params, x, mask)
    assert layout.covered == 1, str(layout)
    return af.value_and_grad(loss_fn, layout), layout, params


@functools.cache
def made(name):
    return capture_of(*MODELS[name], ALL)


def split(array, sizes):
    return jnp.split(array, np.cumsum(sizes)[:-1])


def in_a_scan(name, params, x, mask):
    grad_fn, layout, _ = made(name)
    x, mask = (a.reshape(3, 2, *a.shape[1:]) for a in (x, mask))
    return af.accumulate(grad_fn, layout, mask.sum(1) / mask.sum())(params, x, mask)


def in_a_loop(sizes, name, params, x, mask):
    grad_fn, layout, _ = made(name)
    parts = zip(split(x, sizes), split(mask, sizes), strict=True)
    return looped(grad_fn, layout, params, [(m.sum() / mask.sum(), x, m) for x, m in parts])


def looped(grad_fn, layout, params, calls):
    """The total over calls, each a weight and the other arguments."""
    total = None
    for weight, *args in calls:
        total = af.add_micro_batch(total, grad_fn(params, *args), weight, layout)
    return total


WAYS = {"scan": in_a_scan, "loop over unequal sizes": functools.partial(in_a_loop, UNEQUAL)}
any_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def assert_same(found, expected, rtol=1e-10):
    """Compares loss, gradients and factors."""
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-13)
    assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(lambda a: a.dtype, expected)
    jax.tree.map(close, found[:2], expected[:2])
    assert_factors(found[2], expected[2], rtol)


# The whole batch.


@any_way
@pytest.mark.parametrize("mask", [ALL, SOME], ids=["all rows", "masked rows"])
@any_model
def test_micro_batches_add_up_to_the_batch(name, mask, way, x64):
    (_, x), (grad_fn, _, params) = MODELS[name], made(name)
    found, expected = jax.jit(lambda p: (way(name, p, x, mask), grad_fn(p, x, mask)))(params)
    assert_same(found, expected)


@any_way
def test_a_micro_batch_without_a_row_left_counts_for_nothing(way, x64):
    """Its mean is 0/0; its masked rows are rows of the layers all the same."""
    mask = np.array([1.0, 0, 0, 0, 1, 1])
    grad_fn, _, params = made("dense")
    found, expected, (loss, *_) = jax.jit(
        lambda p: (way("dense", p, X, mask), grad_fn(p, X, mask), grad_fn(p, X[2:4], mask[2:4]))
    )(params)
    assert np.isnan(loss)
    assert np.isfinite(expected[0])
    assert_same(found, expected)


@pytest.mark.parametrize("sizes", [(0, 4, 2), (4, 0, 2), (4, 2, 0)])
@pytest.mark.parametrize("model", [MLP, Normed(nn.LayerNorm(param_dtype=F64))], ids=["", "norm"])
def test_an_empty_micro_batch_counts_for_nothing(model, sizes, x64):
    grad_fn, layout, params = capture_of(model, X, ALL)

    def total_over(params, sizes):
        calls = [(len(x) / ROWS, x, np.ones(len(x))) for x in split(X, sizes)]
        return looped(grad_fn, layout, params, calls)

    assert_same(*jax.jit(lambda p: (total_over(p, sizes), total_over(p, (4, 2))))(params))


def test_a_sum_has_weights_of_one(x64):
    _, layout, params = made("dense")

    def loss_fn(params, x):
        return len(x) * mean_loss(MLP)(params, x, np.ones(len(x)))

    grad_fn = af.value_and_grad(loss_fn, layout)
    summed = af.accumulate(grad_fn, layout, np.ones(3, int))
    assert_same(*jax.jit(lambda p: (summed(p, X.reshape(3, 2, 3)), grad_fn(p, X)))(params))


@any_way
@every_rule
def test_a_trajectory_is_that_of_the_batch(rule, way, x64):
    name = "scan over axis 1"
    grad_fn, layout, start = made(name)
    tx = af.adafisherw(0.01, layout, rule=rule, damping=0.1)

    def train(grad_fn, params):
        def step(carry, x):
            params, state = carry
            _, grads, factors = grad_fn(params, x, SOME)
            updates, state = tx.update(grads, state, params, factors=factors)
            return (optax.apply_updates(params, updates), state), None

        batches = jnp.asarray(np.random.default_rng(1).normal(size=(5, *X.shape)))
        return jax.lax.scan(step, (params, tx.init(params)), batches)[0]

    accumulated = functools.partial(way, name)
    found, expected = jax.jit(lambda p: (train(accumulated, p), train(grad_fn, p)))(start)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), found, expected
    )
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), found[0], start)
    assert min(jax.tree.leaves(moved)) > 1e-3


# What is not a mean over rows, and layers that took no part.


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, nn.BatchNorm])
def test_the_result_is_that_of_one_loss_which_calls_the_model_for_each_micro_batch(norm, x64):
    """Also for normalization layers, whose statistics depend on the batch as a whole."""
    options = {"use_running_average": False} if norm is nn.BatchNorm else {}
    model = Normed(norm(param_dtype=F64, **options))
    x = RNG.normal(size=(ROWS, 3, 2))
    params, stats = random_params(model, x), {}
    if norm is nn.BatchNorm:
        stats = {"batch_stats": {"norm": {"mean": np.zeros(4), "var": np.ones(4)}}}

    def loss_fn(params, x):
        y, _ = model.apply(stats | {"params": params}, x, mutable=["batch_stats"])
        return jnp.mean(waves(y))

    calls = [(len(part) / ROWS, part) for part in split(x, UNEQUAL)]

    def at_once(params):
        return sum(weight * loss_fn(params, part) for weight, part in calls)

    layout = af.trace_layout(loss_fn, params, x)
    grad_fn, once = (af.value_and_grad(f, layout) for f in (loss_fn, at_once))
    found, expected, whole = jax.jit(
        lambda p: (looped(grad_fn, layout, p, calls), once(p), grad_fn(p, x))
    )(params)
    assert_same(found, expected)
    assert not np.allclose(found[2]["norm"].s, whole[2]["norm"].s, rtol=0.01)


def test_a_layer_left_out_of_some_micro_batches(x64):
    def loss_fn(params, x, deep):
        y = nn.Dense(3).apply({"params": params["a"]}, x)
        y = nn.Dense(3).apply({"params": params["b"]}, jnp.tanh(y)) if deep else y
        return jnp.mean(waves(y))

    calls = [(1 / 3, X[:2], False), (1 / 3, X[2:4], True), (1 / 3, X[4:], False)]

    def at_once(params):
        return sum(weight * loss_fn(params, *args) for weight, *args in calls)

    params = {name: random_params(Dense(3), X) for name in "ab"}
    layout = af.trace_layout(loss_fn, params, X, True)
    grad_fn, once = (af.value_and_grad(f, layout) for f in (loss_fn, at_once))
    found, expected = jax.jit(lambda p: (looped(grad_fn, layout, p, calls), once(p)))(params)
    assert_same(found, expected)
    assert found[2]["b"].rows == 2


# Arguments, results and types.


def test_arguments_that_are_no_arrays_are_handed_on(x64):
    _, layout, params = made("dense")
    seen = []

    def loss_fn(params, x, train, *, name, rate, masks):
        seen.append((train, name, rate))
        return mean_loss(MLP)(params, x, masks["rows"])

    grad_fn = af.value_and_grad(loss_fn, layout)
    options = {"train": True, "name": "x", "rate": 0.5}
    accumulated = af.accumulate(grad_fn, layout)

    def both(p):
        masks = {"rows": np.ones((2, 3))}, {"rows": ALL}
        return (
            accumulated(p, X.reshape(2, 3, 3), masks=masks[0], **options),
            grad_fn(p, X, masks=masks[1], **options),
        )

    assert_same(*jax.jit(both)(params))
    assert set(seen) == {(True, "x", 0.5)}


def test_random_keys_are_one_for_each_micro_batch(x64):
    _, layout, params = made("dense")

    def loss_fn(params, x, key):
        return mean_loss(MLP)(params, x + jax.random.normal(key, x.shape), np.ones(len(x)))

    grad_fn, keys = af.value_and_grad(loss_fn, layout), jax.random.split(jax.random.key(0), 3)
    calls = [(1 / 3, x, key) for x, key in zip(split(X, EQUAL), keys, strict=True)]
    accumulated = af.accumulate(grad_fn, layout)
    assert_same(
        *jax.jit(
            lambda p: (accumulated(p, X.reshape(3, 2, 3), keys), looped(grad_fn, layout, p, calls))
        )(params)
    )


def noisy_params(model):
    key = jax.random.key(0)
    return random_like(jax.eval_shape(model.init, {"params": key, "dropout": key}, X)["params"])


def test_a_key_that_is_closed_over_is_that_of_every_micro_batch(x64):
    model = nn.Sequential([Dense(4), nn.Dropout(0.5, deterministic=False), Dense(2)])

    def both(params, key, count):
        def loss_fn(params, x):
            rngs = {"dropout": jax.random.fold_in(key, count)}
            return jnp.mean(waves(model.apply({"params": params}, x, rngs=rngs)))

        layout = af.trace_layout(loss_fn, params, X[:2])
        grad_fn = af.value_and_grad(loss_fn, layout)
        calls = [(1 / 3, x) for x in split(X, EQUAL)]
        accumulated = af.accumulate(grad_fn, layout)(params, X.reshape(3, 2, 3))
        return accumulated, looped(grad_fn, layout, params, calls)

    assert_same(*jax.jit(both)(noisy_params(model), jax.random.key(1), jnp.int32(7)))


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(False, momentum=0.9, param_dtype=F64, name="norm")(Dense(4)(x))
        return Dense(2)(nn.Dropout(0.5, deterministic=False)(x))


def test_masks_and_running_statistics(x64):
    """A key for each; all start from one set of statistics, which the stack's mean moves once."""
    keys, params = jax.random.split(jax.random.key(0), 3), noisy_params(Noisy())
    stats = {"norm": {"mean": np.arange(4.0), "var": np.arange(1.0, 5.0)}}

    def loss_fn(params, x, key, stats):
        variables = {"params": params, "batch_stats": stats}
        y, new = Noisy().apply(variables, x, rngs={"dropout": key}, mutable="batch_stats")
        return jnp.mean(waves(y)), new["batch_stats"]

    layout = af.trace_layout(loss_fn, params, X[:2], keys[0], stats)
    grad_fn = af.value_and_grad(loss_fn, layout, has_aux=True)
    summed = af.accumulate(lambda *args: grad_fn(*args, stats), layout)
    calls = [(1 / 3, x, key, stats) for x, key in zip(split(X, EQUAL), keys, strict=True)]

    def without_aux(params, *args):
        (loss, _), *rest = grad_fn(params, *args)
        return loss, *rest

    ((loss, stack), *rest), expected = jax.jit(
        lambda p: (summed(p, X.reshape(3, 2, 3), keys), looped(without_aux, layout, p, calls))
    )(params)
    assert_same((loss, *rest), expected)
    y = Dense(4).apply({"params": params["Dense_0"]}, X).reshape(3, 2, 4)
    seen = {"mean": y.mean(1), "var": y.var(1)}
    for name, old in stats["norm"].items():
        moved = 0.9 * old + 0.1 * np.mean(seen[name], 0)
        np.testing.assert_allclose(stack["norm"][name].mean(0), moved, rtol=1e-10)


def test_auxiliary_data_come_back_as_a_stack(x64):
    _, layout, params = made("dense")

    def loss_fn(params, x, mask):
        return mean_loss(MLP)(params, x, mask), {"first": x[0], "sums": (mask.sum(), 1)}

    grad_fn = af.value_and_grad(loss_fn, layout, has_aux=True)
    x, mask = X.reshape(2, 3, 3), SOME.reshape(2, 3)
    accumulated = af.accumulate(grad_fn, layout, mask.sum(1) / 4)
    ((loss, aux), *rest), ((whole, _), *expected) = jax.jit(
        lambda p: (accumulated(p, x, mask), grad_fn(p, X, SOME))
    )(params)
    assert_same((loss, *rest), (whole, *expected))
    np.testing.assert_array_equal(aux["first"], x[:, 0])
    np.testing.assert_array_equal(aux["sums"], ([2, 2], [1, 1]))


def test_bfloat16_gradients_are_rounded_once():
    values = jnp.asarray(RNG.normal(size=(40, 9)), jnp.bfloat16)
    accumulated = af.accumulate(lambda params, g: (g[0], {"w": g}, {}), af.Layout(()))
    loss, grads, _ = accumulated({"w": values[0]}, values)
    exact = np.float64(values).mean(0).astype(jnp.bfloat16)
    np.testing.assert_array_equal(grads["w"], exact)
    assert (loss.dtype, loss) == (jnp.bfloat16, exact[0])


WRONG = {
    "no array": ((3,), {}, None, "args: got no array"),
    "two sizes": ((np.ones((2, 3, 3)), np.ones((3, 3))), {}, None, r"args/0 .*args/1 .*"),
    "two sizes inside": ((X,), {"m": {"n": ALL[:2]}}, None, r"args/0 .*kwargs/m/n"),
    "a number": ((X, jnp.float32(1)), {}, None, r"args/1 has shape \(\)"),
    "no micro-batch": ((X[:0],), {}, None, r"args/0 has shape \(0, 3\)"),
    "too few weights": ((X,), {}, np.ones(5), r"weights has shape \(5,\), .*\(6,\)"),
    "one weight": ((X,), {}, 1.0, r"weights has shape \(\), .*\(6,\)"),
}


@pytest.mark.parametrize(("args", "kwargs", "weights", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(args, kwargs, weights, message):
    with pytest.raises(ValueError, match=message):
        af.accumulate(None, af.Layout(()), weights)(None, *args, **kwargs)


def test_a_loop_wants_the_loss_without_auxiliary_data():
    with pytest.raises(ValueError, match="result: its loss is a tuple"):
        af.add_micro_batch(None, ((1.0, {}), {}, {}), 1.0, af.Layout(()))


# Memory, and optax's own accumulation.


def test_a_scan_takes_the_memory_of_one_micro_batch():
    model = nn.Sequential([nn.Dense(64), jnp.tanh, nn.Dense(64), jnp.tanh, nn.Dense(2)])
    x, mask = np.ones((8 * 256, 8), np.float32), np.ones(8 * 256, np.float32)
    grad_fn, layout, params = capture_of(model, x, mask)

    def temporary_bytes(fn, *args):
        return jax.jit(fn).lower(params, *args).compile().memory_analysis().temp_size_in_bytes

    one = temporary_bytes(grad_fn, x[:256], mask[:256])
    whole = temporary_bytes(grad_fn, x, mask)
    stacked = temporary_bytes(
        af.accumulate(grad_fn, layout), x.reshape(8, 256, 8), mask.reshape(8, 256)
    )
    assert whole > 6 * one
    assert stacked < 2 * one


def test_multi_steps_keeps_the_last_micro_batch_alone(x64):
    """Its gradients are the batch's, but of the factors it hands on the last ones."""
    grad_fn, layout, params = made("dense")
    tx = af.scale_by_adafisher(layout, rule="centered")
    multi = optax.MultiSteps(tx, every_k_schedule=3)

    def gathered(params):
        state = multi.init(params)
        for x in split(X, EQUAL):
            _, grads, factors = grad_fn(params, x, ALL[:2])
            _, state = multi.update(grads, state, params, factors=factors)
        return state.inner_opt_state, tx.update(grads, tx.init(params), factors=factors)[1]

    def accumulated(params):
        _, grads, factors = in_a_scan("dense", params, X, ALL)
        return tx.update(grads, tx.init(params), factors=factors)[1]

    (found, last), right = jax.jit(lambda p: (gathered(p), accumulated(p)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found.mu, right.mu)
    assert_factors(found.factors, last.factors)
    for path, factor in right.factors.items():
        for name, a, b in zip(factor._fields, factor, found.factors[path], strict=True):
            assert not np.allclose(a, b, rtol=0.01), (path, name)
