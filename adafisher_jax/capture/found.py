"""What uses a parameter in a traced program: a known layer, a product, or what has no factors."""

from typing import NamedTuple

from adafisher_jax.capture.origins import Origin
from adafisher_jax.capture.pieces import Axes
from adafisher_jax.capture.places import Place
from adafisher_jax.capture.products import Linear
from adafisher_jax.tap import Use

RECOMPUTED = "checkpoint, again"
"""In place of a primitive's name, that of a `jax.checkpoint` in the backward pass of a gradient."""

MARKED = "adafisher_layer"
"""The `jax.named_scope` of a call that leaves a mark: products in it are the marked layer's."""

COMPLEX = "complex, for which the factors are not defined"


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
