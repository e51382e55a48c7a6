"""Parameters that reach their layer in copies, which a `vmap` or the loss itself makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import adafisher_jax as af
from tests.support.reference import (
    Block,
    Dense,
    assert_factors,
    captured,
    random_params,
    scalar,
    slices,
    stacked,
    twin_factors,
)

pytestmark = pytest.mark.usefixtures("x64")


def apply(params, x):
    return Block().apply({"params": params}, x)


def copies(params, axis):
    """Two copies of each array, along an axis of their own."""

    def copied(a):
        kept = tuple(range(a.ndim)) if axis else tuple(range(1, a.ndim + 1))
        shape = (*a.shape, 2) if axis else (2, *a.shape)
        return lax.broadcast_in_dim(a, shape, kept)

    return jax.tree.map(copied, params)


def noisy_rows(params, row):
    return apply(jax.tree.map(lambda a: a + row[0], params), row)


# What makes copies of parameters, and the same with the block, or its copies, by themselves.
COPIED = {
    "branches for each row": (
        jax.vmap(
            lambda p, row: lax.cond(row[0] > 0.2, apply, lambda p, row: row, p, row), (None, 0)
        ),
        lambda blocks, x: jnp.where(x[:, :1] > 0.2, blocks[0](x), x),
    ),
    "noise for each row": (
        jax.vmap(noisy_rows, (None, 0)),
        lambda blocks, x: jnp.concatenate([blocks[i](x[i : i + 1]) for i in range(4)]),
    ),
    "copies, mapped": (
        lambda p, x: jax.vmap(apply)(copies(p, 0), x.reshape(2, 2, 3)).reshape(4, 3),
        lambda blocks, x: blocks[0](x),
    ),
    "copies, mapped along the last axis": (
        lambda p, x: jax.vmap(apply, (-1, 0))(copies(p, -1), x.reshape(2, 2, 3)).reshape(4, 3),
        lambda blocks, x: blocks[0](x),
    ),
    "copies, scanned": (
        lambda p, x: lax.scan(lambda x, p: (apply(p, x), None), x, copies(p, 0))[0],
        lambda blocks, x: blocks[0](blocks[0](x)),
    ),
}


@pytest.mark.parametrize("how", COPIED)
def test_copies_of_parameters(how, x):
    """The rows of all copies are theirs."""
    run, plain = COPIED[how]
    params = random_params(Block(), x)
    layout, factors = captured(lambda p, x: scalar(run(p, x)), params, x, exact=False)
    assert layout.covered == 1, str(layout)
    trees = [jax.tree.map(lambda a, i=i: a + x[i, 0], params) for i in range(4)]
    parts = twin_factors(plain, trees if "noise" in how else [params], x)
    parts = [jax.tree.map(np.asarray, part) for part in parts]
    expected = {
        path: af.Factor(*(sum(values) / len(parts) for values in zip(*of, strict=True)))
        for path in ("up", "down")
        for of in [[part[path] for part in parts]]
    }
    rows = {
        path: factor._replace(rows=factor.rows * len(parts)) for path, factor in expected.items()
    }
    assert_factors(factors, rows)


def test_copies_of_a_stack(x):
    """The axis of the copies lies before the stacked one, and goes last."""
    one = random_params(Block(), x)
    params = jax.tree.map(lambda a: jnp.stack([a, jnp.sin(a), a + 1]), one)
    inner = jax.vmap(apply, (0, None))
    run = lambda p, x: jax.vmap(inner, (1, None))(copies(p, 0), x)  # noqa: E731
    layout, factors = captured(lambda p, x: scalar(run(p, x)), params, x)
    assert layout.covered == 1, str(layout)

    def plain(blocks, x):
        return jnp.stack([jnp.stack([block(x), block(x)]) for block in blocks])

    assert_factors(factors, stacked(twin_factors(plain, slices(params), x)))


def test_a_kernel_made_of_copies_of_a_vector_is_uncovered(x):
    def loss_fn(params, x):
        kernel = jnp.broadcast_to(params[:, None], (3, 2))
        return scalar(Dense(2, use_bias=False).apply({"params": {"kernel": kernel}}, x))

    layout, factors = captured(loss_fn, jnp.ones(3), x)
    assert factors == {}
    assert "repeated" in layout.uncovered[0].reason
