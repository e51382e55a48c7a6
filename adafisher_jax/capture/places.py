"""Where an equation of a traced program is, and the programs inside it."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

Place = tuple[tuple[int, int], ...]
"""Of an equation: in its program, and in those around it, its index and which body it is in."""


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
