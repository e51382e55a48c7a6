"""The cut: the leading singular values of a step are lowered to the level of the others.

The momentum of a weight is nearly of low rank. A few directions hold most of it and leave little of
the step to the others. These directions change slowly. Products with a few vectors in each step are
enough to follow them, and half precision is enough to store them.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adafisher_jax.alike import stack
from adafisher_jax.layout import Layer
from adafisher_jax.meshes import along, beside, everywhere

MOST = 32  # directions of a matrix, unless half of its shorter side is less
STORED = jnp.bfloat16  # the stored directions only begin the next iteration
LEAST = 1e-2  # no singular value's square is cut below this share of the mean of all squares
SOLVED = 16  # rows of the largest triangular matrices that a CPU does not invert in halves
INERTIA = 1e-4  # keeps directions without any step from following rounding errors

Steps = Sequence[jax.Array]


class Cut(NamedTuple):
    r"""The excess :math:`E_i = L_i^T R_i` of the matrices `D_i` of like layers' steps.

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

    def subtract(self, layer: Layer, steps: Steps) -> list[jax.Array]:
        """Each :math:`D_i - E_i`, in the weights' axes."""
        left = _in_axes(layer, self.left, layer.ins, len(steps))
        right = _in_axes(layer, self.right, layer.outs, len(steps))
        found = []
        for step, rows, columns in zip(steps, left, right, strict=True):
            found.append(
                step
                - jax.lax.platform_dependent(
                    _beside(layer, rows, layer.ins, step),
                    _beside(layer, columns, layer.outs, step),
                    cpu=functools.partial(_product, _equation(layer, "bzi,bzo->w")),
                    default=functools.partial(_outer, layer),
                )
            )
        return found


def start(matrices: tuple[int, int, int]) -> jax.Array | None:
    r"""The first directions: rows along the shorter side, `n`, of each matrix.

    The rows are cosines, :math:`u_{ij} \propto \cos(\pi (j + 1/2)(i + 1)/n)`. There are
    32 of them, but :math:`n/2` at most.

    Args:
      matrices: the number of matrices, and of their rows and columns.

    Returns:
      A bfloat16 array (matrices, directions, n), or None if there are none.
    """
    count, *sides = matrices
    n = min(sides)
    vectors = directions(n)
    if not vectors:
        return None
    angles = np.pi * (np.arange(n) + 0.5) * (np.arange(vectors)[:, None] + 1) / n
    rows = jnp.asarray((2 / n) ** 0.5 * np.cos(angles), STORED)
    return jnp.broadcast_to(rows, (count, vectors, n))


def directions(n: int) -> int:
    """How many directions of a matrix with a shorter side of `n` are followed."""
    return min(MOST, n // 2)


def leading_excess(
    layer: Layer,
    steps: Steps,
    basis: jax.Array,
    where: jax.Array,
    vector: jax.Array | None = None,
) -> tuple[Cut, jax.Array]:
    r"""The excess `E` of the leading singular values of each matrix `D` over the others.

    Half a step of subspace iteration moves the directions `V` on. `D` is written with its shorter
    side, of length `n`, as columns, and :math:`u_i` are the columns of `U`:

    .. math::

        U &= \mathrm{orth}(D V_{t-1}), \qquad
        v_i = D^T u_i, \qquad \sigma_i = |v_i|, \qquad V_t = (v_1, ..., v_k) \\
        c^2 &= \max\Big(\frac{|D|^2 - \sum_i \sigma_i^2}{n - k},\; 10^{-2} \frac{|D|^2}{n}\Big),
        \qquad E = \sum_i \big(1 - \min(1, c / \sigma_i)\big)\, u_i v_i^T

    Once `V` has converged, `D - E` is `D` with its `k` leading singular values cut down to the root
    mean square of the others. The bound of 1e-2 matters to a matrix of low rank, whose other
    singular values are noise and rounding errors, of which a step would otherwise mostly be. `V` is
    stored relative to its largest column, with 1e-4 of the previous `V` added, which decides where
    `D` has nothing.

    Args:
      layer: one of the like layers. Each block is a matrix of inputs by outputs.
      steps: the `D` of each layer, in the axes of its weight.
      basis: `V` as rows, of all matrices, as `start` returns it.
      where: false for matrices that have no excess, (matrices,).
      vector: a row to be multiplied with each :math:`D - E`, (matrices, 1, rows).

    Returns:
      The excess, and the next `V`.
    """
    total = _sum_squares(layer, steps)
    before = basis.astype(steps[0].dtype)
    follow = (where & jnp.isfinite(total))[:, None, None]
    size = jnp.where(total > 0, total, 1)[:, None, None]

    def directions_of(vectors: jax.Array) -> jax.Array:
        """Orthonormal rows. They are scaled first, for squares of small steps underflow."""
        return _orthonormal(jnp.where(follow, vectors * jax.lax.rsqrt(size), 0))

    def along_columns(vectors: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Their products, and that of the vector, which costs little beside them."""
        if vector is None:
            return _along_columns(layer, steps, vectors), None
        both = jnp.concatenate([vectors, _like(vector, vectors)], 1)
        found = _along_columns(layer, steps, both)
        return found[:, :-1], everywhere(found[:, -1:])

    if tall := layer.fan_in >= layer.fan_out:
        orthonormal = directions_of(_along_rows(layer, steps, before))
        images, pulled = along_columns(orthonormal)
    else:
        longer, pulled = along_columns(before)
        orthonormal = directions_of(longer)
        images = _along_rows(layer, steps, orthonormal)
    images = jnp.where(follow, images, 0)

    squares = jnp.sum(jnp.square(images), 2)
    rest = jnp.maximum(total - jnp.sum(squares, 1), 0)
    n, k = basis.shape[2], basis.shape[1]
    cap = jnp.maximum(rest / (n - k), LEAST * total / n)[:, None]
    kept = jnp.where(squares > cap, jnp.sqrt(cap / jnp.where(squares > 0, squares, 1)), 1)
    cut = (1 - kept)[..., None] * orthonormal
    left, right = (cut, images) if tall else (images, cut)
    if vector is not None and pulled is not None:
        shares = _product("bji,bki->bjk", _like(vector, left), left)
        pulled = pulled - everywhere(_product("bjk,bko->bjo", shares, right))
    square = rest + jnp.sum(jnp.minimum(squares, cap), 1)
    largest = jnp.max(squares, 1)[:, None, None]
    relative = images * jax.lax.rsqrt(jnp.where(largest > 0, largest, 1))
    after = everywhere((relative + INERTIA * before).astype(STORED))
    return Cut(left, right, square, pulled), jnp.where(largest > 0, after, basis)


def no_excess(layer: Layer, steps: Steps, vector: jax.Array | None = None) -> Cut:
    """The `Cut` of matrices that stay as they are."""
    square = _sum_squares(layer, steps)
    left, right = (
        jnp.zeros((len(square), 0, n), steps[0].dtype) for n in (layer.fan_in, layer.fan_out)
    )
    pulled = None if vector is None else _along_columns(layer, steps, vector)
    return Cut(left, right, square, pulled)


def _sum_squares(layer: Layer, steps: Steps) -> jax.Array:
    """The sum of squares of each matrix, (matrices,)."""
    squares = [jnp.sum(jnp.square(jnp.abs(x)), layer.outs, keepdims=True) for x in steps]
    return jnp.ravel(jnp.sum(stack(squares), tuple(1 + i for i in layer.ins)))


def _along_rows(layer: Layer, steps: Steps, vectors: jax.Array) -> jax.Array:
    """Products of rows (matrices, k, columns) with those of each matrix: (matrices, k, rows)."""
    given = _in_axes(layer, vectors, layer.outs, len(steps))
    equation = _equation(layer, "w,bzo->biz")  # as a product of matrices has it
    found = [_product(equation, *pair) for pair in zip(steps, given, strict=True)]
    axis = len(layer.blocks)
    return _joined(found, axis, (len(vectors), layer.fan_in, vectors.shape[1]), 1).mT


def _along_columns(layer: Layer, steps: Steps, vectors: jax.Array) -> jax.Array:
    """Products of rows (matrices, k, rows) with the columns: (matrices, k, columns)."""
    given = _in_axes(layer, vectors, layer.ins, len(steps))
    equation = _equation(layer, "bzi,w->bzo")
    found = [_product(equation, *pair) for pair in zip(given, steps, strict=True)]
    axis = len(layer.blocks) + 1
    return _joined(found, axis, (len(vectors), vectors.shape[1], layer.fan_out), 2)


def _joined(
    products: Sequence[jax.Array], axis: int, shape: tuple[int, int, int], long: int
) -> jax.Array:
    """Products as matrices. Their axes from `axis` on become the axis `long`.

    On explicit mesh axes each device keeps its own entries of that axis, if only the first of these
    axes is sharded, and in all products alike.
    """
    spec, *others = {tuple(jax.typeof(x).sharding.spec) for x in products}
    kept = spec[axis] if axis < len(spec) else None
    if others or any(spec[:axis] + spec[axis + 1 :]):
        products, kept = [everywhere(x) for x in products], None
    where = along(products[0], *(kept if i == long else None for i in range(3)))
    return jnp.stack(products).reshape(shape, out_sharding=where)


# A weight is never reshaped, which on several devices could move it: vectors are, to its axes.


def _equation(layer: Layer, short: str) -> str:
    """An equation for `einsum`, with the axes of the weight, its blocks, inputs and outputs."""
    for name, axes in (
        ("w", range(len(layer.shape))),
        ("b", layer.blocks),
        ("i", layer.ins),
        ("o", layer.outs),
    ):
        short = short.replace(name, "".join(chr(ord("A") + axis) for axis in axes))
    return short


def _in_axes(
    layer: Layer, vectors: jax.Array, side: tuple[int, ...], count: int
) -> Sequence[jax.Array]:
    """Vectors (matrices, k, n) of each of some layers, in axes: (*blocks, k, *side)."""
    blocks, n = ([layer.shape[i] for i in axes] for axes in (layer.blocks, side))
    where = along(vectors, *[None] * (2 + len(blocks)), jax.typeof(vectors).sharding.spec[2])
    shape = count, *blocks, vectors.shape[1], *n
    return jnp.unstack(vectors.reshape(shape, out_sharding=where))


def _beside(layer: Layer, x: jax.Array, side: tuple[int, ...], step: jax.Array) -> jax.Array:
    """Vectors in axes that lie, on explicit mesh axes, where those of the step do."""
    spec = jax.typeof(step).sharding.spec
    blocks, own = ([spec[i] for i in axes] for axes in (layer.blocks, side))
    return beside(x, step, *blocks, None, *own)


def _like(x: jax.Array, other: jax.Array) -> jax.Array:
    """An array that lies, on explicit mesh axes, as another with as many axes does."""
    return beside(x, other, *jax.typeof(other).sharding.spec)


def _outer(layer: Layer, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The product as a loop over its entries, which then need not be in memory.

    On a GPU this loop is part of the loop that steps the weight. On a CPU it would be slow.
    """

    def spread(x: jax.Array, side: tuple[int, ...]) -> jax.Array:
        own = (*layer.blocks, *side)
        order = [own.index(i) for i in sorted(own)]
        k = len(layer.blocks)
        x = x.transpose(k, *(i + (i >= k) for i in order))
        return jnp.expand_dims(x, [1 + i for i in range(len(layer.shape)) if i not in own])

    left, right = spread(rows, layer.ins), spread(columns, layer.outs)
    # A sum of 32 terms would be a loop of its own, so the first term is apart.
    return jnp.sum(left[:1] * right[:1], 0) + jnp.sum(left[1:] * right[1:], 0)


def _orthonormal(vectors: jax.Array) -> jax.Array:
    r"""Nearly orthonormal rows with the same span, by one pass of shifted Cholesky QR.

    The cosines between rows are made slightly smaller, so that the factorization always exists
    (arXiv:1809.11085). A row with at least a thousandth outside the span of the rows before it
    becomes orthogonal to them. A row with less becomes shorter than 1. So :math:`Q Q^T \le 1` for
    the result `Q`, up to rounding, and a cut along its rows never removes more than there is.
    """
    gram = _product("bkj,blj->bkl", vectors, vectors)
    one = jnp.broadcast_to(jnp.eye(gram.shape[1], dtype=bool), gram.shape)
    less = 1 - gram.shape[1] * jnp.finfo(gram.dtype).eps
    smaller = jnp.where(one, jnp.where(gram > 0, gram, 1), less * gram)  # rows of zeros stay zero
    lower = jax.lax.linalg.cholesky(smaller, symmetrize_input=False)
    inverse = jax.lax.platform_dependent(lower, cpu=_inverse_of_halves, default=_inverse)
    return _product("bkl,blj->bkj", inverse, vectors)


def _inverse(lower: jax.Array) -> jax.Array:
    """The inverses of lower triangular matrices."""
    one = jnp.broadcast_to(jnp.eye(lower.shape[1], dtype=lower.dtype), lower.shape)
    return jax.lax.linalg.triangular_solve(lower, one, left_side=True, lower=True)


def _inverse_of_halves(lower: jax.Array) -> jax.Array:
    """The same from the inverses of their halves, if they have more than `SOLVED` rows.

    For more rows a CPU's library starts threads of its own. They take the cores from the other
    operations, and the whole update takes twice as long.
    """
    k = lower.shape[1]
    if k <= SOLVED:
        return _inverse(lower)
    half = (k + 1) // 2
    halves = jnp.concatenate([lower[:, :half, :half], lower[:, -half:, -half:]])
    first, last = jnp.split(_inverse_of_halves(halves), 2)
    last = last[:, k % 2 :, k % 2 :]  # of an odd number, the halves share a row
    between = _product("bij,bjk->bik", last, -lower[:, half:, :half])
    between = _product("bij,bjk->bik", between, first)
    above = jnp.concatenate([first, jnp.zeros_like(between).mT], 2)
    return jnp.concatenate([above, jnp.concatenate([between, last], 2)], 1)


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
