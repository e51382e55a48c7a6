"""NNX's transforms: a transformed model has the factors of its unrolled twin."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.support.nnx_reference import (
    Block,
    captured,
    factors_of,
    loss_of,
    random_model,
)
from tests.support.reference import F64, assert_factors, in_turn, inputs_of, scalar, stacked

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]

X = (4, 3)


def layers(axis=0, of=Block, length=3):
    """Blocks that lie stacked along an axis of each parameter."""

    def make(rngs):
        out = nnx.StateAxes({nnx.Param: axis, ...: 0})
        many = nnx.vmap(of, in_axes=0, out_axes=out)
        return nnx.split_rngs(splits=length)(many)(rngs)

    return random_model(make)


def apart(blocks, axis=0, length=3):
    """The stacked blocks as a list of single ones."""
    graphdef, params, rest = nnx.split(blocks, nnx.Param, ...)
    return nnx.List(
        nnx.merge(
            graphdef,
            jax.tree.map(lambda leaf: jnp.take(leaf, i, axis), params),
            jax.tree.map(lambda leaf: leaf[i], rest),
        )
        for i in range(length)
    )


def same_as_apart(loss_fn, plain, model, *args, axis=0):
    """Stacked blocks must have the stacked factors of blocks apart."""
    layout, factors = captured(loss_fn, model, *args)
    assert layout.covered == 1, str(layout)
    found = factors_of(plain, apart(model, axis), *args)
    one_by_one = [
        {p.removeprefix(f"{i}/"): f for p, f in found.items() if p.startswith(f"{i}/")}
        for i in range(3)
    ]
    assert_factors(factors, stacked(one_by_one, axis))
    return layout


def turns(blocks, x):
    return scalar(in_turn(blocks, x))


# Over layers.


def scanned(axis, transform=lambda f: f):
    """A loss that scans over stacked blocks."""

    def loss_fn(blocks, x):
        @nnx.scan(in_axes=(nnx.StateAxes({nnx.Param: axis, ...: 0}), nnx.Carry), out_axes=nnx.Carry)
        @transform
        def forward(block, x):
            return block(x)

        return scalar(forward(blocks, x))

    return loss_fn


@pytest.mark.parametrize("transform", [lambda f: f, nnx.remat, nnx.jit], ids=["", "remat", "jit"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_scan_over_layers(axis, transform):
    loss_fn = scanned(axis, transform)
    layout = same_as_apart(loss_fn, turns, layers(axis), inputs_of(X), axis=axis)
    assert {layer.rows_shape for layer in layout.layers} == {(3,)}


def test_a_scan_over_layers_with_dropout():
    """Each layer has its own random numbers, and they go on counting."""
    dropping = functools.partial(Block, dropout=0.5)
    same_as_apart(scanned(0), turns, layers(0, dropping), inputs_of(X))


class Normed(Block):
    """With running statistics in the middle."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.BatchNorm(4, param_dtype=F64, rngs=rngs)


def test_a_scan_over_layers_with_running_statistics():
    same_as_apart(scanned(0), turns, layers(0, Normed), inputs_of(X))


def test_a_scan_with_one_block():
    """The block is carried: the rows of all its calls are averaged."""

    def loss_fn(block, x):
        @nnx.scan(in_axes=(None, nnx.Carry), out_axes=nnx.Carry, length=3)
        def forward(block, x):
            return block(x)

        return scalar(forward(block, x))

    model, x = random_model(Block), inputs_of(X)
    _, factors = captured(loss_fn, model, x)
    assert factors["up"].rows == 12
    assert_factors(factors, factors_of(lambda block, x: turns([block] * 3, x), model, x))


def test_a_scan_in_a_scan():
    def loss_fn(blocks, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def outer(blocks, x):
            return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
                blocks, x
            )

        return scalar(outer(blocks, x))

    def make(rngs):
        return nnx.split_rngs(splits=(2, 3))(nnx.vmap(nnx.vmap(Block)))(rngs)

    model, x = random_model(make), inputs_of(X)
    layout, factors = captured(loss_fn, model, x)
    assert {layer.rows_shape for layer in layout.layers} == {(2, 3)}
    rows = apart(model, length=2)
    twin = nnx.List([block for row in rows for block in apart(row)])
    found = factors_of(turns, twin, x)
    for name in ("up", "down"):
        expected = stacked([{name: found[f"{i}/{name}"]} for i in range(6)])[name]
        folded = jax.tree.map(lambda a: a.reshape(6, *a.shape[2:]), factors[name])
        assert_factors({name: folded}, {name: expected})


# Over models and over data.


def test_an_ensemble():
    def loss_fn(blocks, x):
        return scalar(nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(blocks, x))

    def plain(blocks, x):
        return scalar(jnp.stack([block(x) for block in blocks]))

    same_as_apart(loss_fn, plain, layers(), inputs_of(X))


@pytest.mark.parametrize("axis", [1, -1])
def test_an_ensemble_along_another_axis(axis):
    def loss_fn(blocks, x):
        axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
        return scalar(nnx.vmap(lambda block, x: block(x), in_axes=(axes, 0))(blocks, x))

    def plain(blocks, x):
        return scalar(jnp.stack([block(part) for block, part in zip(blocks, x, strict=True)]))

    same_as_apart(loss_fn, plain, layers(axis), inputs_of((3, *X)), axis=axis)


def test_a_vmap_over_examples():
    """One model: the rows of all examples are averaged."""

    def loss_fn(block, x):
        return scalar(nnx.vmap(lambda block, x: block(x), in_axes=(None, 0))(block, x))

    model, x = random_model(Block), inputs_of((5, *X))
    layout, factors = captured(loss_fn, model, x)
    assert layout.covered == 1
    assert factors["up"].rows == 20
    assert_factors(factors, factors_of(loss_of, model, x))


# Over functions.


def recomputed(block, x):
    return nnx.remat(lambda block, x: block(x))(block, x)


@nnx.jit
def jitted(block, x):
    return block(x)


@jax.jit
def jitted_on_state(graphdef, state, x):
    return nnx.merge(graphdef, state)(x)


def functional(block, x):
    graphdef, state = nnx.split(block)
    return jitted_on_state(graphdef, state, x)


def in_a_branch(block, x):
    return nnx.cond(jnp.sum(x) > 1e9, lambda block, x: x, lambda block, x: block(x), block, x)


def switched(block, x):
    branches = [lambda block, x: x, lambda block, x: block(x), lambda block, x: block(2 * x)]
    return nnx.switch(1, branches, block, x)


def partly_checkpointed(block, x):
    return nnx.remat(Block.__call__)(block, x)


def mapped(block, x):
    return jax.vmap(lambda row: block(row))(x)


FUNCTIONS = [mapped, recomputed, jitted, functional, in_a_branch, switched, partly_checkpointed]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: getattr(f, "__name__", "jitted"))
def test_a_function_of_a_module(function):
    model, x = random_model(Block), inputs_of(X)
    jax.block_until_ready(function(model, x))  # what is cached here has no marks
    layout, factors = captured(lambda block, x: scalar(function(block, x)), model, x)
    assert layout.covered == 1, str(layout)
    assert_factors(factors, factors_of(loss_of, model, x))
    jax.block_until_ready(function(model, x))


def test_a_loop():
    def loss_fn(block, x):
        def body(i, both):
            block, x = both
            return block, block(x)

        return scalar(nnx.fori_loop(0, 3, body, (block, x))[1])

    model, x = random_model(Block), inputs_of(X)
    _, factors = captured(loss_fn, model, x)
    assert_factors(factors, factors_of(lambda block, x: turns([block] * 3, x), model, x))


def test_a_jitted_layer_kept_in_a_module():
    """A jitted method, compiled before the capture."""

    class Fast(Block):
        @nnx.jit
        def __call__(self, x):
            return super().__call__(x)

    model, x = random_model(Fast), inputs_of(X)
    model(x)
    layout, factors = captured(loss_of, model, x)
    assert layout.covered == 1
    assert_factors(factors, factors_of(lambda fast, x: scalar(Block.__call__(fast, x)), model, x))


def test_a_gradient_inside_the_loss():
    """The cotangents are those of the whole loss."""

    def loss_fn(block, x):
        return scalar(block(x)) + scalar(jax.grad(lambda x: scalar(block(x)))(x))

    model, x = random_model(Block), inputs_of(X)
    layout, _ = captured(loss_fn, model, x)
    assert layout.covered == 1


def test_a_function_with_its_own_derivative_is_uncovered():
    @nnx.custom_vjp
    def doubled(block, x):
        return block(x)

    def backward(residuals, g):
        (graphdef, state), x = residuals
        _, g = g
        _, pull = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
        return pull(2 * g)

    doubled.defvjp(lambda block, x: (block(x), (nnx.split(block), x)), backward)

    def loss_fn(block, x):
        return scalar(doubled(block, block(x)))

    layout, factors = captured(loss_fn, random_model(Block), inputs_of(X))
    assert not factors
    assert {row.reason for row in layout.uncovered} == {
        "used inside a function with its own derivative rule"
    }


@pytest.mark.parametrize("dtype", [F64, jnp.float32])
def test_statistics_have_the_type_of_the_parameters(dtype):
    model = random_model(lambda rngs: nnx.Linear(3, 2, param_dtype=dtype, rngs=rngs))
    _, factors = captured(lambda m, x: scalar(m(x)), model, inputs_of(X).astype(dtype))
    assert {part.dtype for part in factors[""]} == {jnp.dtype(dtype)}


def test_the_stacked_paths_are_those_of_the_state():
    model = nnx.Dict(layers=layers())
    layout, _ = captured(lambda m, x: scanned(0)(m.layers, x), model, inputs_of(X))
    assert [layer.path for layer in layout.layers] == ["layers/down", "layers/up"]
