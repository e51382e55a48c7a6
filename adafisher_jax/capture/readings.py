"""Reads a call of a Flax layer: its kind, its parameters and its statistic.

The layers of Linen and NNX have the same attributes, so both are read here. A reader runs one call
of a layer and reports it. `linen_layers` and `nnx_layers` say which method has which reader.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import opt_einsum
from flax.linen.linear import canonicalize_padding

from adafisher_jax import statistics
from adafisher_jax.capture.found import COMPLEX
from adafisher_jax.tap import Use, mark
from adafisher_jax.windows import Window


class Reading(NamedTuple):
    """One call of a layer.

    Attributes:
      kind: as in `adafisher_jax.layout.Layer`.
      statistic: how the rows of the layer are reduced.
      x: the input of the layer.
      weight: the name of the weight.
      bias: the name of the bias.
      inside: the path from the module's parameters to the layer's.
      groups: the number of feature groups.
    """

    kind: str
    statistic: Any
    x: jax.Array
    weight: str = "kernel"
    bias: str = "bias"
    inside: tuple[str, ...] = ()
    groups: int = 1

    @property
    def names(self) -> set[str]:
        """The names of the layer's parameters."""
        return {self.weight, self.bias}


def marked(found: Reading, y: Any, held: Mapping[str, jax.Array]) -> Any:
    """Returns a layer's output with a mark that holds the layer's parameters among `held`."""
    weight, bias = (name if name in held else None for name in (found.weight, found.bias))
    use = Use(
        found.kind,
        weight,
        bias,
        found.statistic.weight_axes,
        found.statistic.bias_axes,
        found.groups,
        COMPLEX if jnp.iscomplexobj(y) else "",
    )
    parameters = [held[name] for name in (weight, bias) if name]
    return mark(found.statistic, found.x, y, parameters, use) if parameters else y


def as_declared(module: Any) -> bool:
    """Whether a layer multiplies by the operations of Flax and JAX, and by none injected."""
    injected = (
        getattr(module, name, None)
        for name in "dot_general dot_general_cls conv_general_dilated conv_general_dilated_cls "
        "promote_dtype".split()
    )
    homes = (getattr(one, "__module__", None) or type(one).__module__ for one in injected if one)
    return all(home.startswith(("flax.", "jax.")) for home in homes)


OnCall = Callable[[Reading, Any], Any]
Read = Callable[[Any, jax.Array, jax.Array, dict[str, Any]], Reading | None]
Reader = Callable[[Any, Callable[..., Any], Any, Any, OnCall], Any]


def _tuple(value: Any, rank: int = 1) -> tuple[int, ...]:
    """Returns an int, a sequence or None as a tuple of ints; an int stands for every axis."""
    if value is None:
        value = 1
    return (value,) * rank if isinstance(value, int) else tuple(value)


def dense(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    """Reads a `Dense` or `Linear`."""
    return Reading("dense", statistics.dense(x.ndim), x)


def dense_general(
    module: Any, x: jax.Array, y: jax.Array, batch: Sequence[int], features: Any
) -> Reading:
    """Reads a `DenseGeneral` or `LinearGeneral`, given its batch axes and output features."""
    axis = sorted(a % x.ndim for a in _tuple(module.axis))
    statistic = statistics.dense(x.ndim, axis, len(batch), len(_tuple(features)))
    return Reading("dense", statistic, x)


def einsum(module: Any, x: jax.Array, y: jax.Array, rest: dict[str, Any]) -> Reading | None:
    """Reads an `Einsum`; None if it is not one linear map."""
    equation: str = rest.get("einsum_str") or module.einsum_str
    shape = tuple(module.shape if hasattr(module, "shape") else module.kernel_shape)
    operands, result, _ = opt_einsum.parser.parse_einsum_input(
        (equation.replace(" ", ""), np.broadcast_to(0, x.shape), np.broadcast_to(0, shape))
    )
    left, right = operands.split(",")
    sizes = dict(zip(left + right, x.shape + shape, strict=True))
    distinct = all(len(set(part)) == len(part) for part in (left, right, result))
    if not distinct or any(sizes[c] != n for c, n in zip(left, x.shape, strict=True)):
        return None  # a diagonal, or an axis of size one that is broadcast: not one linear map
    return Reading("dense", statistics.einsum(f"{operands}->{result}"), x)


def _spatial(
    module: Any, x: jax.Array, y: jax.Array
) -> Iterator[tuple[Any, int, int, int, int, int]]:
    """Yields of each spatial axis its padding; the lengths of kernel, input and output; strides."""
    size = _tuple(module.kernel_size)
    rank = len(size)
    padding = canonicalize_padding(module.padding, rank)
    each = (padding,) * rank if isinstance(padding, str) else padding
    space = slice(-rank - 1, -1)
    steps = (_tuple(value, rank) for value in (module.strides, module.kernel_dilation))
    yield from zip(each, size, x.shape[space], y.shape[space], *steps, strict=True)


def _windows(module: Any, x: jax.Array, y: jax.Array) -> tuple[Window, ...]:
    """Returns how a `Conv` or `ConvLocal` moves along each spatial axis."""
    windows = []
    axes = [*_spatial(module, x, y)]
    dilations = _tuple(module.input_dilation, len(axes))
    for (padding, k, n, m, stride, dilation), input_dilation in zip(axes, dilations, strict=True):
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
                low = int(padding[0])
        windows.append(Window(k, n, m, stride, low, input_dilation, dilation, margin, mode))
    return tuple(windows)


_PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def conv(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    """Reads a `Conv` or `ConvLocal`."""
    windows = _windows(module, x, y)
    if not getattr(module, "shared_weights", True):
        return Reading("conv_local", statistics.LocalConvolution(windows), x)
    groups = module.feature_group_count
    return Reading("conv", statistics.Convolution(windows, groups), x, groups=groups)


def conv_transpose(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    """Reads a `ConvTranspose`."""
    flip = module.transpose_kernel
    windows = []
    for padding, k, n, m, stride, dilation in _spatial(module, x, y):
        reach = (k - 1) * dilation + 1
        low, margin, mode = 0, (0, 0), "constant"
        match padding:
            case "CIRCULAR":  # reads wrap around the dilated input
                margin, mode = (0, -(-(reach - 1) // stride)), "wrap"
            case "SAME":  # as jax.lax.conv_transpose pads
                low = reach - 1 if stride > reach - 1 else -(-(reach + stride - 2) // 2)
            case "VALID":
                low = reach - 1
            case _:
                low = int(padding[0])
        windows.append(Window(k, n, m, 1, low, stride, dilation, margin, mode, flip))
    statistic: Any = statistics.Convolution(tuple(windows))
    if flip:  # the kernel is (*window, out, in)
        rank = len(windows)
        order = (*range(rank), rank + 1, rank)
        statistic = statistics.Rearranged(statistic, None, order, None)
    return Reading("conv", statistic, x)


def lookup(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    """Reads an `Embed`."""
    return Reading(
        "embedding", statistics.lookup(x.ndim, module.num_embeddings), x, "embedding", ""
    )


def attend(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    """Reads the `attend` of an `Embed`."""
    letters = statistics.dense(x.ndim)
    statistic = statistics.Contraction(letters.x, letters.weight[::-1], letters.y)
    return Reading("attend", statistic, x, "embedding", "")


def norm(axes_of: Callable[[Any], Any], keeps_tokens: bool) -> Read:
    """Returns a `Read` of normalization layers, which returns None for a layer without channels.

    Args:
      axes_of: a function of the module that returns the axes of its channels.
      keeps_tokens: as in `statistics.Normalization`.
    """

    def read(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading | None:
        channels = tuple(sorted(a % x.ndim for a in _tuple(axes_of(module))))
        if not channels:
            return None
        bias = "bias" if hasattr(module, "use_bias") else ""
        return Reading("norm", statistics.Normalization(channels, keeps_tokens), x, "scale", bias)

    return read


def reader(method: Callable[..., Any], read: Read) -> Reader:
    """Returns a reader of a method whose output is the output of the layer."""
    signature = inspect.signature(inspect.unwrap(method))

    def run_and_report(module: Any, run: Any, args: Any, kwargs: Any, on_call: OnCall) -> Any:
        y = run(*args, **kwargs)
        rest = dict(signature.bind(module, *args, **kwargs).arguments)
        _, x = (rest.pop(name) for name in list(rest)[:2])
        found = read(module, jnp.asarray(x), y, rest)
        return y if found is None else on_call(found, y)

    return run_and_report


def of_common_layers(flax: Any) -> Iterator[tuple[type, str, Read]]:
    """Yields the methods that have the same names in Linen and NNX, and how to read each."""
    yield flax.Einsum, "__call__", einsum
    yield flax.Conv, "__call__", conv
    yield flax.ConvTranspose, "__call__", conv_transpose
    yield flax.Embed, "__call__", lookup
    yield flax.Embed, "attend", attend
    yield flax.BatchNorm, "__call__", norm(lambda m: m.axis, keeps_tokens=False)
    yield flax.GroupNorm, "__call__", norm(lambda m: -1, keeps_tokens=False)
    yield flax.InstanceNorm, "__call__", norm(lambda m: m.feature_axes, keeps_tokens=False)
    yield flax.LayerNorm, "__call__", norm(lambda m: m.feature_axes, keeps_tokens=True)
    yield flax.RMSNorm, "__call__", norm(lambda m: m.feature_axes, keeps_tokens=True)
