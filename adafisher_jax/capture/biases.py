"""Finds the bias of a product: a parameter that is added to the output along its own axes."""

from adafisher_jax.capture import pieces
from adafisher_jax.capture.found import Found, Product
from adafisher_jax.capture.origins import COMPUTED, Origin, Origins, computed_from


def add_to_output(operands: Origins, found: Found) -> Origin | None:
    """Returns the origin of a sum with a product's output; notes an added parameter as its bias.

    The bias of a sum of two products belongs to the first.
    """
    first, *others = [x for x in operands if x and x.is_output]
    left = [x for x in operands if not (x and x.is_parameter and _pair(first, x, found))]
    return first if others else computed_from(left, COMPUTED)


def _pair(output: Origin, bias: Origin, found: Found) -> bool:
    """Makes `bias` that of the product with this output; returns whether it can be."""
    paired = False
    for i, product in enumerate(found):
        if isinstance(product, Product) and product.place == output.source:
            axes = _bias_axes(product, output, bias)
            if axes is not None and product.bias is None:
                found[i], paired = product._replace(bias=bias, bias_axes=axes), True
    return paired


def _bias_axes(
    product: Product, output: Origin, bias: Origin
) -> tuple[tuple[int, int], ...] | None:
    """Pairs the axes of a bias longer than one with those of the weight; None if it is no bias."""
    weight, outputs = product.weight, product.linear.outputs
    slices = [[(s.by, s.inner) for s in x.away] for x in (weight, bias)]
    if output.sliced or bias.frozen != weight.frozen or slices[0] != slices[1]:
        return None
    if product.linear.kind == "embedding":
        return None
    if bias.multiplied or (weight.multiplied and not weight.mixed):
        return None  # the input of a bias is one, in the units of its weight's inputs
    of_output = [() if i is None else weight.axes[i] for i in outputs]
    matched: dict[int, int] = {}
    for axis, of_bias in zip(output.axes, bias.axes, strict=True):
        roles = {outputs[p.axis] is None for p in axis if p.axis is not None}
        if len(roles) > 1:
            return None
        of_bias = tuple(p for p in of_bias if p.size > 1)
        if roles != {False}:  # rows
            if any(p.axis is not None for p in of_bias):
                return None
            continue
        of_weight = pieces.within(tuple(of_output), axis)
        of_weight = of_weight and tuple(p for p in of_weight if p.size > 1)
        if of_weight is None or len(of_weight) != len(of_bias):
            return None
        for mine, its in zip(of_bias, of_weight, strict=True):
            if mine.axis is None or its.axis is None or mine[1:] != its[1:]:
                return None
            if matched.setdefault(mine.axis, its.axis) != its.axis:
                return None
    pairs = [*matched.items(), *zip(bias.stacks, weight.stacks, strict=False)]
    if any(bias.range_of(mine) != weight.range_of(its) for mine, its in pairs):
        return None
    return tuple(sorted(matched.items()))
