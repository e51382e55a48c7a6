"""Checks of the loss that a user gives: its type, its result, and where it is traced."""

import functools
import numbers
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax import nnx


def check_loss(loss_fn: Any) -> None:
    """Raises a TypeError if the loss is no function, or is a module."""
    if isinstance(loss_fn, nn.Module | nnx.Module) or not callable(loss_fn):
        raise TypeError(
            f"loss_fn: got {type(loss_fn).__name__}, wanted a function that calls the model and "
            "returns a scalar, as lambda params, x: jnp.mean(model.apply(params, x) ** 2)"
        )


def explaining(loss_fn: Callable[..., Any], has_aux: bool | None) -> Callable[..., Any]:
    """Returns the loss with errors that say what to do about them.

    Raises:
      TypeError: from the returned function, if a loss with `has_aux` returns no pair of a scalar
        and something else, or one without returns no scalar. It may return anything for None.
      ValueError: from the returned function, if the loss names a mapped axis that does not exist.
    """

    @functools.wraps(loss_fn)
    def loss(*args: Any, **kwargs: Any) -> Any:
        try:
            result = loss_fn(*args, **kwargs)
        except NameError as error:
            found = re.search(r"unbound axis name:? ?(\w*)", str(error))
            if not found:
                raise
            raise ValueError(
                f"the loss names a mapped axis {found[1]!r}, as nn.BatchNorm(axis_name=...) does, "
                "which is not there. Trace the layout as adafisher_jax.trace_layout(jax.vmap("
                f"loss_fn, (None, 0), axis_name={found[1]!r}), params, x[None]), and call the "
                "gradient function inside the shard_map or pmap of that name"
            ) from error
        if has_aux is not None:
            _check_result(result, has_aux)
        return result

    return loss


def _check_result(result: Any, has_aux: bool) -> None:
    """Raises a TypeError if `result` is no scalar, or with `has_aux` not `(scalar, aux)`."""
    pair = isinstance(result, tuple) and len(result) == 2
    value = result[0] if pair and has_aux else result
    shape = () if isinstance(value, numbers.Number) else getattr(value, "shape", None)
    if shape == () and (pair or not has_aux):
        return
    got = type(value).__name__ if shape is None else f"an array of shape {shape}"
    if has_aux:
        got = f"a pair of which the first is {got}" if pair else got
        wanted = "with has_aux=True wanted is a pair (scalar, aux)"
    else:
        wanted = "wanted is a scalar, or with has_aux=True a pair (scalar, aux)"
    raise TypeError(f"loss_fn: it returns {got}, {wanted}")
