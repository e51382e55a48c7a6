"""What a call of a Flax layer tells: its kind, its parameters and its statistic.

Linen and NNX write their layers alike, so their modules are read alike. A reader runs one call
of a layer and reports it; which function has which reader is for the two to say.
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

    @property
    def names(self) -> set[str]:
        """Of its parameters."""
        return {self.weight, self.bias}


def marked(found: Reading, y: Any, held: Mapping[str, jax.Array]) -> Any:
    """A layer's output, marked with those of its parameters that are held under their names."""
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
    """Whether a layer multiplies by Flax's own operations, none that was injected."""
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
    """An int, a sequence or None as a tuple of ints, an int standing for every axis."""
    if value is None:
        value = 1
    return (value,) * rank if isinstance(value, int) else tuple(value)


def dense(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    """A `Dense` or `Linear`."""
    return Reading("dense", statistics.dense(x.ndim), x)


def dense_general(
    module: Any, x: jax.Array, y: jax.Array, batch: Sequence[int], features: Any
) -> Reading:
    """A `DenseGeneral` or `LinearGeneral`, given its batch axes and output features."""
    axis = sorted(a % x.ndim for a in _tuple(module.axis))
    statistic = statistics.dense(x.ndim, axis, len(batch), len(_tuple(features)))
    return Reading("dense", statistic, x)


def einsum(module: Any, x: jax.Array, y: jax.Array, rest: dict[str, Any]) -> Reading | None:
    """An `Einsum`; None where it is not one linear map."""
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


def conv(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    """A `Conv` or `ConvLocal`."""
    windows = _windows(module, x, y)
    if not getattr(module, "shared_weights", True):
        return Reading("conv_local", statistics.LocalConvolution(windows), x)
    groups = module.feature_group_count
    return Reading("conv", statistics.Convolution(windows, groups), x, groups=groups)


def conv_transpose(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    """A `ConvTranspose`."""
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
            case "CIRCULAR":  # the dilated input is read around
                margin = (0, -(-(reach - 1) // stride))
                windows.append(
                    Window(k, n, m, 1, 0, stride, dilation, margin, "wrap", module.transpose_kernel)
                )
                continue
            case "SAME":  # as jax.lax.conv_transpose pads
                low = reach - 1 if stride > reach - 1 else -(-(reach + stride - 2) // 2)
            case "VALID":
                low = reach - 1
            case _:
                low = int(padding[axis][0])
        windows.append(Window(k, n, m, 1, low, stride, dilation, flip=module.transpose_kernel))
    statistic: Any = statistics.Convolution(tuple(windows))
    if module.transpose_kernel:  # then it is (*window, out, in)
        order = (*range(rank), rank + 1, rank)
        statistic = statistics.Rearranged(statistic, None, order, None)
    return Reading("conv", statistic, x)


def lookup(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    """An `Embed`."""
    return Reading(
        "embedding", statistics.lookup(x.ndim, module.num_embeddings), x, "embedding", ""
    )


def attend(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading:
    """The `attend` of an `Embed`."""
    letters = statistics.dense(x.ndim)
    statistic = statistics.Contraction(letters.x, letters.weight[::-1], letters.y)
    return Reading("attend", statistic, x, "embedding", "")


def norm(axes_of: Callable[[Any], Any], keeps_tokens: bool) -> Read:
    """Of a normalization layer, given how to tell its channels; None without any."""

    def read(module: Any, x: jax.Array, y: jax.Array, _: Any) -> Reading | None:
        channels = tuple(sorted(a % x.ndim for a in _tuple(axes_of(module))))
        if not channels:
            return None
        bias = "bias" if hasattr(module, "use_bias") else ""
        return Reading("norm", statistics.Normalization(channels, keeps_tokens), x, "scale", bias)

    return read


def reader(method: Callable[..., Any], read: Read) -> Reader:
    """A reader for a method whose output is the layer's own."""
    signature = inspect.signature(inspect.unwrap(method))

    def run_and_report(module: Any, run: Any, args: Any, kwargs: Any, on_call: OnCall) -> Any:
        y = run(*args, **kwargs)
        rest = dict(signature.bind(module, *args, **kwargs).arguments)
        _, x = (rest.pop(name) for name in list(rest)[:2])
        found = read(module, jnp.asarray(x), y, rest)
        return y if found is None else on_call(found, y)

    return run_and_report


def of_common_layers(flax: Any) -> Iterator[tuple[type, str, Read]]:
    """The methods, and how to read them, that go by the same names in Linen and NNX."""
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
