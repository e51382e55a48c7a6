"""Parameters that the loss itself holds stacked, and its loops and maps take apart."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import adafisher_jax as af
from tests.reference import (
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
    stacked,
    twin_factors,
    under,
)

pytestmark = pytest.mark.usefixtures("x64")


def apply(params, x):
    return Block().apply({"params": params}, x)


def scan(params, x, **options):
    """The layers in turn."""
    return lax.scan(lambda x, p: (apply(p, x), None), x, params, **options)[0]


def vmap(params, x, in_axes=0):
    """Each layer by itself."""
    return jax.vmap(apply, (in_axes, None))(params, x)


def each(blocks, x):
    return jnp.stack([block(x) for block in blocks])


def shape_of(sizes, axes, x):
    """Parameters of blocks, stacked outermost first along some axes."""
    shapes = random_params(Block(), x)
    for size, axis in zip(reversed(sizes), reversed(axes), strict=True):
        shapes = jax.tree.map(lambda a, n=size, i=axis: jnp.stack([a] * n, i), shapes)
    return random_like(shapes)


def in_order(params):
    """A scan that hands its parameters on in a carry, and picks nothing."""


def on_their_own_axes(params, x):
    in_axes = {"up": {"kernel": 2, "bias": 0}, "down": {"kernel": 0, "bias": 1}}
    turned = {
        "up": {"kernel": jnp.moveaxis(params["up"]["kernel"], 0, 2), "bias": params["up"]["bias"]},
        "down": {"kernel": params["down"]["kernel"], "bias": params["down"]["bias"].T},
    }
    return jax.vmap(apply, (in_axes, None))(turned, x)


def closed_over(params, x):
    """Mapped over inside a loop that has them whole."""
    return lax.scan(lambda x, _: (vmap(params, x).mean(0), None), x, length=2)[0]


def as_constants(params, x):
    """Scanned over inside another scan's body."""
    return lax.scan(lambda x, _: (scan(params, x), None), x, length=2)[0]


def in_the_carry(params, x):
    def step(carry, _):
        params, x = carry
        return (params, scan(params, x)), None

    return lax.scan(step, (params, x), length=2)[0][1]


def in_both_loops(params, x):
    """Sliced by a loop, and again, whole, by another one inside it."""
    return lax.scan(lambda x, p: (apply(p, scan(params, x)), None), x, params)[0]


def both_ways(params, x):
    return scan(params, vmap(params, x).mean(0))


def each_frozen_but_one(params, x):
    return scan(params, x) + scan(lax.stop_gradient(params), x)


ONE_AXIS = {
    "scan": (scan, in_turn),
    "scan, reverse": (
        lambda p, x: scan(p, x, reverse=True),
        lambda blocks, x: in_turn(blocks[::-1], x),
    ),
    "scan, unrolled": (lambda p, x: scan(p, x, unroll=2), in_turn),
    "scan, split transpose": (lambda p, x: scan(p, x, _split_transpose=True), in_turn),
    "scan of checkpoint": (
        lambda p, x: lax.scan(
            jax.checkpoint(lambda x, p: (apply(p, x), None), prevent_cse=False), x, p
        )[0],
        in_turn,
    ),
    "checkpoint of scan": (jax.checkpoint(scan), in_turn),
    "jit of scan": (jax.jit(scan), in_turn),
    "scan of jit": (
        lambda p, x: lax.scan(lambda x, p: (jax.jit(apply)(p, x), None), x, p)[0],
        in_turn,
    ),
    "scan of a branch": (
        lambda p, x: lax.scan(
            lambda x, p: (lax.cond(x[0, 0] < 9, apply, lambda p, x: x, p, x), None), x, p
        )[0],
        in_turn,
    ),
    "a branch of scan": (lambda p, x: lax.cond(x[0, 0] < 9, scan, lambda p, x: x, p, x), in_turn),
    "lax.map": (lambda p, x: lax.map(lambda p: apply(p, x), p), each),
    "vmap": (vmap, each),
    "vmap of jit": (jax.vmap(jax.jit(apply), (0, None)), each),
    "jit of vmap": (jax.jit(vmap), each),
    "vmap of checkpoint": (jax.vmap(jax.checkpoint(apply), (0, None)), each),
    "checkpoint of vmap": (jax.checkpoint(vmap), each),
    "vmap with its rows": (
        lambda p, x: jax.vmap(apply)(p, x[:3]),
        lambda blocks, x: jnp.stack([block(row) for block, row in zip(blocks, x, strict=False)]),
    ),
    "vmap, on their own axes": (on_their_own_axes, None),
    "vmap with a collective": (
        lambda p, x: jax.vmap(lambda p: lax.pmean(apply(p, x), "all"), axis_name="all")(p),
        lambda blocks, x: jnp.stack([sum(block(x) for block in blocks) / 3] * 3),
    ),
    "closed over": (
        closed_over,
        lambda blocks, x: each(blocks, each(blocks, x).mean(0)).mean(0),
    ),
    "as constants of a scan": (as_constants, lambda blocks, x: in_turn(blocks * 2, x)),
    "in the carry of a scan": (in_the_carry, lambda blocks, x: in_turn(blocks * 2, x)),
    "in both of two loops": (
        in_both_loops,
        lambda blocks, x: in_turn([b for one in blocks for b in (*blocks, one)], x),
    ),
    "vmap and scan": (both_ways, lambda blocks, x: in_turn(blocks, each(blocks, x).mean(0))),
}
