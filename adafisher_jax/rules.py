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

from adafisher_jax import spectrum
from adafisher_jax.factors import Axes, Factor, extremes, minmax
from adafisher_jax.layout import Layer, Leaf


class Curvature(NamedTuple):
    """What is stored of one layer.

    Attributes:
      factor: running averages of its statistics.
      slot: the bias slot of `h`, one number for each block: the running average of a constant.
        Averages that start at zero are bias-corrected by it.
      skipped: how many refreshes had statistics that were not finite, whichever stacked layer's.
      age: how many steps ago the averages last changed, whichever stacked layer's.
    """

    factor: Factor
    slot: jax.Array
    skipped: jax.Array
    age: jax.Array


class Pair(NamedTuple):
    """The weight's and the bias's share of something; None where there is none."""

    weight: Any
    bias: Any

    def pick(self, values: Mapping[str, Any]) -> "Pair":
        """What a mapping holds for a pair of paths."""
        return Pair(*(None if path is None else values.get(path) for path in self))


class Scale(NamedTuple):
    """What is stored of one parameter's steps.

    Attributes:
      square: their running mean square, one for each stacked layer, of the parameter's rank.
      weight: that corrects it.
      basis: their leading directions, of a layer's weight; see `adafisher_jax.spectrum`.
    """

    square: jax.Array
    weight: jax.Array
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

    nesterov = False  # whether a step uses the momentum one step ahead, along the same gradient
    exponent = 1.0  # of `damped`, in what the momentum is divided by

    def start(self, layer: Layer, dtype: Any) -> Curvature:
        """The averages before the first refresh."""
        slot = jnp.zeros(layer.slot_shape, dtype)
        return Curvature(layer.zeros(dtype), slot, *(jnp.zeros([], jnp.int32) for _ in range(2)))

    def refresh(self, layer: Layer, old: Curvature, fresh: Factor) -> Curvature:
        """The averages after new statistics; unchanged where those are unusable."""
        new = (fresh, jnp.ones_like(old.slot))
        return _blend(layer, old, new, fresh, self.ema, 1 - self.ema)

    def refreshed(self, curvature: Curvature) -> jax.Array:
        """Which blocks have had statistics; the others are stepped without curvature."""
        return curvature.slot > 0

    def scaled(
        self, layer: Layer, curvature: Curvature, centers: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`h`, its bias slot and `s` as the rule scales them: `h * s` is its Fisher term.

        `centers` says whether the weight and the bias are stepped together.
        """
        (h, s, _, _), slot, *_ = curvature
        return h, slot, s

    def damped(self, layer: Layer, h: jax.Array, s: jax.Array) -> jax.Array:
        """The Fisher term with the damping in it."""
        return h * s + self.damping

    def start_scale(self, leaf: Any, layer: Layer | None, at: Leaf | None) -> Scale | None:
        """What is kept of one parameter, if anything; `at`: its place in a layer."""
        return None

    def direction(
        self, layer: Layer, curvature: Curvature, momentum: Pair, grads: Pair, scales: Pair
    ) -> tuple[Pair, Pair]:
        """The preconditioned momentum, and each parameter's `Scale` after this step."""
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
    skipped = old.skipped + jnp.any(took_part & ~finite)
    return Curvature(factor, slot, skipped, jnp.where(jnp.any(usable), 0, old.age + 1))


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

    def scaled(
        self, layer: Layer, curvature: Curvature, centers: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        (h, s, _, _), slot, *_ = curvature
        return _minmax(layer, h, slot, s)


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

    def refresh(self, layer: Layer, old: Curvature, fresh: Factor) -> Curvature:
        unit = layer.groups / layer.fan_in if layer.kind == "conv" else 1.0
        h, slot, s = _minmax(layer, fresh.h * unit, jnp.full_like(old.slot, unit), fresh.s, 1e-6)
        new = (fresh._replace(h=h, s=s), slot)
        return _blend(layer, old, new, fresh, 0.1 * self.ema, 0.01 * self.ema)

    def refreshed(self, curvature: Curvature) -> jax.Array:
        return curvature.slot < 1  # the first refresh takes it far below where it starts


class Centered(Rule):
    r"""The square root of the factors in coordinates that center the inputs, and a flat spectrum.

    A layer with a bias is the same map as :math:`y = W^T (\bar h - \mu) + b'`. In these
    coordinates the weight and the bias no longer share a direction. With :math:`\hat n` the
    momentum one step ahead (Nesterov's) and :math:`r(x) = x / \mathrm{mean}(x)`,

    .. math::

        \hat H &= r(E[h^2] - \mu^2), \qquad \hat S = r(S), \qquad
        D = (\hat n_w - \mu \hat n_b^T)
            / \left((\hat H + \tau) \otimes (\hat S + \tau)\right)^{1/2} \\
        d_w &= 0.2\, (D - E) / \mathrm{rms}(D - E), \qquad
        d_b = \hat n_b / \big((\hat S + \tau)^{1/2}\, \mathrm{rms}(g_b)\big) - \mu^T d_w

    where `E` is the excess of the leading singular values (`adafisher_jax.spectrum`) and `rms` a
    running root mean square, one number for each parameter (and stacked layer). The loss's scale
    drops out, and a weight's steps are at a learning rate of one about as large as Adam's.
    Without a bias :math:`\mu = 0`. A normalization layer is stepped like a bias. Outside layers,
    and before a layer's first refresh, matrices are divided by their own steps' `rms`, and
    vectors by the gradient's.
    """

    nesterov = True
    exponent = 0.5
    b2 = 0.99
    rms = 0.2

    def start_scale(self, leaf: Any, layer: Layer | None, at: Leaf | None) -> Scale | None:
        shape = [1] * leaf.ndim
        for i, axis in enumerate(at.axes if at else ()):
            if axis.startswith("stack"):
                shape[i] = leaf.shape[i]
        dtype = jnp.promote_types(jnp.finfo(leaf.dtype).dtype, jnp.float32)
        basis = None
        if layer and layer.weight == at and layer.kind != "norm":
            matrices = jax.eval_shape(layer.to_matrices, leaf).shape
            basis = spectrum.start(matrices, jnp.promote_types(leaf.dtype, dtype))
        return Scale(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), basis)

    def scaled(
        self, layer: Layer, curvature: Curvature, centers: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        (h, s, _, mean), slot, *_ = curvature
        weight = jnp.where(self.refreshed(curvature), slot, 1)
        if layer.kind == "norm":
            h = jnp.ones_like(h)
        elif centers:
            h = _relative(layer, jnp.maximum(h / weight - jnp.square(mean / weight), 0))
        else:
            h = _relative(layer, h / weight)
        return h, slot, _relative(layer, s / weight)

    def damped(self, layer: Layer, h: jax.Array, s: jax.Array) -> jax.Array:
        return (s + self.damping) * (h if layer.kind == "norm" else h + self.damping)

    def direction(
        self, layer: Layer, curvature: Curvature, momentum: Pair, grads: Pair, scales: Pair
    ) -> tuple[Pair, Pair]:
        (d_w, d_b), (scale_w, scale_b) = momentum, scales
        centers = layer.kind != "norm" and d_w is not None and d_b is not None
        refreshed = self.refreshed(curvature)
        h, _, s = self.scaled(layer, curvature, centers)
        inverse_h, inverse_s = (
            jnp.where(refreshed, jax.lax.rsqrt(x + self.damping), 1) for x in (h, s)
        )
        mean = curvature.factor.mean / jnp.where(refreshed, curvature.slot, 1)

        if layer.bias is not None and d_b is not None:
            scaled = d_b * layer.to_bias(inverse_s)
            d_b, scale_b = self._vector(scaled, grads.bias, scale_b, layer.bias.axes)
        if d_w is not None and layer.kind == "norm":
            d_w, scale_w = self._vector(d_w * inverse_s, grads.weight, scale_w, layer.axes)
        elif d_w is not None:
            d_w = d_w * (inverse_h * inverse_s)
            least = jnp.zeros(())
            if centers:
                of_in, of_out = mean * inverse_h, layer.from_bias(momentum.bias) * inverse_s
                d_w = d_w - of_in * of_out
                # Where no more than rounding is left of the difference, it is no step.
                least = _mean(_squared(of_in), layer.axes) * _mean(_squared(of_out), layer.axes)
                least = jnp.finfo(d_w.dtype).eps * least
            matrices = layer.to_matrices(d_w)
            excess, left = spectrum.no_excess(matrices), jnp.sum(_squared(matrices), (1, 2))
            if scale_w.basis is not None:
                where = refreshed.reshape(-1)
                excess, basis, left = spectrum.leading_excess(matrices, scale_w.basis, where)
                scale_w = scale_w._replace(basis=basis.astype(scale_w.basis.dtype))
            square = _mean(left.reshape(layer.slot_shape), layer.axes) / matrices[0].size
            scale_w, inverse = self._size(scale_w, jnp.maximum(square, least))
            size = self.rms * inverse
            if centers:
                pull = layer.to_matrices(mean * size)
                pulled = layer.from_matrices(spectrum.over_rows(pull, matrices, excess))
                d_b = d_b - layer.to_bias(pulled)
            d_w = layer.from_matrices(spectrum.subtract(matrices, excess)) * size
        return Pair(d_w, d_b), Pair(scale_w, scale_b)

    def fallback(self, momentum: jax.Array, grad: jax.Array, scale: Any) -> tuple[Any, Any]:
        if momentum.ndim < 2:
            return self._vector(momentum, grad, scale, ("",) * momentum.ndim)
        scale, inverse = self._size(scale, jnp.mean(_squared(momentum), keepdims=True))
        return momentum * (self.rms * inverse), scale

    def _vector(
        self, momentum: jax.Array, grad: jax.Array, scale: Scale, axes: Axes
    ) -> tuple[jax.Array, Scale]:
        """The step of a bias, or of a normalization layer's scale or shift."""
        scale, inverse = self._size(scale, _mean(_squared(grad), axes))
        return momentum * inverse, scale

    def _size(self, scale: Scale, square: jax.Array) -> tuple[Scale, jax.Array]:
        """The scale after a mean square, and one over the root of the average that it keeps."""
        square = square.astype(scale.square.dtype)
        good = jnp.isfinite(square)
        new = jnp.where(good, self.b2 * scale.square + (1 - self.b2) * square, scale.square)
        weight = jnp.where(good, self.b2 * scale.weight + (1 - self.b2), scale.weight)
        scale = scale._replace(square=new, weight=weight)
        return scale, jnp.where(good, _inverse_rms(scale), 0)  # without a square there is no step

    def size(self, layer: Layer, scale: Scale | None) -> Any:
        assert scale is not None
        return (1 if layer.kind == "norm" else self.rms) * _inverse_rms(scale)


def _inverse_rms(scale: Scale) -> jax.Array:
    """One over the running root mean square; 0 while that is 0."""
    average = scale.square / jnp.where(scale.weight > 0, scale.weight, 1)
    return jnp.where(average > 0, jax.lax.rsqrt(jnp.where(average > 0, average, 1)), 0)


def _relative(layer: Layer, values: jax.Array) -> jax.Array:
    """Values relative to their block's average; 1 where that is nothing to go by."""
    average = jnp.mean(values, layer.inner, keepdims=True)
    relative = values / jnp.where(average > 0, average, 1)
    return jnp.where((average > 0) & jnp.isfinite(relative), relative, 1)


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


def _register(rule: type[Rule]) -> None:
    """As a pytree: `register_dataclass` would let JAX take one rule for another."""
    jax.tree_util.register_pytree_node(
        rule, lambda one: ((one.ema, one.damping), None), lambda _, own: rule(*own)
    )


for _rule, _, _ in _RULES.values():
    _register(_rule)


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
