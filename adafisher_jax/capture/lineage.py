"""Where does each layer's parameter come from?  Read off the traced program.

A loss may hand a model its parameters as they are, cast, masked, partly frozen, out of a larger
structure, or through `jax.jit` and `jax.checkpoint`; a lifted transform may slice them. None of
that can be told from names or array identities, but all of it is plain in the program JAX
traces. There each call of a layer has left a mark (`adafisher_jax.tap`), and `find_marks`
follows the data from the program's inputs to the marks' parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from adafisher_jax.tap import Operands, tap_p

RECOMPUTED = "checkpoint, again"
"""In place of a primitive's name, that of a `jax.checkpoint` in the backward pass of a gradient."""

Place = tuple[tuple[int, int], ...]
"""Of an equation: in its program, and in those around it, its index and which body it is in."""


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
    """The program input an array came from, and what happened on the way.

    Attributes:
      source: the position of the input; None where several are behind the array.
      axes: for each axis of the array, the source's axis it is; None for one it is repeated along.
      sliced: the source's axes that are gone, in the order they went.
      frozen: passed through `stop_gradient`.
      mixed: combined element by element with other arrays (a mask, noise).
      lost: why it is no longer the source or a slice of it, if so.
    """

    source: int | None
    axes: tuple[int | None, ...]
    sliced: tuple[Slice, ...] = ()
    frozen: bool = False
    mixed: bool = False
    lost: str = ""

    def drop(self, axis: int, loop: Place) -> "Origin":
        """The origin of one slice along `axis`."""
        if self.lost:
            return self
        gone = self.axes[axis]
        kept = self.axes[:axis] + self.axes[axis + 1 :]
        sliced = self.sliced if gone is None else (*self.sliced, Slice(gone, loop))
        return dataclasses.replace(self, axes=kept, sliced=sliced)


class Mark(NamedTuple):
    """One call of a layer met in a program.

    Attributes:
      use: what the adapter called it.
      origins: of its parameters; `None` for what is no parameter of the loss.
      place: of its equation.
      inside: the primitives (`"jit"`, `"scan"`, …) it lies within, outermost first, or
        `RECOMPUTED`.
      axes: for each axis that its parameters have in the program, the source's axis it is, as in
        an origin; `vmap`s around the mark take some of them.
    """

    use: Hashable
    origins: tuple[Origin | None, ...]
    place: Place
    inside: tuple[str, ...]
    axes: tuple[tuple[int | None, ...], ...]


def find_marks(program: core.ClosedJaxpr, sources: int) -> list[Mark]:
    """Finds the calls of layers in a traced program, in program order.

    The first `sources` inputs of the program are followed. A mark inside a loop is reported
    once; a function that is traced once and called twice is reported at each call.
    """
    inputs = [
        Origin(i, tuple(range(len(var.aval.shape)))) if i < sources else None
        for i, var in enumerate(program.jaxpr.invars)
    ]
    marks: list[Mark] = []
    _follow(program.jaxpr, inputs, marks, (), ())
    return marks


def bodies(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The programs an equation calls with its own operands, in order.

    Those of a `while` are its body's; its condition has none of interest.
    """
    taken = len(eqn.invars) - (eqn.primitive.name == "cond")
    if eqn.primitive.name == "while":
        yield eqn.params["body_jaxpr"].jaxpr
        return
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(value):
            body: Any = getattr(value, "jaxpr", value)
            if len(body.invars) == taken and len(body.outvars) == len(eqn.outvars):
                yield body


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


Origins = list[Origin | None]


def _follow(
    jaxpr: core.Jaxpr, inputs: Origins, marks: list[Mark], around: Place, inside: tuple[str, ...]
) -> Origins:
    """The origins of a program's outputs; appends the marks met on the way."""
    origins: dict[core.Var, Origin | None] = dict(zip(jaxpr.invars, inputs, strict=True))

    def origin(atom: Any) -> Origin | None:
        return None if isinstance(atom, core.Literal) else origins.get(atom)

    for index, eqn in enumerate(jaxpr.eqns):
        operands = [origin(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        run = functools.partial(_run, eqn, around, index, inside)
        if eqn.primitive is tap_p:
            if eqn.params["use"] is not None:
                marks.append(_mark(eqn, operands, (*around, (index, 0)), inside))
            outputs = operands[:1]
        elif name == "scan":
            outputs = _follow_scan(eqn, operands, marks, (*around, (index, 0)), run)
        elif name == "while":
            outputs = _follow_while(eqn, operands, marks, run)
        elif name == "shard_map":
            (outputs,) = run(_unsharded(eqn, operands), marks)
        elif branches := run(operands[1:] if name == "cond" else operands, marks):
            outputs = [_common(list(branch)) for branch in zip(*branches, strict=True)]
        else:
            outputs = _follow_array_op(eqn, operands)
        for var, found in zip(eqn.outvars, outputs, strict=True):
            # What is no floating-point number, as a mask made from a parameter, is data.
            aval: Any = var.aval
            if hasattr(aval, "dtype") and not jnp.issubdtype(aval.dtype, jnp.inexact):
                found = None
            elif found and not found.lost and len(found.axes) != len(aval.shape):
                found = _lost([found], _COMPUTED)
            origins[var] = found
    return [origin(atom) for atom in jaxpr.outvars]


def _run(
    eqn: core.JaxprEqn,
    around: Place,
    index: int,
    inside: tuple[str, ...],
    inputs: Origins,
    marks: list[Mark],
) -> list[Origins]:
    """Follows the programs that an equation calls."""
    again = eqn.params.get("differentiated", False)
    within = (*inside, RECOMPUTED if again else eqn.primitive.name)
    return [
        _follow(body, inputs, marks, (*around, (index, i)), within)
        for i, body in enumerate(bodies(eqn))
    ]


def _mark(eqn: core.JaxprEqn, operands: Origins, place: Place, inside: tuple[str, ...]) -> Mark:
    """The mark, with the axes that the `vmap`s around it took undone, outermost first."""
    n = eqn.params["parameters"]
    handed = Operands.of(operands, n).parameters
    found = list(handed)
    for level, dims in enumerate(reversed(eqn.params["levels"])):
        for i, dim in enumerate(Operands.of(dims, n).parameters):
            if (one := found[i]) and dim is not None:
                found[i] = one.drop(dim, (*place, (level, 0)))
    axes = tuple(one.axes if one else () for one in handed)
    return Mark(eqn.params["use"], tuple(found), place, inside, axes)


Run = Callable[[Origins, list[Mark]], list[Origins]]


def _follow_scan(
    eqn: core.JaxprEqn, operands: Origins, marks: list[Mark], place: Place, run: Run
) -> Origins:
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    fixed = operands[:consts]
    carry = operands[consts : consts + carries]
    slices = [x and x.drop(0, place) for x in operands[consts + carries :]]
    carry = _invariant(lambda c: run([*fixed, *c, *slices], [])[0][:carries], carry)
    (outputs,) = run([*fixed, *carry, *slices], marks)
    return outputs[:carries] + [_lost([x], _COMPUTED) for x in outputs[carries:]]


def _follow_while(eqn: core.JaxprEqn, operands: Origins, marks: list[Mark], run: Run) -> Origins:
    skip, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed, carry = operands[skip : skip + consts], operands[skip + consts :]
    carry = _invariant(lambda c: run([*fixed, *c], [])[0], carry)
    return run([*fixed, *carry], marks)[0]


def _invariant(step: Callable[[Origins], Origins], carry: Origins) -> Origins:
    """The carried origins that a loop body hands on unchanged; the others are lost."""
    while True:
        kept = [_common([old, new]) for old, new in zip(carry, step(carry), strict=True)]
        if kept == carry:
            return carry
        carry = kept


def _unsharded(eqn: core.JaxprEqn, operands: Origins) -> Origins:
    """What a `shard_map` hands to each device; a part of a parameter is not followed."""
    return [
        _lost([x], "only a device's part of it reaches its layer") if any(spec) else x
        for x, spec in zip(operands, eqn.params["in_specs"], strict=True)
    ]


_COMPUTED = "no layer of a known kind uses it as it is"
_SAME = frozenset(
    "convert_element_type stop_gradient copy reduce_precision sharding_constraint "
    "optimization_barrier name pvary pcast mesh_cast reshard layout_constraint device_put".split()
)
_REARRANGING = frozenset("reshape squeeze slice dynamic_slice gather rev broadcast_in_dim".split())
_MOVING = frozenset("add sub add_any".split())
_SCALING = frozenset("mul div max min select_n clamp neg".split())


def _follow_array_op(eqn: core.JaxprEqn, operands: Origins) -> Origins:
    name = eqn.primitive.name
    if name in _SAME and len(operands) == len(eqn.outvars):
        frozen = name == "stop_gradient"
        return [x and dataclasses.replace(x, frozen=x.frozen or frozen) for x in operands]
    if name == "transpose" and (x := operands[0]) and not x.lost:
        axes = tuple(x.axes[i] for i in eqn.params["permutation"])
        return [dataclasses.replace(x, axes=axes)]
    if name == "broadcast_in_dim" and (x := operands[0]) and not x.lost:
        shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
        before: Any = eqn.invars[0].aval
        if tuple(shape[i] for i in kept) == before.shape:
            named = dict(zip(kept, x.axes, strict=True))
            return [dataclasses.replace(x, axes=tuple(named.get(i) for i in range(len(shape))))]
    if name in _REARRANGING:
        return [_lost(operands, "only a slice or a rearrangement of it reaches its layer")]
    if name == "div" and (divisor := operands[1]) and not divisor.frozen:
        return [_lost(operands, "transformed before its layer uses it")]
    if name in _MOVING or name in _SCALING:
        return [_combined(operands, scaled=name in _SCALING)]
    return [_lost(operands, _COMPUTED)] * len(eqn.outvars)


def _common(origins: Origins) -> Origin | None:
    """The origin of an array that is one of several."""
    return origins[0] if all(o == origins[0] for o in origins) else _lost(origins, _COMPUTED)


def _lost(origins: Origins, why: str) -> Origin | None:
    """The origin of what was computed from arrays; None if no parameter is behind it."""
    behind = [x for x in origins if x]
    if not behind:
        return None
    sources = {x.source for x in behind}
    return Origin(
        sources.pop() if len(sources) == 1 else None,
        (),
        frozen=all(x.frozen for x in behind),
        lost=why if any(not x.lost for x in behind) else behind[0].lost,
    )


def _combined(origins: Origins, scaled: bool) -> Origin | None:
    """The origin of an elementwise combination: that of the one operand that is a parameter.

    Beside it, what is frozen counts as data. So does anything that is added to it, as a gradient
    step: the sum moves with the parameter. What a parameter is scaled by must be data.
    """
    behind = [x for x in origins if x]
    exact = {dataclasses.replace(x, mixed=True) for x in behind if not x.lost}
    exact = {x for x in exact if not x.frozen} or exact
    live = sum(not x.frozen for x in behind)
    if len(exact) != 1 or (scaled and live > 1):
        return _lost(origins, "transformed before its layer uses it")
    return exact.pop()
