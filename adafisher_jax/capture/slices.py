"""Slices of a parameter outside of loops (of a stack of weights, `w[2]`), and ranges (`w[:3]`)."""

import dataclasses
import itertools
from typing import Any

from jax.extend import core

from adafisher_jax.capture.origins import REARRANGED, Origin, Origins, computed_from

SLICING = frozenset("slice split unstack".split())


def of_parts(eqn: core.JaxprEqn, x: Origin | None) -> Origins:
    """Returns the origins of the parts of an array that an equation takes.

    A part of a parameter has neighbouring entries of each axis; any other part is lost. An axis of
    one entry is sliced away.
    """
    if x is None or not x.is_parameter:
        return [computed_from([x], REARRANGED)] * len(eqn.outvars)
    return [_part(x, eqn, entries) for entries in _entries(eqn)]


def _entries(eqn: core.JaxprEqn) -> list[list[range]]:
    """Returns for each output which entries it has along each axis of the array."""
    params, every = eqn.params, [range(n) for n in _shape(eqn.invars[0])]
    if eqn.primitive.name == "slice":
        strides = params["strides"] or [1] * len(every)
        return [[*map(range, params["start_indices"], params["limit_indices"], strides)]]
    axis = params["axis"]
    sizes = params.get("sizes", [1] * len(every[axis]))
    return [
        [*every[:axis], range(stop - size, stop), *every[axis + 1 :]]
        for size, stop in zip(sizes, itertools.accumulate(sizes), strict=True)
    ]


def _part(x: Origin, eqn: core.JaxprEqn, entries: list[range]) -> Origin | None:
    part: Origin | None = x
    alone: list[int] = []
    for axis, (own, size) in enumerate(zip(entries, _shape(eqn.invars[0]), strict=True)):
        if len(own) == size:
            continue
        if part is not None and len(own) == 1:
            part = part.drop(axis - len(alone), own[0])
            alone.append(axis)
        elif part is not None and own and own.step == 1:
            part = part.cut(axis - len(alone), own)
        else:
            return computed_from([x], REARRANGED)
    if part is None or part.lost or eqn.primitive.name == "unstack":
        return part
    left = iter(part.axes)
    axes = tuple(() if i in alone else next(left) for i in range(len(entries)))
    return dataclasses.replace(part, axes=axes)


def _shape(array: Any) -> tuple[int, ...]:
    return array.aval.shape
