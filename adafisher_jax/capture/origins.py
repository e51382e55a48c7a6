"""What an array of a traced program came from, and what operations on arrays make of that."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.extend import core

from adafisher_jax.capture import pieces
from adafisher_jax.capture.pieces import Axes
from adafisher_jax.capture.places import Place


class Slice(NamedTuple):
    """One slice at a time of an array's axis.

    Attributes:
      axis: of the source.
      loop: the place of the scan that slices it; of the mark and the level, where `vmap` does.
    """

    axis: int
    loop: Place


@dataclasses.dataclass(frozen=True)
class Origin:
    """What an array came from, and what happened on the way.

    Attributes:
      source: the position of the program input, or the place of the product whose output it is;
        None where several arrays, or only data, are behind it.
      axes: see `adafisher_jax.capture.pieces`.
      sliced: the source's axes that are gone, in the order they went.
      frozen: passed through `stop_gradient`.
      mixed: combined element by element with other arrays (a mask, noise).
      lost: why it is no longer the source or a slice of it, if so.
      behind: the live parameters that what is lost was computed from, by their positions.
    """

    source: int | Place | None
    axes: Axes
    sliced: tuple[Slice, ...] = ()
    frozen: bool = False
    mixed: bool = False
    lost: str = ""
    behind: frozenset[int] = frozenset()

    @property
    def parameters(self) -> frozenset[int]:
        """The live parameters behind it; what a product makes of one with data is data."""
        if self.frozen or self.lost:
            return self.behind
        return frozenset([self.source]) if isinstance(self.source, int) else frozenset()

    @property
    def is_parameter(self) -> bool:
        """Whether it is, but for its form, an input of the program."""
        return isinstance(self.source, int) and not self.lost

    @property
    def is_output(self) -> bool:
        """Whether it is, but for its form, the output of a product."""
        return isinstance(self.source, tuple) and not self.lost

    @property
    def repeated(self) -> bool:
        return any(map(pieces.repeated, self.axes))

    def drop(self, axis: int, loop: Place) -> "Origin | None":
        """The origin of one slice along `axis`."""
        if self.lost:
            return self
        gone = self.axes[axis]
        kept = self.axes[:axis] + self.axes[axis + 1 :]
        if not gone or pieces.repeated(gone):
            return dataclasses.replace(self, axes=kept)
        (piece, *more) = gone
        if more or any(other.axis == piece.axis for axis in kept for other in axis):
            return computed_from([self], REARRANGED)
        assert piece.axis is not None
        sliced = (*self.sliced, Slice(piece.axis, loop))
        return dataclasses.replace(self, axes=kept, sliced=sliced)


Origins = list[Origin | None]

COMPUTED = "no layer of a known kind uses it as it is"
_TRANSFORMED = "transformed before its layer uses it"
REARRANGED = "only a slice or a rearrangement of it reaches its layer"
_SAME = frozenset(
    "convert_element_type stop_gradient copy reduce_precision sharding_constraint "
    "optimization_barrier name pvary pcast mesh_cast reshard layout_constraint device_put".split()
)
_REARRANGING = frozenset("reshape squeeze slice dynamic_slice split rev broadcast_in_dim".split())
SUMS = frozenset("add add_any".split())
_MOVING = SUMS | {"sub"}
_SCALING = frozenset("mul div max min select_n clamp neg".split())
# What computes arrays from arrays and calls no program that could hold a layer.
ARRAY_OPS = (
    frozenset(p.name for p in vars(jax.lax).values() if isinstance(p, core.Primitive))
    | _SAME
    | _REARRANGING
    | _MOVING
    | _SCALING
)


def of_array_op(eqn: core.JaxprEqn, operands: Origins) -> Origins:
    """The origins of the outputs of an operation on arrays, given those of its operands."""
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
    return [combined(operands, scaled=name in _SCALING)]


def settled(origins: Origins) -> Origins:
    """Origins for which the output of a product is one to which no bias is added any more."""
    return [computed_from([x], COMPUTED) if x and x.is_output else x for x in origins]


def stretched(operands: Origins, eqn: core.JaxprEqn) -> Origins:
    """The operands of an elementwise operation, each with the axes of its output."""
    aval: Any = eqn.outvars[0].aval

    def axes(x: Origin) -> Axes:
        return pieces.broadcast(x.axes, aval.shape, range(len(x.axes)))

    return [dataclasses.replace(x, axes=axes(x)) if x and not x.lost else x for x in operands]


def _rearranged(eqn: core.JaxprEqn, axes: Axes) -> Axes | None:
    """The axes after a change of an array's form; None where only a part of it is left."""
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
    """The origin of an array that is one of several."""
    return origins[0] if all(o == origins[0] for o in origins) else computed_from(origins, COMPUTED)


def computed_from(origins: Origins, why: str) -> Origin | None:
    """What is known of an array computed from others; None if no parameter is behind it."""
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


def combined(origins: Origins, scaled: bool) -> Origin | None:
    """The origin of an elementwise combination: that of the one operand that is a parameter.

    Beside it, what is frozen counts as data. So does anything that is added to it, as a gradient
    step: the sum moves with the parameter. What a parameter is scaled by must be data.
    """
    behind = [x for x in origins if x]
    exact = {dataclasses.replace(x, mixed=True) for x in behind if not x.lost}
    exact = {x for x in exact if not x.frozen} or exact
    live = sum(not x.frozen for x in behind)
    if len(exact) != 1 or (scaled and live > 1):
        return computed_from(origins, _TRANSFORMED)
    return exact.pop()
