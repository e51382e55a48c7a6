"""The NNX layers, and watching a model call them.

NNX has no interceptors. While a loss is watched, the methods of Flax's own layers are exchanged
for ones that report to the thread that watches; no model is touched.
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

from adafisher_jax import readings, statistics
from adafisher_jax.readings import OnCall, Read, Reader, Reading


def _linear_general(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading | None:
    batch = list(module.batch_axis)
    if batch != sorted(batch):
        return None
    return readings.dense_general(module, x, y, batch, module.out_features)


def _lora(module: Any, run: Any, args: Any, kwargs: Any, on_call: OnCall) -> Any:
    """Reports the two layers of `y = (x A) B`, adding zeros between them to see the first."""
    y = run(*args, **kwargs)
    x, a, b = module.promote_dtype(
        (args[0] if args else kwargs["x"], module.lora_a[...], module.lora_b[...]),
        dtype=module.dtype,
    )
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
    """Exchanges the layers' methods while some thread watches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watching = 0
        self._local = threading.local()
        self._originals = {(layer, name): vars(layer)[name] for layer, name in READERS}
        self._reporting = {
            method: self._report(original, READERS[method])
            for method, original in self._originals.items()
        }

    def _report(self, original: Callable[..., Any], reader: Reader) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(module: Any, /, *args: Any, **kwargs: Any) -> Any:
            if not getattr(self._local, "watching", False):
                return original(module, *args, **kwargs)
            run = functools.partial(original, module)
            return reader(module, run, args, kwargs, functools.partial(_marked, module))

        return method

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        self._local.watching = True
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)
            self._local.watching = False

    def _count(self, by: int) -> None:
        with self._lock:
            self._watching += by
            methods = self._reporting if self._watching else self._originals
            for (layer, name), method in methods.items():
                setattr(layer, name, method)


def _marked(module: Any, found: Reading, y: Any) -> Any:
    held = {name: getattr(module, name, None) for name in found.names if name}
    return readings.marked(
        found, y, {name: v[...] for name, v in held.items() if isinstance(v, nnx.Variable)}
    )


_methods_of_layers = _Methods()


def marking() -> contextlib.AbstractContextManager[None]:
    """Within, the NNX layers this thread calls leave marks."""
    return _methods_of_layers.reporting()
