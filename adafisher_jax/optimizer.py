"""AdaFisher's preconditioning as an optax transformation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adafisher_jax import execution_order
from adafisher_jax.alike import Group, groups
from adafisher_jax.factors import Factor
from adafisher_jax.layout import Layout, check_factors, check_floating, check_state
from adafisher_jax.paths import by_path
from adafisher_jax.required import shows_call
from adafisher_jax.rules import (
    Curvature,
    Outcome,
    Pair,
    Rule,
    Scale,
    check_fraction,
    make_rule,
)
from adafisher_jax.step import step_alone, step_group


class ScaleByAdaFisherState(NamedTuple):
    """The state of `scale_by_adafisher`. No array outside of `mu` has the size of a weight.

    Like layers lie stacked along a new first axis, under the path of the first of them (see
    `adafisher_jax.alike`). `adafisher_jax.diagnostics.averages` returns the averages of each layer.

    Attributes:
      count: the number of steps.
      mu: the running average of the gradients.
      factors: the running averages of the layers' `Factor`s. Those of a rule that starts at zero
        are to be divided by the layer's slot.
      slots: the entry of each layer's `h` that belongs to the bias, averaged as the rest of `h`.
      scales: the mean square and the leading directions of each parameter's steps, if the rule has
        any.
      ranges: for a rule with min-max, the ranges of the averages, so that a step between refreshes
        has no reductions.
      skipped: how many refreshes each layer skipped because its statistics were not finite, in the
        order of the layers' paths; None without layers. Layers that a scan has stacked count as
        one, which skips where any of them does.
      ages: how many steps ago each layer's averages last changed, in the same order. Stacked
        layers count as one, which changes where any of them does.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, and a method of tuples
    mu: Any
    factors: dict[str, Factor]
    slots: dict[str, jax.Array]
    scales: dict[str, Scale]
    ranges: dict[str, jax.Array]
    skipped: Any
    ages: Any

    def curvature(self, path: str) -> Curvature:
        """The stored curvature of the group whose first layer has this path."""
        return Curvature(self.factors[path], self.slots[path], self.ranges.get(path))


@shows_call('scale_by_adafisher(layout, rule="centered")')
def scale_by_adafisher(
    layout: Layout | None,
    *,
    rule: str | Rule,
    b1: Any = 0.9,
    curvature_ema: Any = None,
    damping: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions the gradients' momentum with diagonal Kronecker factors.

    .. math::

        m_t = \beta m_{t-1} + (1-\beta) g_t, \qquad d_t = F_t^{-1} \frac{m_t}{1-\beta^t}

    `F` is a diagonal matrix that the rule makes from running averages of each layer's factors
    (Algorithm 1, arXiv:2405.16397); see `adafisher_jax.rules`. `update` takes the factors of
    `adafisher_jax.value_and_grad` as the keyword `factors`. `factors=None` reuses the stored
    averages. Before the first factors, and for parameters without a layer, `F` is the identity
    under `"paper"` and `"official"`. Under `"centered"` it is then a running root mean square: of
    the steps for matrices, of the gradient for vectors.

    An entry of a gradient that is not finite, also in the momentum's type, does not change its
    momentum. Statistics that are not finite do not change the averages of their layer; the state
    counts them in `skipped`. An entry of a step that would not be finite is 0.

    Args:
      layout: from `adafisher_jax.trace_layout`; None if there are no layers.
      rule: `"centered"` (recommended), `"paper"` or `"official"`; or a `Rule`.
      b1: the decay β of the momentum.
      curvature_ema: the decay γ of the factors' averages; None for the rule's default.
      damping: the damping λ (or τ); None for the rule's default. With 0, entries whose Fisher term
        is 0 are not stepped.
      mu_dtype: the type of the momentum; None for the parameters' type.

    Returns:
      A transformation whose `update` takes the extra argument `factors`, which is required with a
      layout. Updates have the gradients' types.

    Raises:
      ValueError: if the rule is unknown, the damping negative or a decay outside of [0, 1); from
        `init` and `update`, if the layout does not have a parameter, or if the shapes of the
        layout, the factors or the state are of another model.
      TypeError: if `layout` is no layout, or `mu_dtype` is not floating-point; from `init`, if a
        parameter is not; from `update` with a layout, if `factors` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_adafisher(None, rule="paper")
      >>> params = {"w": jnp.ones(2)}
      >>> updates, state = tx.update({"w": jnp.array([1.0, 2.0])}, tx.init(params))
      >>> updates["w"].round(3).tolist()
      [1.0, 2.0]
    """
    chosen = make_rule(rule, curvature_ema, damping)
    check_fraction("b1", b1)
    if not isinstance(layout, Layout | None):
        raise TypeError(
            f"layout: got {type(layout).__name__}, wanted "
            "adafisher_jax.trace_layout(loss_fn, params, ...) or, for no layers, None"
        )
    if mu_dtype is not None and not jnp.issubdtype(mu_dtype, jnp.inexact):
        raise TypeError(f"mu_dtype: got {jnp.dtype(mu_dtype)}, wanted a floating-point type")
    layers = sorted(layout.layers, key=lambda layer: layer.path) if layout is not None else []

    def own_groups(leaves: dict[str, Any]) -> list[Group]:
        """Groups of layers with a parameter among `leaves`: a mask may take others away."""
        own = (x for x in layers if any(leaf.path in leaves for leaf in x.leaves))
        return groups(own, leaves)

    def init_fn(params: optax.Params) -> ScaleByAdaFisherState:
        leaves, _ = by_path(params)
        check_floating(leaves)
        leaves = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
        count = jnp.zeros([], jnp.int32)
        if not leaves:  # nothing to step, or optax.tree.map_params asks where the parameters are
            nothing: list[Any] = [jnp.zeros([]) for _ in range(6)]
            return ScaleByAdaFisherState(count, params, *nothing)
        if layout is not None:
            layout.check_params(leaves)
        own, rest = own_groups(leaves), dict(leaves)
        scales: dict[str, Scale | None] = {}
        for group in own:
            layer = group.stacked
            for paths, at in zip(group.paths(leaves), (layer.weight, layer.bias), strict=True):
                if paths and at:
                    alike = [rest.pop(path) for path in paths]
                    stacked = jax.ShapeDtypeStruct(at.shape, alike[0].dtype)
                    scales[paths[0]] = chosen.start_scale(stacked, layer, at)
        scales |= {path: chosen.start_scale(leaf, None, None) for path, leaf in rest.items()}
        layers_count = sum(len(group.layers) for group in own)
        return ScaleByAdaFisherState(
            count=count,
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            **_stored({one.name: chosen.start(one.stacked, one.dtype(leaves)) for one in own}),
            scales={path: scale for path, scale in scales.items() if scale is not None},
            skipped=jnp.zeros(layers_count, jnp.int32) if own else None,
            ages=jnp.zeros(layers_count, jnp.int32) if own else None,
        )

    compiled_init = jax.jit(init_fn)  # whose shapes JAX keeps between updates outside of jit

    def update_fn(
        updates: optax.Updates,
        state: ScaleByAdaFisherState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdaFisherState]:
        del params
        if layout is not None and "factors" not in extra_args:
            raise TypeError(
                "update: got no keyword factors. Write tx.update(grads, opt_state, params, "
                "factors=factors), with those of adafisher_jax.value_and_grad, or factors=None to "
                "keep the stored curvature. If you did, a wrapper around the optimizer dropped it"
            )
        factors: dict[str, Factor] | None = extra_args.get("factors")
        grads, treedef = by_path(updates)
        check_state(state, compiled_init.eval_shape(updates))
        count = optax.safe_increment(state.count)
        if not grads:
            return updates, state._replace(count=count)
        own = own_groups(grads)
        if factors is not None:
            check_factors(factors, [layer for group in own for layer in group.layers])
        before = dict(zip(grads, treedef.flatten_up_to(state.mu), strict=True))
        widest = jnp.result_type(jnp.float32, *(jnp.finfo(g.dtype).dtype for g in grads.values()))
        ahead = count + chosen.nesterov
        correction = 1 / (1 - jnp.asarray(b1, widest) ** ahead)

        curvatures: dict[str, Curvature] = {}
        outcomes: list[Outcome] = []
        mu: dict[str, jax.Array] = {}
        steps: dict[str, jax.Array] = {}
        scales = dict(state.scales)
        for group in own:
            pair = Pair(*group.paths(grads))
            curvatures[group.name], outcome, *found = step_group(
                group.stacked,
                chosen,
                b1,
                correction,
                state.curvature(group.name),
                None if factors is None else tuple(factors[one.path] for one in group.layers),
                *(pair.each(of.__getitem__) for of in (before, grads)),
                Pair(*(paths and scales.get(paths[0]) for paths in pair)),
            )
            outcomes.append(outcome)
            for paths, *of_all, scale in zip(pair, *found, strict=True):
                for values, into in zip(of_all, (mu, steps), strict=True):
                    into.update(zip(paths or (), values or (), strict=True))
                if scale is not None:
                    scales[paths[0]] = scale
                    # In turn, groups need the memory of two or three; at once, that of all.
                    correction = execution_order.after(correction, [scale.square])
        for path in [path for path in grads if path not in mu]:
            mu[path], steps[path], scale = step_alone(
                chosen, b1, correction, before[path], grads[path], scales.get(path)
            )
            if scale is not None:
                scales[path] = scale

        skipped, ages = state.skipped, state.ages
        if own:
            order = np.argsort([layer.path for group in own for layer in group.layers])
            of_layers = jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *outcomes)
            skipped = skipped + of_layers.skipped
            ages = jnp.where(of_layers.changed, 0, ages + 1)
        new_state = ScaleByAdaFisherState(
            count=count,
            mu=treedef.unflatten([mu[path] for path in grads]),
            **_stored(curvatures),
            scales=scales,
            skipped=skipped,
            ages=ages,
        )
        return treedef.unflatten([steps[path] for path in grads]), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stored(curvatures: Mapping[str, Curvature]) -> dict[str, Any]:
    """Returns the fields of the state that hold the curvature of groups."""
    return {
        "factors": {path: curvature.factor for path, curvature in curvatures.items()},
        "slots": {path: curvature.slot for path, curvature in curvatures.items()},
        "ranges": {
            path: curvature.ranges
            for path, curvature in curvatures.items()
            if curvature.ranges is not None
        },
    }
