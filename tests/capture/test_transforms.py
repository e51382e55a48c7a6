"""Flax's lifted transforms: a lifted model has the factors of its unrolled twin."""

import functools
import itertools

import flax.linen as nn
import jax.numpy as jnp
import pytest

from tests.support.reference import (
    Block,
    Dense,
    assert_factors,
    captured,
    in_turn,
    loss_of,
    random_params,
    scalar,
    slices,
    stacked,
    twin_factors,
    under,
)

pytestmark = pytest.mark.usefixtures("x64")


class Step(nn.Module):
    """A block as the body of a scan over layers."""

    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


def check(model, x, expected, **options):
    """Everything in a model must be covered and have the expected factors."""
    params = random_params(model, x)
    layout, factors = captured(loss_of(model, **options), params, x)
    assert layout.covered == 1, str(layout)
    assert_factors(factors, expected(params))
    return layout


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scan_over_layers(axis, remat, x):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.remat(Step, prevent_cse=False) if remat else Step
            scan = nn.scan(
                body, variable_axes={"params": axis}, split_rngs={"params": True}, length=3
            )
            return scan(name="layers")(x, None)[0]

    def expected(params):
        blocks = slices(params["layers"]["block"], axis)
        return under("layers/block", stacked(twin_factors(in_turn, blocks, x), axis))

    check(Model(), x, expected)


def test_scan_of_a_method_function(x):
    """A scan over a function of a module rather than over a class."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return scan(Block(name="block"), x, None)[0]

    def expected(params):
        return under("block", stacked(twin_factors(in_turn, slices(params["block"]), x)))

    check(Model(), x, expected)


def test_scan_with_shared_parameters(x):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Step, variable_broadcast="params", split_rngs={"params": False}, length=3
            )
            return scan(name="layers")(x, None)[0]

    def expected(params):
        def thrice(blocks, x):
            return in_turn(blocks * 3, x)

        (factors,) = twin_factors(thrice, [params["layers"]["block"]], x)
        assert factors["up"].rows == 12
        return under("layers/block", factors)

    check(Model(), x, expected)


@pytest.mark.parametrize(("outer", "inner"), [(0, 0), (1, 0), (0, 1), (-1, 0)])
def test_nested_scan(outer, inner, x):
    class Rows(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            scan = nn.scan(
                Step, variable_axes={"params": inner}, split_rngs={"params": True}, length=2
            )
            return scan(name="inner")(x, None)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Rows, variable_axes={"params": outer}, split_rngs={"params": True}, length=3
            )
            return scan(name="outer")(x, None)[0]

    def expected(params):
        rows = [slices(row, inner) for row in slices(params["outer"]["inner"]["block"], outer)]
        flat = twin_factors(in_turn, [*itertools.chain(*rows)], x)
        rows = [stacked(flat[2 * i : 2 * i + 2], inner) for i in range(3)]
        rows_axis = 0 if outer == 0 else 1  # as the stacked axes lie in the weight
        return under("outer/inner/block", stacked(rows, outer, rows_axis))

    layout = check(Model(), x, expected)
    assert layout.layers[0].rows_shape in ((3, 2), (2, 3))


REMAT = {
    "class": nn.remat(Block),
    "jit": nn.jit(Block),
    "jit of remat": nn.jit(nn.remat(Block)),
}


@pytest.mark.parametrize("lifted", REMAT.values(), ids=REMAT)
@pytest.mark.parametrize("outermost", [False, True])
def test_remat_and_jit_change_nothing(lifted, outermost, x):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lifted(name="block")(jnp.sin(lifted(name="block_2")(x)))

    def expected(params):
        if outermost:
            return twin_factors(in_turn, [params], x)[0]

        def run(blocks, x):
            return blocks[1](jnp.sin(blocks[0](x)))

        first, second = twin_factors(run, [params["block_2"], params["block"]], x)
        return under("block_2", first) | under("block", second)

    check(lifted() if outermost else Model(), x, expected)


class Methods(nn.Module):
    """Lifted methods rather than classes."""

    def setup(self):
        self.up, self.down = Dense(4), Dense(3)

    def __call__(self, x):
        return self.last(self.first(x))

    def plain(self, x):
        return self.down(jnp.tanh(self.up(x)))

    @nn.remat
    def first(self, x):
        return jnp.tanh(self.up(x))

    @nn.jit
    def last(self, x):
        return self.down(x)


def test_lifted_methods(x):
    check(Methods(), x, lambda params: twin_factors(in_turn, [params], x)[0])


def test_lifted_compact_method(x):
    class Lifted(nn.Module):
        @nn.remat
        @nn.compact
        def __call__(self, x):
            return Dense(3, name="down")(jnp.tanh(Dense(4, name="up")(x)))

    check(Lifted(), x, lambda params: twin_factors(in_turn, [params], x)[0])


def test_lifted_functions(x):
    """One block through three lifted functions: the rows of all three."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            def run(block, x):
                return jnp.tanh(block(x))

            lifts = (nn.remat(run), nn.jit(run), nn.jit(nn.remat(run)))
            block = Block(name="block")
            return functools.reduce(lambda x, lift: lift(block, x), lifts, x)

    def thrice(blocks, x):
        return functools.reduce(lambda x, block: jnp.tanh(block(x)), blocks * 3, x)

    check(Model(), x, lambda p: under("block", twin_factors(thrice, [p["block"]], x)[0]))


def test_remat_scan(x):
    model = nn.remat_scan(Block, lengths=(2, 3))()

    def expected(params):
        (names,) = [list(params)]
        rows = [slices(row) for row in slices(params)]
        flat = twin_factors(in_turn, [*itertools.chain(*rows)], x)
        assert names == ["down", "up"]
        return stacked([stacked(flat[3 * i : 3 * i + 3]) for i in range(2)])

    check(model, x, expected)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_vmap_of_separate_parameters(axis, x):
    lifted = nn.vmap(
        Block,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
    )

    def expected(params):
        def run(blocks, x):
            return jnp.stack([block(x) for block in blocks])

        return stacked(twin_factors(run, slices(params, axis), x), axis)

    check(lifted(), x, expected)


def test_vmap_of_separate_parameters_and_inputs(x):
    lifted = nn.vmap(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)

    def expected(params):
        def run(blocks, x):
            return jnp.stack([block(row) for block, row in zip(blocks, x, strict=True)])

        factors = twin_factors(run, slices(params), x)
        assert factors[0]["up"].rows == 1
        return stacked(factors)

    check(lifted(), x, expected)


def test_vmap_of_named_methods(x):
    """Transformed under other names, methods are still met once."""
    lifted = nn.vmap(
        Methods,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
        methods=["first", "plain"],
    )

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lifted(name="blocks").plain(x)

    def expected(params):
        def run(blocks, x):
            return jnp.stack([block(x) for block in blocks])

        return under("blocks", stacked(twin_factors(run, slices(params["blocks"]), x)))

    check(Model(), x, expected)


@pytest.mark.parametrize("inside", [False, True])
def test_vmap_of_shared_parameters(inside, x):
    lifted = nn.vmap(Block, variable_axes={"params": None}, split_rngs={"params": False})

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lifted(name="block")(x)

    def expected(params):
        (factors,) = twin_factors(in_turn, [params["block"] if inside else params], x)
        return under("block", factors) if inside else factors

    check(Model() if inside else lifted(), x, expected)


def test_vmap_of_a_scan(x):
    """Two stacked axes from different transforms."""

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Step, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
            return scan(name="layers")(x, None)[0]

    lifted = nn.vmap(
        Layers, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
    )

    def expected(params):
        rows = [slices(row, 1) for row in slices(params["layers"]["block"])]

        def run(blocks, x):
            return jnp.stack([in_turn(blocks[:3], x), in_turn(blocks[3:], x)])

        flat = twin_factors(run, [*itertools.chain(*rows)], x)
        rows = [stacked(flat[3 * i : 3 * i + 3], 1) for i in range(2)]
        return under("layers/block", stacked(rows))

    check(lifted(), x, expected)


def test_scan_as_the_top_class(x):
    model = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = random_params(model, x, None)

    def loss_fn(params, x):
        return scalar(model.apply({"params": params}, x, None)[0])

    layout, factors = captured(loss_fn, params, x)
    assert layout.covered == 1
    expected = stacked(twin_factors(in_turn, slices(params["block"]), x))
    assert_factors(factors, under("block", expected))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_switch(index, x):
    """Only the branch that ran has rows."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, index):
            blocks = [Block(name=f"{i}") for i in range(3)]
            branches = [lambda _, x, block=block: block(x) for block in blocks]
            if self.is_initializing():
                return [block(x) for block in blocks]
            return nn.switch(index, branches, self, x)

    model = Model()
    params = random_params(model, x, index)
    layout, factors = captured(loss_of(model), params, x, jnp.asarray(index))
    assert layout.covered == 1
    trees = [params[f"{i}"] for i in range(3)]
    ran = twin_factors(lambda blocks, x: blocks[index](x), trees, x)
    for i in range(3):
        for name in ("up", "down"):
            found = factors[f"{i}/{name}"]
            if i == index:
                assert_factors({name: found}, {name: ran[i][name]})
            else:
                assert all((leaf == 0).all() for leaf in found)


def test_cond_of_one_layer(x):
    """The same layer in both branches."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = Block(name="block")
            if self.is_initializing():
                return block(x)
            return nn.cond(x[0, 0] > 0, lambda b, x: b(x), lambda b, x: b(2 * x), block, x)

    check(Model(), x, lambda p: under("block", twin_factors(in_turn, [p["block"]], x)[0]))
