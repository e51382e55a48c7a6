"""Errors for calls that leave out what has no default, or say what there is not."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

P = ParamSpec("P")


def shows_call(call: str) -> Callable[[Callable[P, Any]], Callable[P, Any]]:
    """Returns a decorator whose TypeError for arguments that do not fit shows a complete `call`."""

    def decorate(make: Callable[P, Any]) -> Callable[P, Any]:
        signature = inspect.signature(make)

        @functools.wraps(make)
        def made(*args: P.args, **kwargs: P.kwargs) -> Any:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(
                    f"{make.__name__}: {error}. Write {call}, where layout is "
                    "adafisher_jax.trace_layout(loss_fn, params, ...) or, for no layers, None, "
                    'and rule is "centered" (recommended), "paper" or "official"'
                ) from None
            return make(*args, **kwargs)

        return made

    return decorate
