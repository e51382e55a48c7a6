"""The singular values of a step: its leading ones are cut down to the level of the others.

The momentum of a weight is nearly of low rank: a few directions hold most of it, and leave little
of the step to the others. They change slowly, so that products with a few vectors in each step
are enough to follow them, stored in half precision.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adafisher_jax.alike import beside, everywhere

DIRECTIONS = 16
STORED = jnp.bfloat16  # a point of departure is all that they are
LEAST = 1e-4  # of the mean square of all singular values, to which leading ones are cut at most
INERTIA = 1e-4  # keeps directions in which there is nothing from following rounding errors

Matrices = Sequence[jax.Array]


class Cut(NamedTuple):
    r"""The excess :math:`E_i = L_i^T R_i` of the matrices `D_i` of a few steps.

    Attributes:
      left: rows of `L`, (matrices, k, rows).
      right: rows of `R`, (matrices, k, columns).
      square: the sum of squares of each :math:`D_i - E_i`, (matrices,).
      pulled: a vector's product with each :math:`D_i - E_i`, (matrices, 1, columns), or None.
    """

    left: jax.Array
    right: jax.Array
    square: jax.Array
    pulled: jax.Array | None

    def subtract(self, steps: Matrices) -> list[jax.Array]:
        """Each :math:`D_i - E_i`."""
        found = []
        for step, *vectors in zip(steps, *(_split(x, steps) for x in self[:2]), strict=True):
            pair = (beside(x, step, axis) for x, axis in zip(vectors, (1, 2), strict=True))
            found.append(step - jax.lax.platform_dependent(*pair, cpu=_outer, default=_fused_outer))
        return found


def _outer(left: jax.Array, right: jax.Array) -> jax.Array:
    return _product("bki,bkj->bij", left, right)


def _fused_outer(left: jax.Array, right: jax.Array) -> jax.Array:
    """The same, never in memory where a loop over its entries takes it up; on a CPU that is slow."""
    return jnp.sum(left[..., None] * right[:, :, None], 1)


def _split(vectors: jax.Array, steps: Matrices) -> list[jax.Array]:
    return jnp.split(vectors, len(steps))


def start(matrices: tuple[int, int, int]) -> jax.Array | None:
    r"""The directions to begin with: rows along the shorter side of some matrices.

    They are cosines, :math:`u_{ij} \propto \cos(\pi (j + 1/2)(i + 1)/n)`: `DIRECTIONS` of them,
    and at most half as many as that side, `n`, is long.

    Args:
      matrices: how many, of how many rows and columns.

    Returns:
      A bfloat16 array (matrices, directions, n), or None if there are none.
    """
    count, *sides = matrices
    n = min(sides)
    vectors = min(DIRECTIONS, n // 2)
    if not vectors:
        return None
    angles = np.pi * (np.arange(n) + 0.5) * (np.arange(vectors)[:, None] + 1) / n
    rows = jnp.asarray((2 / n) ** 0.5 * np.cos(angles), STORED)
    return jnp.broadcast_to(rows, (count, vectors, n))


def leading_excess(
    steps: Matrices, basis: jax.Array, where: jax.Array, vector: jax.Array | None = None
) -> tuple[Cut, jax.Array]:
    r"""By how much the leading singular values of each matrix `D` exceed the others.

    Half a step of subspace iteration moves the directions on: with `n` the shorter side of `D`
    (which stands for its transpose where it has fewer rows than columns) and :math:`u_i` the
    columns of `U`,

    .. math::

        U &= \mathrm{orth}(D V_{t-1}), \qquad
        v_i = D^T u_i, \qquad \sigma_i = |v_i|, \qquad V_t = (v_1, ..., v_k) \\
        c^2 &= \max\Big(\frac{|D|^2 - \sum_i \sigma_i^2}{n - k},\; 10^{-4} \frac{|D|^2}{n}\Big),
        \qquad E = \sum_i \big(1 - \min(1, c / \sigma_i)\big)\, u_i v_i^T

    When these have converged, `D - E` is `D` with its `k` leading singular values cut down to the
    root mean square of the others; of a matrix without others, not down to what rounding leaves.
    `V` is kept relative to its largest column, and with 1e-4 of the one before added, which decides
    where `D` has nothing.

    Args:
      steps: arrays (matrices, rows, columns) of one shape; those of all are counted through.
      basis: `V` as rows, as `start` returns it.
      where: false for matrices without any excess, (matrices,).
      vector: to be multiplied with each :math:`D - E`, (matrices, 1, rows).

    Returns:
      The excess, and the next `V`.
    """
    total = sum_squares(steps)
    before = basis.astype(steps[0].dtype)
    follow = (where & jnp.isfinite(total))[:, None, None]
    tall = steps[0].shape[1] >= steps[0].shape[2]

    # One product serves the directions and the vector.
    if tall:
        directions = _orthonormal(jnp.where(follow, along_rows(steps, before), 0))
        images, pulled = _with(vector, directions, steps)
    else:
        longer, pulled = _with(vector, before, steps)
        directions = _orthonormal(jnp.where(follow, longer, 0))
        images = along_rows(steps, directions)
    images = jnp.where(follow, images, 0)

    squares = jnp.sum(jnp.square(images), 2)
    rest = jnp.maximum(total - jnp.sum(squares, 1), 0)
    n, k = basis.shape[2], basis.shape[1]
    cap = jnp.maximum(rest / (n - k), LEAST * total / n)[:, None]
    kept = jnp.where(squares > cap, jnp.sqrt(cap / jnp.where(squares > 0, squares, 1)), 1)
    cut = (1 - kept)[..., None] * directions
    left, right = (cut, images) if tall else (images, cut)
    if pulled is not None:
        pulled = pulled - _product("bki,bij->bkj", _product("bki,bji->bkj", vector, left), right)
    square = rest + jnp.sum(jnp.square(kept) * squares, 1)
    largest = jnp.max(squares, 1)[:, None, None]
    relative = images * jax.lax.rsqrt(jnp.where(largest > 0, largest, 1))
    basis = jnp.where(largest > 0, (relative + INERTIA * before).astype(STORED), basis)
    return Cut(left, right, square, pulled), basis


def no_excess(steps: Matrices, vector: jax.Array | None = None) -> Cut:
    """That of matrices which are left as they are."""
    square = sum_squares(steps)
    none = (jnp.zeros((len(square), 0, n), steps[0].dtype) for n in steps[0].shape[1:])
    return Cut(*none, square, None if vector is None else along_columns(steps, vector))


def sum_squares(steps: Matrices) -> jax.Array:
    """Of each matrix, (matrices,): over its columns apart, and over the rows for all together."""
    by_row = [everywhere(jnp.sum(jnp.square(jnp.abs(step)), 2)) for step in steps]
    return jnp.sum(jnp.concatenate(by_row), 1)


def along_rows(steps: Matrices, vectors: jax.Array) -> jax.Array:
    """Products of rows (matrices, vectors, columns) with the rows of each matrix."""
    return _products("bij,bkj->bik", steps, vectors).mT


def along_columns(steps: Matrices, vectors: jax.Array) -> jax.Array:
    """Products of rows (matrices, vectors, rows) with the columns of each matrix."""
    return _products("bij,bki->bkj", steps, vectors)


def _with(
    vector: jax.Array | None, vectors: jax.Array, steps: Matrices
) -> tuple[jax.Array, jax.Array | None]:
    """`along_columns`, of the vectors and of one more that may be there."""
    if vector is None:
        return along_columns(steps, vectors), None
    found = along_columns(steps, jnp.concatenate([vectors, vector.astype(vectors.dtype)], 1))
    return found[:, :-1], found[:, -1:]


def _products(equation: str, steps: Matrices, vectors: jax.Array) -> jax.Array:
    parts = _split(vectors, steps)
    return jnp.concatenate(
        [everywhere(_product(equation, *pair)) for pair in zip(steps, parts, strict=True)]
    )


def _orthonormal(vectors: jax.Array) -> jax.Array:
    r"""Rows nearer to those that Gram and Schmidt make of them: a pass of shifted Cholesky QR.

    Cosines are taken a bit smaller than they are, by which it succeeds whatever the rows are
    (arXiv:1809.11085). A row of which those before leave a thousandth is then orthogonal to them.
    Of one of which they leave less, the less there is the shorter the row that is returned. So the
    rows `Q` have :math:`Q Q^T \le 1` up to rounding: what is cut along them is never more than there
    is, and what is left never larger than it is taken for.
    """
    gram = _product("bkj,blj->bkl", vectors, vectors)
    one = jnp.broadcast_to(jnp.eye(gram.shape[1], dtype=gram.dtype), gram.shape)
    squares = jnp.sum(gram * one, 2)
    unit = jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
    less = 1 - DIRECTIONS * jnp.finfo(gram.dtype).eps
    cosines = jnp.where(one > 0, one, less * gram * unit[:, :, None] * unit[:, None])
    lower = jax.lax.linalg.cholesky(cosines, symmetrize_input=False)
    inverse = jax.lax.linalg.triangular_solve(lower, one, left_side=True, lower=True)
    return _product("bkl,blj->bkj", inverse * unit[:, None], vectors)


def _product(equation: str, *operands: jax.Array) -> jax.Array:
    """An exact product; on explicit mesh axes, each axis of it lies where its operand's does."""
    inputs, output = equation.split("->")
    axes: dict[str, Any] = {}
    mesh = None
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        sharding = jax.typeof(operand).sharding
        for letter, axis in zip(letters, sharding.spec, strict=True):
            if axis is not None:
                axes[letter], mesh = axis, sharding.mesh
    spec = jax.sharding.PartitionSpec(*map(axes.get, output))
    where = None if mesh is None else jax.sharding.NamedSharding(mesh, spec)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, *operands, precision=highest, out_sharding=where)
