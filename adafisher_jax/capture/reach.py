"""Finds the equations of a traced program that the loss depends on.

The loss may not depend on a layer that runs: its output is returned beside the loss, or only the
derivative of a model is used. No cotangent reaches such an output.
"""

from collections.abc import Sequence

from jax.extend import core

from adafisher_jax.capture.places import Place, bodies


def places_reached(program: core.ClosedJaxpr, outputs: Sequence[bool]) -> set[Place]:
    """Returns the places of the equations that the chosen outputs of a program depend on.

    All of a `while` loop counts, and all of an equation that cannot be followed.
    """
    reached: set[Place] = set()
    _reach(program.jaxpr, outputs, (), reached)
    return reached


def _reach(
    jaxpr: core.Jaxpr, outputs: Sequence[bool], around: Place, reached: set[Place]
) -> list[bool]:
    """Returns for each input whether the chosen outputs depend on it; adds to `reached`."""
    wanted = {v for v, one in zip(jaxpr.outvars, outputs, strict=True) if one and _is_var(v)}
    for index, eqn in reversed(list(enumerate(jaxpr.eqns))):
        outs = [var in wanted for var in eqn.outvars]
        if any(outs):
            place = (*around, (index, 0))
            reached.add(place)
            ins = _reach_bodies(eqn, outs, place, reached)
            wanted |= {v for v, one in zip(eqn.invars, ins, strict=True) if one and _is_var(v)}
    return [var in wanted for var in jaxpr.invars]


def _reach_bodies(
    eqn: core.JaxprEqn, outs: list[bool], place: Place, reached: set[Place]
) -> list[bool]:
    """Returns for each operand of an equation whether the chosen outputs depend on it."""
    everything = [True] * len(eqn.invars)
    if eqn.primitive.name == "while":
        (body,) = bodies(eqn)
        _reach(body, [True] * len(body.outvars), place, reached)
        return everything
    if eqn.primitive.name == "scan":
        consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
        (body,) = bodies(eqn)
        while True:  # the carry that a step reads is written by the step before
            ins = _reach(body, outs, place, reached)
            more = [a or b for a, b in zip(outs, ins[consts : consts + carries], strict=False)]
            if more == outs[:carries]:
                return ins
            outs = [*more, *outs[carries:]]
    found = [
        _reach(body, outs, (*place[:-1], (place[-1][0], i)), reached)
        for i, body in enumerate(bodies(eqn))
    ]
    if not found:
        return everything
    ins = [any(of) for of in zip(*found, strict=True)]
    return [True, *ins] if eqn.primitive.name == "cond" else ins


def _is_var(atom: object) -> bool:
    return isinstance(atom, core.Var)
