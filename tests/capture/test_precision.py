"""Types of the statistics, and what a capture allocates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import adafisher_jax as af
from tests.support.reference import captured, random_like, random_params, scalar

LAYERS = {
    "dense": (nn.Dense(3), (4, 5)),
    "einsum": (nn.Einsum((5, 3), "bti,io->bto"), (4, 3, 5)),
    "conv": (nn.Conv(3, (3, 3)), (2, 4, 4, 2)),
    "conv transpose": (nn.ConvTranspose(3, (2, 2), strides=(2, 2)), (2, 4, 4, 2)),
    "conv local": (nn.ConvLocal(3, (2, 2)), (4, 3, 3, 2)),
    "embedding": (nn.Embed(5, 3), None),
    "norm": (nn.LayerNorm(), (2, 3, 4)),
    "cell": (nn.RNN(nn.OptimizedLSTMCell(2)), (2, 2, 3)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("by", ["dtype", "cast"])
def test_bfloat16_activations_have_float32_statistics(layer, shape, by):
    """Whether the model computes in bfloat16 or the loss casts what it is given."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32) if shape else np.arange(16) % 5
    params = random_params(layer, x)

    def factors_in(dtype):
        low = dtype if by == "dtype" else None
        inside = (
            layer.clone(cell=layer.cell.clone(dtype=low))
            if isinstance(layer, nn.RNN)
            else layer.clone(dtype=low)
        )

        def loss_fn(params, x):
            if by == "cast":
                params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
                x = x.astype(dtype) if shape else x
            return scalar(inside.apply({"params": params}, x).astype(jnp.float32))

        layout = af.trace_layout(loss_fn, params, x)
        assert layout.covered == 1, str(layout)
        _, grads, factors = jax.jit(af.value_and_grad(loss_fn, layout))(params, x)
        types = {leaf.dtype for leaf in jax.tree.leaves((grads, factors))}
        assert types == {jnp.dtype(jnp.float32)}
        return factors

    expected, found = factors_in(jnp.float32), factors_in(jnp.bfloat16)
    assert found.keys() == expected.keys()
    for path, factor in expected.items():
        assert found[path].rows == factor.rows
        for name in ("h", "s", "mean"):
            want, got = getattr(factor, name), getattr(found[path], name)
            assert np.linalg.norm(got - want) <= 0.03 * np.linalg.norm(want), (path, name)


def test_bfloat16_rows_are_summed_in_float32():
    """Squares and sums in bfloat16 would be off by one part in 500."""
    layer = nn.Dense(2, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=(512, n)), jnp.bfloat16) for n in (3, 2))
    params = random_params(layer, x)

    def loss_fn(params, x):
        return jnp.sum((layer.apply({"params": params}, x) * w).astype(jnp.float32))

    layout = af.trace_layout(loss_fn, params, x)
    _, _, factors = jax.jit(af.value_and_grad(loss_fn, layout))(params, x)
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    np.testing.assert_allclose(factors[""].h[:, 0], jnp.mean(x**2, 0), 1e-5)
    np.testing.assert_allclose(factors[""].mean[:, 0], jnp.mean(x, 0), 1e-4)
    np.testing.assert_allclose(factors[""].s[0], jnp.mean(w**2, 0), 1e-5)
    assert factors[""].rows == 512


def test_bfloat16_parameters_have_float32_statistics():
    model, x = nn.Dense(2, param_dtype=jnp.bfloat16), jnp.ones((4, 3), jnp.bfloat16)
    params = random_params(model, x)
    loss_fn = lambda params, x: scalar(model.apply({"params": params}, x)).astype(jnp.float32)  # noqa: E731
    layout = af.trace_layout(loss_fn, params, x)
    _, grads, factors = jax.jit(af.value_and_grad(loss_fn, layout))(params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in factors[""]} == {jnp.dtype(jnp.float32)}


def test_float64_stays_float64(x64):
    model, x = nn.Dense(2, param_dtype=jnp.float64), jnp.ones((4, 3))
    _, factors = captured(
        lambda p, x: scalar(model.apply({"params": p}, x)), random_params(model, x), x
    )
    assert {leaf.dtype for leaf in factors[""]} == {jnp.dtype(jnp.float64)}


def largest_array(jaxpr):
    """The number of elements of the largest array a program makes, and its equation."""
    found = (0, "")
    for eqn in jaxpr.eqns:
        made = max((var.aval.size for var in eqn.outvars), default=0)
        inner = [
            leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf
            for leaf in jax.tree.leaves(
                list(eqn.params.values()),
                is_leaf=lambda v: isinstance(v, core.Jaxpr | core.ClosedJaxpr),
            )
            if isinstance(leaf, core.Jaxpr | core.ClosedJaxpr)
        ]
        found = max(found, (made, str(eqn.primitive)), *map(largest_array, inner))
    return found


CONVOLUTIONS = {
    "2-D": (nn.Conv(4, (5, 5)), (2, 12, 12, 4)),
    "3-D": (nn.Conv(4, (3, 3, 3)), (2, 6, 6, 6, 4)),
    "strided": (nn.Conv(4, (5, 5), strides=2), (2, 12, 12, 4)),
    "dilated": (nn.Conv(4, (5, 5), kernel_dilation=2, strides=2), (2, 12, 12, 4)),
    "depthwise": (nn.Conv(4, (5, 5), feature_group_count=4), (2, 12, 12, 4)),
    "input dilation": (nn.Conv(4, (5,), input_dilation=2, padding=3), (2, 32, 4)),
    "transposed": (nn.ConvTranspose(4, (5, 5), strides=(2, 2)), (2, 6, 6, 4)),
    "transposed kernel": (
        nn.ConvTranspose(4, (5, 5), strides=(2, 2), transpose_kernel=True),
        (2, 6, 6, 4),
    ),
    "local": (nn.ConvLocal(4, (5, 5)), (2, 8, 8, 4)),
}


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_no_patches_are_built(layer, shape):
    """Nothing larger than the input, the output or the kernel is ever made."""
    x = random_like(jax.ShapeDtypeStruct(shape, jnp.float32))
    params = random_params(layer, x)
    loss_fn = lambda params, x: jnp.mean(jnp.square(layer.apply({"params": params}, x)))  # noqa: E731
    grad_fn = af.value_and_grad(loss_fn, af.trace_layout(loss_fn, params, x))
    y = jax.eval_shape(lambda: layer.apply({"params": params}, x))
    allowed = max(x.size, y.size, params["kernel"].size)
    plain, by = largest_array(jax.make_jaxpr(jax.value_and_grad(loss_fn))(params, x).jaxpr)
    size, made_by = largest_array(jax.make_jaxpr(grad_fn)(params, x).jaxpr)
    assert size <= max(allowed, plain), (
        f"{made_by} made {size} elements, {by} {plain} without capture"
    )


def test_the_patch_test_sees_patches():
    x = jnp.ones((2, 12, 12, 4))

    def with_patches(x):
        return jax.lax.conv_general_dilated_patches(
            x, (5, 5), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).sum()

    size, _ = largest_array(jax.make_jaxpr(jax.jit(with_patches))(x).jaxpr)
    assert size == 25 * x.size
