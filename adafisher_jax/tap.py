"""The tap: an identity whose backward pass returns a layer's statistics.

For a layer `y = W h̄` with `s = ∂L/∂y`, the row sums of `h̄²` and `h̄` are known
going forward and those of `s²` going backward. `tap` is put on `y`. It hands
`y` on, and in the backward pass hands `s` on, and returns the sums *as the
cotangent of a probe*: a `Factor` of zeros among the differentiated arguments.
One ordinary backward pass so yields gradients and factors together, and
whatever a transformation does to the probe (slice, stack, broadcast, sum over
uses or devices) it does to the statistics.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from adafisher_jax.factors import Factor


class Statistic(Protocol):
    """What one layer kind contributes to its factors: sums over its rows.

    Implementations are hashable and hold no arrays; see `adafisher_jax.statistics`.
    """

    def of_inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sums over rows of the squared inputs and of the inputs."""
        ...

    def of_cotangents(self, g: jax.Array) -> jax.Array:
        """The sum over rows of the squared output cotangents."""
        ...

    def rows(self, y: jax.Array) -> int:
        """How many rows the output has."""
        ...


def tap(statistic: Statistic, x: jax.Array, y: jax.Array, probe: Factor) -> jax.Array:
    r"""Returns `y`, and makes `probe`'s gradient the layer's statistics.

    The gradient of any loss with respect to `probe` is, summed over every tapped use of it,

    .. math:: \Big(\sum_n \bar h_n^2,\ \sum_n s_n^2,\ N,\ \sum_n \bar h_n\Big)

    with one row `n` for each example (and position); `Factor.from_sums` turns it into means.

    Args:
      statistic: how this layer's inputs and cotangents are reduced, for example
        `adafisher_jax.statistics.einsum("ni,io->no")`.
      x: the layer's input, any float or integer type.
      y: the layer's output.
      probe: a `Factor` of zeros with the shapes the statistic yields. Its type, at least
        float32, is the type the statistics are accumulated in.

    Returns:
      `y` itself. Gradients with respect to everything but `probe` are unchanged.

    Example:
      A layer written by hand, without Flax:

      >>> import jax, jax.numpy as jnp
      >>> import adafisher_jax as af
      >>> w, x = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 0.0], [2.0, 1.0]])
      >>> def loss(w, probe):
      ...     y = af.tap(af.statistics.einsum("ni,io->no"), x, x @ w, probe)
      ...     return jnp.sum(y) / 2
      >>> probe = af.Factor(jnp.zeros((2, 1)), jnp.zeros((1, 2)), jnp.zeros(()), jnp.zeros((2, 1)))
      >>> grads, sums = jax.grad(loss, argnums=(0, 1))(w, probe)
      >>> factor = sums.from_sums()
      >>> factor.h.ravel().tolist(), factor.s.ravel().tolist(), float(factor.rows)
      ([2.5, 0.5], [0.25, 0.25], 2.0)
    """
    sums = statistic.of_inputs(jax.lax.stop_gradient(x))
    like = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in probe)
    return _tap(statistic, like, y, sums, probe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(
    statistic: Statistic,
    like: tuple[jax.ShapeDtypeStruct, ...],
    y: jax.Array,
    sums: tuple[jax.Array, jax.Array],
    probe: Factor,
) -> jax.Array:
    return y


def _forward(statistic: Statistic, like: Any, y: jax.Array, sums: Any, probe: Factor) -> Any:
    # Tapped again, so that a loss that differentiates twice still meets the tap.
    return _tap(statistic, like, y, sums, probe), sums


def _backward(statistic: Statistic, like: Any, sums: Any, g: jax.Array) -> Any:
    h, mean = sums
    s = statistic.of_cotangents(g)
    rows = jnp.full((), statistic.rows(g), s.dtype)
    # `vmap` sums over its axis only what depends on the incoming cotangent.
    tie = 0 * jnp.ravel(s)[0]
    found = (h + tie, s, rows + tie, mean + tie)
    cotangent = Factor(
        *(jnp.broadcast_to(v.astype(p.dtype), p.shape) for v, p in zip(found, like, strict=True))
    )
    return g, None, cotangent


_tap.defvjp(_forward, _backward)
