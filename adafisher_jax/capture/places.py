"""The place of an equation in a traced program, and the programs that an equation calls."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

Place = tuple[tuple[int, int], ...]
"""The place of an equation: for each program around it, outermost first, and its own, the index of
the equation there, and which body of that equation comes next."""


def bodies(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Yields the programs that an equation calls with its own operands, in order.

    A `while` yields its body and not its condition, which holds no layer of interest.
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
