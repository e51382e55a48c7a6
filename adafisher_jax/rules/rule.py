"""What a rule is: how it averages the statistics of layers and divides momentum by them.

A rule sees one group of like layers at a time (`adafisher_jax.alike`). The group is one `Layer`
whose first axis is over its members, and its `Curvature` is stacked along that axis. The weights of
a `Pair` are a tuple of arrays, one for each member, and so are the biases. A rule treats stacked
layers as separate ones. It knows nothing of optax, of Flax or of where factors come from.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adafisher_jax.alike import each
from adafisher_jax.factors import Factor
from adafisher_jax.layout import Layer, Leaf, unstacked


class Curvature(NamedTuple):
    """The stored curvature of a group of like layers, stacked.

    Attributes:
      factor: the running averages of the statistics.
      slot: the entry of `h` that belongs to the bias, one number for each block. It is the running
        average of the constant 1, which corrects averages that start at zero.
      ranges: only of rules with min-max: the least value of `h` and one over its range, then the
        same of `s`, along the second axis.
    """

    factor: Factor
    slot: jax.Array
    ranges: Any = None


class Outcome(NamedTuple):
    """The result of a refresh, one value for each layer of a group.

    Layers that a scan has stacked have one value: whether it is true of any of them.

    Attributes:
      changed: whether the averages changed.
      skipped: whether they did not because the statistics were not finite.
    """

    changed: jax.Array
    skipped: jax.Array


class Pair(NamedTuple):
    """A value for the weight and one for the bias; None for one that a layer does not have."""

    weight: Any
    bias: Any

    def each(self, function: Callable[..., Any]) -> "Pair":
        """A pair with the function applied to each weight and to each bias."""
        return Pair(*(values and tuple(map(function, values)) for values in self))


class Vectors(NamedTuple):
    """The vectors of a group, stacked: its biases, and all parameters of normalization layers.

    Attributes:
      momentum: their momentum, as a step uses it.
      grads: their gradients.
    """

    momentum: Pair
    grads: Pair


class Scale(NamedTuple):
    """The stored size and directions of a parameter's steps; of like parameters, stacked.

    Attributes:
      square: the running mean square of the steps, one number for each stacked layer, of the
        parameter's rank. It starts at zero.
      bias_correction: the same running mean of ones, by which `square` is divided.
      basis: the leading directions of a layer's weight; see `adafisher_jax.spectrum`.
    """

    square: jax.Array
    bias_correction: jax.Array
    basis: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """The base of the rules: averages that start at zero, and momentum divided by them, damped.

    Attributes:
      ema: decay γ of the averages.
      damping: λ, or the relative damping τ.
    """

    ema: Any
    damping: Any

    def __init_subclass__(cls) -> None:
        """Makes each rule a pytree of its own type, so that JAX never takes one for another."""
        super().__init_subclass__()
        jax.tree_util.register_pytree_node(
            cls, lambda one: ((one.ema, one.damping), None), lambda _, own: cls(*own)
        )

    nesterov = False  # whether a step uses the momentum one step ahead, along the same gradient

    def start(self, layer: Layer, dtype: Any) -> Curvature:
        """The averages before the first refresh."""
        return Curvature(layer.zeros(dtype), jnp.zeros(layer.slot_shape, dtype))

    def refresh(self, layer: Layer, old: Curvature, fresh: Factor) -> tuple[Curvature, Outcome]:
        """The averages after new statistics; unchanged where the statistics are not usable."""
        new = (fresh, jnp.ones_like(old.slot))
        finite = are_finite(layer, fresh)
        return blend(layer, old, new, fresh.rows, finite, self.ema, 1 - self.ema)

    def refreshed(self, curvature: Curvature) -> jax.Array:
        """Which blocks have had statistics; the others are stepped without curvature."""
        return curvature.slot > 0

    def scaled(
        self, layer: Layer, curvature: Curvature, centers: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`h`, its bias slot and `s` as the rule scales them: `h * s` is its Fisher term.

        `centers` says whether the weight and the bias are stepped together.
        """
        (h, s, _, _), slot, _ = curvature
        return h, slot, s

    def start_scale(self, leaf: Any, layer: Layer | None, at: Leaf | None) -> Scale | None:
        """The `Scale` a parameter starts with, or None; `at` is its stacked leaf in a layer."""
        return None

    def direction(
        self, layer: Layer, curvature: Curvature, momentum: Pair, vectors: Vectors, scales: Pair
    ) -> tuple[Pair, Pair]:
        """The preconditioned momenta, and the `Scale`s after this step."""
        h, slot, s = self.scaled(layer, curvature, False)
        refreshed = self.refreshed(curvature)
        damping = jnp.where(refreshed, self.damping, 1)
        return _divide(layer, momentum, h, slot, jnp.where(refreshed, s, 0), damping), scales

    def fallback(self, momentum: Any, grad: Any, scale: Any) -> tuple[Any, Any]:
        """The same for one parameter outside every layer."""
        return momentum, scale

    # What a step divides by, in words for reports: no step reads these three.

    exponent = 1.0  # the power of `damped` by which the momentum is divided

    def damped(self, layer: Layer, h: jax.Array, s: jax.Array) -> jax.Array:
        """The Fisher term with the damping in it."""
        return h * s + self.damping

    def size(self, layer: Layer, curvature: Curvature, scale: Scale | None) -> Any:
        """The factor that multiplies the preconditioned momentum of a layer's weight."""
        return 1.0


def are_finite(layer: Layer, fresh: Factor) -> jax.Array:
    """Whether the statistics of each block are finite, and their sums."""
    return jnp.isfinite(sum(sums(layer, fresh.h, jnp.abs(fresh.mean))) + sum(sums(layer, fresh.s)))


def sums(layer: Layer, *values: jax.Array) -> Sequence[jax.Array]:
    """The sums of arrays of one shape over each block, in one reduction."""
    dtype = jnp.result_type(*values)
    fixed = tuple(jax.lax.stop_gradient(v).astype(dtype) for v in values)
    zeros = tuple(jnp.zeros([], dtype) for _ in fixed)
    found = jax.lax.reduce(fixed, zeros, lambda a, b: tuple(map(jnp.add, a, b)), layer.inner)
    return [jnp.expand_dims(v, layer.inner) for v in found]


def blend(
    layer: Layer,
    old: Curvature,
    new: tuple[Factor, jax.Array],
    rows: jax.Array,
    finite: jax.Array,
    keep: Any,
    add: Any,
) -> tuple[Curvature, Outcome]:
    """`keep * old + add * new`; `old` for the stacked layers without rows, or not finite.

    `finite` says of each block whether its statistics are.
    """
    whole = jnp.all(finite, unstacked(layer.axes), keepdims=True)
    finite = whole & jnp.isfinite(rows).reshape(layer.stack_shape)
    took_part = (rows != 0).reshape(layer.stack_shape)
    usable = took_part & finite

    def average(before: jax.Array, after: jax.Array) -> jax.Array:
        where = usable if before.ndim == usable.ndim else usable.reshape(before.shape)
        new = keep * before + add * after.astype(before.dtype)
        return jnp.where(where, new.astype(before.dtype), before)

    factor, slot = jax.tree.map(average, (old.factor, old.slot), new)
    others = tuple(range(1, usable.ndim))
    outcome = Outcome(jnp.any(usable, others), jnp.any(took_part & ~finite, others))
    return old._replace(factor=factor, slot=slot), outcome


def _divide(
    layer: Layer, momentum: Pair, h: jax.Array, slot: jax.Array, s: jax.Array, damping: jax.Array
) -> Pair:
    """Algorithm 1: `m̂ / (h ⊗ s + λ)`, and the bias by its slot of `h`."""
    if layer.kind == "norm":  # `h` is the pair of the scale and the shift
        h, slot = jnp.split(h, 2, layer.axes.index("out0"))
    weights, biases = momentum
    if weights is not None:
        weights = each(_damped_quotient, weights, h, s, damping)
    if biases is not None:
        biases = each(_quotient, biases, layer.to_bias(slot * s + damping))
    return Pair(weights, biases)


def _damped_quotient(x: jax.Array, h: jax.Array, s: jax.Array, damping: jax.Array) -> jax.Array:
    return _quotient(x, h * s + damping)


def _quotient(x: jax.Array, by: jax.Array) -> jax.Array:
    """`x / by`; 0 where that is 0, without damping."""
    return jnp.where(by != 0, x / jnp.where(by != 0, by, 1), 0)
