"""Turns a loss of an NNX module into a function of its parameters."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from adafisher_jax.layout import Layout
from adafisher_jax.nnx import parameters_of


def pure(loss_fn: Callable[..., Any], layout: Layout, first: Any) -> tuple[Callable[..., Any], Any]:
    """Returns the loss as a function of a pytree of parameters, and that pytree.

    For a module the parameters are those that its layout was traced for, with the layout's paths.
    What the loss changes in the module is dropped.
    """
    if not isinstance(first, nnx.Module):
        return loss_fn, first
    graph, params, rest = nnx.split(first, parameters_of(layout), ...)  # type: ignore[misc]

    def loss(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        return loss_fn(nnx.merge(graph, params, rest, copy=True), *args, **kwargs)

    return loss, params
