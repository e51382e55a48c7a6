"""The factors of a layer, and the arrays that hold them.

This array convention holds in every module of the package. A layer's weight has *in* axes, *out*
axes and, if several independent layers lie stacked in one array, *stacked* axes. `h` and
`mean` have the weight's rank with every out axis 1, `s` with every in axis 1. So `h * s` is the
diagonal of the Kronecker product, in the shape of the weight:

| layer | weight | `h`, `mean` | `s` | `rows` |
| --- | --- | --- | --- | --- |
| `Dense(5)` on 3 features | (3, 5) | (3, 1) | (1, 5) | () |
| the same in a scan of 4 | (4, 3, 5) | (4, 3, 1) | (4, 1, 5) | (4,) |
| `DenseGeneral((2, 8))` | (3, 2, 8) | (3, 1, 1) | (1, 2, 8) | () |
| `Conv(5, (3, 3))` on 6 channels | (3, 3, 6, 5) | (3, 3, 6, 1) | (1, 1, 1, 5) | () |
| `Embed(9, 4)` | (9, 4) | (9, 1) | (1, 4) | () |
| `LayerNorm` of 5 channels | (5,) | (2,) | (5,) | () |

A bias counts as one more input, the constant 1. Its entry of `h` is 1 and is not stored.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

Axes = tuple[str, ...]


class Factor(NamedTuple):
    """Diagonal Kronecker factors of one layer: `H = E[h̄²]`, `S = E[s²]`.

    Attributes:
      h: the mean over rows of the squared inputs.
      s: the mean over rows of the squared output cotangents.
      rows: the number of rows. If a layer took no part in the loss, it is 0 and all else is zero.
      mean: the mean over rows of the inputs.
    """

    h: jax.Array
    s: jax.Array
    rows: jax.Array
    mean: jax.Array

    def from_sums(self) -> "Factor":
        """Returns the means, if `self` holds the sums that the gradient of a probe consists of.

        Example:
          >>> import jax.numpy as jnp
          >>> sums = Factor(*map(jnp.float32, (8, 2, 4, 4)))
          >>> sums.from_sums()
          Factor(h=Array(2., dtype=float32), s=Array(0.5, dtype=float32),
                 rows=Array(4., dtype=float32), mean=Array(1., dtype=float32))
        """
        n = jnp.where(self.rows > 0, self.rows, 1)
        return Factor(self.h / n, self.s / n, self.rows, self.mean / n)

    def unscale(self, scale: jax.typing.ArrayLike) -> "Factor":
        """Returns the factor of a loss, if `self` is that of `scale` times the loss.

        `s` is divided by `scale²`.

        Example:
          >>> import jax.numpy as jnp
          >>> scaled = Factor(*map(jnp.float32, (2, 64, 4, 1)))
          >>> scaled.unscale(4.0).s
          Array(4., dtype=float32)
        """
        return self._replace(s=self.s / scale / scale)


def to_unit(
    values: tuple[jax.Array, ...], inner: tuple[int, ...], epsilon: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    r"""Returns the two numbers of min-max, eq. (4): what it subtracts, and what it multiplies by.

    .. math:: \mathrm{minmax}(v) = (v - \min v) \cdot \frac{1}{\max v - \min v}

    Args:
      values: arrays of one rank. For each block they form one vector.
      inner: the axes within one block.
      epsilon: a number added to the denominator (1e-6 in the released code).

    Returns:
      The least entry and the multiplier, one of each for each block. The multiplier is 0 for a
      constant vector. Both are 0 for a vector without entries.

    Example:
      >>> import jax.numpy as jnp
      >>> low, inverse = to_unit((jnp.array([2.0, 5.0]), jnp.array([1.0])), (0,))
      >>> low.tolist(), inverse.tolist()
      ([1.0], [0.25])
    """
    bounds = [extremes(v, inner) for v in values if v.size]
    if not bounds:
        nothing = jnp.zeros_like(jnp.sum(values[0], inner, keepdims=True))
        return nothing, nothing
    low = functools.reduce(jnp.minimum, [low for low, _ in bounds])
    high = functools.reduce(jnp.maximum, [high for _, high in bounds])
    spread = high - low + epsilon
    varies = spread >= jnp.finfo(spread.dtype).tiny  # else its inverse would overflow
    return low, jnp.where(varies, 1 / jnp.where(varies, spread, 1), 0)


def extremes(values: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the greatest entry, in one reduction.

    An array with a NaN has NaN for both.

    Args:
      values: a floating-point array.
      axes: the axes to reduce; they stay with length 1.

    Example:
      >>> import jax.numpy as jnp
      >>> low, high = extremes(jnp.array([[2.0, 5.0]]), (1,))
      >>> low.tolist(), high.tolist()
      ([[2.0]], [[5.0]])
    """
    limits = tuple(jnp.asarray(limit, values.dtype) for limit in (jnp.inf, -jnp.inf))
    low, high = jax.lax.reduce(
        (values, values),
        limits,
        lambda old, new: (jax.lax.min(old[0], new[0]), jax.lax.max(old[1], new[1])),
        axes,
    )
    return jnp.expand_dims(low, axes), jnp.expand_dims(high, axes)
