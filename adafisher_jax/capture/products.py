"""What a product of a parameter with data is, read off its equation in the traced program.

A linear map is what its operands' axes say, whoever wrote it and in whichever order: the dimension
numbers of the equation become the letters of a `statistics.Contraction`, or the windows of a
`statistics.Convolution`.
"""

import dataclasses
import string
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.extend import core

from adafisher_jax import statistics
from adafisher_jax.capture.pieces import Axes
from adafisher_jax.statistics import Contraction
from adafisher_jax.windows import Window


class Linear(NamedTuple):
    """A linear map.

    Attributes:
      kind: as in `adafisher_jax.layout.Layer`.
      statistic: how its rows are reduced; it names the axes of the weight, as the equation has it.
      data: which operands of the equation are the input.
      outputs: for each axis of the output, the weight's axis it is, or None.
      groups: feature groups of a convolution.
      apart: so many runs of them are layers of their own.
      scales: it is no map of rows, but scales the weight along some of its axes.
    """

    kind: str
    statistic: Any
    data: tuple[int, ...]
    outputs: tuple[int | None, ...]
    groups: int = 1
    apart: int = 1
    scales: bool = False


def _letters() -> Callable[[int], str]:
    """A function that yields so many letters, new ones at each call."""
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


def keep_apart(linear: Linear, weight: Axes) -> Linear:
    """A grouped convolution whose kernel, with these axes, has an axis for groups alone.

    So `vmap` runs one convolution with each kernel of a stack.
    """
    if linear.groups == 1:
        return linear
    (out,) = (i for i in linear.outputs if i is not None)
    *leading, _ = weight[out]
    apart = before = 1
    for i, piece in enumerate(leading, 1):
        before *= piece.size
        if linear.groups % before == 0 and all(p.axis != piece.axis for p in weight[out][i:]):
            apart = before
    statistic = dataclasses.replace(linear.statistic.layer, apart=apart)
    statistic = dataclasses.replace(linear.statistic, layer=statistic)
    return linear._replace(statistic=statistic, groups=linear.groups // apart, apart=apart)


def _gather(eqn: core.JaxprEqn, weight: int) -> Linear | str:
    """A lookup of whole rows, along one axis."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table: Any = eqn.invars[0].aval
    batch = tuple(numbers.operand_batching_dims)
    others = [i for i in range(len(table.shape)) if i not in batch]
    parts = [i for i in others if sizes[i] != table.shape[i]]
    looked_up = parts or [i for i in numbers.start_index_map if sizes[i] == 1]
    if weight != 0 or len(looked_up) != 1 or sizes[looked_up[0]] != 1:
        return "only a slice or a rearrangement of it reaches its layer"
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
    """Rows in a line, group by group, each group with a matrix of its own."""
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
"""For each product, a function of its equation and of which operand is the parameter.

It returns the linear map, or why that is none.
"""
