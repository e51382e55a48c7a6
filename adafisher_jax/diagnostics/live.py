r"""What the optimizer is doing to each layer, read from its state at any step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adafisher_jax.layout import Layer, Layout, path_of
from adafisher_jax.optimizer import ScaleByAdaFisherState
from adafisher_jax.rules import Curvature, Rule, make_rule

QUANTILES = (0.05, 0.5, 0.95)
_POINTS = 32  # of each factor at most, from which quantiles are taken


class LayerReport(NamedTuple):
    r"""One layer's curvature and steps, as scalars; `F` is what divides its momentum.

    They are of the layer's weight (of its bias, where it has none), over all its entries.

    Attributes:
      above_damping: the share of entries whose Fisher term is larger than what damping adds to it:
        :math:`\tilde H \tilde S > \lambda` under `"paper"` and `"official"`, and
        :math:`\hat H \hat S > \tau (\hat H + \hat S + \tau)` under `"centered"`. 0 before the
        first refresh.
      rate_low: the 5 % quantile of the effective learning rate, by which an entry of the
        momentum is multiplied: :math:`\alpha / F`, in `"centered"` with its scalar.
      rate_median: the 50 % quantile.
      rate_high: the 95 % quantile.
      condition: of the averages, :math:`\max(h \otimes s) / \min(h \otimes s)`; infinite where one
        is 0, the largest of stacked layers.
      relative_step: the root mean square of the update over that of the weight; None unless
        both were given.
      age: how many steps ago the averages last changed.
      skipped: how many refreshes were skipped, since statistics were not finite.
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
    rule: str = "paper",
    damping: Any = None,
    learning_rate: Any = 1.0,
    params: Any = None,
    updates: Any = None,
) -> dict[str, LayerReport]:
    """A `LayerReport` for each layer, from the optimizer's state; works inside `jax.jit`.

    The costs are a pass over each weight's entries that stores nothing, and sorts of at most
    1,024 numbers for each stacked layer. Of layers wider than 32 the quantiles are those of 32
    evenly spaced order statistics of each factor.

    Args:
      opt_state: of any transformation or `nnx.Optimizer` with AdaFisher in it.
      layout: the transformation's.
      rule: the transformation's, by name.
      damping: likewise; None for the rule's default.
      learning_rate: of the step; 1 gives what the momentum is multiplied by before it.
      params: parameters or an NNX module, for `relative_step`.
      updates: of this step, what `optax.apply_updates` adds to them.

    Returns:
      A pytree of scalars, by layer path.

    Raises:
      ValueError: if the state has no AdaFisher in it, none of the layout's layers, or for an
        unknown rule.

    Example:
      >>> import adafisher_jax as af, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(2), jnp.array([[1.0, 2.0], [3.0, 0.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda params, x: jnp.sum(model.apply({"params": params}, x))
      >>> layout = af.trace_layout(loss_fn, params, x)
      >>> tx, grad_fn = af.adafisher(1e-3, layout), af.value_and_grad(loss_fn, layout)
      >>> loss, grads, factors = grad_fn(params, x)
      >>> updates, state = tx.update(grads, tx.init(params), params, factors=factors)
      >>> found = report(state, layout, params=params, updates=updates)[""]
      >>> found.condition.item(), found.age.item(), found.skipped.item()
      (2.5, 0, 0)
    """
    chosen = make_rule(rule, damping=damping)
    weights, steps = (None if tree is None else _leaves(tree) for tree in (params, updates))
    found: dict[str, LayerReport] = {}
    for state in _states(opt_state):
        for layer in layout.layers:
            if layer.path in state.factors:
                at = layer.leaves[0].path
                ratio = None
                if weights is not None and steps is not None:
                    ratio = _rms(steps[at]) / _rms(weights[at])
                found[layer.path] = _of_layer(chosen, layer, state, learning_rate, ratio)
    if not found:
        raise ValueError("opt_state: got none with AdaFisher's factors of a layer of the layout")
    return dict(sorted(found.items()))


def scalars(found: Mapping[str, LayerReport]) -> dict[str, jax.Array]:
    """A report as one flat dict, `path/field` → scalar, as loggers want it.

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
    """A report as text, a line for each layer.

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
    return "-" if value is None else f"{value.item():.3g}"


def _states(opt_state: Any) -> list[ScaleByAdaFisherState]:
    def is_state(node: Any) -> bool:
        return isinstance(node, ScaleByAdaFisherState)

    plain = jax.tree.map(
        lambda leaf: leaf[...] if isinstance(leaf, nnx.Variable) else leaf,
        opt_state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    found = [node for node in jax.tree.leaves(plain, is_leaf=is_state) if is_state(node)]
    return [state for state in found if isinstance(state.factors, dict)]


def _leaves(tree: Any) -> dict[str, jax.Array]:
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _rms(x: jax.Array) -> jax.Array:
    wide = jnp.abs(x).astype(jnp.promote_types(jnp.finfo(x.dtype).dtype, jnp.float32))
    return jnp.sqrt(jnp.mean(jnp.square(wide)))


def _of_layer(
    rule: Rule, layer: Layer, state: ScaleByAdaFisherState, learning_rate: Any, ratio: Any
) -> LayerReport:
    at = layer.path
    curvature = Curvature(state.factors[at], state.slots[at], state.skipped[at], state.ages[at])
    refreshed = rule.refreshed(curvature)
    centers = layer.weight is not None and layer.bias is not None and layer.kind != "norm"
    h, _, s = rule.scaled(layer, curvature, centers)
    if layer.kind == "norm":  # of the pair, the scale's
        h = jnp.split(h, 2, layer.axes.index("out0"))[0 if layer.weight else 1]
    above = refreshed & (2 * h * s > rule.damped(h, s))

    size = learning_rate * rule.size(layer, state.scales.get(layer.leaves[0].path))
    points = _points(layer.to_matrices(h), 1), _points(layer.to_matrices(s), 2)
    divisor = rule.damped(*points) ** rule.exponent
    known = refreshed.reshape(-1, 1, 1)
    sizes = jnp.broadcast_to(size, layer.slot_shape).reshape(-1, 1, 1)
    rates = sizes / jnp.where(known, divisor, 1)
    low, median, high = jnp.quantile(rates, jnp.asarray(QUANTILES, rates.dtype))
    return LayerReport(
        above_damping=jnp.mean(above, dtype=jnp.float32),
        rate_low=low,
        rate_median=median,
        rate_high=high,
        condition=_condition(layer, curvature),
        relative_step=ratio,
        age=curvature.age,
        skipped=curvature.skipped,
    )


def _points(values: jax.Array, axis: int) -> jax.Array:
    """At most `_POINTS` order statistics along an axis, each for as many of its entries."""
    n = values.shape[axis]
    if n <= _POINTS:
        return values
    places = jnp.floor((jnp.arange(_POINTS) + 0.5) * n / _POINTS).astype(jnp.int32)
    return jnp.take(jnp.sort(values, axis), places, axis)


def _condition(layer: Layer, curvature: Curvature) -> jax.Array:
    def of(part: jax.Array) -> jax.Array:
        largest, smallest = (bound(layer.to_matrices(part), (1, 2)) for bound in (jnp.max, jnp.min))
        return jnp.where(smallest > 0, largest / jnp.where(smallest > 0, smallest, 1), jnp.inf)

    return jnp.max(of(curvature.factor.h) * of(curvature.factor.s))
