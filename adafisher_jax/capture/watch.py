"""Opens a context in which every Flax layer that a traced loss calls leaves a mark."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from adafisher_jax.capture import linen_layers, nnx_layers

_watching = contextvars.ContextVar("adafisher_watching", default=False)

# A part of the keys of JAX's caches, so that a function traced without marks is traced again.
_trace_key = jax.make_user_context(None)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Opens a context in which the layers that this thread calls leave marks, one for each call.

    Contexts inside the context add no second mark.
    """
    if _watching.get():
        yield
        return
    token = _watching.set(True)
    try:
        with linen_layers.marking(), nnx_layers.marking(), _trace_key(True):
            yield
    finally:
        _watching.reset(token)
