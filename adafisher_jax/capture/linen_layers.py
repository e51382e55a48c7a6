"""Reports the calls of Linen's layers while a loss is traced."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax

from adafisher_jax import statistics
from adafisher_jax.capture import readings
from adafisher_jax.capture.found import MARKED
from adafisher_jax.capture.readings import OnCall, Read, Reader, Reading


def _dense_general(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    batch = module.batch_dims
    return readings.dense_general(
        module, x, y, (batch,) if isinstance(batch, int) else batch, module.features
    )


def _optimized_lstm(module: Any, run: Any, args: Any, kwargs: Any, on_call: OnCall) -> Any:
    """Reports the dense layers of an LSTM that multiplies by all its kernels at once.

    The input of a gate's activation is the sum of two dense layers' outputs, so the cotangents of
    the two are equal to that of the sum. The cell passes the sum to `gate_fn` or `activation_fn`,
    gate by gate, and the layers are reported there.
    """
    bound = inspect.signature(inspect.unwrap(nn.OptimizedLSTMCell.__call__)).bind(
        module, *args, **kwargs
    )
    (_, h), x = bound.arguments["carry"], bound.arguments["inputs"]
    gates = iter("ifgo")

    def tapped(function: Callable[..., Any], z: Any) -> Any:
        if gate := next(gates, None):
            for name, source in (("i", x), ("h", h)):
                statistic = statistics.dense(source.ndim)
                z = on_call(Reading("dense", statistic, source, inside=(name + gate,)), z)
        return function(z)

    own = {name: getattr(module, name) for name in ("gate_fn", "activation_fn")}
    try:
        for name, function in own.items():
            object.__setattr__(module, name, functools.partial(tapped, function))
        return run(*args, **kwargs)
    finally:
        for name, function in own.items():
            object.__setattr__(module, name, function)


def _methods() -> Iterator[tuple[type, str, Read]]:
    yield nn.Dense, "__call__", readings.dense
    yield nn.DenseGeneral, "__call__", _dense_general
    yield from readings.of_common_layers(nn)


# The keys are the functions behind the methods, not the classes: so a subclass that calls
# `super().__call__` is read once.
READERS: MappingProxyType[Any, Reader] = MappingProxyType(
    {
        inspect.unwrap(method): readings.reader(method, read)
        for layer, name, read in _methods()
        for method in [getattr(layer, name)]
    }
    | {inspect.unwrap(nn.OptimizedLSTMCell.__call__): _optimized_lstm}
)


def _unused(module: Any) -> set[str]:
    """Returns the parameter names that a layer does not use, though its scope may hold them."""
    uses = {"bias": "use_bias", "scale": "use_scale"}
    return {name for name, flag in uses.items() if not getattr(module, flag, True)}


def marking() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which the Linen layers that this thread calls leave marks."""
    return nn.intercept_methods(_intercept)


def _as_declared(module: Any, run: Any) -> bool:
    """Whether a call computes what the layer declares: no interceptor, no overridden `param`."""
    own_method = isinstance(run, functools.partial)
    own_parameters = type(module).param is nn.Module.param
    return own_method and own_parameters and readings.as_declared(module)


def _intercept(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
    scope = context.module.scope
    reader = READERS.get(context.orig_method.func)
    if reader is None or scope is None or not _as_declared(context.module, run):
        return run(*args, **kwargs)

    def on_call(found: Reading, y: Any) -> Any:
        held = scope._collection("params")
        for name in found.inside:
            held = held.get(name, {})
        # A boxed parameter is a tree of one leaf.
        names = (found.names - _unused(context.module)) & held.keys()
        unboxed = {name: jax.tree.leaves(held[name])[0] for name in names}
        return readings.marked(found, y, unboxed)

    with jax.named_scope(MARKED):
        return reader(context.module, run, args, kwargs, on_call)
