"""A loss of parameters, be they Linen's or those of an NNX module."""

from collections.abc import Callable
from typing import Any

from flax import nnx


def pure(loss_fn: Callable[..., Any], first: Any) -> tuple[Callable[..., Any], Any]:
    """The loss as a function of a pytree of parameters, and that pytree.

    Of a module these are its `nnx.Param`s, with the paths of its layout; what the loss changes in
    it is dropped.
    """
    if not isinstance(first, nnx.Module):
        return loss_fn, first
    graph, params, rest = nnx.split(first, nnx.Param, ...)  # type: ignore[misc]

    def loss(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        return loss_fn(nnx.merge(graph, params, rest, copy=True), *args, **kwargs)

    return loss, params
