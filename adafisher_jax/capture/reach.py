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

_FLAT = frozenset("stop_gradient while sign floor ceil round".split())


def places_reached(program: core.ClosedJaxpr, outputs: Sequence[bool]) -> set[Place]:
    """Returns the places of the equations through which a gradient of chosen outputs passes.

    In a function with its own derivative rule these are all that its outputs depend on, since the
    rule decides. So are all of an equation that cannot be followed.
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
    own_rule: bool = False,
) -> list[bool]:
    """Returns for each input whether a gradient gets to it; adds to `reached`.

    Args:
      jaxpr: the program.
      outputs: which outputs have a gradient.
      around: the place of the program.
      reached: all places reached so far.
      references: which inputs are mutable arrays that are read later: who writes to them is
        reached.
      own_rule: whether the program is that of a function with its own derivative rule.
    """

    def passes(atom: object) -> TypeGuard[core.Var]:
        return _is_var(atom) and (own_rule or _is_reference(atom) or _is_real(atom))

    wanted = {v for v, one in zip(jaxpr.outvars, outputs, strict=True) if one and passes(v)}
    wanted |= {v for v, one in zip(jaxpr.invars, references, strict=False) if one}
    for index, eqn in reversed(list(enumerate(jaxpr.eqns))):
        outs = [var in wanted for var in eqn.outvars]
        refs = [_is_reference(v) and v in wanted for v in eqn.invars]
        flat = eqn.primitive.name in _FLAT and not own_rule
        if (any(outs) or any(refs)) and not flat:
            place = (*around, (index, 0))
            reached.add(place)
            ins = _reach_bodies(eqn, outs, refs, place, reached, own_rule)
            wanted |= {v for v, one in zip(eqn.invars, ins, strict=True) if one and passes(v)}
    return [var in wanted for var in jaxpr.invars]


def _reach_bodies(
    eqn: core.JaxprEqn,
    outs: list[bool],
    refs: list[bool],
    place: Place,
    reached: set[Place],
    own_rule: bool,
) -> list[bool]:
    """Returns for each operand of an equation whether a gradient gets to it."""
    name = eqn.primitive.name
    everything = [True] * len(eqn.invars)
    own_rule = own_rule or name.startswith("custom_")
    if name == "while":
        (body,) = bodies(eqn)
        both = [True] * len(body.outvars), [True] * len(body.invars)
        _reach(body, both[0], place, reached, both[1], own_rule)
        return everything
    if name == "scan":
        consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
        (body,) = bodies(eqn)
        while True:  # the carry, or reference, that a step reads is written by the step before
            ins = _reach(body, outs, place, reached, refs, own_rule)
            more = [a or b for a, b in zip(outs, ins[consts : consts + carries], strict=False)]
            read = [one and _is_reference(v) for one, v in zip(ins, eqn.invars, strict=True)]
            if more == outs[:carries] and read == refs:
                return ins
            outs, refs = [*more, *outs[carries:]], read
    inside = refs[1:] if name == "cond" else refs
    found = [
        _reach(body, outs, (*place[:-1], (place[-1][0], i)), reached, inside, own_rule)
        for i, body in enumerate(bodies(eqn))
    ]
    if not found:
        return everything
    ins = [any(of) for of in zip(*found, strict=True)]
    return [True, *ins] if name == "cond" else ins


def _is_real(var: core.Var) -> bool:
    """Whether a variable is of a type that gradients have."""
    aval: Any = var.aval
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)


def _is_reference(atom: object) -> TypeGuard[core.Var]:
    """Whether a variable is a mutable array (`jax.new_ref`)."""
    return _is_var(atom) and hasattr(atom.aval, "inner_aval")


def _is_var(atom: object) -> TypeGuard[core.Var]:
    return isinstance(atom, core.Var)
