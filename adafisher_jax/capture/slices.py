"""Slices of a parameter outside of loops: of a stack of weights, `w[2]` is one."""

import dataclasses
import itertools
from typing import Any

from jax.extend import core

from adafisher_jax.capture.origins import REARRANGED, Origin, Origins, computed_from

SLICING = frozenset("slice split unstack".split())


def of_parts(eqn: core.JaxprEqn, x: Origin | None) -> Origins:
    """Returns the origins of the parts of an array that an equation takes.

    A part of a parameter has one entry of an axis or all of them; any other part is lost.
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
    axes = [*x.axes]
    gone = 0
    for axis, (own, size) in enumerate(zip(entries, _shape(eqn.invars[0]), strict=True)):
        if len(own) == size:
            continue
        if len(own) != 1 or part is None:
            return computed_from([x], REARRANGED)
        part = part.drop(axis - gone, own[0])
        axes[axis], gone = (), gone + 1
    if eqn.primitive.name == "unstack":
        del axes[eqn.params["axis"]]
    return part if part is None or part.lost else dataclasses.replace(part, axes=tuple(axes))


def _shape(array: Any) -> tuple[int, ...]:
    return array.aval.shape
