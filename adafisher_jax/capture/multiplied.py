"""Tells what a product of a traced program multiplies: a weight with data, or two parameters."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from adafisher_jax.capture import pieces, products
from adafisher_jax.capture.found import COMPLEX, OF_PARAMETERS, Found, Product, Refusal
from adafisher_jax.capture.origins import COMPUTED, Origin, Origins, combined, computed_from
from adafisher_jax.capture.places import Place
from adafisher_jax.capture.products import Linear

_BY_ELEMENT = "combined by element with the data of its product"


def multiply(
    eqn: core.JaxprEqn, operands: Origins, place: Place, inside: tuple[str, ...], derived: bool
) -> tuple[Found, Origin | None]:
    """Returns the uses of parameters in a product, and the origin of its output.

    Args:
      eqn: the product, one of `products.READERS`.
      operands: the origins of its operands.
      place: the place of the equation.
      inside: as in `Product`.
      derived: as in `Product`.
    """
    parameters = _parameters(operands[:2])
    weights = {i: x for i, x in parameters.items() if not _by_element(eqn, x, i)}
    computed = computed_from(operands, OF_PARAMETERS if len(weights) == 2 else COMPUTED)
    if len(weights) == 1:
        ((i, weight),) = weights.items()
        linear = _read(eqn, i)
        if isinstance(linear, str):
            return [Refusal(weight.source, linear, place, not derived)], computed
        if linear.scales:
            axes = tuple(weight.axes[j] for j in linear.outputs)
            operands[i] = dataclasses.replace(weight, axes=axes)
            return [], combined(operands, scaled=True)
        aval: Any = eqn.outvars[0].aval
        output = Origin(place, pieces.whole(aval.shape), frozen=weight.frozen)
        return [_product(linear, weight, place, inside, derived)], output

    uses: Found = []
    for i, x in weights.items():
        other = weights[1 - i].source
        linear = _read(eqn, i)
        if x.source == other or isinstance(linear, str) or linear.scales:
            uses.append(Refusal(x.source, OF_PARAMETERS, place, False))
        else:
            uses.append(_product(linear, x, place, inside, derived)._replace(beside=other))
    if not weights:
        live = [x for x in parameters.values() if not x.frozen]
        uses += [Refusal(x.source, _BY_ELEMENT, place, not derived) for x in live]
        for lost, with_ in (operands[:2], operands[1::-1]):
            if lost and lost.lost:
                with_data = with_ is None or with_.parameters != lost.parameters
                outweighs = with_data and not derived
                uses += [Refusal(i, lost.lost, place, outweighs) for i in sorted(lost.behind)]
    return uses, computed


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
    shared = eqn.params["dimension_numbers"][1][i] if eqn.primitive.name == "dot_general" else ()
    return x.varied and (x.scaled or any(axis not in shared for axis in x.extended))


def _read(eqn: core.JaxprEqn, i: int) -> Linear | str:
    """Reads a product whose operand `i` is the weight; returns why it is none if it is none."""
    aval: Any = eqn.outvars[0].aval
    if jnp.issubdtype(aval.dtype, jnp.complexfloating):
        return COMPLEX
    return products.READERS[eqn.primitive.name](eqn, i)


def _product(
    linear: Linear, weight: Origin, place: Place, inside: tuple[str, ...], derived: bool
) -> Product:
    linear = products.keep_apart(linear, weight.axes)
    linear, axes = products.without_copies(linear, weight.axes)
    return Product(linear, dataclasses.replace(weight, axes=axes), place, inside, derived)
