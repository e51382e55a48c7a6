"""The singular values of a step: its leading ones are cut down to the level of the others.

The momentum of a weight is nearly of low rank: a few directions hold most of it, and leave little
of the step to the others. They change slowly, so that two products with a few vectors in each
step are enough to follow them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adafisher_jax.layout import Layer

DIRECTIONS = 4
INERTIA = 1e-4  # keeps directions in which there is nothing from following rounding errors


def start(layer: Layer, dtype: jax.typing.DTypeLike) -> jax.Array | None:
    r"""The directions that a layer begins with: orthonormal vectors along its shorter side.

    They are cosines, :math:`u_{ij} \propto \cos(\pi (i + 1/2)(j + 1)/n)`: `DIRECTIONS` of them,
    and at most half as many as that side is long.

    Returns:
      An array of the weight's rank, 1 where its longer side is, and one axis more for the
      vectors; None if there are none, or if the weight is complex.
    """
    n = layer.extent(layer.shorter_side)
    count = min(DIRECTIONS, n // 2)
    if not count or jnp.issubdtype(dtype, jnp.complexfloating):
        return None
    angles = np.pi * (np.arange(n)[:, None] + 0.5) * (np.arange(count) + 1) / n
    vectors = jnp.asarray((2 / n) ** 0.5 * np.cos(angles), dtype)
    one_block = [size if i in layer.shorter_side else 1 for i, size in enumerate(layer.shape)]
    blocks = [1 if i in layer.longer_side else size for i, size in enumerate(layer.shape)]
    return jnp.broadcast_to(vectors.reshape(*one_block, count), (*blocks, count))


class Excess(NamedTuple):
    """A few rank-one matrices: vectors along the inputs, and along the outputs."""

    ins: jax.Array
    outs: jax.Array

    def taken_from(self, step: jax.Array) -> jax.Array:
        """What is left of a step."""
        # A sum written out is part of the loop over the step; a product would be stored first.
        pairs = [self.ins[..., i] * self.outs[..., i] for i in range(self.ins.shape[-1])]
        return step - sum(pairs)

    def over_inputs(self, layer: Layer, vector: jax.Array) -> jax.Array:
        """The sum over inputs of these times a vector like `h`."""
        shares = jnp.sum(vector[..., None] * self.ins, layer.ins, keepdims=True)
        return jnp.sum(shares * self.outs, -1)


def no_excess(layer: Layer) -> Excess:
    """No vectors at all."""
    none = jnp.zeros((*[1] * len(layer.shape), 0))
    return Excess(none, none)


def leading_excess(
    layer: Layer, step: jax.Array, basis: jax.Array, where: jax.Array
) -> tuple[Excess, jax.Array, jax.Array]:
    r"""By how much the leading singular values of a step `D` exceed the others, block by block.

    One step of subspace iteration moves the directions on; then, with :math:`u_i` the columns of
    `U` and `n` the shorter side of `D` (which stands for its transpose where that is shorter),

    .. math::

        U_t &= \mathrm{orth}(D D^T U_{t-1}), \qquad
        v_i = D^T u_i, \qquad \sigma_i = |v_i| \\
        c^2 &= \Big(|D|^2 - \sum_i \sigma_i^2\Big) / (n - k), \qquad
        E = \sum_i \big(1 - \min(1, c / \sigma_i)\big)\, u_i v_i^T

    When `U` has converged, `D - E` is `D` with its `k` leading singular values cut down to the
    root mean square of the others.

    Args:
      layer: whose weight is stepped.
      step: `D`, in the weight's shape.
      basis: `U`, as `start` returns it.
      where: false for blocks without any excess, with the weight's rank.

    Returns:
      `E`, the next `U`, and the sum of squares of `D - E` in each block.
    """
    short, long = layer.shorter_side, layer.longer_side
    total = jnp.sum(jnp.square(step), layer.inner, keepdims=True)[..., None]
    follow = where[..., None] & jnp.isfinite(total)

    def strengths(along: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(along), long, keepdims=True)

    along = jnp.where(follow, layer.product(step, basis, short), 0)
    largest = jnp.sqrt(jnp.max(strengths(along), -1, keepdims=True))
    largest = jnp.where(largest > 0, largest, 1)
    ahead = jnp.where(follow, layer.product(step, along / largest, long), 0)
    basis = _orthonormal(layer, ahead + INERTIA * largest * basis)

    along = jnp.where(follow, layer.product(step, basis, short), 0)
    squares = strengths(along)
    rest = jnp.maximum(total - jnp.sum(squares, -1, keepdims=True), 0)
    cap = rest / (layer.extent(short) - basis.shape[-1])
    kept = jnp.where(squares > cap, jnp.sqrt(cap / jnp.where(squares > 0, squares, 1)), 1)
    sides = basis * (1 - kept), along
    left = total - jnp.sum((1 - jnp.square(kept)) * squares, -1, keepdims=True)
    excess = Excess(*(sides if short == layer.ins else sides[::-1]))
    return excess, basis, left[..., 0]


def _orthonormal(layer: Layer, vectors: jax.Array) -> jax.Array:
    """Vectors along the shorter side that span the same, the first the most like the first."""
    order = (*layer.blocks, *layer.shorter_side, *layer.longer_side, vectors.ndim - 1)
    ordered = vectors.transpose(order)
    blocks = ordered.shape[: len(layer.blocks)]
    found, _ = jnp.linalg.qr(ordered.reshape(*blocks, -1, vectors.shape[-1]))
    return found.reshape(ordered.shape).transpose(np.argsort(order))
