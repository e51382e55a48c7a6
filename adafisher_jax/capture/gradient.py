"""Traces a loss: finds its layout, and its gradients together with its factors.

The loss is traced once, and the layers that are known by name leave marks. The traced program
shows which parameters the marked layers use, and which it multiplies by data. With probes inserted
there, the program is differentiated.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from adafisher_jax.capture.lineage import find_uses
from adafisher_jax.capture.probes import insert_probes
from adafisher_jax.capture.reach import places_reached
from adafisher_jax.capture.uses import Uses, read_uses
from adafisher_jax.capture.watch import watching
from adafisher_jax.factors import Factor
from adafisher_jax.layout import Layer, Layout, check_floating
from adafisher_jax.paths import by_path, named_leaves
from adafisher_jax.tap import Statistic, vary_like


class Form(NamedTuple):
    """A form of a layer's statistics: diagonals, or whole matrices.

    Attributes:
      zeros: a function of a layer and a type that returns a zero `Factor` of this form. Each part
        except `rows` has the weight's rank.
      statistic: a function that turns a layer's statistic into one that yields this form.
      of_ranges: whether a range of a weight (`w[:3]`) has statistics of this form.
    """

    zeros: Callable[[Layer, Any], Factor]
    statistic: Callable[[Statistic], Statistic]
    of_ranges: bool = True


DIAGONAL = Form(Layer.zeros, lambda statistic: statistic)


class _Traced(NamedTuple):
    """A traced loss.

    Attributes:
      program: the traced program, a function of the leaves of the loss's first argument.
      uses: the layers in it.
      result: turns the program's outputs into what the loss returns.
    """

    program: core.ClosedJaxpr
    uses: Uses
    result: Callable[[list[Any]], Any]


def _trace(loss_fn: Callable[..., Any], first: Any, leaves: list[Any], rest: Any) -> _Traced:
    """Traces a loss as a program of `first`; the leaves of further arguments are constants."""
    outputs: Any = None

    def program(first: Any) -> list[Any]:
        nonlocal outputs
        args, kwargs = rest.unflatten(leaves)  # here, so that mutable objects are of this trace
        found, treedef = jax.tree.flatten(loss_fn(first, *args, **kwargs))
        traced = [isinstance(leaf, jax.core.Tracer) for leaf in found]
        untraced = [None if t else (leaf,) for leaf, t in zip(found, traced, strict=True)]
        outputs = treedef, untraced
        return [leaf for leaf, t in zip(found, traced, strict=True) if t]

    parameters, _ = by_path(first)
    check_floating(parameters)
    named = named_leaves(first)
    with watching(), jax.disable_jit(False):  # an unrolled loop would hide the layers of slices
        traced = jax.make_jaxpr(program)(first)
    treedef, untraced = outputs

    def result(values: list[Any]) -> Any:
        remaining = iter(values)
        return treedef.unflatten([leaf[0] if leaf else next(remaining) for leaf in untraced])

    outs = traced.jaxpr.outvars
    scalar = untraced[0] is None and not outs[0].aval.shape if untraced else False
    counts = [not scalar or i == 0 for i in range(len(outs))]  # only the loss counts
    uses = read_uses(find_uses(traced, len(named)), places_reached(traced, counts), named)
    return _Traced(traced, uses, result)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def trace_layout(loss_fn: Callable[..., Any], first: Any, args: Any, kwargs: Any) -> Layout:
    """Returns the layout of `loss_fn(first, *args, **kwargs)`, without computing anything.

    Raises:
      TypeError: for a leaf of `first` that is not floating-point.
      ValueError: if the loss calls no layer and multiplies no parameter by data, or two kinds of
        layer share a parameter.
    """
    leaves, rest = jax.tree.flatten((args, kwargs))
    layout: Any = None

    def abstractly(arrays: list[Any]) -> None:
        nonlocal layout
        remaining = iter(arrays)
        abstract = [next(remaining) if _is_array(leaf) else leaf for leaf in leaves]
        layout = _trace(loss_fn, first, abstract, rest).uses.layout

    jax.eval_shape(abstractly, [leaf for leaf in leaves if _is_array(leaf)])
    return layout


def value_and_grad(
    loss_fn: Callable[..., Any],
    layout: Layout,
    has_aux: bool,
    first: Any,
    args: Any,
    kwargs: Any,
    form: Form = DIAGONAL,
    when: Any = True,
) -> tuple[Any, Any, dict[str, Factor]]:
    """Returns the value of `loss_fn(first, *args, **kwargs)`, its gradient and its factors.

    If `when` is false, the factors are zeros and have zero rows.

    Raises:
      TypeError: for a leaf of `first` that is not floating-point.
      ValueError: if the layout is another model's or another loss's.
    """
    zeros = probes_of(layout, first, form)
    loss, met = probed(loss_fn, layout, first, args, kwargs, form, when)
    probes = {path: _due(zeros[path], when) for path in met}
    value, (grads, sums) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=has_aux)(first, probes)
    return value, grads, means_of(layout, zeros | sums)


def probes_of(layout: Layout, first: Any, form: Form = DIAGONAL) -> dict[str, Factor]:
    """Returns the probe of each layer, zeros, by layer path.

    `rows` has the weight's rank too, so that a scan slices it with the weight.
    """
    leaves, _ = by_path(first)
    layout.check_params(leaves)

    def probe(layer: Layer) -> Factor:
        zeros = form.zeros(layer, layer.dtype(leaves))
        return zeros._replace(rows=zeros.rows.reshape(layer.stack_shape))

    return {layer.path: probe(layer) for layer in layout.layers}


def _due(probe: Factor, when: Any) -> Factor:
    """Returns the probe with `rows` of 1 where statistics are not wanted, which its tap reads."""
    rows = jnp.where(when, probe.rows, 1)
    # In a `shard_map` the parts of a probe must differ between devices all together or not at all.
    return Factor(*(vary_like(part, rows) for part in probe._replace(rows=rows)))


def means_of(layout: Layout, sums: dict[str, Factor]) -> dict[str, Factor]:
    """Returns the factors, given the gradients of the probes: sums over rows."""
    found = {}
    for layer in layout.layers:
        means = sums[layer.path].from_sums()
        found[layer.path] = means._replace(rows=means.rows.reshape(layer.rows_shape))
    return found


def probed(
    loss_fn: Callable[..., Any],
    layout: Layout,
    first: Any,
    args: Any,
    kwargs: Any,
    form: Form = DIAGONAL,
    when: Any = True,
) -> tuple[Callable[[Any, dict[str, Factor]], Any], list[str]]:
    """Returns the loss as a function of its first argument and of probes, and the probed paths."""
    leaves, _ = by_path(first)
    layout.check_params(leaves)
    traced = _trace(loss_fn, first, *jax.tree.flatten((args, kwargs)))
    _check_same(layout, traced.uses)
    sources = {} if when is False else traced.uses.sources
    positions = {
        sources[layer.leaves[0].path]: layer.path
        for layer in layout.layers
        if layer.leaves[0].path in sources
    }
    completions = {
        place: completion
        for place, completion in traced.uses.completions.items()
        if completion.carrier.source in positions
    }
    for source, sliced in (completion.carrier for completion in completions.values()):
        if not form.of_ranges and any(isinstance(s.by, range) for s in sliced):
            raise ValueError(
                f"the layer {positions[source]!r} is used in parts (as `w[:3]`), which have no "
                "whole factors here: leave it out of `paths`"
            )

    def loss(first: Any, probes: dict[str, Factor]) -> Any:
        given = {position: probes[path] for position, path in positions.items()}
        with jax.disable_jit(False):
            program = insert_probes(
                traced.program, completions, given, form.statistic, when is not True
            )
        return traced.result(program(*jax.tree.leaves(first), *jax.tree.leaves(given)))

    return loss, list(positions.values())


def condition(when: Any) -> Any:
    """Returns `when` as a Python Boolean, or unchanged if it is traced.

    Raises:
      TypeError: if `when` is not one Boolean.
    """
    if not isinstance(when, bool | jax.Array | np.ndarray | np.bool_):
        raise TypeError(f"when: got {type(when).__name__}, wanted one Boolean")
    if not isinstance(when, bool) and (when.shape != () or when.dtype != np.bool_):
        raise TypeError(f"when: got {when.dtype} of shape {when.shape}, wanted one Boolean")
    return when if isinstance(when, jax.core.Tracer) else bool(when)


def _check_same(layout: Layout, uses: Uses) -> None:
    """Checks the layers found in a loss against a layout, of which some may be missing."""
    met = {layer.leaves[0].path: layer for layer in uses.layout.layers}
    for layer in layout.layers:
        found = met.get(layer.leaves[0].path)
        if found and dataclasses.replace(found, path=layer.path) != layer:
            raise ValueError(
                f"the layer {layer.path!r} is a {found.kind} with parameters {_described(found)}, "
                f"the layout has a {layer.kind} with {_described(layer)}: it was traced from "
                "another model"
            )
        refused = [leaf.path for leaf in layer.leaves if leaf.path in uses.refused]
        if not found and refused:
            raise ValueError(
                f"the layer {layer.path!r} of the layout has no factors in this loss: "
                f"{refused[0]!r}: {uses.refused[refused[0]]}"
            )
    if layout.layers and not met.keys() & {layer.leaves[0].path for layer in layout.layers}:
        raise ValueError("the capture met no layer of the layout: it was traced from another loss")


def _described(layer: Layer) -> str:
    return ", ".join(f"{leaf.shape} {leaf.axes}" for leaf in layer.leaves)
