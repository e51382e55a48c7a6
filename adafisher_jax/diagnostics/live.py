r"""Reports what the optimizer does to each layer, from its state at any step."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adafisher_jax.diagnostics.stored import Stored, of_layers, states
from adafisher_jax.layout import Layer, Layout, check_layout
from adafisher_jax.nnx import parameters_of
from adafisher_jax.paths import by_path
from adafisher_jax.rules import Rule, Scale, make_rule

QUANTILES = (0.05, 0.5, 0.95)
_POINTS = 32  # the most entries of each factor from which quantiles are taken


class LayerReport(NamedTuple):
    r"""The curvature and steps of one layer, as scalars. `F` is the divisor of the momentum.

    The scalars summarize all entries of the layer's weight (of the shift, if a normalization layer
    has no scale).

    Attributes:
      above_damping: the share of entries whose Fisher term is larger than what damping adds to it:
        :math:`\tilde H \tilde S > \lambda` under `"paper"` and `"official"`, and
        :math:`\hat H \hat S > \tau (\hat H + \hat S + \tau)` under `"centered"` (of a
        normalization layer :math:`\hat S > \tau`). 0 before the first refresh.
      rate_low: the 5 % quantile of the effective learning rate: the number that multiplies an
        entry of the momentum, :math:`\alpha / F`. Under `"centered"` it includes the scalar that
        sets the size of the step, and multiplies the centered momentum before the cut.
      rate_median: the 50 % quantile.
      rate_high: the 95 % quantile.
      condition: the condition of the averages, :math:`\max(h \otimes s) / \min(h \otimes s)`. It is
        infinite if an entry is 0, and the largest of stacked layers. Under `"official"` it grows
        with the refreshes, because the weights of the averages do not sum to one.
      relative_step: the root mean square of the update over that of the weight; None unless
        both were given.
      age: the number of steps since the averages last changed.
      skipped: the number of refreshes that were skipped because statistics were not finite.
    """

    above_damping: jax.Array
    rate_low: jax.Array
    rate_median: jax.Array
    rate_high: jax.Array
    condition: jax.Array
    relative_step: jax.Array | None
    age: jax.Array
    skipped: jax.Array


def report(
    opt_state: Any,
    layout: Layout,
    *,
    rule: str | Rule,
    damping: Any = None,
    learning_rate: Any = 1.0,
    params: Any = None,
    updates: Any = None,
) -> dict[str, LayerReport]:
    """Returns a `LayerReport` for each layer whose weight the optimizer steps.

    It works inside `jax.jit`. It costs a pass over the entries of each weight that stores nothing,
    a sort of each factor, and a sort of at most 1,024 numbers for each stacked layer. For layers
    wider than 32 the quantiles are those of 32 evenly spaced order statistics of each factor.

    Args:
      opt_state: the state of any transformation or `nnx.Optimizer` with AdaFisher in it.
      layout: the layout of the transformation.
      rule: the rule of the transformation, by name.
      damping: the damping of the transformation; None for the rule's default.
      learning_rate: the learning rate of the step. With 1 the rates are those before it.
      params: parameters or an NNX module, for `relative_step`.
      updates: the updates of this step, which `optax.apply_updates` adds to `params`.

    Returns:
      A pytree of scalars, by layer path.

    Raises:
      TypeError: if `layout` is no layout.
      ValueError: if the state has no AdaFisher in it or none of the layout's layers; if the rule is
        unknown or not the state's (`"paper"` and `"official"` have equal states); if the shapes
        of the state, or the paths or shapes of parameters, are not the layout's.

    Example:
      >>> import adafisher_jax as af, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(2), jnp.array([[1.0, 2.0], [3.0, 0.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda params, x: jnp.sum(model.apply({"params": params}, x))
      >>> layout = af.trace_layout(loss_fn, params, x)
      >>> tx = af.adafisher(1e-3, layout, rule="paper")
      >>> grad_fn = af.value_and_grad(loss_fn, layout)
      >>> loss, grads, factors = grad_fn(params, x)
      >>> updates, state = tx.update(grads, tx.init(params), params, factors=factors)
      >>> found = report(state, layout, rule="paper", params=params, updates=updates)[""]
      >>> found.condition.item(), found.age.item(), found.skipped.item()
      (2.5, 0, 0)
    """
    check_layout(layout)
    chosen = make_rule(rule, damping=damping)
    both = params is not None and updates is not None
    weights, steps = (_leaves(tree, layout) if both else {} for tree in (params, updates))
    if both:
        layout.check_params(weights)
        layout.check_params(steps)
    found: dict[str, LayerReport] = {}
    for state in states(opt_state):
        momenta = _leaves(state.mu, layout)
        for layer, stored in of_layers(state, layout):
            at = layer.leaves[0].path
            if at not in momenta:  # masked
                continue
            _check(chosen, layer, momenta[at], stored.scale)
            found[layer.path] = _of_layer(
                layer.stacked(1),
                layer.bias is not None and layer.bias.path in momenta,
                chosen,
                stored,
                learning_rate,
                weights.get(at),
                steps.get(at),
            )
    if not found:
        raise ValueError("opt_state: got none with AdaFisher's factors of a layer of the layout")
    return dict(sorted(found.items()))


def scalars(found: Mapping[str, LayerReport]) -> dict[str, jax.Array]:
    """Returns a report as one flat dict from `path/field` to a scalar, for loggers.

    Example:
      >>> import jax.numpy as jnp
      >>> one = LayerReport(*(jnp.float32(i) for i in range(8)))
      >>> scalars({"encoder/up": one})["encoder/up/condition"].item()
      4.0
    """
    return {
        f"{path}/{name}".lstrip("/"): value
        for path, layer in found.items()
        for name, value in layer._asdict().items()
        if value is not None
    }


def table(found: Mapping[str, LayerReport]) -> str:
    """Returns a report as text, with a line for each layer.

    Example:
      >>> import jax.numpy as jnp
      >>> one = LayerReport(*(jnp.float32(0.5) for _ in range(6)), jnp.int32(3), jnp.int32(0))
      >>> print(table({"up": one}))
      layer  above damping  rate low  rate median  rate high  condition  relative step  age  skipped
      -----  -------------  --------  -----------  ---------  ---------  -------------  ---  -------
      up               0.5       0.5          0.5        0.5        0.5            0.5    3        0
    """
    header = ["layer", *(name.replace("_", " ") for name in LayerReport._fields)]
    rows = [[path or "(root)", *map(_cell, layer)] for path, layer in found.items()]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    number = value.item()
    return f"{number:.3g}" if isinstance(number, float) else str(number)


def _leaves(tree: Any, layout: Layout) -> dict[str, jax.Array]:
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, parameters_of(layout))
    return by_path(tree)[0]


def _rms(x: jax.Array) -> jax.Array:
    wide = jnp.abs(x).astype(jnp.promote_types(jnp.finfo(x.dtype).dtype, jnp.float32))
    return jnp.sqrt(jnp.mean(jnp.square(wide)))


@functools.partial(jax.jit, static_argnums=(0, 1))  # so that like layers are traced once
def _of_layer(
    layer: Layer,
    steps_bias: bool,
    rule: Rule,
    stored: Stored,
    learning_rate: Any,
    weight: jax.Array | None,
    step: jax.Array | None,
) -> LayerReport:
    curvature = stored.curvature
    refreshed = rule.refreshed(curvature)
    h, _, s = rule.scaled(layer, curvature, layer.kind != "norm" and steps_bias)
    h = _own(layer, h)
    above = refreshed & (2 * h * s > rule.damped(layer, h, s))

    points = _points(layer.to_matrices(h), 1), _points(layer.to_matrices(s), 2)
    divisor = rule.damped(layer, *points) ** rule.exponent
    known = refreshed.reshape(-1, 1, 1)
    size = learning_rate * rule.size(layer, curvature, stored.scale)
    sizes = jnp.broadcast_to(size, layer.slot_shape).reshape(-1, 1, 1)
    rates = sizes / jnp.where(known, divisor, 1)
    low, median, high = jnp.quantile(rates, jnp.asarray(QUANTILES, rates.dtype))
    return LayerReport(
        above_damping=jnp.mean(above, dtype=jnp.float32),
        rate_low=low,
        rate_median=median,
        rate_high=high,
        condition=_condition(layer, _own(layer, curvature.factor.h), curvature.factor.s),
        relative_step=None if weight is None or step is None else _rms(step) / _rms(weight),
        age=stored.age,
        skipped=stored.skipped,
    )


def _check(rule: Rule, layer: Layer, momentum: jax.Array, scale: Scale | None) -> None:
    at = layer.leaves[0]
    wanted = jax.eval_shape(lambda leaf: rule.start_scale(leaf, layer, at), momentum)
    if (wanted is None) != (scale is None):
        has, wants = ("none" if one is None else "one" for one in (scale, wanted))
        raise ValueError(
            f"rule: the state has {has} of the scales of {at.path!r}, "
            f"{type(rule).__name__.lower()!r} wants {wants}: it is of another rule"
        )


def _own(layer: Layer, h: jax.Array) -> jax.Array:
    """Returns `h`; for a normalization layer, the entry of the pair for the reported parameter."""
    if layer.kind != "norm":
        return h
    return jnp.split(h, 2, layer.axes.index("out0"))[0 if layer.weight else 1]


def _points(values: jax.Array, axis: int) -> jax.Array:
    """Returns at most `_POINTS` order statistics along an axis, evenly spaced."""
    n = values.shape[axis]
    if n <= _POINTS:
        return values
    places = (2 * np.arange(_POINTS) + 1) * n // (2 * _POINTS)
    return jnp.take(jnp.sort(values, axis), places, axis)


def _condition(layer: Layer, h: jax.Array, s: jax.Array) -> jax.Array:
    def of(part: jax.Array) -> jax.Array:
        largest, smallest = (bound(layer.to_matrices(part), (1, 2)) for bound in (jnp.max, jnp.min))
        return jnp.where(smallest > 0, largest / jnp.where(smallest > 0, smallest, 1), jnp.inf)

    return jnp.max(of(h) * of(s))
