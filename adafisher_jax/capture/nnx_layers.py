"""Reports the calls of NNX's layers while a loss is traced.

NNX has no interceptors. While a thread traces a loss, the methods of Flax's own layers are replaced
by methods that report to that thread. No model is changed.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adafisher_jax import statistics
from adafisher_jax.capture import readings
from adafisher_jax.capture.found import MARKED
from adafisher_jax.capture.readings import OnCall, Read, Reader, Reading


def _linear_general(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading | None:
    batch = list(module.batch_axis)
    if batch != sorted(batch):
        return None
    return readings.dense_general(module, x, y, batch, module.out_features)


def _lora(module: Any, run: Any, args: Any, kwargs: Any, on_call: OnCall) -> Any:
    """Reports the two layers of `y = (x A) B`; added zeros stand for the output of the first."""
    y = run(*args, **kwargs)
    x = args[0] if args else kwargs["x"]
    x, a, b = (v.astype(y.dtype) for v in (x, module.lora_a[...], module.lora_b[...]))
    statistic, inner = statistics.dense(x.ndim), x @ a
    zeros = on_call(Reading("dense", statistic, x, "lora_a", ""), jnp.zeros_like(inner))
    return on_call(Reading("dense", statistic, inner, "lora_b", ""), y) + zeros @ b


def _methods() -> Iterator[tuple[type, str, Read]]:
    yield nnx.Linear, "__call__", readings.dense
    yield nnx.LinearGeneral, "__call__", _linear_general
    yield from readings.of_common_layers(nnx)


READERS: Mapping[tuple[type, str], Reader] = MappingProxyType(
    {(layer, name): readings.reader(getattr(layer, name), read) for layer, name, read in _methods()}
    | {(nnx.LoRA, "__call__"): _lora}
)


class _Methods:
    """Replaces the layers' methods while a thread traces a loss."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watching = 0
        self._local = threading.local()
        self._originals: dict[tuple[type, str], Any] = {}

    def _reporting(self, original: Callable[..., Any], reader: Reader) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(module: Any, /, *args: Any, **kwargs: Any) -> Any:
            if not getattr(self._local, "watching", False) or not readings.as_declared(module):
                return original(module, *args, **kwargs)
            run = functools.partial(original, module)
            with jax.named_scope(MARKED):
                return reader(module, run, args, kwargs, functools.partial(_marked, module))

        return method

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Opens a context in which the methods report the calls that this thread makes."""
        self._local.watching = True
        with self._lock:
            if self._watching == 0:
                self._originals = {key: vars(key[0])[key[1]] for key in READERS}
                for (layer, name), original in self._originals.items():
                    setattr(layer, name, self._reporting(original, READERS[layer, name]))
            self._watching += 1
        try:
            yield
        finally:
            with self._lock:
                self._watching -= 1
                if self._watching == 0:
                    for (layer, name), original in self._originals.items():
                        setattr(layer, name, original)
            self._local.watching = False


def _marked(module: Any, found: Reading, y: Any) -> Any:
    held = {name: getattr(module, name, None) for name in found.names if name}
    return readings.marked(
        found, y, {name: v[...] for name, v in held.items() if isinstance(v, nnx.Variable)}
    )


_methods_of_layers = _Methods()


def marking() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which the NNX layers that this thread calls leave marks."""
    return _methods_of_layers.watched()
