"""Which parameters do the layers and products of a traced program use?

A loss may hand a model its parameters as they are, cast, masked, reshaped, partly frozen, out of a
larger structure, or through `jax.jit` and `jax.checkpoint`; a lifted transform may slice them. None
of that can be told from names or array identities, but all of it is plain in the traced program.
`find_uses` follows the data from the program's inputs to what uses them:

- each call of a layer that is known by name has left a mark (`adafisher_jax.tap`);
- every product of a parameter with data is a layer, whoever wrote it (`products`). A parameter that
  is added to its output, along the output's own axes, is its bias.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from adafisher_jax.capture import pieces, products
from adafisher_jax.capture.pieces import Axes
from adafisher_jax.capture.products import Linear
from adafisher_jax.tap import Operands, Use, tap_p

RECOMPUTED = "checkpoint, again"
"""In place of a primitive's name, that of a `jax.checkpoint` in the backward pass of a gradient."""

MARKED = "adafisher_layer"
"""The `jax.named_scope` of a call that leaves a mark: products in it are the marked layer's."""

COMPLEX = "complex, for which the factors are not defined"

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

    def drop(self, axis: int, loop: Place) -> "Origin":
        """The origin of one slice along `axis`."""
        if self.lost:
            return self
        gone = self.axes[axis]
        kept = self.axes[:axis] + self.axes[axis + 1 :]
        if not gone or pieces.repeated(gone):
            return dataclasses.replace(self, axes=kept)
        (piece, *more) = gone
        if more or any(other.axis == piece.axis for axis in kept for other in axis):
            return _known([self], REARRANGED)
        sliced = (*self.sliced, Slice(piece.axis, loop))
        return dataclasses.replace(self, axes=kept, sliced=sliced)


class Mark(NamedTuple):
    """One call of a known layer.

    Attributes:
      use: what the adapter called it.
      origins: of its parameters; `None` for what is no parameter of the loss.
      place: of its equation.
      inside: the primitives (`"jit"`, `"scan"`, …) it lies within, outermost first, or
        `RECOMPUTED`.
      axes: for each of its parameters, its axes in the program; `vmap`s around the mark take some.
    """

    use: Use
    origins: tuple[Origin | None, ...]
    place: Place
    inside: tuple[str, ...]
    axes: tuple[Axes, ...]


class Product(NamedTuple):
    """One product of a parameter with data.

    Attributes:
      linear: how the equation multiplies.
      weight: the parameter's origin.
      bias: that of the parameter added to the output.
      bias_axes: for each axis of the bias longer than one, the weight's axis it is, both of their
        sources.
      place: of its equation.
      inside: as of a mark.
      derived: it lies in the call of a marked layer, or in the backward pass of a derivative that
        the loss takes: another use of the weight describes it, if there is one.
    """

    linear: Linear
    weight: Origin
    place: Place
    inside: tuple[str, ...]
    derived: bool
    bias: Origin | None = None
    bias_axes: tuple[tuple[int, int], ...] = ()


class Refusal(NamedTuple):
    """A use of a parameter that cannot be captured, and why.

    Attributes:
      source: the position of the parameter.
      why: the reason.
      place: of its equation.
      outweighs: whether other uses of the parameter do not tell of this one: it is with data.
    """

    source: int
    why: str
    place: Place
    outweighs: bool


Found = list[Mark | Product | Refusal]


def find_uses(program: core.ClosedJaxpr, sources: int) -> Found:
    """Finds what uses the first `sources` inputs of a traced program, in program order.

    A use inside a loop is reported once; a function that is traced once and called twice is
    reported at each call.
    """
    inputs = [
        Origin(i, pieces.whole(var.aval.shape)) if i < sources else None
        for i, var in enumerate(program.jaxpr.invars)
    ]
    found: Found = []
    _follow(program.jaxpr, inputs, found, _Around((), (), False))
    return found


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


class _Around(NamedTuple):
    """Where a program lies.

    Attributes:
      place: of the equation that calls it, and which of its bodies it is.
      inside: the primitives around it.
      derived: whether products in it are.
    """

    place: Place
    inside: tuple[str, ...]
    derived: bool

    def at(self, index: int, eqn: core.JaxprEqn) -> "_Around":
        """What is around the first body of an equation."""
        again = eqn.params.get("differentiated", False)
        name = RECOMPUTED if again else eqn.primitive.name
        scopes = str(eqn.source_info.name_stack)
        derived = self.derived or MARKED in scopes or "transpose(" in scopes
        return _Around((*self.place, (index, 0)), (*self.inside, name), derived)

    def body(self, i: int) -> "_Around":
        """What is around another of its bodies."""
        return self._replace(place=(*self.place[:-1], (self.place[-1][0], i)))


def _follow(jaxpr: core.Jaxpr, inputs: Origins, found: Found, around: _Around) -> Origins:
    """The origins of a program's outputs; appends the uses met on the way."""
    origins: dict[core.Var, Origin | None] = dict(zip(jaxpr.invars, inputs, strict=True))
    reads = collections.Counter(
        var
        for atoms in (jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
        for var in atoms
        if isinstance(var, core.Var)
    )

    def origin(atom: Any) -> Origin | None:
        return None if isinstance(atom, core.Literal) else origins.get(atom)

    for index, eqn in enumerate(jaxpr.eqns):
        operands = [origin(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in _ARRAY_OPS and not any(operands):
            continue
        here = around.at(index, eqn)
        run = functools.partial(_run, eqn, here)
        if eqn.primitive is tap_p:
            if eqn.params["use"] is not None:
                found.append(_mark(eqn, operands, here.place, around.inside))
            outputs = operands[:1]
        elif name == "scan":
            outputs = _follow_scan(eqn, operands, found, here.place, run)
        elif name == "while":
            outputs = _follow_while(eqn, operands, found, run)
        elif name == "shard_map":
            (outputs,) = run(_unsharded(eqn, operands), found)
        elif branches := run(_settled(operands[1:]) if name == "cond" else operands, found):
            outputs = [_common(list(branch)) for branch in zip(*branches, strict=True)]
        elif name in products.READERS:
            outputs = [_multiply(eqn, operands, found, around.inside, here)]
        elif name in _SUMS and any(x and x.is_output for x in operands):
            outputs = [_add_to_output(_stretched(operands, eqn), found)]
        else:
            outputs = _follow_array_op(eqn, operands)
            if name not in _ARRAY_OPS:
                why, beside = f"used inside {name}, which takes no probe", len(operands) > 1
                found += [
                    Refusal(x.source, why, here.place, beside)  # type: ignore[arg-type]
                    for x in operands
                    if x and x.is_parameter
                ]
        for var, one in zip(eqn.outvars, outputs, strict=True):
            # What is no floating-point number, as a mask made from a parameter, is data.
            aval: Any = var.aval
            if hasattr(aval, "dtype") and not jnp.issubdtype(aval.dtype, jnp.inexact):
                one = None
            elif one and not one.lost and len(one.axes) != len(aval.shape):
                one = _known([one], _COMPUTED)
            elif one and reads[var] > 1:  # what is added to it is not added to all uses of it
                (one,) = _settled([one])
            origins[var] = one
    return [origin(atom) for atom in jaxpr.outvars]


def _run(eqn: core.JaxprEqn, here: _Around, inputs: Origins, found: Found) -> list[Origins]:
    """Follows the programs that an equation calls."""
    return [_follow(body, inputs, found, here.body(i)) for i, body in enumerate(bodies(eqn))]


def _mark(eqn: core.JaxprEqn, operands: Origins, place: Place, inside: tuple[str, ...]) -> Mark:
    """The mark, with the axes that the `vmap`s around it took undone, outermost first."""
    handed = Operands.of(operands, eqn.params).parameters
    found = list(handed)
    for level, dims in enumerate(reversed(eqn.params["levels"])):
        for i, dim in enumerate(Operands.of(dims, eqn.params).parameters):
            if (one := found[i]) and dim is not None:
                found[i] = one.drop(dim, (*place, (level, 0)))
    axes = tuple(one.axes if one else () for one in handed)
    return Mark(eqn.params["use"], tuple(found), place, inside, axes)


def _multiply(
    eqn: core.JaxprEqn, operands: Origins, found: Found, inside: tuple[str, ...], here: _Around
) -> Origin | None:
    """The origin of a product's output; appends the product, if one operand is a parameter."""
    weights = _weights(operands[:2])
    if len(weights) == 1:
        (i,) = weights
        weight = operands[i]
        assert weight is not None
        assert isinstance(weight.source, int)
        aval: Any = eqn.outvars[0].aval
        is_complex = jnp.issubdtype(aval.dtype, jnp.complexfloating)
        linear = COMPLEX if is_complex else products.READERS[eqn.primitive.name](eqn, i)
        if isinstance(linear, Linear) and linear.scales:
            axes = tuple(weight.axes[j] for j in linear.outputs)  # type: ignore[index]
            operands[i] = dataclasses.replace(weight, axes=axes)
            return _combined(operands, scaled=True)
        if isinstance(linear, Linear):
            linear = products.keep_apart(linear, weight.axes)
            found.append(Product(linear, weight, here.place, inside, here.derived))
            return Origin(here.place, pieces.whole(aval.shape), frozen=weight.frozen)
        found.append(Refusal(weight.source, linear, here.place, not here.derived))
    for x, other in (operands[:2], operands[1::-1]):
        if len(weights) == 2 and x and isinstance(x.source, int):
            found.append(Refusal(x.source, _OF_PARAMETERS, here.place, False))
        elif not weights and x and x.lost:
            with_data = other is None or other.parameters != x.parameters
            outweighs = with_data and not here.derived
            found += [Refusal(i, x.lost, here.place, outweighs) for i in sorted(x.behind)]
    return _known(operands, _COMPUTED)


def _weights(operands: Origins) -> list[int]:
    """Which of two factors are parameters, and not what is made of one to be data.

    Data are, beside a parameter as it is: one that is frozen, copies of one, and one that was scaled
    or shifted element by element, which is how the inputs of a single example may look.
    """
    found = [i for i, x in enumerate(operands) if x and x.is_parameter]
    for is_data in (lambda x: x.frozen, lambda x: x.repeated, lambda x: x.mixed):
        if len(found) == 2:
            found = [i for i in found if not is_data(operands[i])] or found
    return [i for i in found if not (operands[i].repeated and operands[i].mixed)]  # type: ignore[union-attr]


def _add_to_output(operands: Origins, found: Found) -> Origin | None:
    """The origin of a sum with a product's output; notes a parameter as the product's bias."""
    first, *outputs = [x for x in operands if x and x.is_output]
    for x in operands:
        if x and x.is_parameter:
            _pair(first, x, found)
    return first if outputs else _known(operands, _COMPUTED)


def _pair(output: Origin, bias: Origin, found: Found) -> None:
    """Makes a parameter the bias of the product whose output it is added to, if it is like one."""
    for i, product in enumerate(found):
        if isinstance(product, Product) and product.place == output.source:
            axes = _bias_axes(product, output, bias)
            if axes is not None and product.bias is None:
                found[i] = product._replace(bias=bias, bias_axes=axes)


def _bias_axes(
    product: Product, output: Origin, bias: Origin
) -> tuple[tuple[int, int], ...] | None:
    """For each axis of a bias longer than one, the weight's; None for what is no bias."""
    weight, outputs = product.weight, product.linear.outputs
    loops = [[s.loop for s in x.sliced] for x in (weight, bias)]
    if output.sliced or bias.frozen != weight.frozen or loops[0] != loops[1]:
        return None
    if product.linear.kind == "embedding":
        return None
    of_output = [() if i is None else weight.axes[i] for i in outputs]
    matched: dict[int, int] = {}
    for axis, of_bias in zip(output.axes, bias.axes, strict=True):
        roles = {outputs[p.axis] is None for p in axis if p.axis is not None}
        if len(roles) > 1:
            return None
        of_bias = tuple(p for p in of_bias if p.size > 1)
        if roles != {False}:  # rows
            if any(p.axis is not None for p in of_bias):
                return None
            continue
        of_weight = pieces.within(tuple(of_output), axis)
        of_weight = of_weight and tuple(p for p in of_weight if p.size > 1)
        if of_weight is None or len(of_weight) != len(of_bias):
            return None
        for mine, its in zip(of_bias, of_weight, strict=True):
            if mine.axis is None or its.axis is None or mine[1:] != its[1:]:
                return None
            if matched.setdefault(mine.axis, its.axis) != its.axis:
                return None
    return tuple(sorted(matched.items()))


Run = Callable[[Origins, Found], list[Origins]]


def _follow_scan(
    eqn: core.JaxprEqn, operands: Origins, found: Found, place: Place, run: Run
) -> Origins:
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    operands = _settled(operands)
    fixed = operands[:consts]
    carry = operands[consts : consts + carries]
    slices = [x and x.drop(0, place) for x in operands[consts + carries :]]
    carry = _invariant(lambda c: run([*fixed, *c, *slices], [])[0][:carries], carry)
    (outputs,) = run([*fixed, *carry, *slices], found)
    return _settled(outputs[:carries]) + [_known([x], _COMPUTED) for x in outputs[carries:]]


def _follow_while(eqn: core.JaxprEqn, operands: Origins, found: Found, run: Run) -> Origins:
    skip, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    operands = _settled(operands)
    fixed, carry = operands[skip : skip + consts], operands[skip + consts :]
    carry = _invariant(lambda c: run([*fixed, *c], [])[0], carry)
    return _settled(run([*fixed, *carry], found)[0])


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
        _known([x], "only a device's part of it reaches its layer") if any(spec) else x
        for x, spec in zip(operands, eqn.params["in_specs"], strict=True)
    ]


_COMPUTED = "no layer of a known kind uses it as it is"
REARRANGED = "only a slice or a rearrangement of it reaches its layer"
_OF_PARAMETERS = "multiplied by another parameter before any data"
_SAME = frozenset(
    "convert_element_type stop_gradient copy reduce_precision sharding_constraint "
    "optimization_barrier name pvary pcast mesh_cast reshard layout_constraint device_put".split()
)
_REARRANGING = frozenset("reshape squeeze slice dynamic_slice split rev broadcast_in_dim".split())
_SUMS = frozenset("add add_any".split())
_MOVING = _SUMS | {"sub"}
_SCALING = frozenset("mul div max min select_n clamp neg".split())
# What computes arrays from arrays and calls no program that could hold a layer.
_ARRAY_OPS = (
    frozenset(p.name for p in vars(jax.lax).values() if isinstance(p, core.Primitive))
    | _SAME
    | _REARRANGING
    | _MOVING
    | _SCALING
)


def _follow_array_op(eqn: core.JaxprEqn, operands: Origins) -> Origins:
    name = eqn.primitive.name
    if name in _SAME and len(operands) == len(eqn.outvars):
        if name == "stop_gradient":
            operands = [x and dataclasses.replace(x, frozen=True, behind=frozenset()) for x in operands]
        return operands
    if name == "transpose" or name in _REARRANGING:
        x = operands[0]
        axes = _rearranged(eqn, x.axes) if x and not x.lost else None
        if x and axes is not None:
            return [dataclasses.replace(x, axes=axes)]
        return [_known(operands, REARRANGED)] * len(eqn.outvars)
    if name not in _MOVING and name not in _SCALING:
        return [_known(operands, _COMPUTED)] * len(eqn.outvars)
    operands = _stretched(_settled(operands), eqn)
    if name == "div" and (divisor := operands[1]) and not divisor.frozen:
        return [_known(operands, _TRANSFORMED)]
    return [_combined(operands, scaled=name in _SCALING)]


def _settled(origins: Origins) -> Origins:
    """Origins for which the output of a product is one to which no bias is added any more."""
    return [_known([x], _COMPUTED) if x and x.is_output else x for x in origins]


def _stretched(operands: Origins, eqn: core.JaxprEqn) -> Origins:
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


def _common(origins: Origins) -> Origin | None:
    """The origin of an array that is one of several."""
    return origins[0] if all(o == origins[0] for o in origins) else _known(origins, _COMPUTED)


def _known(origins: Origins, why: str) -> Origin | None:
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


_TRANSFORMED = "transformed before its layer uses it"


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
        return _known(origins, _TRANSFORMED)
    return exact.pop()
