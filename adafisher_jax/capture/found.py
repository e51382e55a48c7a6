"""The three uses of a parameter in a traced program: a known layer, a product, a refused use."""

from typing import Any, NamedTuple

from adafisher_jax.capture.origins import Origin
from adafisher_jax.capture.pieces import Axes
from adafisher_jax.capture.places import Place
from adafisher_jax.capture.products import Linear
from adafisher_jax.tap import Use

RECOMPUTED = "checkpoint, again"
"""Stands for the name of a `jax.checkpoint` that runs in the backward pass of a gradient."""

MARKED = "adafisher_layer"
"""The `jax.named_scope` of a call that leaves a mark. Products inside belong to that layer."""

OF_PARAMETERS = "multiplied by another parameter before any data"
COMPLEX = "complex, for which the factors are not defined"


class Mark(NamedTuple):
    """One call of a known layer, as the traced program records it.

    Attributes:
      use: the adapter's description of the layer.
      origins: the origins of the layer's parameters; `None` for an array that is no parameter of
        the loss.
      place: the place of the mark's equation.
      inside: the primitives (`"jit"`, `"scan"`, …) around the mark, outermost first; `RECOMPUTED`
        stands for one.
      axes: for each parameter its axes in the program, `vmap`s around the mark not undone.
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
      place: the place of the equation.
      inside: the primitives around the equation, as in `Mark`.
      derived: whether the product lies in the call of a marked layer, or in the backward pass of a
        derivative that the loss takes. Other uses of the weight then describe it, if there are any.
      written: where its author wrote the product, if a forward derivative inside the loss made it.
        A product of tangents has that of the product it is the tangent of. Otherwise false.
      learned: whether the input comes from a parameter.
      bias: the origin of the parameter that is added to the output.
      bias_axes: pairs of an axis of the bias longer than one and its axis of the weight, both
        counted in the whole parameters.
    """

    linear: Linear
    weight: Origin
    place: Place
    inside: tuple[str, ...]
    derived: bool
    written: Any
    learned: bool = False
    bias: Origin | None = None
    bias_axes: tuple[tuple[int, int], ...] = ()


class Refusal(NamedTuple):
    """A use of a parameter that cannot be captured, and why.

    Attributes:
      source: the position of the parameter.
      why: the reason.
      place: the place of the equation.
      outweighs: whether the parameter is refused even if it has other uses, because this use
        multiplies it by data.
    """

    source: int
    why: str
    place: Place
    outweighs: bool


Found = list[Mark | Product | Refusal]


def without_probe(name: str) -> str:
    """Why a use inside a primitive of this name is refused."""
    return f"used inside {name}, which takes no probe"
