"""Watching a loss: while it is traced, every Flax layer it calls leaves a mark."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from adafisher_jax.capture import linen_layers, nnx_layers

_watching = contextvars.ContextVar("adafisher_watching", default=False)

# Part of the keys of JAX's caches: a function traced without marks is traced again for them.
_trace_key = jax.make_user_context(None)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Within, the layers this thread calls leave marks; a capture inside another adds no second."""
    if _watching.get():
        yield
        return
    token = _watching.set(True)
    try:
        with linen_layers.marking(), nnx_layers.marking(), _trace_key(True):
            yield
    finally:
        _watching.reset(token)
