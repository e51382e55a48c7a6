"""How averaged factors become a preconditioner: one small object for each rule.

A rule sees one layer at a time: its `Curvature` (averaged factors, and the bias slot of `h`
beside them) and its weight and bias as a `Pair`. Stacked layers are treated each for itself.
Nothing here knows about optax, Flax or where the factors come from.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adafisher_jax.factors import Axes, Factor, extremes, minmax
from adafisher_jax.layout import Layer


class Curvature(NamedTuple):
    """What is stored of one layer.

    Attributes:
      factor: running averages of its statistics.
      slot: the bias slot of `h`, one number for each block: the running average of a constant.
        Averages that start at zero are bias-corrected by it.
      skipped: how many refreshes had statistics that were not finite, whichever stacked layer's.
    """

    factor: Factor
    slot: jax.Array
    skipped: jax.Array


class Pair(NamedTuple):
    """The weight's and the bias's share of something; None where there is none."""

    weight: Any
    bias: Any

    def pick(self, values: Mapping[str, Any]) -> "Pair":
        """What a mapping holds for a pair of paths."""
        return Pair(*(None if path is None else values.get(path) for path in self))


class Scale(NamedTuple):
    """A running mean square, one for each stacked layer, and the weight that corrects it.

    Both have the parameter's rank, to broadcast against it.
    """

    square: jax.Array
    weight: jax.Array


@dataclasses.dataclass(frozen=True)
class Rule:
    """The identity, with averages that start at zero; what every rule builds on.

    Attributes:
      ema: the averages' decay γ.
      damping: λ, or the relative damping τ.
    """

    ema: Any
    damping: Any

    def start(self, layer: Layer, dtype: Any) -> Curvature:
        """The averages before the first refresh."""
        slot = jnp.zeros(layer.slot_shape, dtype)
        return Curvature(layer.zeros(dtype), slot, jnp.zeros([], jnp.int32))

    def refresh(self, layer: Layer, old: Curvature, fresh: Factor) -> Curvature:
        """The averages after new statistics; unchanged where those are unusable."""
        new = (fresh, jnp.ones_like(old.slot))
        return _blend(layer, old, new, fresh, self.ema, 1 - self.ema)

    def start_scale(self, leaf: Any, axes: Axes) -> Scale | None:
        """The scalars kept for one parameter, if any."""
        return None

    def direction(
        self, layer: Layer, curvature: Curvature, momentum: Pair, grads: Pair, scales: Pair
    ) -> tuple[Pair, Pair]:
        """The preconditioned momentum, and each parameter's `Scale` after this step.

        Linear in the momentum, which is not bias-corrected yet.
        """
        return momentum, scales

    def fallback(self, momentum: Any, grad: Any, scale: Any) -> tuple[Any, Any]:
        """The same for one parameter outside every layer."""
        return momentum, scale


def _blend(
    layer: Layer,
    old: Curvature,
    new: tuple[Factor, jax.Array],
    fresh: Factor,
    keep: Any,
    add: Any,
) -> Curvature:
    """`keep * old + add * new`; `old` for the stacked layers without rows, or not finite."""
    within = tuple(i for i, axis in enumerate(layer.axes) if not axis.startswith("stack"))
    extreme = (*extremes((fresh.h, fresh.mean), within), *extremes((fresh.s,), within))
    finite = jnp.isfinite(fresh.rows).reshape(layer.stack_shape)
    for values in jax.tree.leaves(extreme):  # finite if all are, and NaN if one is
        finite &= jnp.isfinite(values)
    took_part = (fresh.rows != 0).reshape(layer.stack_shape)
    usable = took_part & finite

    def average(before: jax.Array, after: jax.Array) -> jax.Array:
        where = usable if before.ndim == usable.ndim else usable.reshape(before.shape)
        return jnp.where(where, keep * before + add * after.astype(before.dtype), before)

    factor, slot = jax.tree.map(average, (old.factor, old.slot), new)
    return Curvature(factor, slot, old.skipped + jnp.any(took_part & ~finite))


def _minmax(
    layer: Layer, h: jax.Array, slot: jax.Array, s: jax.Array, epsilon: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`h` and its bias slot scaled as one vector and `s` as another, block by block."""
    if layer.bias is None or layer.kind == "norm":  # there is no slot, or `h` has it inside
        (h,), slot = minmax((h,), layer.inner, epsilon), jnp.zeros_like(slot)
    else:
        h, slot = minmax((h, slot), layer.inner, epsilon)
    (s,) = minmax((s,), layer.inner, epsilon)
    return h, slot, s


def _divide(
    layer: Layer, momentum: Pair, h: jax.Array, slot: jax.Array, s: jax.Array, damping: jax.Array
) -> Pair:
    """Algorithm 1: `m̂ / (h ⊗ s + λ)`, and the bias by its slot of `h`."""
    if layer.kind == "norm":  # `h` is the pair of the scale and the shift
        h, slot = jnp.split(h, 2, layer.axes.index("out0"))
    weight, bias = momentum
    if weight is not None:
        weight = weight / (h * s + damping)
    if bias is not None:
        bias = bias / layer.to_bias(slot * s + damping)
    return Pair(weight, bias)


class Paper(Rule):
    r"""AdaFisher as printed: eqs. (3)-(4) and Algorithm 1 of arXiv:2405.16397.

    .. math::

        H_t = \gamma H_{t-1} + (1-\gamma) H, \qquad
        \tilde F = \mathrm{minmax}(H_t) \otimes \mathrm{minmax}(S_t) + \lambda, \qquad
        d = \hat m / \tilde F

    Min-max is indifferent to a vector's scale, and the bias slot carries the same weight as
    the rest of `H`, so averages that start at zero need no further correction.
    """

    def direction(
        self, layer: Layer, curvature: Curvature, momentum: Pair, grads: Pair, scales: Pair
    ) -> tuple[Pair, Pair]:
        (h, s, _, _), slot, _ = curvature
        damping = jnp.where(slot > 0, self.damping, 1)
        return _divide(layer, momentum, *_minmax(layer, h, slot, s), damping), scales


class Official(Rule):
    r"""The released code's arithmetic: min-max first, then an average of weights γ/10 and γ/100.

    .. math::

        H_t = \tfrac{\gamma}{10} H_{t-1} + \tfrac{\gamma}{100}\, \mathrm{minmax}_{10^{-6}}(H),
        \qquad H_{-1} = 1, \qquad \tilde F = H_t \otimes S_t + \lambda

    A convolution's statistics are summed over groups and divided by its patch length. Unlike
    in the released code every layer is stepped with its own factors.
    """

    def start(self, layer: Layer, dtype: Any) -> Curvature:
        factor, slot, skipped = super().start(layer, dtype)
        factor = factor._replace(h=jnp.ones_like(factor.h), s=jnp.ones_like(factor.s))
        return Curvature(factor, jnp.ones_like(slot), skipped)

    def refresh(self, layer: Layer, old: Curvature, fresh: Factor) -> Curvature:
        unit = layer.groups / layer.fan_in if layer.kind == "conv" else 1.0
        h, slot, s = _minmax(layer, fresh.h * unit, jnp.full_like(old.slot, unit), fresh.s, 1e-6)
        new = (fresh._replace(h=h, s=s), slot)
        return _blend(layer, old, new, fresh, 0.1 * self.ema, 0.01 * self.ema)

    def direction(
        self, layer: Layer, curvature: Curvature, momentum: Pair, grads: Pair, scales: Pair
    ) -> tuple[Pair, Pair]:
        (h, s, _, _), slot, _ = curvature
        refreshed = slot < 1  # the first refresh takes it far below where it starts
        damping = jnp.where(refreshed, self.damping, 1)
        return _divide(layer, momentum, h, slot, jnp.where(refreshed, s, 0), damping), scales


class Centered(Rule):
    r"""The square root of the factors, in coordinates that center the inputs.

    A layer with a bias is the same map as :math:`y = W^T (\bar h - \mu) + b'`. In these
    coordinates the weight and the bias no longer share a direction. With
    :math:`r(x) = x / \mathrm{mean}(x)`,

    .. math::

        M_w &= \hat m_w - \mu \hat m_b^T, \qquad
        \hat H = r(E[h^2] - \mu^2), \qquad \hat S = r(S) \\
        d_w &= M_w / \big((\hat H + \tau)^{1/2} \otimes (\hat S + \tau)^{1/2}\, g_{rms}\big) \\
        d_b &= \hat m_b / \big((\hat S + \tau)^{1/2}\, g_{rms,b}\big) - \mu^T d_w

    where :math:`g_{rms}^2` is the running mean square of the centered gradient, one number for
    each parameter (and stacked layer). The loss's scale drops out. Without a bias
    :math:`\mu = 0`; a normalization layer is divided by the root of its `S` alone.
    """

    b2 = 0.99

    def start_scale(self, leaf: Any, axes: Axes) -> Scale | None:
        shape = [1] * leaf.ndim
        for i, axis in enumerate(axes):
            if axis.startswith("stack"):
                shape[i] = leaf.shape[i]
        dtype = jnp.promote_types(jnp.finfo(leaf.dtype).dtype, jnp.float32)
        return Scale(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def direction(
        self, layer: Layer, curvature: Curvature, momentum: Pair, grads: Pair, scales: Pair
    ) -> tuple[Pair, Pair]:
        (h, s, _, mean), slot, _ = curvature
        refreshed = slot > 0
        weight = jnp.where(refreshed, slot, 1)
        h, s, mean = h / weight, s / weight, mean / weight
        (d_w, d_b), (g_w, g_b), (scale_w, scale_b) = momentum, grads, scales

        def dot(left: jax.Array, right: jax.Array) -> jax.Array:
            return jnp.sum(left * right, layer.ins, keepdims=True)

        centers = layer.kind != "norm" and d_w is not None and d_b is not None
        if centers:
            h = jnp.maximum(h - jnp.square(mean), 0)
        inverse_s = jnp.where(refreshed, self._inverse_root(layer, s), 1)
        inverse_h = jnp.ones_like(inverse_s)
        if layer.kind != "norm":
            inverse_h = jnp.where(refreshed, self._inverse_root(layer, h), 1)

        if layer.bias is not None and d_b is not None:
            scale_b, inverse_rms = self._by_rms(scale_b, _mean(_squared(g_b), layer.bias.axes))
            d_b = d_b * inverse_rms * layer.to_bias(inverse_s)
        if d_w is not None:
            # What centering adds to sums over the weight is expanded: products of the weight as
            # it is with a vector, so that (in one float type) nothing of its size is made.
            square = _mean(_squared(g_w), layer.axes)
            if centers:
                g_b = layer.from_bias(g_b)
                cross = g_b * (g_b * dot(mean, mean) - 2 * layer.over_inputs(mean, g_w))
                least = jnp.finfo(square.dtype).eps * square  # what rounding leaves of it
                square = jnp.maximum(square + _mean(cross, layer.axes) / layer.fan_in, least)
            scale_w, inverse_rms = self._by_rms(scale_w, square)
            inverse_in = inverse_h * inverse_rms
            if centers:
                m_b, pull = layer.from_bias(momentum.bias), mean * inverse_in
                pulled = layer.over_inputs(pull, d_w) - m_b * dot(pull, mean)
                d_b = d_b - layer.to_bias(pulled * inverse_s)
                d_w = d_w - mean * m_b
            d_w = d_w * (inverse_in * inverse_s)
        return Pair(d_w, d_b), Pair(scale_w, scale_b)

    def _inverse_root(self, layer: Layer, values: jax.Array) -> jax.Array:
        """One over the damped root of values relative to their block's average."""
        average = jnp.mean(values, layer.inner, keepdims=True)
        relative = jnp.where(average > 0, values / jnp.where(average > 0, average, 1), 1)
        return jax.lax.rsqrt(relative + self.damping)

    def fallback(self, momentum: Any, grad: Any, scale: Any) -> tuple[Any, Any]:
        scale, inverse_rms = self._by_rms(scale, jnp.mean(_squared(grad), keepdims=True))
        return momentum * inverse_rms, scale

    def _by_rms(self, scale: Scale, square: jax.Array) -> tuple[Scale, jax.Array]:
        """The scale after a gradient of mean square `square`, and one over its root."""
        square = square.astype(scale.square.dtype)
        good = jnp.isfinite(square)
        scale = jax.tree.map(
            lambda old, new: jnp.where(good, self.b2 * old + (1 - self.b2) * new, old),
            scale,
            Scale(square, jnp.ones_like(square)),
        )
        average = scale.square / jnp.where(scale.weight > 0, scale.weight, 1)
        return scale, jnp.where(average > 0, jax.lax.rsqrt(jnp.where(average > 0, average, 1)), 0)


def _squared(x: jax.Array) -> jax.Array:
    return jnp.square(jnp.abs(x).astype(jnp.promote_types(jnp.finfo(x.dtype).dtype, jnp.float32)))


def _mean(values: jax.Array, axes: Axes) -> jax.Array:
    """The average of each stacked layer; the other axes stay as 1."""
    within = tuple(i for i, axis in enumerate(axes) if not axis.startswith("stack"))
    return jnp.mean(values, within, keepdims=True)


# Each rule with its default averaging constant and damping.
_RULES: dict[str, tuple[type[Rule], float, float]] = {
    "paper": (Paper, 0.8, 1e-3),
    "official": (Official, 0.8, 1e-3),
    "centered": (Centered, 0.95, 0.01),
}

for _rule, _, _ in _RULES.values():
    jax.tree_util.register_dataclass(_rule, data_fields=["ema", "damping"], meta_fields=[])


def make_rule(name: str, ema: Any = None, damping: Any = None) -> Rule:
    """The rule called `name`; None stands for its own default.

    Raises:
      ValueError: for an unknown name, an averaging constant outside [0, 1) or a negative
        damping. Traced values are not checked.
    """
    if name not in _RULES:
        raise ValueError(f"rule: got {name!r}, wanted one of {', '.join(map(repr, _RULES))}")
    rule, default_ema, default_damping = _RULES[name]
    ema = default_ema if ema is None else ema
    damping = default_damping if damping is None else damping
    check_fraction("curvature_ema", ema)
    if _is_known(damping) and not damping >= 0:
        raise ValueError(f"damping: got {damping}, wanted a number of at least 0")
    return rule(ema, damping)


def check_fraction(name: str, value: Any) -> None:
    """Raises a `ValueError` for a decay outside [0, 1), unless it is traced."""
    if _is_known(value) and not 0 <= value < 1:
        raise ValueError(f"{name}: got {value}, wanted a number in [0, 1)")


def _is_known(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer)
