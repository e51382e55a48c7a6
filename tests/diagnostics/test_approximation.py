"""Steps beside the exact ones: NumPy's, from per-example gradients and whole factors."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adafisher_jax as af
from adafisher_jax.diagnostics import Comparison, Deviation, compare_steps
from tests.diagnostics.test_full_factors import Scanned, whole
from tests.support.reference import F64, Block, Dense, calls_of, random_params, slices

pytestmark = pytest.mark.usefixtures("x64")

B, DAMPING = 6, 0.3


# The definition, in NumPy.


def compared(each, h, s, rows):
    """A `Comparison` from every example's gradient, (B, n), and the factors."""
    exact = each.T @ each / len(each)
    kronecker = rows * len(each) * np.kron(h, s)
    gradient = each.mean(0)

    def step(curvature):
        damped = curvature + DAMPING * np.mean(np.diag(curvature)) * np.eye(len(curvature))
        return np.linalg.solve(damped, gradient)

    wanted = step(exact)
    length = np.linalg.norm(wanted)

    def deviation(found):
        cosine = found @ wanted / np.linalg.norm(found) / length
        return Deviation(np.degrees(np.arccos(cosine)), np.linalg.norm(found - wanted) / length)

    steps = step(np.diag(np.diag(kronecker))), step(kronecker)
    return Comparison(*map(deviation, (gradient * length / np.linalg.norm(gradient), *steps)))


def vectors(leaves):
    """Gradients of every example, (B, n): the kernel's rows of outputs, then the bias."""
    kernel = np.asarray(leaves["embedding" if "embedding" in leaves else "kernel"])
    parts = [kernel.reshape(len(kernel), -1)]
    if "bias" in leaves:
        parts.append(np.asarray(leaves["bias"]))
    return np.concatenate(parts, 1)


def assert_compared(found, expected):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-7)
    jax.tree.map(close, found, expected)


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3,), strides=2, use_bias=False, param_dtype=F64, name="conv")(x)
        return Dense(2, name="head")(jnp.tanh(x).reshape(len(x), -1))


class Sequence(nn.Module):
    """Every position of an example is a row."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 2, param_dtype=F64, name="embed")(tokens)
        return Dense(2, name="head")(jnp.cumsum(jnp.tanh(x), 1))


MODELS = {
    "dense": (Block(), (B, 3)),
    "conv": (Convolutional(), (B, 5, 2)),
    "sequence": (Sequence(), (B, 4)),
    "scan": (Scanned(), (B, 3)),
}


def part(apply, x):
    """A mean over examples of terms that depend on one each."""
    y = apply(x)
    return jnp.mean(
        jnp.square(y - jnp.arange(1.0, y.size + 1)[: y[0].size].reshape(1, *y[0].shape))
    )


def apply_of(name, params):
    return functools.partial(MODELS[name][0].apply, {"params": params})


def loss_fn(params, inputs):
    return sum(part(apply_of(name, params[name]), x) for name, x in inputs.items())


@functools.cache
def everything():
    """Parameters, inputs, what is found, and every example's gradients."""
    rng = np.random.default_rng(0)
    inputs = {name: jnp.asarray(rng.normal(size=shape)) for name, (_, shape) in MODELS.items()}
    inputs["sequence"] = jnp.asarray(rng.integers(5, size=MODELS["sequence"][1]))
    params = {name: random_params(model, inputs[name]) for name, (model, _) in MODELS.items()}
    layout = af.trace_layout(loss_fn, params, inputs)
    found = jax.jit(compare_steps(loss_fn, layout, damping=DAMPING))(params, inputs)
    gradient = jax.jit(jax.grad(loss_fn))
    each = [gradient(params, {name: x[i : i + 1] for name, x in inputs.items()}) for i in range(B)]
    return params, inputs, found, jax.tree.map(lambda *leaves: np.stack(leaves), *each)


def test_all_layers_with_two_factors_are_compared():
    assert everything()[2].keys() == {
        "dense/up", "dense/down", "conv/conv", "conv/head", "sequence/embed", "sequence/head",
        "scan/layers/block/up", "scan/layers/block/down",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["dense", "conv", "sequence"])
def test_steps_are_those_of_the_matrices_written_out(name):
    params, inputs, found, each = everything()
    calls = calls_of(lambda p, x: part(apply_of(name, p), x), params[name], inputs[name])
    assert {call.path for call in calls} == params[name].keys()
    for call in calls:
        factor = whole([call], "bias" in params[name][call.path])
        expected = compared(vectors(each[name][call.path]), *(one[0] for one in factor))
        assert_compared(found[f"{name}/{call.path}"], expected)


def test_stacked_layers_are_each_compared():
    params, inputs, found, each = everything()
    trees = slices(params["scan"]["layers"]["block"])

    def run(trees, x):
        for tree in trees:
            x = Block().apply({"params": tree}, x)
        return x

    calls = calls_of(lambda p, x: part(functools.partial(run, p), x), trees, inputs["scan"])
    for leaf in ("up", "down"):
        own = slices(each["scan"]["layers"]["block"][leaf], 1)
        for i, call in enumerate(call for call in calls if call.path == leaf):
            expected = compared(vectors(own[i]), *(one[0] for one in whole([call], True)))
            one = jax.tree.map(lambda value: value[i], found[f"scan/layers/block/{leaf}"])
            assert_compared(one, expected)
        assert len(own) == 3


def test_an_nnx_module_is_compared_like_its_linen_twin():
    params, inputs, found, _ = everything()

    class Twin(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = (
                nnx.Linear(*sizes, param_dtype=F64, rngs=rngs) for sizes in ((3, 4), (4, 3))
            )

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    model = Twin(nnx.Rngs(0))
    nnx.update(model, params["dense"])
    layout = af.nnx.trace_layout(part, model, inputs["dense"])
    compare = compare_steps(part, layout, ["up"], damping=DAMPING)
    assert_compared(jax.jit(compare)(model, inputs["dense"])["up"], found["dense/up"])


# Where the curvature is known.


def linear(params, x, t):
    """A loss whose cotangents are `t`, whatever the parameters."""
    model = Dense(t.shape[-1], use_bias="bias" in params)
    y = model.apply({"params": params}, x)
    return jnp.mean(jnp.sum((y * t).reshape(len(y), -1), 1))


def linear_comparison(x, t, bias=True):
    x, t = (jnp.asarray(value) for value in (x, t))
    params = random_params(Dense(t.shape[-1], use_bias=bias), x)
    layout = af.trace_layout(linear, params, x, t)
    return jax.jit(compare_steps(linear, layout))(params, x, t)[""]


def pairs(*values):
    """Every combination, so that the columns are independent."""
    return [np.stack(column) for column in zip(*itertools.product(*values), strict=True)]


INPUTS = np.random.default_rng(1).normal(size=(4, 3))
COTANGENTS = np.random.default_rng(2).normal(size=(3, 2)) + 1


def test_the_kronecker_curvature_is_exact_where_inputs_and_cotangents_are_independent():
    found = linear_comparison(*pairs(INPUTS, COTANGENTS))
    assert found.kronecker.angle < 1e-6
    assert found.kronecker.error < 1e-8
    assert found.diagonal.angle > 1
    assert found.gradient.angle > 1


def test_and_over_positions_that_do_not_hang_together():
    """One position's cotangent has either sign, so that its products with the other's cancel."""
    sign, *x = pairs([1, -1], INPUTS, INPUTS)
    t = np.stack([sign[:, None] * COTANGENTS[:1], np.tile(COTANGENTS[:1], (len(sign), 1))], 1)
    found = linear_comparison(np.stack(x, 1), t)
    assert found.kronecker.error < 1e-8
    assert found.gradient.error > 0.1


def test_the_diagonal_is_exact_where_factors_are_diagonal():
    """One-hot inputs and cotangents, in different frequencies."""
    x, t = pairs(np.eye(3)[[0, 1, 1, 2, 2, 2]], np.eye(2)[[0, 1, 1]])
    found = linear_comparison(x, t, bias=False)
    assert found.diagonal.error < 1e-10
    assert found.kronecker.error < 1e-10
    assert found.gradient.error > 0.1


def test_small_angles_are_seen_in_float32():
    with jax.enable_x64(False):
        x, t = (np.float32(value) for value in pairs(INPUTS, COTANGENTS))
        params = jax.tree.map(jnp.float32, random_params(nn.Dense(2), x))

        def loss_fn(params, x, t):
            return jnp.mean(jnp.sum(nn.Dense(2).apply({"params": params}, x) * t, 1))

        layout = af.trace_layout(loss_fn, params, x, t)
        found = jax.jit(compare_steps(loss_fn, layout))(params, x, t)[""]
    assert found.kronecker.angle < 1e-3


# Choices and errors.


class Large(nn.Module):
    """A layer of 2,020 parameters, one of 2,000, and five of 420 in one array."""

    @nn.compact
    def __call__(self, x):
        x = Dense(20, name="large")(x)
        x = nn.LayerNorm(param_dtype=F64, name="norm")(x)
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=5,
        )
        x, _ = scan(Dense(20, name="stacked"), x, None)
        return Dense(100, use_bias=False, name="small")(x)


def test_large_layers_are_compared_only_when_asked_for():
    x = jnp.ones((2, 100))
    model = Large()
    params = random_params(model, x)

    def loss_fn(params, x):
        return jnp.mean(model.apply({"params": params}, x))

    layout = af.trace_layout(loss_fn, params, x)

    def chosen(*paths):
        return jax.eval_shape(compare_steps(loss_fn, layout, *paths), params, x).keys()

    assert chosen() == {"stacked", "small"}
    assert chosen(iter(["large", "small"])) == {"large", "small"}


def test_errors_say_what_was_given_and_wanted():
    x, t = np.ones((4, 3)), np.ones((4, 2))
    params = random_params(Dense(2), x)
    layout = af.trace_layout(linear, params, x, t)
    with pytest.raises(ValueError, match="paths: got 'c'"):
        compare_steps(linear, layout, ["c"])
    with pytest.raises(TypeError, match="layout: got NoneType"):
        compare_steps(linear, None)

    def scaled(params, x, t, scale):
        return scale * linear(params, x, t)

    compare = compare_steps(scaled, layout)
    assert jax.eval_shape(lambda *xs: compare(*xs, 2.0), params, x, t).keys() == {""}
    with pytest.raises(ValueError, match=r"shapes \(4, 3\), \(4, 2\), \(\), wanted the examples"):
        compare(params, x, t, jnp.ones(()))

    with pytest.raises(ValueError, match=r"shapes \(4, 3\), \(2, 2\), wanted the examples"):
        compare_steps(linear, layout)(params, x, t[:2])
    with pytest.raises(ValueError, match="got no array, wanted"):
        compare_steps(lambda params: linear(params, x, t), layout)(params)
