"""Origins: from which parameter an array of a traced program came, and what happened to it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core

from adafisher_jax.capture import pieces
from adafisher_jax.capture.pieces import Axes
from adafisher_jax.capture.places import Place


class Slice(NamedTuple):
    """An axis, or a part of one, of which the program takes one slice at a time, or only a range.

    Attributes:
      axis: the axis of the source.
      by: the place of the scan that slices. If a `vmap` slices: the place of the mark, and the
        level of the `vmap`. If one slice alone is taken (`w[2]`): its index. If several neighbours
        are taken (`w[:3]`), which stay an axis: their range.
      inner: the distance between its neighbouring entries, along what slices before left.
      left: how many entries of the axis each slice still has.
    """

    axis: int
    by: Place | int | range
    inner: int
    left: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """From what an array came, and what happened on the way.

    Attributes:
      source: the position of the program input, or the place of the product with this output. None
        if the array was computed from several arrays or from data only.
      axes: the array's axes in terms of the source's (see `adafisher_jax.capture.pieces`).
      sliced: the axes of the source that were sliced away, or cut to a range, in order.
      frozen: whether the array passed through `stop_gradient`.
      mixed: whether the array was combined by element with other arrays (a mask, noise).
      varied: whether it was so along axes that the source does not have.
      multiplied: whether the array was multiplied by a number or by another array, or masked.
      lost: why the array is no longer the source or a slice of it; empty if it is.
      behind: if the array is lost, the positions of the parameters that it was computed from and
        that are not frozen.
    """

    source: int | Place | None
    axes: Axes
    sliced: tuple[Slice, ...] = ()
    frozen: bool = False
    mixed: bool = False
    varied: bool = False
    multiplied: bool = False
    lost: str = ""
    behind: frozenset[int] = frozenset()

    @property
    def parameters(self) -> frozenset[int]:
        """The positions of the parameters behind the array that are not frozen.

        The output of a product counts as data, whose parameters are not behind it.
        """
        if self.frozen or self.lost:
            return self.behind
        return frozenset([self.source]) if isinstance(self.source, int) else frozenset()

    @property
    def is_parameter(self) -> bool:
        """Whether the array is an input of the program, up to its form."""
        return isinstance(self.source, int) and not self.lost

    @property
    def is_output(self) -> bool:
        """Whether the array is the output of a product, up to its form."""
        return isinstance(self.source, tuple) and not self.lost

    @property
    def repeated(self) -> bool:
        return any(map(pieces.repeated, self.axes))

    @property
    def away(self) -> list[Slice]:
        """Those of `sliced` that took entries away one at a time, which ranges do not."""
        return [s for s in self.sliced if not isinstance(s.by, range)]

    @property
    def stacks(self) -> dict[Any, str]:
        """The names of the axes that were sliced away."""
        axes = dict.fromkeys(s.axis for s in self.away)
        return {axis: f"stack{i}" for i, axis in enumerate(axes)}

    @property
    def extended(self) -> tuple[int, ...]:
        """The axes that the source does not have; one of length one may be one of many."""
        return tuple(i for i, axis in enumerate(self.axes) if not axis or pieces.repeated(axis))

    @property
    def alone(self) -> tuple[int, ...]:
        """The axes of which one slice alone, or a range, was taken."""
        return tuple(s.axis for s in self.sliced if not isinstance(s.by, tuple))

    @property
    def ranges(self) -> set[int]:
        """The axes of the source that were cut to a range, and not sliced away."""
        return {s.axis for s in self.sliced if isinstance(s.by, range)} - {*self.stacks}

    def range_of(self, axis: int) -> list[Any]:
        """The ranges to which an axis of the source was cut, in order."""
        return [s.by for s in self.sliced if s.axis == axis and isinstance(s.by, range)]

    def cut(self, axis: int, entries: range) -> "Origin | None":
        """Returns the origin of the array with some neighbouring entries along `axis`."""
        if self.lost or len(self.axes[axis]) > 1:
            return computed_from([self], REARRANGED)
        (piece,) = self.axes[axis]
        short = (piece._replace(size=len(entries)),)
        cut = dataclasses.replace(self, axes=(*self.axes[:axis], short, *self.axes[axis + 1 :]))
        if piece.axis is None:
            return cut
        others = self._others(axis)
        if any(p.inner > piece.inner for p in others):
            return computed_from([self], REARRANGED)
        inner = math.prod(p.size for p in others)
        entries = range(entries.start * inner, entries.stop * inner)
        sliced = (*self.sliced, Slice(piece.axis, entries, 1, len(entries)))
        return dataclasses.replace(cut, sliced=sliced)

    def drop(self, axis: int, by: Place | int) -> "Origin | None":
        """Returns the origin of one slice along `axis`; see `Slice` for `by`."""
        if self.lost:
            return self
        gone = self.axes[axis]
        kept = self.axes[:axis] + self.axes[axis + 1 :]
        if not gone or pieces.repeated(gone):
            return dataclasses.replace(self, axes=kept)
        (piece, *more) = gone
        if more:
            return computed_from([self], REARRANGED)
        assert piece.axis is not None
        others = self._others(axis)
        left = math.prod(p.size for p in others)
        inner = math.prod(p.size for p in others if p.inner < piece.inner)
        if isinstance(by, int) and left == inner > 1:  # such a slice is a range of the axis
            cut = self.cut(axis, range(by, by + 1))
            return cut and dataclasses.replace(cut, axes=kept)
        sliced = (*self.sliced, Slice(piece.axis, by, inner, left))
        return dataclasses.replace(self, axes=kept, sliced=sliced)

    def _others(self, axis: int) -> list[pieces.Piece]:
        """Returns the other pieces of the axis of the source to which an axis belongs."""
        own = self.axes[axis][0]
        others = (p for i, of in enumerate(self.axes) if i != axis for p in of)
        return [p for p in others if p.axis == own.axis]


Origins = list[Origin | None]

COMPUTED = "no layer of a known kind uses it as it is"
_TRANSFORMED = "transformed before its layer uses it"
REARRANGED = "only a part or a rearrangement of it reaches its layer"
_SAME = frozenset(
    "convert_element_type stop_gradient copy reduce_precision sharding_constraint "
    "optimization_barrier name pvary pcast mesh_cast reshard layout_constraint device_put".split()
)
_REARRANGING = frozenset("reshape squeeze dynamic_slice rev broadcast_in_dim".split())
SUMS = frozenset("add add_any".split())
_MOVING = SUMS | {"sub"}
_MULTIPLYING = frozenset("mul div neg".split())
_SCALING = _MULTIPLYING | frozenset("max min select_n clamp".split())
# The primitives that compute arrays from arrays and call no program that could hold a layer.
ARRAY_OPS = (
    frozenset(p.name for p in vars(jax.lax).values() if isinstance(p, core.Primitive))
    | _SAME
    | _REARRANGING
    | _MOVING
    | _SCALING
)


def of_array_op(eqn: core.JaxprEqn, operands: Origins, is_number: Callable[[Any], bool]) -> Origins:
    """Returns the origins of the outputs of an array operation.

    Args:
      eqn: the operation.
      operands: the origins of its operands.
      is_number: whether an operand without an origin has one value in all its entries.
    """
    name = eqn.primitive.name
    if name in _SAME and len(operands) == len(eqn.outvars):
        if name == "stop_gradient":
            operands = [
                x and dataclasses.replace(x, frozen=True, behind=frozenset()) for x in operands
            ]
        return operands
    if name == "transpose" or name in _REARRANGING:
        x = operands[0]
        axes = _rearranged(eqn, x.axes) if x and not x.lost else None
        if x and axes is not None:
            return [dataclasses.replace(x, axes=axes)]
        return [computed_from(operands, REARRANGED)] * len(eqn.outvars)
    if name not in _MOVING and name not in _SCALING:
        return [computed_from(operands, COMPUTED)] * len(eqn.outvars)
    operands = stretched(settled(operands), eqn)
    if name == "div" and (divisor := operands[1]) and not divisor.frozen:
        return [computed_from(operands, _TRANSFORMED)]
    numbers = all(x or is_number(atom) for atom, x in zip(eqn.invars, operands, strict=True))
    return [
        combined(
            operands,
            scaled=name in _SCALING,
            mixed=not (numbers and name in _MULTIPLYING | _MOVING),
        )
    ]


def settled(origins: Origins) -> Origins:
    """Returns the origins with outputs of products lost, so that nothing becomes their bias."""
    return [computed_from([x], COMPUTED) if x and x.is_output else x for x in origins]


def stretched(operands: Origins, eqn: core.JaxprEqn) -> Origins:
    """Returns the operands of an elementwise operation, each broadcast to the output's axes."""
    aval: Any = eqn.outvars[0].aval

    def axes(x: Origin) -> Axes:
        return pieces.broadcast(x.axes, aval.shape, range(len(x.axes)))

    return [dataclasses.replace(x, axes=axes(x)) if x and not x.lost else x for x in operands]


def _rearranged(eqn: core.JaxprEqn, axes: Axes) -> Axes | None:
    """Returns the axes after a change of an array's form; None if only a part of it is left."""
    match eqn.primitive.name:
        case "transpose":
            return tuple(axes[i] for i in eqn.params["permutation"])
        case "reshape":
            order = eqn.params["dimensions"] or range(len(axes))
            return pieces.reshape(tuple(axes[i] for i in order), eqn.params["new_sizes"])
        case "squeeze":
            return tuple(a for i, a in enumerate(axes) if i not in eqn.params["dimensions"])
        case "broadcast_in_dim":
            shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
            return pieces.broadcast(axes, shape, kept)
    return None


def common(origins: Origins) -> Origin | None:
    """Returns the origin of an array that is one of several, as after a branch."""
    return origins[0] if all(o == origins[0] for o in origins) else computed_from(origins, COMPUTED)


def computed_from(origins: Origins, why: str) -> Origin | None:
    """Returns the origin of an array computed from others; None if no parameter is behind it."""
    behind = [x for x in origins if x]
    if not behind:
        return None
    sources = {x.source if isinstance(x.source, int) else None for x in behind}
    return Origin(
        sources.pop() if len(sources) == 1 else None,
        (),
        frozen=all(x.frozen for x in behind),
        lost=why if any(not x.lost for x in behind) else behind[0].lost,
        behind=frozenset().union(*(x.parameters for x in behind)),
    )


def combined(origins: Origins, scaled: bool, mixed: bool = True) -> Origin | None:
    """Returns the origin of an elementwise combination: that of its one parameter.

    Frozen operands count as data. Operands that are added count as data too, such as a gradient
    step: the sum moves with the parameter. Operands that scale a parameter must be data. A single
    operand that is not `mixed` is multiplied by numbers alone, or they are added to it. A parameter
    that is added to itself is multiplied.
    """
    behind = [x for x in origins if x]
    known = [x for x in behind if not x.lost]
    known = [x for x in known if not x.frozen] or known
    mixed = mixed or len(behind) > 1
    exact = {
        dataclasses.replace(
            x,
            mixed=mixed or any(y.mixed for y in known),
            varied=any(y.varied or (mixed and bool(y.extended)) for y in known),
            multiplied=scaled or len(known) > 1 or any(y.multiplied for y in known),
        )
        for x in known
    }
    live = sum(not x.frozen for x in behind)
    if len(exact) != 1 or (scaled and live > 1):
        return computed_from(origins, _TRANSFORMED)
    return exact.pop()
