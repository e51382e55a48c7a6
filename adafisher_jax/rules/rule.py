"""What a rule is: how layers' statistics are averaged and divide their momentum.

A rule sees one group of like layers at a time (`adafisher_jax.alike`): as one layer whose first
axis is over the group, with their `Curvature` (averaged factors, and the bias slot of `h` beside
them) stacked along it. The weights, and the biases, of a `Pair` are a tuple of arrays, one for each
layer. Stacked layers are treated each for itself.
Nothing here knows about optax, Flax or where the factors come from.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adafisher_jax.alike import each
from adafisher_jax.factors import Factor, extremes
from adafisher_jax.layout import Layer, Leaf


class Curvature(NamedTuple):
    """What is stored of like layers, stacked.

    Attributes:
      factor: running averages of its statistics.
      slot: the bias slot of `h`, one number for each block: the running average of a constant.
        Averages that start at zero are bias-corrected by it.
      ranges: of a rule with min-max: the least value of `h` and one over its range, then those
        of `s`, along the second axis.
    """

    factor: Factor
    slot: jax.Array
    ranges: Any = None


class Outcome(NamedTuple):
    """What came of a refresh, one for each layer of a group; of any, of those a scan has stacked.

    Attributes:
      changed: whether averages changed.
      skipped: whether some were left as they were, since statistics were not finite.
    """

    changed: jax.Array
    skipped: jax.Array


class Pair(NamedTuple):
    """The weight's and the bias's share of something; None where there is none."""

    weight: Any
    bias: Any

    def each(self, function: Callable[..., Any]) -> "Pair":
        """The function of each of the weights, and of the biases."""
        return Pair(*(values and tuple(map(function, values)) for values in self))


class Vectors(NamedTuple):
    """The biases of a group, or what its normalization layers have, stacked: to take numbers from.

    Attributes:
      momentum: likewise as a step uses it.
      grads: the gradients.
    """

    momentum: Pair
    grads: Pair


class Scale(NamedTuple):
    """What is stored of a parameter's steps, or of the steps of like parameters, stacked.

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
    """Averages that start at zero, and momentum divided by them, damped; what rules build on.

    Attributes:
      ema: the averages' decay γ.
      damping: λ, or the relative damping τ.
    """

    ema: Any
    damping: Any

    def __init_subclass__(cls) -> None:
        """Makes a rule a pytree: `register_dataclass` would let JAX take one for another."""
        super().__init_subclass__()
        jax.tree_util.register_pytree_node(
            cls, lambda one: ((one.ema, one.damping), None), lambda _, own: cls(*own)
        )

    nesterov = False  # whether a step uses the momentum one step ahead, along the same gradient
    exponent = 1.0  # of `damped`, in what the momentum is divided by

    def start(self, layer: Layer, dtype: Any) -> Curvature:
        """The averages before the first refresh."""
        return Curvature(layer.zeros(dtype), jnp.zeros(layer.slot_shape, dtype))

    def refresh(self, layer: Layer, old: Curvature, fresh: Factor) -> tuple[Curvature, Outcome]:
        """The averages after new statistics; unchanged where those are unusable."""
        new = (fresh, jnp.ones_like(old.slot))
        return blend(layer, old, new, fresh, self.ema, 1 - self.ema)

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

    def damped(self, layer: Layer, h: jax.Array, s: jax.Array) -> jax.Array:
        """The Fisher term with the damping in it."""
        return h * s + self.damping

    def start_scale(self, leaf: Any, layer: Layer | None, at: Leaf | None) -> Scale | None:
        """What is kept of a parameter, if anything; `at`: its place in a layer, then stacked."""
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

    def size(self, layer: Layer, scale: Scale | None) -> Any:
        """What a layer's weight has its preconditioned momentum multiplied by."""
        return 1.0


def blend(
    layer: Layer,
    old: Curvature,
    new: tuple[Factor, jax.Array],
    fresh: Factor,
    keep: Any,
    add: Any,
) -> tuple[Curvature, Outcome]:
    """`keep * old + add * new`; `old` for the stacked layers without rows, or not finite."""
    within = tuple(i for i, axis in enumerate(layer.axes) if not axis.startswith("stack"))
    h, s, _, mean = jax.lax.stop_gradient(fresh)
    finite = jnp.isfinite(fresh.rows).reshape(layer.stack_shape)
    for parts in ((h, mean), (s,)):
        if parts[0].size:  # the extremes of nothing are infinite
            for values in jax.tree.leaves(extremes(parts, within)):  # NaN if one entry is
                finite &= jnp.isfinite(values)
    took_part = (fresh.rows != 0).reshape(layer.stack_shape)
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
