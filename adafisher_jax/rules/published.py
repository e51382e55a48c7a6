"""The rule as the paper prints it, and as the released code computes it."""

from typing import Any

import jax
import jax.numpy as jnp

from adafisher_jax.factors import Factor, to_unit
from adafisher_jax.layout import Layer
from adafisher_jax.rules.rule import Curvature, Outcome, Rule, are_finite, blend


class Paper(Rule):
    r"""AdaFisher as printed: eqs. (3)-(4) and Algorithm 1 of arXiv:2405.16397.

    .. math::

        H_t = \gamma H_{t-1} + (1-\gamma) H, \qquad
        \tilde F = \mathrm{minmax}(H_t) \otimes \mathrm{minmax}(S_t) + \lambda, \qquad
        d = \hat m / \tilde F

    Min-max is indifferent to a vector's scale, and the bias slot carries the same weight as
    the rest of `H`, so averages that start at zero need no further correction.
    """

    def scaled(
        self, layer: Layer, curvature: Curvature, centers: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        (h, s, _, _), slot, ranges = curvature
        return _minmax(layer, h, slot, s, ranges)

    def start(self, layer: Layer, dtype: Any) -> Curvature:
        return self._with_ranges(layer, super().start(layer, dtype))

    def refresh(self, layer: Layer, old: Curvature, fresh: Factor) -> tuple[Curvature, Outcome]:
        new, outcome = super().refresh(layer, old, fresh)
        return self._with_ranges(layer, new), outcome

    def _with_ranges(self, layer: Layer, curvature: Curvature) -> Curvature:
        # Stored, since ranges change with the averages only: other steps only divide.
        (h, s, _, _), slot, _ = curvature
        return curvature._replace(ranges=_ranges(layer, h, slot, s))


class Official(Rule):
    r"""The released code's arithmetic: min-max first, then an average of weights γ/10 and γ/100.

    .. math::

        H_t = \tfrac{\gamma}{10} H_{t-1} + \tfrac{\gamma}{100}\, \mathrm{minmax}_{10^{-6}}(H),
        \qquad H_{-1} = 1, \qquad \tilde F = H_t \otimes S_t + \lambda

    A convolution's statistics are summed over groups and divided by its patch length. Unlike
    in the released code every layer is stepped with its own factors.
    """

    def start(self, layer: Layer, dtype: Any) -> Curvature:
        start = super().start(layer, dtype)
        h, s = (jnp.ones_like(part) for part in start.factor[:2])
        return start._replace(
            factor=start.factor._replace(h=h, s=s), slot=jnp.ones_like(start.slot)
        )

    def refresh(self, layer: Layer, old: Curvature, fresh: Factor) -> tuple[Curvature, Outcome]:
        scale = layer.groups / max(layer.fan_in, 1) if layer.kind == "conv" else 1.0
        whole = fresh.h * scale, jnp.full_like(old.slot, scale), fresh.s
        h, slot, s = _minmax(layer, *whole, _ranges(layer, *whole, 1e-6))
        new = (fresh._replace(h=h, s=s), slot)
        finite = are_finite(layer, fresh)
        return blend(layer, old, new, fresh.rows, finite, 0.1 * self.ema, 0.01 * self.ema)

    def refreshed(self, curvature: Curvature) -> jax.Array:
        return curvature.slot < 1  # the first refresh takes it far below where it starts


def _ranges(
    layer: Layer, h: jax.Array, slot: jax.Array, s: jax.Array, epsilon: float = 0.0
) -> jax.Array:
    """The least value and one over the range, of `h` with its bias slot and of `s`."""
    joint = (h, slot) if _has_slot(layer) else (h,)
    found = *to_unit(joint, layer.inner, epsilon), *to_unit((s,), layer.inner, epsilon)
    return jnp.stack(found, 1)


def _minmax(
    layer: Layer, h: jax.Array, slot: jax.Array, s: jax.Array, ranges: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`h`, its bias slot and `s`, brought to the unit interval by their ranges."""
    low_h, inverse_h, low_s, inverse_s = jnp.unstack(ranges, axis=1)
    slot = (slot - low_h) * inverse_h if _has_slot(layer) else jnp.zeros_like(slot)
    return (h - low_h) * inverse_h, slot, (s - low_s) * inverse_s


def _has_slot(layer: Layer) -> bool:
    """Whether `h` has a bias slot beside it: a normalization layer's pair has it inside."""
    return layer.bias is not None and layer.kind != "norm"
