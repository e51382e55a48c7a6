"""Turns a loss of an NNX module into a function of its parameters."""

from collections.abc import Callable
from typing import Any

from flax import nnx


def pure(loss_fn: Callable[..., Any], first: Any) -> tuple[Callable[..., Any], Any]:
    """Returns the loss as a function of a pytree of parameters, and that pytree.

    For a module the parameters are its `nnx.Param`s, with the paths of its layout. What the loss
    changes in the module is dropped.
    """
    if not isinstance(first, nnx.Module):
        return loss_fn, first
    graph, params, rest = nnx.split(first, nnx.Param, ...)  # type: ignore[misc]

    def loss(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        return loss_fn(nnx.merge(graph, params, rest, copy=True), *args, **kwargs)

    return loss, params
