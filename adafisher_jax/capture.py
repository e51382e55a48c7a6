"""Tracing a loss for its layout, and differentiating it together with its probes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adafisher_jax.factors import Factor
from adafisher_jax.layout import Layer, Layout, path_of
from adafisher_jax.lineage import find_marks
from adafisher_jax.uses import Place, Trace, read_uses


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def abstractly(loss_fn: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
    """A function of a loss's first argument and its other arrays, and those arrays.

    What is no array is passed to the loss as it is.
    """
    rest, structure = jax.tree.flatten((args, kwargs))

    def program(first: Any, arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        leaves = [next(remaining) if _is_array(leaf) else leaf for leaf in rest]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        loss_fn(first, *args, **kwargs)
        return ()

    return program, [leaf for leaf in rest if _is_array(leaf)]


def trace(
    marked: Callable[..., Any], first: Any, args: Any, kwargs: Any
) -> tuple[Layout, dict[Place, str]]:
    """Traces a loss whose adapter leaves marks, without computing anything.

    Raises:
      TypeError: for a leaf of the first argument that is not floating-point.
      ValueError: if the loss calls no layer, or two kinds of layer share a parameter.
    """
    named, _ = jax.tree_util.tree_flatten_with_path(first)
    for keys, leaf in named:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"the parameter {path_of(keys)!r} is of type {jnp.result_type(leaf)}, wanted a "
                "floating-point array: pass integers as another argument of the loss"
            )
    program, arrays = abstractly(marked, args, kwargs)
    return read_uses(find_marks(program, first, arrays), named)


Probes = dict[Place, Factor]


def trace_layout(
    traced: Callable[..., Trace],
    probed: Callable[[Probes, bool], Callable[..., Any]],
    first: Any,
    args: Any,
    kwargs: Any,
) -> Layout:
    """The layout of a loss, less the layers that no probe can reach.

    A model may rebuild its variables or map over them, and so lose a probe or stumble over it.
    Tracing the loss with the probes in place tells.
    """
    layout, places, nested = traced(first, *args, **kwargs)
    named, _ = jax.tree_util.tree_flatten_with_path(first)
    leaves = {path_of(keys): leaf for keys, leaf in named}

    def carry(layers: Sequence[Layer]) -> None:
        probes = {layer.path: _probe(layer, layer.dtype(leaves)) for layer in layers}
        placed = {place: probes[path] for place, path in places.items() if path in probes}
        program, arrays = abstractly(probed(placed, nested), args, kwargs)
        jax.eval_shape(program, first, arrays)

    try:
        carry(layout.layers)
    except Exception:  # whatever the model raises: find out which layers it cannot take
        for layer in layout.layers:
            try:
                carry([layer])
            except Exception as error:
                layout = layout.without(layer, f"no probe can reach it: {error}")
    return layout


def value_and_grad(
    traced: Callable[..., Trace],
    probed: Callable[[Probes, bool], Callable[..., Any]],
    layout: Layout,
    has_aux: bool,
) -> Callable[..., Any]:
    """Differentiates a loss together with the probes of its layers.

    Args:
      traced: traces the loss on the arguments of a call.
      probed: given the probes, and whether models are called inside functions that JAX traces
        by themselves, the loss whose model calls carry and tap them.
      layout: the layers to capture.
      has_aux: whether the loss returns `(loss, aux)`.
    """
    if not isinstance(layout, Layout):
        raise TypeError(f"layout: got {type(layout).__name__}, wanted a Layout")

    def grad_fn(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        named, _ = jax.tree_util.tree_flatten_with_path(params)
        leaves = {path_of(keys): leaf for keys, leaf in named}
        layout.check_params(leaves)
        wanted = {layer.path: layer for layer in layout.layers}
        met, places, nested = traced(params, *args, **kwargs)
        for layer in met.layers:
            if layer.path in wanted and layer != wanted[layer.path]:
                raise ValueError(
                    f"the layer {layer.path!r} is a {layer.kind} with parameters "
                    f"{_described(layer)}, the layout has a {wanted[layer.path].kind} with "
                    f"{_described(wanted[layer.path])}: it was traced from another model"
                )
        if wanted and not wanted.keys() & {layer.path for layer in met.layers}:
            raise ValueError(
                "the capture met no layer of the layout: it was traced from another loss"
            )

        def loss_fn(params: Any, probes: dict[str, Factor]) -> Any:
            placed = {place: probes[path] for place, path in places.items() if path in probes}
            return probed(placed, nested)(params, *args, **kwargs)

        value, (grads, sums) = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=has_aux)(
            params,
            {path: _probe(layer, layer.dtype(leaves)) for path, layer in wanted.items()},
        )
        factors = {path: _means(wanted[path], factor) for path, factor in sums.items()}
        return value, grads, factors

    return grad_fn


def _described(layer: Layer) -> str:
    return ", ".join(f"{leaf.shape} {leaf.axes}" for leaf in layer.leaves)


def _probe(layer: Layer, dtype: Any) -> Factor:
    """Zeros beside a weight; `rows` has its rank, to be sliced with it."""
    zeros = layer.zeros(dtype)
    return zeros._replace(rows=zeros.rows.reshape(layer.stack_shape))


def _means(layer: Layer, sums: Factor) -> Factor:
    means = sums.from_sums()
    return means._replace(rows=means.rows.reshape(layer.rows_shape))
