"""Finds which parameters the layers and products of a traced program use.

A loss may cast, mask or reshape its parameters, freeze a part of them, take them out of a larger
structure, or pass them through `jax.jit` and `jax.checkpoint`. A lifted transform may slice them.
Names and array identities do not show this; the traced program does. `find_uses` follows the data
from the program's inputs to two kinds of use:

- A call of a layer that is known by name has left a mark (`adafisher_jax.tap`).
- Every product of a parameter with data is a layer, whoever wrote it (`products`). A parameter that
  is added to the output, along the output's own axes, is the bias.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from adafisher_jax.capture import pieces, products
from adafisher_jax.capture.biases import add_to_output
from adafisher_jax.capture.found import (
    MARKED,
    OF_PARAMETERS,
    RECOMPUTED,
    Found,
    Mark,
    Product,
    Refusal,
    without_probe,
)
from adafisher_jax.capture.multiplied import multiply, refuse_looked_up_weights
from adafisher_jax.capture.origins import (
    ARRAY_OPS,
    COMPUTED,
    SUMS,
    Origin,
    Origins,
    common,
    computed_from,
    of_array_op,
    settled,
    stretched,
)
from adafisher_jax.capture.places import Place, bodies
from adafisher_jax.capture.slices import SLICING, of_parts
from adafisher_jax.tap import Operands, tap_p


def find_uses(program: core.ClosedJaxpr, sources: int) -> Found:
    """Finds the uses of the first `sources` inputs of a traced program, in program order.

    A use inside a loop is reported once. A use inside a function that is traced once and called
    twice is reported at each call.
    """
    inputs = [
        Origin(i, pieces.whole(var.aval.shape)) if i < sources else None
        for i, var in enumerate(program.jaxpr.invars)
    ]
    weights: frozenset[Any] = frozenset()
    last = False
    while True:
        found: Found = []
        _follow(program.jaxpr, inputs, found, _Around((), (), False, False, weights, last))
        more = _weights(found) - weights
        if last or not any(isinstance(x, Refusal) and x.why == OF_PARAMETERS for x in found):
            return found
        weights |= more  # what is the weight of a product of two parameters is known now
        last = not more


def _weights(found: Found) -> frozenset[Any]:
    """Returns which parameters, or slices of them, layers and products have as weights."""
    products = [x.weight for x in found if isinstance(x, Product)]
    marked = [one for x in found if isinstance(x, Mark) for one in x.origins if one]
    return frozenset((x.source, x.alone) for x in (*products, *marked) if not x.frozen)


class _Around(NamedTuple):
    """What is around a program.

    Attributes:
      place: the place of the equation that calls the program, and which of its bodies it is.
      inside: the primitives around the program.
      derived: whether products in the program are derived (see `Product`).
      forward: whether a forward derivative inside the loss made the program.
      weights: which parameters, or slices of them, are known to be multiplied by data somewhere.
      last: whether no more of them will be known.
    """

    place: Place
    inside: tuple[str, ...]
    derived: bool
    forward: bool
    weights: frozenset[Any]
    last: bool

    def at(self, index: int, eqn: core.JaxprEqn) -> "_Around":
        """Returns what is around the first body of an equation."""
        again = eqn.params.get("differentiated", False)
        name = RECOMPUTED if again else eqn.primitive.name
        scopes = str(eqn.source_info.name_stack)
        derived = self.derived or MARKED in scopes or "transpose(" in scopes
        forward = self.forward or "jvp(" in scopes
        place, inside = (*self.place, (index, 0)), (*self.inside, name)
        return self._replace(place=place, inside=inside, derived=derived, forward=forward)

    def body(self, i: int) -> "_Around":
        """Returns what is around body `i` of the same equation."""
        return self._replace(place=(*self.place[:-1], (self.place[-1][0], i)))


def _follow(jaxpr: core.Jaxpr, inputs: Origins, found: Found, around: _Around) -> Origins:
    """Returns the origins of a program's outputs; appends the uses in it to `found`."""
    reads = collections.Counter(
        var
        for atoms in (jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
        for var in atoms
        if isinstance(var, core.Var)
    )

    def of_one_use(var: core.Var, one: Origin | None) -> Origin | None:
        """A bias would be added to one of several uses of an output."""
        return settled([one])[0] if reads[var] > 1 else one

    uniform: set[core.Var] = set()
    origins = {v: of_one_use(v, one) for v, one in zip(jaxpr.invars, inputs, strict=True)}

    def origin(atom: Any) -> Origin | None:
        return None if isinstance(atom, core.Literal) else origins.get(atom)

    def is_number(atom: Any) -> bool:
        return isinstance(atom, core.Literal) or not atom.aval.shape or atom in uniform

    for index, eqn in enumerate(jaxpr.eqns):
        operands = [origin(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in ("broadcast_in_dim", "convert_element_type") and is_number(eqn.invars[0]):
            uniform |= {*eqn.outvars}
        if name in ARRAY_OPS and not any(operands):
            continue
        here = around.at(index, eqn)
        run = functools.partial(_run, eqn, here)
        if eqn.primitive is tap_p:
            outputs = operands[:1]
            if eqn.params["use"] is not None:
                mark = _mark(eqn, operands, here.place, around.inside)
                found.append(mark)
                outputs = [_marked(operands[0], mark)]
        elif name == "scan":
            outputs = _follow_scan(eqn, operands, found, here.place, run)
        elif name == "while":
            outputs = _follow_while(eqn, operands, found, run)
        elif name == "shard_map":
            (outputs,) = run(_unsharded(eqn, operands), found)
        elif branches := run(_entering(name, operands), found):
            outputs = [common(list(branch)) for branch in zip(*branches, strict=True)]
            if name.startswith("custom_"):  # the rule decides what its outputs depend on
                outputs = [x or computed_from(operands, COMPUTED) for x in settled(outputs)]
        elif name in products.READERS:
            refuse_looked_up_weights(operands, found)
            written = here.forward and eqn.source_info.traceback
            of_use = here.place, around.inside, here.derived, written
            uses, output = multiply(eqn, operands, around.weights, around.last, *of_use)
            found += uses
            outputs = [output]
        elif name in SUMS and any(x and x.is_output for x in operands):
            outputs = [add_to_output(stretched(operands, eqn), found)]
        elif name in SLICING:
            outputs = of_parts(eqn, operands[0])
        else:
            outputs = of_array_op(eqn, operands, is_number)
            if name not in ARRAY_OPS:
                why, beside = without_probe(name), len(operands) > 1
                found += [
                    Refusal(x.source, why, here.place, beside)  # type: ignore[arg-type]
                    for x in operands
                    if x and x.is_parameter
                ]
        for var, one in zip(eqn.outvars, outputs, strict=True):
            # An array that is not floating-point, as a mask made from a parameter, is data.
            aval: Any = var.aval
            if hasattr(aval, "dtype") and not jnp.issubdtype(aval.dtype, jnp.inexact):
                one = None
            elif one and not one.lost and len(one.axes) != len(aval.shape):
                one = computed_from([one], COMPUTED)
            origins[var] = of_one_use(var, one)
    return [origin(atom) for atom in jaxpr.outvars]


def _entering(name: str, operands: Origins) -> Origins:
    """Returns the origins of the inputs of called programs, in which no bias may be added."""
    if name == "cond":
        return settled(operands[1:])
    return settled(operands) if name.startswith("custom_") else operands


def _run(eqn: core.JaxprEqn, here: _Around, inputs: Origins, found: Found) -> list[Origins]:
    """Follows the programs that an equation calls."""
    return [_follow(body, inputs, found, here.body(i)) for i, body in enumerate(bodies(eqn))]


def _mark(eqn: core.JaxprEqn, operands: Origins, place: Place, inside: tuple[str, ...]) -> Mark:
    """Returns the mark of an equation, its origins without the axes that `vmap`s around it map."""
    handed = Operands.of(operands, eqn.params).parameters
    found = list(handed)
    for level, dims in enumerate(reversed(eqn.params["levels"])):
        for i, dim in enumerate(Operands.of(dims, eqn.params).parameters):
            if (one := found[i]) and dim is not None:
                found[i] = one.drop(dim, (*place, (level, 0)))
    axes = tuple(one.axes if one else () for one in handed)
    return Mark(eqn.params["use"], tuple(found), place, inside, axes)


def _marked(output: Origin | None, mark: Mark) -> Origin | None:
    """Returns the origin of a marked layer's output, in which its own parameters count as data."""
    own = {x.source for x in mark.origins if x}
    if output is None or not (left := output.parameters - own):
        return None
    return dataclasses.replace(output, behind=left) if output.parameters & own else output


Run = Callable[[Origins, Found], list[Origins]]


def _follow_scan(
    eqn: core.JaxprEqn, operands: Origins, found: Found, place: Place, run: Run
) -> Origins:
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    operands = settled(operands)
    fixed = operands[:consts]
    carry = operands[consts : consts + carries]
    slices = [x and x.drop(0, place) for x in operands[consts + carries :]]
    carry = _invariant(lambda c: run([*fixed, *c, *slices], [])[0][:carries], carry)
    (outputs,) = run([*fixed, *carry, *slices], found)
    return settled(outputs[:carries]) + [computed_from([x], COMPUTED) for x in outputs[carries:]]


def _follow_while(eqn: core.JaxprEqn, operands: Origins, found: Found, run: Run) -> Origins:
    skip, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    operands = settled(operands)
    fixed, carry = operands[skip : skip + consts], operands[skip + consts :]
    carry = _invariant(lambda c: run([*fixed, *c], [])[0], carry)
    return settled(run([*fixed, *carry], found)[0])


def _invariant(step: Callable[[Origins], Origins], carry: Origins) -> Origins:
    """Returns the origins that a loop carries unchanged; the other origins are lost."""
    while True:
        kept = [common([old, new]) for old, new in zip(carry, step(carry), strict=True)]
        if kept == carry:
            return carry
        carry = kept


def _unsharded(eqn: core.JaxprEqn, operands: Origins) -> Origins:
    """Returns the origins inside a `shard_map`; a parameter split over devices is lost."""
    return [
        computed_from([x], "only a device's part of it reaches its layer") if any(spec) else x
        for x, spec in zip(operands, eqn.params["in_specs"], strict=True)
    ]
