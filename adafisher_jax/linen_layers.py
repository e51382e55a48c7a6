"""What a call of each Linen layer tells: its kind, its parameters and its statistic.

`READERS` maps the function behind a layer's method to a reader, which runs the call and reports
it. The function, not the class, decides: a subclass that calls `super().__call__` is read once.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import opt_einsum
from flax.linen.linear import canonicalize_padding

from adafisher_jax import statistics
from adafisher_jax.statistics import Window


class Reading(NamedTuple):
    """One call of a layer.

    Attributes:
      kind: as in `adafisher_jax.layout.Layer`.
      statistic: how its rows are reduced.
      x: its input.
      weight: the name of its weight.
      bias: the name of its bias.
      inside: the path from the module's parameters to the layer's.
      groups: feature groups.
    """

    kind: str
    statistic: Any
    x: jax.Array
    weight: str = "kernel"
    bias: str = "bias"
    inside: tuple[str, ...] = ()
    groups: int = 1


OnCall = Callable[[Reading, Any], Any]
Read = Callable[[Any, jax.Array, jax.Array, dict[str, Any]], Reading | None]
Reader = Callable[[Any, Callable[..., Any], Any, Any, OnCall], Any]


def _tuple(value: Any, rank: int = 1) -> tuple[int, ...]:
    """An int, a sequence or None as a tuple of ints, an int standing for every axis."""
    if value is None:
        value = 1
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _dense(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    return Reading("dense", statistics.dense(x.ndim), x)


def _dense_general(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    axis = sorted(a % x.ndim for a in _tuple(module.axis))
    batch, features = len(_tuple(module.batch_dims)), len(_tuple(module.features))
    return Reading("dense", statistics.dense(x.ndim, axis, batch, features), x)


def _einsum(module: Any, x: jax.Array, y: jax.Array, rest: dict[str, Any]) -> Reading | None:
    equation: str = rest.get("einsum_str") or module.einsum_str
    shape = tuple(module.shape)
    operands, result, _ = opt_einsum.parser.parse_einsum_input(
        (equation.replace(" ", ""), np.broadcast_to(0, x.shape), np.broadcast_to(0, shape))
    )
    left, right = operands.split(",")
    sizes = dict(zip(left + right, x.shape + shape, strict=True))
    distinct = all(len(set(part)) == len(part) for part in (left, right, result))
    if not distinct or any(sizes[c] != n for c, n in zip(left, x.shape, strict=True)):
        return None  # a diagonal, or an axis of size one that is broadcast: not one linear map
    return Reading("dense", statistics.einsum(f"{operands}->{result}"), x)


def _windows(module: Any, x: jax.Array, y: jax.Array) -> tuple[Window, ...]:
    """How a `Conv` or `ConvLocal` moves along each spatial axis."""
    size = _tuple(module.kernel_size)
    rank = len(size)
    padding = canonicalize_padding(module.padding, rank)
    windows = []
    for axis, (k, n, m, stride, input_dilation, dilation) in enumerate(
        zip(
            size,
            x.shape[-rank - 1 : -1],
            y.shape[-rank - 1 : -1],
            _tuple(module.strides, rank),
            _tuple(module.input_dilation, rank),
            _tuple(module.kernel_dilation, rank),
            strict=True,
        )
    ):
        reach, length = (k - 1) * dilation + 1, (n - 1) * input_dilation + 1
        low, margin, mode = 0, (0, 0), "constant"
        match padding:
            case "CIRCULAR" | "REFLECT":
                margin, mode = ((reach - 1) // 2, reach // 2), _PAD_MODES[padding]
            case "CAUSAL":
                margin = (reach - 1, 0)
            case str():
                ((low, _),) = jax.lax.padtype_to_pads([length], [reach], [stride], padding)
            case _:
                low = int(padding[axis][0])
        windows.append(Window(k, n, m, stride, low, input_dilation, dilation, margin, mode))
    return tuple(windows)


_PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def _conv(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    windows = _windows(module, x, y)
    if not module.shared_weights:
        return Reading("conv_local", statistics.LocalConvolution(windows), x)
    groups = module.feature_group_count
    return Reading("conv", statistics.Convolution(windows, groups), x, groups=groups)


def _conv_transpose(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    size = _tuple(module.kernel_size)
    rank = len(size)
    padding = canonicalize_padding(module.padding, rank)
    windows = []
    for axis, (k, n, m, stride, dilation) in enumerate(
        zip(
            size,
            x.shape[-rank - 1 : -1],
            y.shape[-rank - 1 : -1],
            _tuple(module.strides, rank),
            _tuple(module.kernel_dilation, rank),
            strict=True,
        )
    ):
        reach = (k - 1) * dilation + 1
        match padding:
            case "CIRCULAR":  # each kernel position reads each input position once
                windows.append(Window(k, n, n, margin=(0, k - 1), mode="wrap"))
                continue
            case "SAME":  # as jax.lax.conv_transpose pads
                low = reach - 1 if stride > reach - 1 else -(-(reach + stride - 2) // 2)
            case "VALID":
                low = reach - 1
            case _:
                low = int(padding[axis][0])
        windows.append(Window(k, n, m, 1, low, stride, dilation, flip=module.transpose_kernel))
    statistic = statistics.Convolution(tuple(windows), transposed=module.transpose_kernel)
    return Reading("conv", statistic, x)


def _lookup(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    return Reading("embedding", statistics.Lookup(module.num_embeddings), x, "embedding", "")


def _attend(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    letters = statistics.dense(x.ndim)
    statistic = statistics.Contraction(letters.x, letters.weight[::-1], letters.y)
    return Reading("attend", statistic, x, "embedding", "")


def _norm(axes_of: Callable[[Any], Any], keeps_tokens: bool) -> Read:
    def read(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
        channels = tuple(sorted(a % x.ndim for a in _tuple(axes_of(module))))
        return Reading("norm", statistics.Normalization(channels, keeps_tokens), x, "scale")

    return read


def _called(method: Any, read: Read) -> tuple[Any, Reader]:
    """A reader for a method whose output is the layer's own."""
    function = inspect.unwrap(method)
    signature = inspect.signature(function)

    def reader(module: Any, run: Any, args: Any, kwargs: Any, on_call: OnCall) -> Any:
        y = run(*args, **kwargs)
        rest = dict(signature.bind(module, *args, **kwargs).arguments)
        _, x = (rest.pop(name) for name in list(rest)[:2])
        found = read(module, jnp.asarray(x), y, rest)
        return y if found is None else on_call(found, y)

    return function, reader


def _optimized_lstm(module: Any, run: Any, args: Any, kwargs: Any, on_call: OnCall) -> Any:
    """Taps an LSTM that multiplies by all its kernels at once where each gate's sum is used.

    The pre-activation of a gate is the sum of two dense layers' outputs, so its cotangent is
    theirs. The cell hands it to `gate_fn` or `activation_fn`, gate by gate.
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


READERS: Mapping[Any, Reader] = MappingProxyType(
    {
        **dict(
            [
                _called(nn.Dense.__call__, _dense),
                _called(nn.DenseGeneral.__call__, _dense_general),
                _called(nn.Einsum.__call__, _einsum),
                _called(nn.Conv.__call__, _conv),
                _called(nn.ConvTranspose.__call__, _conv_transpose),
                _called(nn.Embed.__call__, _lookup),
                _called(nn.Embed.attend, _attend),
                _called(nn.BatchNorm.__call__, _norm(lambda m: m.axis, keeps_tokens=False)),
                _called(nn.GroupNorm.__call__, _norm(lambda m: -1, keeps_tokens=False)),
                _called(
                    nn.InstanceNorm.__call__, _norm(lambda m: m.feature_axes, keeps_tokens=False)
                ),
                _called(nn.LayerNorm.__call__, _norm(lambda m: m.feature_axes, keeps_tokens=True)),
                _called(nn.RMSNorm.__call__, _norm(lambda m: m.feature_axes, keeps_tokens=True)),
            ]
        ),
        inspect.unwrap(nn.OptimizedLSTMCell.__call__): _optimized_lstm,
    }
)
