"""How averaged factors become a preconditioner: one small object for each rule, by name."""

import math
import numbers
from typing import Any

import jax

from adafisher_jax.rules.centered import Centered
from adafisher_jax.rules.published import Official, Paper
from adafisher_jax.rules.rule import Curvature, Outcome, Pair, Rule, Scale, Vectors

__all__ = [
    "Curvature",
    "Outcome",
    "Pair",
    "Rule",
    "Scale",
    "Vectors",
    "check_fraction",
    "is_known",
    "is_number",
    "make_rule",
]

# Each rule with its default averaging constant and damping.
RULES: dict[str, tuple[type[Rule], float, float]] = {
    "paper": (Paper, 0.8, 1e-3),
    "official": (Official, 0.8, 1e-3),
    "centered": (Centered, 0.95, 0.01),
}


def make_rule(name: str | Rule, ema: Any = None, damping: Any = None) -> Rule:
    """The rule called `name`, or a rule itself; None stands for its own default.

    Raises:
      ValueError: for an unknown name, an averaging constant outside [0, 1) or a negative
        damping. Traced values are not checked.
    """
    if isinstance(name, Rule):
        rule, default_ema, default_damping = type(name), name.ema, name.damping
    elif name in tuple(RULES):
        rule, default_ema, default_damping = RULES[name]
    else:
        raise ValueError(f"rule: got {name!r}, wanted one of {', '.join(map(repr, RULES))}")
    ema = default_ema if ema is None else ema
    damping = default_damping if damping is None else damping
    check_fraction("curvature_ema", ema)
    if is_known(damping) and not (is_number(damping) and 0 <= damping < math.inf):
        raise ValueError(f"damping: got {damping!r}, wanted a finite number of at least 0")
    return rule(ema, damping)


def check_fraction(name: str, value: Any) -> None:
    """Raises a `ValueError` for a decay outside [0, 1), unless it is traced."""
    if is_known(value) and not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"{name}: got {value!r}, wanted a number in [0, 1)")


def is_number(value: Any) -> bool:
    """Whether a value is one number, which may be traced."""
    return isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()


def is_known(value: Any) -> bool:
    """Whether a value is not traced."""
    return not isinstance(value, jax.core.Tracer)
