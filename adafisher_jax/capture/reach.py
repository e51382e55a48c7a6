"""Finds the equations of a traced program that a gradient of the loss passes through.

The loss may not depend on a layer that runs: its output is returned beside the loss, or only the
derivative of a model is used. Or it depends on the layer without a gradient: by `stop_gradient`,
by an index or a comparison, or through a `while` loop. No cotangent reaches such an output.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import jax.numpy as jnp
from jax.extend import core

from adafisher_jax.capture.places import Place, bodies

# No gradient passes through these. A `while` has none in reverse.
_FLAT = frozenset("stop_gradient while sign floor ceil round".split())


def places_reached(program: core.ClosedJaxpr, outputs: Sequence[bool]) -> set[Place]:
    """Returns the places of the equations through which a gradient of chosen outputs passes.

    All of a function with its own derivative rule counts, since the rule decides, and all operands
    of an equation that cannot be followed.
    """
    reached: set[Place] = set()
    _reach(program.jaxpr, outputs, (), reached)
    return reached


def _reach(
    jaxpr: core.Jaxpr,
    outputs: Sequence[bool],
    around: Place,
    reached: set[Place],
    references: Sequence[bool] = (),
) -> list[bool]:
    """Returns for each input whether a gradient gets to it; adds to `reached`.

    `references` says which inputs are mutable arrays that are read later: who writes to them
    is reached.
    """
    wanted = {v for v, one in zip(jaxpr.outvars, outputs, strict=True) if one and _passes(v)}
    wanted |= {v for v, one in zip(jaxpr.invars, references, strict=False) if one}
    for index, eqn in reversed(list(enumerate(jaxpr.eqns))):
        outs = [var in wanted for var in eqn.outvars]
        refs = [_is_reference(v) and v in wanted for v in eqn.invars]
        if (any(outs) or any(refs)) and eqn.primitive.name not in _FLAT:
            place = (*around, (index, 0))
            reached.add(place)
            ins = _reach_bodies(eqn, outs, refs, place, reached)
            wanted |= {v for v, one in zip(eqn.invars, ins, strict=True) if one and _passes(v)}
    return [var in wanted for var in jaxpr.invars]


def _reach_bodies(
    eqn: core.JaxprEqn, outs: list[bool], refs: list[bool], place: Place, reached: set[Place]
) -> list[bool]:
    """Returns for each operand of an equation whether a gradient gets to it."""
    name = eqn.primitive.name
    everything = [True] * len(eqn.invars)
    if name.startswith("custom_") or name == "linear_call":
        reached |= _places_inside(eqn, place)
        return everything
    if name == "scan":
        consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
        (body,) = bodies(eqn)
        while True:  # the carry, or reference, that a step reads is written by the step before
            ins = _reach(body, outs, place, reached, refs)
            more = [a or b for a, b in zip(outs, ins[consts : consts + carries], strict=False)]
            read = [one and _is_reference(v) for one, v in zip(ins, eqn.invars, strict=True)]
            if more == outs[:carries] and read == refs:
                return ins
            outs, refs = [*more, *outs[carries:]], read
    inside = refs[1:] if name == "cond" else refs
    found = [
        _reach(body, outs, (*place[:-1], (place[-1][0], i)), reached, inside)
        for i, body in enumerate(bodies(eqn))
    ]
    if not found:
        return everything
    ins = [any(of) for of in zip(*found, strict=True)]
    return [True, *ins] if name == "cond" else ins


def _places_inside(eqn: core.JaxprEqn, place: Place) -> set[Place]:
    """Returns the places of all equations in the programs that an equation calls."""
    found: set[Place] = set()
    for i, body in enumerate(bodies(eqn)):
        for index, inner in enumerate(body.eqns):
            here = (*place[:-1], (place[-1][0], i), (index, 0))
            found |= {here} | _places_inside(inner, here)
    return found


def _passes(atom: object) -> TypeGuard[core.Var]:
    """Whether an array is mutable, or of a type that gradients have."""
    if not _is_var(atom):
        return False
    aval: Any = atom.aval
    real = hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)
    return real or _is_reference(atom)


def _is_reference(atom: object) -> TypeGuard[core.Var]:
    """Whether a variable is a mutable array (`jax.new_ref`)."""
    return _is_var(atom) and hasattr(atom.aval, "inner_aval")


def _is_var(atom: object) -> TypeGuard[core.Var]:
    return isinstance(atom, core.Var)
