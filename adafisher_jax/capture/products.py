"""Reads a product of a parameter with data from its equation in the traced program.

The axes of the operands define the linear map, whoever wrote it and in any order. The dimension
numbers of the equation become the letters of a `statistics.Contraction`, or the windows of a
`statistics.Convolution`.
"""

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.extend import core

from adafisher_jax import statistics
from adafisher_jax.capture.origins import REARRANGED, Origin
from adafisher_jax.capture.pieces import Axes
from adafisher_jax.statistics import Contraction
from adafisher_jax.windows import Window


class Linear(NamedTuple):
    """A linear map.

    Attributes:
      kind: as in `adafisher_jax.layout.Layer`.
      statistic: how the rows are reduced. It names the axes of the weight in the equation's form.
      data: the operands of the equation that are the input.
      outputs: for each axis of the output the same axis of the weight, or None.
      groups: the number of feature groups of a convolution, within one layer.
      apart: the number of layers in a grouped convolution; each has `groups` groups.
      scales: whether the equation only scales the weight along some axes, which is no map of rows.
    """

    kind: str
    statistic: Any
    data: tuple[int, ...]
    outputs: tuple[int | None, ...]
    groups: int = 1
    apart: int = 1
    scales: bool = False


def _letters() -> Callable[[int], str]:
    """Returns a function of `n` that returns `n` letters, new ones at each call."""
    unused = iter(string.ascii_letters)
    return lambda n: "".join(next(unused) for _ in range(n))


def _contraction(x: str, weight: str, y: str) -> tuple[Contraction, tuple[int | None, ...]]:
    return Contraction(x, weight, y), tuple(weight.index(c) if c in weight else None for c in y)


def _dot_general(eqn: core.JaxprEqn, weight: int) -> Linear | str:
    contracted, batch = eqn.params["dimension_numbers"]
    new = _letters()
    sides: list[list[str]] = [list(new(_rank(eqn.invars[i]))) for i in (0, 1)]
    for left, right in (*zip(*contracted, strict=True), *zip(*batch, strict=True)):
        sides[1][right] = sides[0][left]
    free = [
        "".join(c for i, c in enumerate(side) if i not in (*summed, *shared))
        for side, summed, shared in zip(sides, contracted, batch, strict=True)
    ]
    y = "".join(sides[0][i] for i in batch[0]) + "".join(free)
    data = 1 - weight
    statistic, outputs = _contraction("".join(sides[data]), "".join(sides[weight]), y)
    scales = set(statistic.x) <= set(statistic.y) and set(statistic.y) == set(statistic.weight)
    return Linear("dense", statistic, (data,), outputs, scales=scales and bool(statistic.x))


def _conv_general_dilated(eqn: core.JaxprEqn, weight: int) -> Linear | str:
    params = eqn.params
    if weight == 0:
        return "the input of a convolution, not its kernel"
    if params["batch_group_count"] != 1:
        return "the kernel of a convolution in batch groups"
    numbers = params["dimension_numbers"]
    x, y = ((s[0], *s[2:], s[1]) for s in (numbers.lhs_spec, numbers.out_spec))  # channels last
    out, channels, *window = numbers.rhs_spec
    kernel = (*window, channels, out)
    sizes: list[Any] = [var.aval for var in (*eqn.invars, *eqn.outvars)]
    windows = tuple(
        Window(
            sizes[1].shape[kernel[i]],
            sizes[0].shape[x[1 + i]],
            sizes[2].shape[y[1 + i]],
            params["window_strides"][i],
            params["padding"][i][0],
            params["lhs_dilation"][i],
            params["rhs_dilation"][i],
        )
        for i in range(len(kernel) - 2)
    )
    groups = params["feature_group_count"]
    statistic = statistics.Rearranged(statistics.Convolution(windows, groups), x, kernel, y)
    outputs = tuple(kernel[-1] if i == y[-1] else None for i in range(len(y)))
    return Linear("conv", statistic, (0,), outputs, groups)


def keep_apart(linear: Linear, weight: Origin, shape: Sequence[int]) -> Linear:
    """Splits a grouped convolution into layers if its kernel has an axis for groups alone.

    `vmap` over a stack of kernels makes such a convolution.

    Args:
      linear: any linear map; one without groups is returned unchanged.
      weight: the kernel's origin.
      shape: of the whole parameter. If each kernel of a stack has one output, that axis is gone.
    """
    if linear.groups == 1:
        return linear
    (out,) = (i for i in linear.outputs if i is not None)
    seen = {piece.axis for axis in weight.axes for piece in axis} | {s.axis for s in weight.sliced}
    gone = any(n == 1 and i not in seen for i, n in enumerate(shape))
    leading = weight.axes[out] if gone else weight.axes[out][:-1]
    apart = before = 1
    for i, piece in enumerate(leading, 1):
        before *= piece.size
        if linear.groups % before == 0 and all(p.axis != piece.axis for p in weight.axes[out][i:]):
            apart = before
    statistic = dataclasses.replace(linear.statistic.layer, apart=apart)
    statistic = dataclasses.replace(linear.statistic, layer=statistic)
    return linear._replace(statistic=statistic, groups=linear.groups // apart, apart=apart)


def without_copies(linear: Linear, weight: Axes) -> tuple[Linear, Axes]:
    """Takes copies of a weight, each with rows of its own, for one weight with all their rows.

    `vmap` makes them where it maps a weight that is combined with mapped data.

    Args:
      linear: any linear map; only one of a `Contraction` is changed.
      weight: the axes of the weight in terms of the whole parameter's.
    """
    map_ = linear.statistic
    if not isinstance(map_, Contraction):
        return linear, weight
    kept = [
        i
        for i, (axis, role) in enumerate(zip(weight, map_.weight_axes, strict=True))
        if not (role.startswith("batch") and axis and all(p.axis is None for p in axis))
    ]
    letters = "".join(map_.weight[i] for i in kept)
    statistic, outputs = _contraction(map_.x, letters, map_.y)
    return linear._replace(statistic=statistic, outputs=outputs), tuple(weight[i] for i in kept)


def _gather(eqn: core.JaxprEqn, weight: int) -> Linear | str:
    """Reads a lookup of whole rows along one axis."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table: Any = eqn.invars[0].aval
    batch = tuple(numbers.operand_batching_dims)
    others = [i for i in range(len(table.shape)) if i not in batch]
    parts = [i for i in others if sizes[i] != table.shape[i]]
    looked_up = parts or [i for i in numbers.start_index_map if sizes[i] == 1]
    if weight != 0 or len(looked_up) != 1 or sizes[looked_up[0]] != 1:
        return REARRANGED
    (axis,) = looked_up
    new = _letters()
    letters = new(len(table.shape))
    indices: Any = eqn.invars[1].aval
    x = list(new(len(indices.shape) - 1))
    for i, j in zip(batch, numbers.start_indices_batching_dims, strict=True):
        x[j] = letters[i]
    offsets = iter([i for i in others if i not in numbers.collapsed_slice_dims])
    rows, y = iter(x), ""
    for i in range(_rank(eqn.outvars[0])):
        if i in numbers.offset_dims:
            taken = next(offsets)
            y += new(1) if taken == axis else letters[taken]
        else:
            y += next(rows)
    mapping, outputs = _contraction("".join(x) + letters[axis], letters, y)
    component = list(numbers.start_index_map).index(axis)
    clips = eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP
    statistic = statistics.Lookup(mapping, table.shape[axis], component, clips)
    return Linear("embedding", statistic, (1,), outputs)


def _ragged_dot_general(eqn: core.JaxprEqn, weight: int) -> Linear | str:
    """Reads a product in which each group of consecutive rows has a matrix of its own."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    plain = (((1,), (1,)), ((), ()))
    if (
        weight != 1
        or eqn.params["group_offset"] is not None
        or jax.tree.map(int, numbers.dot_dimension_numbers) != plain
        or tuple(numbers.lhs_ragged_dimensions) != (0,)
        or tuple(numbers.rhs_group_dimensions) != (0,)
    ):
        return "multiplied by ragged groups that are not along its first axis"
    return Linear("dense", statistics.Groups(), (0, 2), (None, 2))


def _rank(atom: Any) -> int:
    return len(atom.aval.shape)


READERS: Mapping[str, Callable[[core.JaxprEqn, int], Linear | str]] = MappingProxyType(
    {
        "dot_general": _dot_general,
        "conv_general_dilated": _conv_general_dilated,
        "gather": _gather,
        "ragged_dot_general": _ragged_dot_general,
    }
)
"""For each primitive a function of its equation and of the position of the parameter in it.

The function returns the linear map, or the reason why there is none.
"""
