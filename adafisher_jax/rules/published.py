"""The rule as the paper prints it, and as the released code computes it."""

from typing import Any

import jax
import jax.numpy as jnp

from adafisher_jax.factors import Factor, extremes, minmax, to_unit
from adafisher_jax.layout import Layer
from adafisher_jax.rules.rule import Curvature, Outcome, Rule, blend


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
        (h, s, _, _), slot, unit = curvature
        low_h, inverse_h, low_s, inverse_s = jnp.split(unit, 4, layer.inner[0])
        slot = (slot - low_h) * inverse_h if _has_slot(layer) else jnp.zeros_like(slot)
        return (h - low_h) * inverse_h, slot, (s - low_s) * inverse_s

    def start(self, layer: Layer, dtype: Any) -> Curvature:
        return _with_unit(layer, super().start(layer, dtype))

    def refresh(self, layer: Layer, old: Curvature, fresh: Factor) -> tuple[Curvature, Outcome]:
        new, outcome = super().refresh(layer, old, fresh)
        return _with_unit(layer, new), outcome


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
        scale = layer.groups / layer.fan_in if layer.kind == "conv" else 1.0
        h, slot = fresh.h * scale, jnp.full_like(old.slot, scale)
        if _has_slot(layer):
            h, slot = minmax((h, slot), layer.inner, 1e-6)
        else:
            (h,), slot = minmax((h,), layer.inner, 1e-6), jnp.zeros_like(slot)
        (s,) = minmax((fresh.s,), layer.inner, 1e-6)
        new = (fresh._replace(h=h, s=s), slot)
        return blend(layer, old, new, fresh, 0.1 * self.ema, 0.01 * self.ema)

    def refreshed(self, curvature: Curvature) -> jax.Array:
        return curvature.slot < 1  # the first refresh takes it far below where it starts


def _with_unit(layer: Layer, curvature: Curvature) -> Curvature:
    """With the least entry and one over the spread, of `h` with its slot and of `s`, in one array.

    They change with the averages only: a step between refreshes is nothing but a division.
    """
    h, s, slot = curvature.factor.h, curvature.factor.s, curvature.slot
    bounds = [extremes((v,), layer.inner)[0] for v in (h, s)]
    of_h = [bounds[0], (slot, slot)] if _has_slot(layer) else bounds[:1]
    unit = jnp.concatenate([*to_unit(of_h), *to_unit(bounds[1:])], layer.inner[0])
    return curvature._replace(unit=unit)


def _has_slot(layer: Layer) -> bool:
    """Whether the bias slot belongs to `h`'s vector: a normalization layer's pair holds its own."""
    return layer.bias is not None and layer.kind != "norm"
