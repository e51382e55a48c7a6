"""Every layer kind's factors against the brute-force reference, in float64."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

import adafisher_jax as af
from tests.support.reference import (
    F64,
    assert_factors,
    captured,
    factors_of,
    inputs_of,
    loss_of,
    random_params,
    same_as_plain,
    scalar,
)

Dense, DenseGeneral, Einsum, Conv, ConvLocal, ConvTranspose, Embed = (
    functools.partial(layer, param_dtype=F64)
    for layer in (
        nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Embed,
    )
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("x64")


def check(model, *inputs, method=None):
    """Captures one layer or model of layers; everything in it must be covered and right."""
    params = random_params(model, *inputs, method=method)
    loss_fn = loss_of(model, method=method)
    layout, factors = captured(loss_fn, params, *inputs)
    assert layout.covered == 1, str(layout)
    assert_factors(factors, factors_of(loss_fn, params, *inputs))
    return params, factors


DENSE = {
    "1-D": (Dense(3), (2,)),
    "2-D": (Dense(3), (4, 2)),
    "3-D": (Dense(3, use_bias=False), (2, 3, 4)),
    "one feature": (Dense(1), (4, 1)),
    "general": (DenseGeneral(3), (4, 2)),
    "several features": (DenseGeneral((2, 3)), (4, 2)),
    "several axes": (DenseGeneral((2, 3), axis=(1, 3)), (2, 3, 4, 2)),
    "negative axes": (DenseGeneral(3, axis=(-2, -1)), (4, 2, 3)),
    "unsorted axes": (DenseGeneral(3, axis=(-1, -2)), (4, 2, 3)),
    "first axis": (DenseGeneral(3, axis=0), (4, 2)),
    "all axes": (DenseGeneral(3, axis=(0, 1)), (4, 2)),
    "batch dim": (DenseGeneral(3, batch_dims=(0,)), (2, 5, 4)),
    "batch dims, several axes": (
        DenseGeneral((2, 3), axis=(2, -1), batch_dims=(0, 1)),
        (2, 3, 4, 5, 2),
    ),
    "batch dim without bias": (DenseGeneral(3, batch_dims=(0,), use_bias=False), (2, 5, 4)),
}

EINSUM = {
    "dense": (Einsum((2, 3), "bi,io->bo"), (4, 2)),
    "spaces": (Einsum((2, 3), "b i, i o -> b o"), (4, 2)),
    "kernel transposed": (Einsum((3, 2), "bi,oi->bo"), (4, 2)),
    "ellipsis": (Einsum((2, 3), "...i,io->...o"), (4, 5, 2)),
    "empty ellipsis": (Einsum((2, 3), "...i,io->...o"), (2,)),
    "ellipsis moved": (Einsum((2, 3), "...i,io->o..."), (4, 5, 2)),
    "contracts several": (Einsum((2, 3, 4), "bij,ijo->bo"), (5, 2, 3)),
    "several outputs": (Einsum((2, 3, 4), "bi,iop->pbo"), (5, 2)),
    "shared letter": (Einsum((4, 2, 3), "bhi,hio->bho"), (5, 4, 2)),
    "shared letter, no sum": (Einsum((4,), "bh,h->bh", kernel_init=nn.initializers.ones), (5, 4)),
    "shared letter, first": (Einsum((2, 4, 3), "hbi,iho->boh"), (4, 5, 2)),
    "kernel-only letter": (Einsum((2, 4, 3), "bi,iko->bo"), (5, 2)),
    "input-only letter": (Einsum((2, 3), "bki,io->bo"), (5, 4, 2)),
    "no output letter": (Einsum((2, 3), "bij,ij->b", use_bias=False), (5, 2, 3)),
    "no row letter": (Einsum((2, 3), "i,io->o"), (2,)),
}

CONV = {
    "no space": (Conv(3, ()), (5, 2)),
    "no space, grouped": (Conv(4, (), feature_group_count=2), (5, 4)),
    "1-D": (Conv(3, (3,)), (2, 6, 2)),
    "int kernel size": (Conv(3, 3), (2, 6, 2)),
    "2-D": (Conv(3, (3, 2)), (2, 5, 4, 2)),
    "3-D": (Conv(2, (2, 3, 1)), (2, 3, 4, 2, 2)),
    "VALID": (Conv(3, (3, 2), padding="VALID", use_bias=False), (2, 5, 4, 2)),
    "SAME strided": (Conv(3, (3, 3), strides=2), (2, 6, 5, 2)),
    "SAME, stride over kernel": (Conv(3, (2,), strides=3), (2, 8, 2)),
    "VALID strided": (Conv(3, (3, 2), strides=(2, 3), padding="VALID"), (2, 6, 5, 2)),
    "stride over input": (Conv(3, (3, 3), strides=2), (2, 1, 1, 2)),
    "unread end": (Conv(3, (2,), strides=4, padding="VALID"), (2, 8, 2)),
    "SAME_LOWER": (Conv(3, (4,), strides=2, padding="SAME_LOWER"), (2, 7, 2)),
    "even kernel": (Conv(3, (4, 2)), (2, 5, 4, 2)),
    "int padding": (Conv(3, (3, 3), padding=2), (2, 4, 4, 2)),
    "asymmetric padding": (Conv(3, (3, 2), strides=2, padding=((2, 0), (1, 3))), (2, 5, 4, 2)),
    "negative padding": (Conv(3, (2,), padding=((-1, 1),)), (2, 6, 2)),
    "CAUSAL": (Conv(3, (3,), padding="CAUSAL"), (2, 6, 2)),
    "CAUSAL dilated": (Conv(3, (3,), padding="CAUSAL", kernel_dilation=2, strides=2), (2, 7, 2)),
    "CIRCULAR": (Conv(3, (3, 4), padding="CIRCULAR"), (2, 5, 4, 2)),
    "CIRCULAR strided": (
        Conv(3, (4,), padding="CIRCULAR", strides=2, kernel_dilation=2),
        (2, 7, 2),
    ),
    "CIRCULAR, wide kernel": (Conv(3, (9,), padding="CIRCULAR"), (2, 3, 2)),
    "REFLECT": (Conv(3, (3, 4), padding="REFLECT"), (2, 5, 4, 2)),
    "REFLECT strided": (Conv(3, (3,), padding="REFLECT", strides=2, kernel_dilation=2), (2, 7, 2)),
    "kernel dilation": (Conv(3, (3, 2), kernel_dilation=(2, 1)), (2, 6, 4, 2)),
    "kernel dilation, strided": (Conv(3, (2, 2), kernel_dilation=2, strides=2), (2, 6, 5, 2)),
    "input dilation": (
        Conv(3, (3, 2), input_dilation=(2, 1), padding=((1, 2), (0, 1))),
        (2, 3, 4, 2),
    ),
    "both dilations": (
        Conv(3, (2,), input_dilation=3, kernel_dilation=2, strides=2, padding=1),
        (2, 5, 2),
    ),
    "groups": (Conv(6, (3, 2), feature_group_count=2), (2, 4, 4, 4)),
    "groups strided": (Conv(4, (3,), feature_group_count=2, strides=2, use_bias=False), (2, 7, 6)),
    "depthwise": (Conv(3, (3, 3), feature_group_count=3), (2, 4, 4, 3)),
    "depthwise, wider": (Conv(6, (3,), feature_group_count=3), (2, 5, 3)),
    "1x1": (Conv(3, (1, 1)), (2, 4, 4, 2)),
    "no batch dim": (Conv(3, (3, 2)), (5, 4, 2)),
    "two batch dims": (Conv(3, (3,), strides=2), (2, 3, 6, 2)),
    "masked": (Conv(3, (3,), mask=np.tril(np.ones((3, 2, 3)))), (2, 6, 2)),
}

CONV_LOCAL = {
    "1-D": (ConvLocal(3, (3,)), (2, 5, 2)),
    "2-D": (ConvLocal(2, (3, 2)), (2, 4, 3, 2)),
    "VALID": (ConvLocal(2, (2, 2), padding="VALID", use_bias=False), (2, 3, 3, 2)),
    "strided": (ConvLocal(2, (3, 2), strides=(2, 1)), (2, 5, 3, 2)),
    "explicit padding": (ConvLocal(2, (2,), padding=((2, 0),)), (2, 4, 2)),
    "CIRCULAR dilated": (ConvLocal(2, (3,), padding="CIRCULAR", kernel_dilation=2), (2, 5, 2)),
    "CAUSAL": (ConvLocal(2, (3,), padding="CAUSAL"), (2, 4, 2)),
    "no batch dim": (ConvLocal(2, (3,)), (5, 2)),
    "two batch dims": (ConvLocal(2, (3,)), (2, 3, 4, 2)),
}

CONV_TRANSPOSE = {
    "1-D": (ConvTranspose(3, (3,)), (2, 4, 2)),
    "2-D strided": (ConvTranspose(3, (3, 2), strides=(2, 2)), (2, 3, 3, 2)),
    "even kernel": (ConvTranspose(3, (4,), strides=(2,)), (2, 4, 2)),
    "even kernel, stride 1": (ConvTranspose(3, (2,)), (2, 4, 2)),
    "stride over kernel": (ConvTranspose(3, (2,), strides=(3,)), (2, 4, 2)),
    "VALID": (ConvTranspose(3, (3,), strides=(2,), padding="VALID", use_bias=False), (2, 4, 2)),
    "VALID, stride over kernel": (ConvTranspose(3, (2,), strides=(3,), padding="VALID"), (2, 4, 2)),
    "explicit padding": (ConvTranspose(3, (3,), strides=(2,), padding=((1, 2),)), (2, 4, 2)),
    "int padding": (ConvTranspose(3, (3,), padding=1), (2, 4, 2)),
    "CIRCULAR": (ConvTranspose(3, (3, 3), strides=(2, 2), padding="CIRCULAR"), (2, 3, 4, 2)),
    "CIRCULAR, even kernel": (ConvTranspose(3, (4,), strides=(2,), padding="CIRCULAR"), (2, 4, 2)),
    "CIRCULAR, wide kernel": (ConvTranspose(3, (7,), padding="CIRCULAR"), (2, 3, 2)),
    "CIRCULAR, stride over kernel": (
        ConvTranspose(3, (2,), strides=(3,), padding="CIRCULAR"),
        (2, 4, 2),
    ),
    "kernel dilation": (ConvTranspose(3, (3,), strides=(2,), kernel_dilation=(2,)), (2, 4, 2)),
    "VALID, kernel dilation": (
        ConvTranspose(3, (2,), kernel_dilation=2, padding="VALID"),
        (2, 4, 2),
    ),
    "no batch dim": (ConvTranspose(3, (3, 2), strides=(2, 1)), (3, 3, 2)),
    "two batch dims": (ConvTranspose(3, (3,), strides=(2,)), (2, 3, 4, 2)),
    "masked": (ConvTranspose(3, (3,), mask=np.tril(np.ones((3, 2, 3)))), (2, 4, 2)),
}
TRANSPOSED_KERNEL = {
    f"{name}, transposed kernel": (layer.clone(transpose_kernel=True), shape)
    for name, (layer, shape) in CONV_TRANSPOSE.items()
    if name not in ("masked", "1-D", "int padding", "no batch dim", "two batch dims")
}

ALL = {
    f"{kind}: {name}": case
    for kind, cases in {
        "dense": DENSE,
        "einsum": EINSUM,
        "conv": CONV,
        "conv local": CONV_LOCAL,
        "conv transpose": CONV_TRANSPOSE | TRANSPOSED_KERNEL,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize(("layer", "shape"), ALL.values(), ids=ALL)
def test_linear_layer(layer, shape):
    check(layer, inputs_of(shape))


def test_einsum_given_in_the_call():
    x = inputs_of((4, 2))
    layer = nn.Einsum((2, 3), param_dtype=F64)
    named = layer.clone(einsum_str="bi,io->bo")
    params = random_params(named, x)
    _, factors = captured(loss_of(layer, einsum_str="bi,io->bo"), params, x)
    assert_factors(factors, factors_of(loss_of(named), params, x))


def test_einsum_along_a_diagonal_of_its_inputs_is_a_layer_of_the_diagonal():
    model, x = Einsum((2, 3), "bii,io->bo", use_bias=False), inputs_of((4, 2, 2))
    params = random_params(model, x)
    _, factors = captured(loss_of(model), params, x)
    diagonal = np.diagonal(x, axis1=1, axis2=2)
    assert_factors(factors, factors_of(loss_of(Dense(3, use_bias=False)), params, diagonal))


def test_einsum_along_a_diagonal_of_its_kernel_is_uncovered():
    model = nn.Sequential([Einsum((2, 2), "bi,ii->bi", use_bias=False), Dense(2)])
    params = random_params(model, inputs_of((4, 2)))
    layout, _ = captured(loss_of(model), params, inputs_of((4, 2)))
    assert [row.leaf.path for row in layout.uncovered] == ["layers_0/kernel"]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_with_one_scale_for_all_is_uncovered(norm):
    model = nn.Sequential([norm(feature_axes=(), use_fast_variance=False), Dense(2)])
    params = random_params(model, inputs_of((4, 3)))
    layout, _ = captured(loss_of(model), params, inputs_of((4, 3)))
    assert {row.leaf.path for row in layout.uncovered} == {
        f"layers_0/{k}" for k in params["layers_0"]
    }


# The shapes of the contract, written out: kernel, h and mean, s, rows.
SHAPES = {
    "dense": (Dense(5), (4, 3), (3, 5), (3, 1), (1, 5), 4),
    "dense general": (DenseGeneral((2, 8)), (4, 3), (3, 2, 8), (3, 1, 1), (1, 2, 8), 4),
    "batch dim": (DenseGeneral(3, batch_dims=(0,)), (2, 5, 4), (2, 4, 3), (2, 4, 1), (2, 1, 3), 5),
    "conv": (Conv(5, (3, 2)), (2, 4, 4, 6), (3, 2, 6, 5), (3, 2, 6, 1), (1, 1, 1, 5), 32),
    "groups": (Conv(4, (3,), feature_group_count=2), (2, 4, 6), (3, 3, 4), (3, 3, 1), (1, 1, 4), 8),
    "transposed": (
        ConvTranspose(5, (3,), transpose_kernel=True),
        (2, 4, 6), (3, 5, 6), (3, 1, 6), (1, 5, 1), 8,
    ),
    "local": (ConvLocal(5, (3,)), (2, 4, 6), (4, 18, 5), (4, 18, 1), (4, 1, 5), 2),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "x", "kernel", "h", "s", "rows"), SHAPES.values(), ids=SHAPES)
def test_shapes_follow_the_contract(layer, x, kernel, h, s, rows):
    params, factors = check(layer, inputs_of(x))
    assert params["kernel"].shape == kernel
    assert [leaf.shape for leaf in factors[""]] == [h, s, (), h]
    assert factors[""].rows == rows


def test_the_reference_agrees_with_patches_written_out():
    """The reference's Jacobians against loops over output positions, for one convolution."""
    layer, x = (
        Conv(4, (3, 2), strides=2, padding=((1, 2), (0, 1)), feature_group_count=2),
        (2, 5, 4, 6),
    )
    x = inputs_of(x)
    params = random_params(layer, x)
    factor = factors_of(loss_of(layer), params, x)[""]
    padded = np.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)))
    patches = [
        padded[b, i : i + 3, j : j + 2, 3 * group : 3 * group + 3]
        for b in range(2)
        for i in range(0, 6, 2)
        for j in range(0, 4, 2)
        for group in range(2)
    ]
    np.testing.assert_allclose(factor.h[..., 0], np.mean(np.square(patches), 0), 1e-12)
    np.testing.assert_allclose(factor.mean[..., 0], np.mean(patches, 0), 1e-12, 1e-15)
    y = layer.apply({"params": params}, x)
    g = jax.grad(scalar)(y)
    np.testing.assert_allclose(factor.s.ravel(), np.mean(np.square(g), (0, 1, 2)), 1e-12)
    assert factor.rows == y[..., 0].size == len(patches) / 2


class Doubled(nn.Dense):
    """A subclass that adds to what its parent does."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Replaced(nn.Dense):
    """A subclass that computes something else with a parameter of the same name."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", self.kernel_init, (3, self.features), self.param_dtype)


def test_a_subclass_that_calls_its_parent_is_its_parent():
    x = inputs_of((4, 3))
    model = Doubled(2, param_dtype=F64)
    params = random_params(model, x)

    def plain(params, x):
        return scalar(2 * Dense(2).apply({"params": params}, x))

    same_as_plain(loss_of(model), plain, params, x)


def test_a_subclass_with_a_method_of_its_own_is_what_that_computes():
    x = inputs_of((4, 3))
    model = nn.Sequential([Replaced(3, param_dtype=F64), Dense(2)])
    plain = nn.Sequential([Dense(3, use_bias=False), Dense(2)])
    same_as_plain(loss_of(model), loss_of(plain), random_params(model, x), x)


@pytest.mark.parametrize("layer", [nn.LayerNorm(), nn.RMSNorm(), nn.GroupNorm(1)])
def test_a_normalization_of_no_examples_has_no_statistics(layer):
    def loss(params, x):
        return layer.apply({"params": params}, x).sum()

    params = layer.init(jax.random.key(0), np.zeros((1, 3)))["params"]
    layout = af.trace_layout(loss, params, np.zeros((0, 3)))
    _, _, factors = af.value_and_grad(loss, layout)(params, np.zeros((0, 3)))
    assert all(not part.any() for part in factors[""])
