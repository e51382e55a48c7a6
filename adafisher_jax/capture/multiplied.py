"""Tells what a product of a traced program multiplies: a weight with data, or two parameters."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from adafisher_jax.capture import pieces, products
from adafisher_jax.capture.found import COMPLEX, OF_PARAMETERS, Found, Product, Refusal
from adafisher_jax.capture.origins import (
    COMPUTED,
    REARRANGED,
    Origin,
    Origins,
    combined,
    computed_from,
)
from adafisher_jax.capture.places import Place
from adafisher_jax.capture.products import Linear

_BY_ELEMENT = "combined by element with data along axes that it does not have"


def multiply(
    eqn: core.JaxprEqn,
    operands: Origins,
    known: frozenset[Any],
    last: bool,
    place: Place,
    inside: tuple[str, ...],
    derived: bool,
    written: Any,
) -> tuple[Found, Origin | None]:
    """Returns the uses of parameters in a product, and the origin of its output.

    Args:
      eqn: the product, one of `products.READERS`.
      operands: the origins of its operands.
      known: which parameters, or slices of them, are multiplied by data: pairs of `source` and
        `alone` of `Origin`. One of them is the weight of another parameter.
      last: whether no more will be known. A slice alone then is an input, as of learned prompts.
      place: the place of the equation.
      inside: as in `Product`.
      derived: as in `Product`.
      written: as in `Product`.
    """
    parameters = _parameters(operands[:2])
    both = {i: x for i, x in parameters.items() if not _by_element(eqn, x, i)}
    weights = both
    if len(both) == 2:
        weights = {i: x for i, x in both.items() if (x.source, x.alone) in known}
        if last and len(weights) != 1:
            weights = {i: x for i, x in both.items() if not x.alone}
        if len({x.source for x in both.values()}) == 1 and any(x.ranges for x in both.values()):
            weights = {}  # as in a penalty on a weight
    if len(weights) == 1:
        ((i, weight),) = weights.items()
        linear = _read(eqn, i)
        if isinstance(linear, str):
            outweighs = not derived and not _picks(eqn)
            return [Refusal(weight.source, linear, place, outweighs)], computed_from(
                operands, linear
            )
        if linear.scales:
            axes = tuple(weight.axes[j] for j in linear.outputs)
            operands[i] = dataclasses.replace(weight, axes=axes)
            return [], combined(operands, scaled=True)
        linear, axes = products.without_copies(linear, weight.axes)
        weight = dataclasses.replace(weight, axes=axes)
        aval: Any = eqn.outvars[0].aval
        output = Origin(place, pieces.whole(aval.shape), frozen=weight.frozen)
        inputs = [x for j, x in both.items() if j != i]
        product = Product(linear, weight, place, inside, derived, written, bool(inputs))
        return [product, *_of_parameters(inputs, place)], output
    if both:
        return _of_parameters(both.values(), place), computed_from(operands, OF_PARAMETERS)

    live = [x for x in parameters.values() if not x.frozen]
    uses: Found = [Refusal(x.source, _BY_ELEMENT, place, not derived) for x in live]
    for x, other in (operands[:2], operands[1::-1]):
        if x and x.lost:
            with_data = not _picks(eqn) and (other is None or other.parameters != x.parameters)
            uses += [Refusal(i, x.lost, place, with_data and not derived) for i in sorted(x.behind)]
    found = _computed(operands)
    if found and not _picks(eqn) and sum(bool(x and x.parameters) for x in operands[:2]) == 1:
        found = dataclasses.replace(found, behind=frozenset())  # as other products' outputs, data
    return uses, found


def refuse_looked_up_weights(operands: Origins, found: Found) -> None:
    """Refuses lookups of whole matrices that multiply data: they are weights."""
    if any(x and x.is_parameter and not x.frozen for x in operands[:2]):
        return
    outputs = {x.source for x in operands[:2] if x and x.is_output}
    for i, use in enumerate(found if outputs else []):
        if isinstance(use, Product) and use.place in outputs and use.linear.kind == "embedding":
            roles = [axis.rstrip("0123456789") for axis in use.linear.statistic.weight_axes]
            if roles.count("out") > 1:
                source: Any = use.weight.source
                found[i] = Refusal(source, REARRANGED, use.place, not use.derived)


def _of_parameters(parameters: Iterable[Any], place: Place) -> Found:
    return [Refusal(x.source, OF_PARAMETERS, place, False) for x in parameters]


def _computed(operands: Origins) -> Origin | None:
    return computed_from(operands, COMPUTED)


def _parameters(operands: Origins) -> dict[int, Any]:
    """Returns which of two operands are parameters in the sense of a product, by their numbers.

    If both come from parameters, some count as data: a frozen parameter, copies of a parameter, and
    a parameter that was scaled or shifted by element, as the inputs of a single example may be.
    """
    found = {i: x for i, x in enumerate(operands) if x and x.is_parameter}
    for is_data in (lambda x: x.frozen, lambda x: x.repeated, lambda x: x.mixed):
        if len(found) == 2:
            found = {i: x for i, x in found.items() if not is_data(x)} or found
    return found


def _by_element(eqn: core.JaxprEqn, x: Origin, i: int) -> bool:
    """Whether operand `i` is data to which a parameter was added, or which one scales.

    It is a weight if rows of its own were added to each of its copies, which `vmap` multiplies.
    """
    copied = {axis for axis, of in enumerate(x.axes) if pieces.repeated(of)}
    summed, shared = (), ()
    if eqn.primitive.name == "dot_general":
        summed, shared = (axes[i] for axes in eqn.params["dimension_numbers"])
    copied |= {axis for axis in x.extended if axis not in (*summed, *shared)}
    return x.varied and bool(copied if x.multiplied else copied - {*shared})


def _picks(eqn: core.JaxprEqn) -> bool:
    """Whether an equation takes entries or a part of an array, which is no product with data."""
    if eqn.primitive.name != "gather":
        return False
    array: Any = eqn.invars[0].aval
    return len(array.shape) == 1 or isinstance(products.READERS["gather"](eqn, 0), str)


def _read(eqn: core.JaxprEqn, i: int) -> Linear | str:
    """Reads a product whose operand `i` is the weight; returns why it is none if it is none."""
    aval: Any = eqn.outvars[0].aval
    if jnp.issubdtype(aval.dtype, jnp.complexfloating):
        return COMPLEX
    return products.READERS[eqn.primitive.name](eqn, i)
