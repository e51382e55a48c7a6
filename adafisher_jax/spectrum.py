"""The singular values of a step: its leading ones are cut down to the level of the others.

The momentum of a weight is nearly of low rank: a few directions hold most of it, and leave little
of the step to the others. They change slowly, so that products with a few vectors in each step
are enough to follow them, stored in half precision.
"""

import jax
import jax.numpy as jnp
import numpy as np

DIRECTIONS = 16
STORED = jnp.bfloat16  # a point of departure is all that they are
LEAST = 1e-4  # of the mean square of all singular values, to which leading ones are cut at most
INERTIA = 1e-4  # keeps directions in which there is nothing from following rounding errors

Excess = tuple[jax.Array, jax.Array]


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
    step: jax.Array, basis: jax.Array, where: jax.Array
) -> tuple[Excess, jax.Array, jax.Array]:
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
      step: `D`, (matrices, rows, columns).
      basis: `V` as rows, as `start` returns it.
      where: false for matrices without any excess, (matrices,).

    Returns:
      `E` as its two factors, (matrices, rows, k) and (matrices, k, columns); the next `V`; and the
      sum of squares of `D - E`, (matrices,).
    """
    total = everywhere(jnp.sum(jnp.square(step), (1, 2)))
    before = basis.astype(step.dtype)
    follow = (where & jnp.isfinite(total))[:, None, None]
    tall = step.shape[1] >= step.shape[2]

    # Vectors are rows along columns and columns along rows, so that no product transposes `step`.
    def along_columns(columns: jax.Array) -> jax.Array:
        return jnp.where(follow, _product("bik,bij->bkj", columns, step), 0)

    def along_rows(rows: jax.Array) -> jax.Array:
        return jnp.where(follow, _product("bij,bkj->bik", step, rows), 0)

    def to_longer(vectors: jax.Array) -> jax.Array:
        return along_rows(vectors).mT if tall else along_columns(vectors.mT)

    def to_shorter(vectors: jax.Array) -> jax.Array:
        return along_columns(vectors.mT) if tall else along_rows(vectors).mT

    directions = jax.lax.fori_loop(0, 3, lambda _, rows: _orthonormal(rows), to_longer(before))
    images = to_shorter(directions)
    squares = jnp.sum(jnp.square(images), 2)
    rest = jnp.maximum(total - jnp.sum(squares, 1), 0)
    n, k = basis.shape[2], basis.shape[1]
    cap = jnp.maximum(rest / (n - k), LEAST * total / n)[:, None]
    kept = jnp.where(squares > cap, jnp.sqrt(cap / jnp.where(squares > 0, squares, 1)), 1)
    cut = (1 - kept)[..., None] * directions
    left = rest + jnp.sum(jnp.square(kept) * squares, 1)
    largest = jnp.max(squares, 1)[:, None, None]
    relative = images * jax.lax.rsqrt(jnp.where(largest > 0, largest, 1))
    basis = jnp.where(largest > 0, (relative + INERTIA * before).astype(STORED), basis)
    return (cut.mT, images) if tall else (images.mT, cut), basis, left


def no_excess(step: jax.Array) -> Excess:
    """The factors of zero."""
    count, rows, columns = step.shape
    return jnp.zeros((count, rows, 0), step.dtype), jnp.zeros((count, 0, columns), step.dtype)


def subtract(step: jax.Array, excess: Excess) -> jax.Array:
    """A step without its excess, `D - E`."""
    rows, columns = excess
    return step - _product("bik,bkj->bij", rows, columns)


def over_rows(vector: jax.Array, step: jax.Array, excess: Excess) -> jax.Array:
    """The product of a vector (matrices, rows, 1), transposed, and `D - E`."""
    rows, columns = excess
    shares = _product("bik,bij->bkj", vector, rows)
    return _product("bik,bij->bkj", vector, step) - _product("bki,bij->bkj", shares, columns)


def _orthonormal(vectors: jax.Array) -> jax.Array:
    """Rows nearer to those that Gram and Schmidt make of them: a pass of shifted Cholesky QR.

    What is added to the diagonal lets it succeed whatever the rows are. A row of which those before
    leave a thousandth is orthogonal to them after one pass, and what rounding leaves of it after
    three (arXiv:1809.11085), in matrix products instead of reflections.
    """
    gram = _product("bkj,blj->bkl", vectors, vectors)
    one = jnp.broadcast_to(jnp.eye(gram.shape[1], dtype=gram.dtype), gram.shape)
    squares = jnp.sum(gram * one, 2)
    unit = jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
    added = DIRECTIONS * jnp.finfo(gram.dtype).eps
    cosines = gram * unit[:, :, None] * unit[:, None]
    lower = jax.lax.linalg.cholesky(cosines + added * one, symmetrize_input=False)
    inverse = jax.lax.linalg.triangular_solve(lower, one, left_side=True, lower=True)
    lengths = 1 - added * jnp.sum(jnp.square(inverse), 2, keepdims=True)
    inverse = inverse * jax.lax.rsqrt(jnp.maximum(lengths, 0.5))
    return _product("bkl,blj->bkj", inverse * unit[:, None], vectors)


def _product(equation: str, *operands: jax.Array) -> jax.Array:
    highest, where = jax.lax.Precision.HIGHEST, _replicated(*operands)
    return jnp.einsum(equation, *operands, precision=highest, out_sharding=where)


def everywhere(x: jax.Array) -> jax.Array:
    """An array that lies on explicit mesh axes, whole on each device."""
    sharding = _replicated(x)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def _replicated(*operands: jax.Array) -> jax.sharding.NamedSharding | None:
    """Where operands lie on explicit mesh axes (only these are in a type), everywhere of them."""
    for sharding in (jax.typeof(operand).sharding for operand in operands):
        if any(sharding.spec):
            return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return None
