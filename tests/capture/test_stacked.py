"""Parameters that the loss itself holds stacked, and its loops and maps take apart."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import adafisher_jax as af
from tests.support.reference import (
    F64,
    Block,
    Dense,
    assert_factors,
    captured,
    factors_of,
    in_turn,
    loss_of,
    random_like,
    random_params,
    scalar,
    slices,
    stack,
    stacked,
    twin_factors,
    under,
)

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]


def apply(params, x):
    return Block().apply({"params": params}, x)


def scan(params, x, **options):
    """The layers in turn."""
    return lax.scan(lambda x, p: (apply(p, x), None), x, params, **options)[0]


def vmap(params, x):
    """Each layer by itself."""
    return jax.vmap(apply, (0, None))(params, x)


def each(blocks, x):
    return jnp.stack([block(x) for block in blocks])


def random_stack(params, sizes, axes):
    """Random parameters of layers, stacked along some axes, the outermost first."""
    for size, axis in zip(reversed(sizes), reversed(axes), strict=True):
        params = jax.tree.map(lambda a, n=size, i=axis: jnp.stack([a] * n, i), params)
    return random_like(params)


def carried(params, x):
    def step(carry, _):
        params, x = carry
        return (params, scan(params, x)), None

    return lax.scan(step, (params, x), length=2)[0][1]


def in_both_of_two_loops(params, x):
    """Sliced by a loop, and again, whole, by another one inside it."""
    return lax.scan(lambda x, p: (apply(p, scan(params, x)), None), x, params)[0]


def with_a_collective(params, x):
    return jax.vmap(lambda p: lax.pmean(apply(p, x), "all"), axis_name="all")(params)[0]


def accumulated(params, x):
    """In a mutable array, beside the carry."""
    total = jax.new_ref(jnp.zeros_like(x))

    def step(x, p):
        y = apply(p, x)
        total[...] += y
        return y, None

    lax.scan(step, x, params)
    return total[...]


def summed(blocks, x):
    total = 0
    for block in blocks:
        x = block(x)
        total += x
    return total


def over(body, **options):
    return lambda p, x: lax.scan(lambda x, p: (body(p, x), None), x, p, **options)[0]


# A way to use a stack of three blocks, and the same with the blocks one by one.
WAYS = {
    "scan": (scan, in_turn),
    "scan, reverse": (over(apply, reverse=True), lambda blocks, x: in_turn(blocks[::-1], x)),
    "scan, unrolled": (over(apply, unroll=2), in_turn),
    "scan, split transpose": (over(apply, _split_transpose=True), in_turn),
    "scan of checkpoint": (over(jax.checkpoint(apply, prevent_cse=False)), in_turn),
    "scan of jit": (over(jax.jit(apply)), in_turn),
    "scan of a branch": (
        over(lambda p, x: lax.cond(x[0, 0] < 9, apply, lambda p, x: x, p, x)),
        in_turn,
    ),
    "checkpoint of scan": (jax.checkpoint(scan), in_turn),
    "jit of scan": (jax.jit(scan), in_turn),
    "a branch of scan": (lambda p, x: lax.cond(x[0, 0] < 9, scan, lambda p, x: x, p, x), in_turn),
    "lax.map": (lambda p, x: lax.map(lambda p: apply(p, x), p), each),
    "vmap": (vmap, each),
    "vmap of jit": (jax.vmap(jax.jit(apply), (0, None)), each),
    "vmap of checkpoint": (jax.vmap(jax.checkpoint(apply), (0, None)), each),
    "jit of vmap": (jax.jit(vmap), each),
    "checkpoint of vmap": (jax.checkpoint(vmap), each),
    "vmap with its rows": (
        lambda p, x: jax.vmap(apply)(p, x[:3]),
        lambda blocks, x: jnp.stack([blocks[i](x[i]) for i in range(3)]),
    ),
    "vmap with a collective": (with_a_collective, lambda blocks, x: each(blocks, x).mean(0)),
    "constant in another loop": (
        lambda p, x: lax.scan(lambda x, _: (scan(p, x), None), x, length=2)[0],
        lambda blocks, x: in_turn(blocks * 2, x),
    ),
    "mapped in another loop": (
        lambda p, x: lax.scan(lambda x, _: (vmap(p, x).mean(0), None), x, length=2)[0],
        lambda blocks, x: each(blocks, each(blocks, x).mean(0)).mean(0),
    ),
    "carried by another loop": (carried, lambda blocks, x: in_turn(blocks * 2, x)),
    "in both of two loops": (
        in_both_of_two_loops,
        lambda blocks, x: in_turn([b for one in blocks for b in (*blocks, one)], x),
    ),
    "vmap, then scan": (
        lambda p, x: scan(p, vmap(p, x).mean(0)),
        lambda blocks, x: in_turn(blocks, each(blocks, x).mean(0)),
    ),
    "accumulated in a reference": (accumulated, summed),
}


@pytest.mark.parametrize("how", WAYS)
def test_a_stack_of_layers(how, x):
    run, plain = WAYS[how]
    params = random_stack(random_params(Block(), x), [3], [0])
    layout, factors = captured(lambda p, x: scalar(run(p, x)), params, x, exact=False)
    assert layout.covered == 1, str(layout)
    assert_factors(factors, stacked(twin_factors(plain, slices(params), x)))


def test_arrays_stacked_along_unequal_axes(x):
    """A layer's factors lie as its weight does; the other rooms follow from the layout."""
    params = random_stack(random_params(Block(), x), [3], [0])
    in_axes = {"up": {"kernel": 2, "bias": 0}, "down": {"kernel": 1, "bias": 1}}
    turned = jax.tree.map(lambda a, axis: jnp.moveaxis(a, 0, axis), params, in_axes)
    run = jax.vmap(apply, (in_axes, None))
    layout, factors = captured(lambda p, x: scalar(run(p, x)), turned, x)
    assert layout.covered == 1, str(layout)
    members = twin_factors(each, slices(params), x)
    for path, axis in (("up", 2), ("down", 1)):
        assert_factors(
            {path: factors[path]}, {path: stack([member[path] for member in members], axis)}
        )


def nested(loops, axes, params, x):
    """Loops and maps, the outermost first, over parameters stacked along some axes."""
    if not loops:
        return apply(params, x)

    def inner(x, params):
        return nested(loops[1:], axes[1:], params, x)

    if loops[0] == "vmap":
        return jax.vmap(inner, (None, axes[0]))(x, params).mean(0)
    first = jax.tree.map(lambda a: jnp.moveaxis(a, axes[0], 0), params)
    return lax.scan(lambda x, p: (inner(x, p), None), x, first)[0]


def unrolled(loops, sizes, blocks, x):
    if not loops:
        return blocks[0](x)
    parts = parts_of(blocks, sizes[0])
    if loops[0] == "vmap":
        return sum(unrolled(loops[1:], sizes[1:], part, x) for part in parts) / len(parts)
    for part in parts:
        x = unrolled(loops[1:], sizes[1:], part, x)
    return x


def parts_of(values, n):
    size = len(values) // n
    return [values[i * size : (i + 1) * size] for i in range(n)]


def all_slices(tree, axes):
    if not axes:
        return [tree]
    return [leaf for part in slices(tree, axes[0]) for leaf in all_slices(part, axes[1:])]


def stacked_again(factors, sizes, axes):
    """The inverse of `all_slices`, and the places of the stacked axes."""
    if not axes:
        return factors[0], []
    parts = [stacked_again(part, sizes[1:], axes[1:]) for part in parts_of(factors, sizes[0])]
    places, axis = parts[0][1], axes[0]
    before = sum(place < axis for place in places)
    found = stacked([part for part, _ in parts], axis, before)
    return found, [axis, *(place + (place >= axis) for place in places)]


@pytest.mark.parametrize("axes", [(0, 0), (1, 0), (0, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("loops", ["scan scan", "scan vmap", "vmap scan", "vmap vmap"])
def test_loops_within_loops(loops, axes, x):
    check_nested(loops.split(), (2, 3), axes, x)


@pytest.mark.parametrize("loops", ["scan vmap scan", "vmap scan vmap"])
def test_three_loops(loops, x):
    check_nested(loops.split(), (2, 3, 2), (1, 2, 0), x)


def check_nested(loops, sizes, axes, x):
    params = random_stack(random_params(Block(), x), sizes, axes)
    layout, factors = captured(
        lambda p, x: scalar(nested(loops, axes, p, x)), params, x, exact=False
    )
    assert layout.covered == 1, str(layout)
    flat = twin_factors(
        lambda blocks, x: unrolled(loops, sizes, blocks, x), all_slices(params, axes), x
    )
    assert_factors(factors, stacked_again(flat, sizes, axes)[0])


TOKENS = jnp.array([[0, 3, 1], [3, 2, 3]])
IMAGES = random_like(jax.ShapeDtypeStruct((2, 5, 4), jnp.float32))
LAYERS = {
    "convolution": (nn.Conv(4, (3,), feature_group_count=2, param_dtype=F64), IMAGES),
    "transposed": (nn.ConvTranspose(4, (2,), strides=2, param_dtype=F64), IMAGES),
    "einsum": (nn.Einsum((5, 4, 3), "bti,tio->bto", param_dtype=F64), IMAGES),
    "embedding": (nn.Embed(5, 3, param_dtype=F64), TOKENS),
    "norm": (nn.LayerNorm(param_dtype=F64), IMAGES),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", LAYERS)
def test_an_ensemble_of_any_layer(kind, axis):
    """By `jax.vmap`, over arrays stacked along either axis."""
    layer, inputs = LAYERS[kind]
    inputs = inputs if kind == "embedding" else inputs.astype(F64)
    params = random_stack(random_params(layer, inputs), [3], [axis])

    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.stack([layer.clone(parent=self, name=f"{i}")(x) for i in range(3)])

    def loss_fn(params, x):
        return scalar(jax.vmap(lambda p: layer.apply({"params": p}, x), axis)(params))

    layout, factors = captured(loss_fn, params, inputs)
    assert layout.covered == 1, str(layout)
    apart = {f"{i}": part for i, part in enumerate(slices(params, axis))}
    expected = factors_of(loss_of(Twin()), apart, inputs)
    assert_factors(factors, {"": stack([expected[f"{i}"] for i in range(3)], axis)})
    for rule in ("paper", "official", "centered"):
        tx = af.adafisher(1e-3, layout, rule=rule)
        updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params, factors=factors)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


UNCOVERED = {
    "their sum": (
        lambda p, x: apply(jax.tree.map(lambda leaf: leaf.sum(0), p), x),
        "no layer of a known kind",
    ),
    "some of them": (
        lambda p, x: scan(jax.tree.map(lambda leaf: leaf[1:], p), x),
        "only a part or a rearrangement of it",
    ),
    "their collective mean": (
        lambda p, x: jax.vmap(
            lambda p: apply(jax.tree.map(lambda a: lax.pmean(a, "all"), p), x), axis_name="all"
        )(p).mean(0),
        "no layer of a known kind",
    ),
}


@pytest.mark.parametrize("how", UNCOVERED)
def test_a_stack_that_reaches_its_layer_as_another_array_is_uncovered(how, x):
    """Never a wrong factor; and the layer after it is not disturbed."""
    run, why = UNCOVERED[how]
    one = random_params(Block(), x)
    params = {"stacked": random_stack(one, [3], [0]), "single": one}

    def loss_fn(params, x):
        return scalar(apply(params["single"], run(params["stacked"], x)))

    layout, factors = captured(loss_fn, params, x)
    expected = factors_of(loss_of(Block()), one, run(params["stacked"], x))
    assert_factors(factors, under("single", expected))
    reasons = {row.leaf.path: row.reason for row in layout.uncovered}
    assert {path.partition("/")[0] for path in reasons} == {"stacked"}
    assert len(reasons) == 4
    assert all(why in reason for reason in reasons.values())


def test_no_layer_at_all_in_a_stack(x):
    """Loops of length zero have factors without rows."""
    one = random_params(Block(), x)
    params = {"none": jax.tree.map(lambda a: jnp.zeros((0, *a.shape)), one), "single": one}
    layout, factors = captured(
        lambda p, x: scalar(apply(p["single"], scan(p["none"], x))), params, x
    )
    assert layout.covered == 1
    assert factors["none/up"].h.shape == (0, 3, 1)
    assert_factors(
        {path: factors[f"single/{path}"] for path in ("up", "down")},
        factors_of(loss_of(Block()), one, x),
    )


SHARED = {
    "one bias": lambda p, x: jax.vmap(lambda k: dense(p | {"kernel": k}, x))(p["kernel"]),
    "one kernel": lambda p, x: jax.vmap(lambda b: dense(p | {"bias": b}, x))(p["bias"]),
    "scan, one bias": lambda p, x: lax.map(lambda k: dense(p | {"kernel": k}, x), p["kernel"]),
    "all pairs": lambda p, x: jax.vmap(
        lambda k: jax.vmap(lambda b: dense({"kernel": k, "bias": b}, x))(p["bias"])
    )(p["kernel"]),
}


def dense(params, x):
    return Dense(3).apply({"params": params}, x)


@pytest.mark.parametrize("how", SHARED)
def test_a_weight_and_a_bias_stacked_differently_have_no_block(how, x):
    one = random_params(Dense(3), x)
    params = {
        name: random_stack({"": leaf}, [3], [0])[""]
        if how == "all pairs" or (name == "kernel") == ("bias" in how)
        else leaf
        for name, leaf in one.items()
    }
    layout, factors = captured(lambda p, x: scalar(SHARED[how](p, x)), params, x)
    assert factors == {}
    assert all("stack" in row.reason for row in layout.uncovered)
