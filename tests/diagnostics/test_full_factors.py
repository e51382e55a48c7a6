"""Whole factors: their diagonals are the captured ones, and all of them those of the definition."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adafisher_jax as af
from adafisher_jax.diagnostics import FullFactor, full_factors, pool
from tests.capture.test_layers import ALL, Conv, DenseGeneral, Einsum
from tests.capture.test_layers_composed import Recurrent
from tests.support import nnx_reference
from tests.support.reference import (
    F64,
    Block,
    Dense,
    calls_of,
    in_turn,
    inputs_of,
    jacobian_of,
    loss_of,
    matched_axes,
    random_params,
    scalar,
    slices,
)

pytestmark = pytest.mark.usefixtures("x64")


# The definition: each row's inputs from a Jacobian, its cotangents by perturbation.


def rows_of(call):
    """A layer's inputs, (rows, blocks, outs, ins), and its cotangents, (rows, blocks, outs)."""
    module, g = call.module, call.g
    if getattr(module, "mask", None) is not None:  # a mask is on the kernel, not on its inputs
        module = module.clone(mask=None)
    jacobian = np.asarray(jacobian_of(module, call.method, call.x), g.dtype)
    outs, batches = matched_axes(call, jacobian.ndim - g.ndim)
    y = "abcdefghij"[: g.ndim]
    own = outs | batches
    kernel = "".join(
        y[own[i]] if i in own else "ABCDEFGHIJ"[i] for i in range(jacobian.ndim - g.ndim)
    )
    ins = "".join(c for c in kernel if c.isupper())
    inputs = np.einsum(f"{y}{kernel}->{y}{ins}", jacobian)
    blocks, outs = ([axes[i] for i in sorted(axes)] for axes in (batches, outs))
    rows = [i for i in range(g.ndim) if i not in blocks + outs]
    sizes = [math.prod(g.shape[i] for i in axes) for axes in (rows, blocks, outs)]
    order = [*rows, *blocks, *outs]
    inputs = inputs.transpose(*order, *range(g.ndim, inputs.ndim)).reshape(*sizes, -1)
    return inputs, g.transpose(order).reshape(sizes)


def whole(calls, bias):
    """The factors of a layer's calls, with one axis of blocks; groups of outputs are averaged."""
    h = s = rows = 0
    for inputs, g in map(rows_of, calls):
        if bias:
            inputs = np.concatenate([inputs, np.ones((*inputs.shape[:-1], 1))], -1)
        h = h + np.einsum("rboi,rboj->bij", inputs, inputs) / inputs.shape[2]
        s = s + np.einsum("rbo,rbp->bop", g, g)
        rows += len(g)
    return FullFactor(h / rows, s / rows, np.full(len(h), rows))


def stacked(factors):
    return FullFactor(*(np.concatenate(part) for part in zip(*factors, strict=True)))


def assert_whole(found, expected):
    for name, got, want in zip(FullFactor._fields, found, expected, strict=True):
        size = np.shape(want)[1:]
        np.testing.assert_allclose(got.reshape(-1, *size), want, 1e-10, 1e-13, err_msg=name)


def assert_diagonals(layer, full, factor):
    """`full` has those of `factor` on its diagonals, the 1 of a bias beside them."""
    ins = layer.to_matrices(factor.h)[:, :, 0]
    if layer.bias is not None:
        ins = np.concatenate([ins, np.ones((len(ins), 1))], 1)
    for whole, part in ((full.h, ins), (full.s, layer.to_matrices(factor.s)[:, 0])):
        diagonal = np.diagonal(whole, axis1=-2, axis2=-1)
        np.testing.assert_allclose(diagonal.reshape(part.shape), part, 1e-11, 1e-14)


def captured(loss_fn, *args):
    """The layout, whole factors and diagonals of a loss, compiled as one."""
    layout = af.trace_layout(loss_fn, *args)
    paths = [layer.path for layer in layout.layers if layer.kind != "norm"]
    wholes = full_factors(loss_fn, layout, paths)
    both = wholes, lambda *xs: af.value_and_grad(loss_fn, layout)(*xs)[2]
    full, factors = jax.jit(lambda *xs: [f(*xs) for f in both])(*args)
    return layout, full, factors


# Every geometry, in one loss.

GEOMETRIES = {
    "dense": [
        "1-D", "3-D", "several axes", "unsorted axes", "all axes", "batch dims, several axes",
        "batch dim without bias",
    ],
    "einsum": ["ellipsis moved", "several outputs", "shared letter, first", "input-only letter"],
    "conv": [
        "1-D", "3-D", "VALID strided", "SAME strided", "unread end", "SAME_LOWER",
        "asymmetric padding", "negative padding", "CAUSAL dilated", "CIRCULAR strided",
        "CIRCULAR, wide kernel", "REFLECT strided", "both dilations", "groups strided",
        "depthwise, wider", "no batch dim", "masked",
    ],
    "conv local": ["2-D", "strided", "CIRCULAR dilated"],
    "conv transpose": [
        "2-D strided", "VALID, stride over kernel", "explicit padding", "kernel dilation",
        "CIRCULAR", "CIRCULAR, wide kernel", "even kernel, stride 1, transposed kernel",
        "2-D strided, transposed kernel", "kernel dilation, transposed kernel",
        "CIRCULAR, even kernel, transposed kernel",
    ],
}  # fmt: skip


Embed = functools.partial(nn.Embed, param_dtype=F64)
with jax.enable_x64(True):
    CASES = {
        f"{kind}: {name}": (layer, inputs_of(shape), "__call__")
        for kind, names in GEOMETRIES.items()
        for name in names
        for layer, shape in [ALL[f"{kind}: {name}"]]
    } | {
        "embedding": (Embed(5, 2), np.array([[-1, 2, -3], [2, 0, 4]]), "__call__"),
        "embedding of one": (Embed(1, 2), np.array([0, 0]), "__call__"),
        "attend": (Embed(5, 4), inputs_of((2, 3, 4)), "attend"),
    }


@functools.cache
def geometries():
    """Each layer's description, whole factors, diagonals and call."""

    def loss_fn(params, inputs):
        return sum(
            scalar(layer.apply({"params": params[name]}, inputs[name], method=method))
            for name, (layer, _, method) in CASES.items()
        )

    inputs = {name: x for name, (_, x, _) in CASES.items()}
    params = {n: random_params(layer, x, method=m) for n, (layer, x, m) in CASES.items()}
    layout, full, factors = captured(loss_fn, params, inputs)
    layers = {layer.path: layer for layer in layout.layers}
    assert layers.keys() == full.keys() == CASES.keys()
    calls = dict(zip(CASES, calls_of(loss_fn, params, inputs), strict=True))
    return {name: (layers[name], full[name], factors[name], calls[name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_whole_factors_are_those_of_the_definition(name):
    layer, full, factor, call = geometries()[name]
    assert_whole(full, whole([call], layer.bias is not None))
    assert_diagonals(layer, full, factor)
    blocks = tuple(layer.shape[i] for i in layer.blocks)
    assert full.h.shape[:-2] == full.s.shape[:-2] == full.rows.shape == blocks


def test_a_convolution_against_the_patches_of_jax():
    x = inputs_of((2, 7, 6, 3))
    layer = Conv(4, (3, 2), strides=(2, 1), padding=((1, 2), (0, 1)), kernel_dilation=(2, 1))
    params = random_params(layer, x)
    _, full, _ = captured(loss_of(layer), params, x)
    patches = jax.lax.conv_general_dilated_patches(
        x, (3, 2), (2, 1), ((1, 2), (0, 1)), rhs_dilation=(2, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    rows = patches.reshape(-1, 3, 6).swapaxes(1, 2).reshape(-1, 18)  # channels vary slowest there
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    np.testing.assert_allclose(full[""].h, rows.T @ rows / len(rows), 1e-11, 1e-14)
    g = np.asarray(jax.grad(scalar)(layer.apply({"params": params}, x))).reshape(-1, 4)
    np.testing.assert_allclose(full[""].s, g.T @ g / len(g), 1e-11)


# Lifted models, in one loss.


class Step(nn.Module):
    """A block as the body of a scan over layers."""

    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


class Scanned(nn.Module):
    axis: int | None = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        body = nn.remat(Step, prevent_cse=False) if self.remat else Step
        own = {"variable_broadcast": "params"}
        if self.axis is not None:
            own = {"variable_axes": {"params": self.axis}}
        split = {"params": self.axis is not None}
        return nn.scan(body, **own, split_rngs=split, length=3)(name="layers")(x, None)[0]


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        many = nn.vmap(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=3,
        )
        return many(name="block")(x)


class Again(nn.Module):
    """A block that is called twice."""

    @nn.compact
    def __call__(self, x):
        block = Block(name="block")
        return block(jnp.sin(block(x)))


def each(blocks, x):
    return jnp.stack([block(x) for block in blocks])


# The model, its blocks' axis (None for one block), and what it does with a list of them.
LIFTED = {
    "scan": (Scanned(), 0, in_turn),
    "scan of remat": (Scanned(1, remat=True), 1, in_turn),
    "scan of one block": (Scanned(None), None, lambda blocks, x: in_turn(blocks * 3, x)),
    "vmap": (Mapped(), 0, each),
    "remat": (nn.remat(Block)(), None, in_turn),
    "jit": (nn.jit(Block)(), None, in_turn),
    "called twice": (Again(), None, lambda blocks, x: blocks[0](jnp.sin(blocks[0](x)))),
}


@functools.cache
def lifted():
    def loss_fn(params, x):
        return sum(
            scalar(model.apply({"params": params[name]}, x)) for name, (model, *_) in LIFTED.items()
        )

    x = inputs_of((4, 3))
    params = {name: random_params(model, x) for name, (model, *_) in LIFTED.items()}
    layout, full, factors = captured(loss_fn, params, x)
    return params, x, [(layer, full[layer.path], factors[layer.path]) for layer in layout.layers]


@pytest.mark.parametrize("name", LIFTED)
def test_lifted_layers_have_the_whole_factors_of_their_unrolled_twins(name):
    params, x, layers = lifted()
    _, axis, run = LIFTED[name]
    own = params[name]
    while "up" not in own:
        (own,) = own.values()
    trees = [own] if axis is None else slices(own, axis)

    def loss_fn(trees, x):
        blocks = [functools.partial(Block().apply, {"params": tree}) for tree in trees]
        return scalar(run(blocks, x))

    calls = calls_of(loss_fn, trees, x)
    met = [found for found in layers if found[0].path.startswith(f"{name}/")]
    assert len(met) == 2
    for layer, full, factor in met:
        of = [call for call in calls if call.path == layer.path.split("/")[-1]]
        share = len(of) // len(trees)
        blocks = [whole(of[i * share : (i + 1) * share], True) for i in range(len(trees))]
        assert full.rows.shape == (() if axis is None else (3,))
        assert_whole(full, stacked(blocks))
        assert_diagonals(layer, full, factor)


@pytest.mark.slow
def test_the_gates_of_a_recurrent_cell():
    """`OptimizedLSTMCell` computes its gates by one product; its twin by one each."""
    cell, twin = (kind(3, param_dtype=F64) for kind in (nn.OptimizedLSTMCell, nn.LSTMCell))
    xs = inputs_of((2, 2, 2))
    params = random_params(Recurrent(twin, "loop"), xs)
    layout, full, factors = captured(loss_of(Recurrent(cell, "nn.RNN")), params, xs)
    calls = calls_of(loss_of(Recurrent(twin, "loop")), params, xs)
    assert len(layout.layers) == 8
    for layer in layout.layers:
        of = [call for call in calls if call.path == layer.path]
        assert_whole(full[layer.path], whole(of, layer.bias is not None))
        assert_diagonals(layer, full[layer.path], factors[layer.path])
        assert full[layer.path].rows == 4


# NNX.


class Net(nnx.Module):
    """With running statistics and random numbers, that a loss changes."""

    def __init__(self, rngs):
        options = {"param_dtype": F64, "rngs": rngs}
        self.conv = nnx.Conv(2, 3, (3,), strides=2, **options)
        self.norm = nnx.BatchNorm(3, **options)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(3, 4, use_bias=False, **options)

    def __call__(self, x):
        return self.head(jnp.tanh(self.drop(self.norm(self.conv(x)))))


def test_an_nnx_module_is_read_and_left_as_it_was():
    model, x = nnx_reference.random_model(Net), inputs_of((2, 5, 2))
    layout = af.nnx.trace_layout(nnx_reference.loss_of, model, x)
    before = jax.tree.map(nnx_reference._numbers, nnx.to_pure_dict(nnx.state(model)))
    found = jax.jit(full_factors(nnx_reference.loss_of, layout))(model, x)
    calls = {c.path: c for c in nnx_reference.calls_of(nnx_reference.loss_of, model, x)}
    after = jax.tree.map(nnx_reference._numbers, nnx.to_pure_dict(nnx.state(model)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert found.keys() == {"conv", "head"}
    assert_whole(found["conv"], whole([calls["conv"]], True))
    assert_whole(found["head"], whole([calls["head"]], False))


# Batches.


class Maps(nn.Module):
    """A layer with a map for each of two heads, in a stack of three."""

    axis: int

    @nn.compact
    def __call__(self, x):
        stack = nn.vmap(
            DenseGeneral,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=3,
        )
        return stack(4, batch_dims=(0,), name="maps")(x)


def test_pooled_batches_are_one_batch():
    """Where the loss is a sum over examples, so that none depends on the batch's size."""

    models = {"first": Maps(0), "second": Maps(1)}

    def loss_fn(params, x):
        return sum(
            jnp.sum(jnp.sin(model.apply({"params": params[name]}, x)))
            for name, model in models.items()
        )

    x = inputs_of((2, 7, 3))
    params = {name: random_params(model, x) for name, model in models.items()}
    factors_fn = full_factors(loss_fn, af.trace_layout(loss_fn, params, x))

    def in_parts(params, x):
        return pool(factors_fn(params, part) for part in (x[:, :3], x[:, 3:4], x[:, 4:]))

    found, expected = jax.jit(lambda *xs: (in_parts(*xs), factors_fn(*xs)))(params, x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    jax.tree.map(close, found, expected)
    for name, blocks in (("first", (3, 2)), ("second", (2, 3))):
        assert found[f"{name}/maps"].h.shape == (*blocks, 4, 4)
        np.testing.assert_array_equal(found[f"{name}/maps"].rows, np.full(blocks, 7))


def two_models(params, x, *, both=True):
    left, right = (Dense(2).apply({"params": params[name]}, x) for name in "ab")
    return scalar(left) + (scalar(right) if both else 0)


def test_a_layer_that_takes_no_part_has_zeros_and_weighs_nothing():
    x = inputs_of((4, 3))
    params = {name: random_params(Dense(2), x) for name in "ab"}
    factors_fn = full_factors(two_models, af.trace_layout(two_models, params, x))
    without, full = jax.jit(lambda *xs: (factors_fn(*xs, both=False), factors_fn(*xs)))(params, x)
    assert without["a"].rows == 4
    assert not any(np.any(leaf) for leaf in without["b"])
    assert [leaf.shape for leaf in without["b"]] == [(4, 4), (2, 2), ()]
    for batches in ([without, full], [full, without]):
        jax.tree.map(np.testing.assert_array_equal, pool(batches)["b"], full["b"])


def test_products_are_accumulated_in_float32_whatever_the_loss_computes_in():
    with jax.enable_x64(False):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4096, 3)), jnp.float32)
        x = x.at[:, 0].set(1)
        params = random_params(nn.Dense(2), x)

        def loss_fn(params, x):
            half = nn.Dense(2, dtype=jnp.bfloat16).apply({"params": params}, x.astype(jnp.bfloat16))
            return jnp.mean(half**2)

        layout = af.trace_layout(loss_fn, params, x)
        found = jax.jit(full_factors(loss_fn, layout))(params, x)[""]
    assert {leaf.dtype for leaf in found} == {np.dtype("float32")}
    half = np.concatenate([np.float64(x.astype(jnp.bfloat16)), np.ones((4096, 1))], 1)
    np.testing.assert_allclose(found.h, half.T @ half / 4096, 1e-5, 1e-6)


# Choices and errors.


def test_chosen_layers_are_those_asked_for():
    x = inputs_of((4, 3))
    params = {name: random_params(Dense(2), x) for name in "ab"}
    layout = af.trace_layout(two_models, params, x)
    fns = full_factors(two_models, layout), full_factors(two_models, layout, ["b"])
    every, chosen = jax.jit(lambda *xs: [f(*xs) for f in fns])(params, x)
    jax.tree.map(np.testing.assert_array_equal, chosen, {"b": every["b"]})
    for paths in (("b", "b"), iter(["b"]), []):
        found = jax.eval_shape(full_factors(two_models, layout, paths), params, x)
        assert found.keys() == (chosen.keys() if paths else set())


def test_lookups_are_left_out_unless_asked_for_and_normalization_layers_anyway():
    model = nn.Sequential([Embed(9, 3), Dense(3), nn.LayerNorm(param_dtype=F64), Dense(2)])
    x = np.array([0, 5, 7])
    params = random_params(model, x)
    layout = af.trace_layout(loss_of(model), params, x)
    found = jax.eval_shape(full_factors(loss_of(model), layout), params, x)
    assert found.keys() == {"layers_1", "layers_3"}
    found = jax.eval_shape(full_factors(loss_of(model), layout, ["layers_0"]), params, x)
    assert found["layers_0"].h.shape == (9, 9)
    with pytest.raises(ValueError, match="'layers_2' is a norm layer"):
        full_factors(loss_of(model), layout, ["layers_1", "layers_2"])


def test_errors_say_what_was_given_and_wanted():
    x = inputs_of((4, 3))
    params = {name: random_params(Dense(2), x) for name in "ab"}
    layout = af.trace_layout(two_models, params, x)
    with pytest.raises(ValueError, match="paths: got 'c', wanted some of 'a', 'b'"):
        full_factors(two_models, layout, ["a", "c"])
    with pytest.raises(TypeError, match="paths: got the string 'a'"):
        full_factors(two_models, layout, "a")
    with pytest.raises(TypeError, match="layout: got dict, wanted a Layout"):
        full_factors(two_models, {})
    other = {name: random_params(Dense(5), x) for name in "ab"}
    with pytest.raises(ValueError, match=r"'a/kernel' has shape .*another model"):
        full_factors(two_models, layout)(other, x)


def test_an_einsum_over_an_axis_without_inputs_is_refused():
    layer, x = Einsum((2, 4, 3), "bi,iko->bo"), inputs_of((5, 2))
    params = random_params(layer, x)
    layout = af.trace_layout(loss_of(layer), params, x)
    with pytest.raises(ValueError, match="bi,iko->bo sums its weight"):
        full_factors(loss_of(layer), layout)(params, x)
