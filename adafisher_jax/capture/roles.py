"""Names the axes of a whole parameter by their roles in a layer that sees another form of it."""

from adafisher_jax.capture.origins import Origin
from adafisher_jax.factors import Axes
from adafisher_jax.statistics import numbered


def named_axes(inner: Axes, origin: Origin, rank: int) -> Axes | None:
    """Names the axes of a whole parameter, given the names in the array that a layer sees.

    Returns:
      The names, or None if one axis has parts of two roles.
    """
    if all(len(axis) == 1 and axis[0].inner == 1 for axis in origin.axes):
        names = {axis[0].axis: name for axis, name in zip(origin.axes, inner, strict=True)}
        names |= origin.stacks
        if len(names) == rank == len(origin.axes) + len(origin.away):
            return tuple(names[axis] for axis in range(rank))
    return source_axes(inner, origin, rank)


def source_axes(inner: Axes, origin: Origin, rank: int, apart: int = 1) -> Axes | None:
    """Names the axes of a whole parameter as `named_axes`, also if axes were split or merged.

    The names are numbered anew. The outermost `apart` entries of an output axis count as
    independent maps (`"batch0"`).
    """
    roles: dict[int, set[str]] = {i: set() for i in range(rank)}
    for axis, name in zip(origin.axes, inner, strict=True):
        role, before = name.rstrip("0123456789"), 1
        for piece in axis:
            if piece.axis is not None:
                roles[piece.axis].add("batch" if role == "out" and before < apart else role)
            before *= piece.size
    for i in origin.stacks:
        roles[i] = (roles[i] - {"batch"}) | {"stack"}  # blocks, whoever takes them apart
    if any(len(found) > 1 for found in roles.values()):
        return None
    # An axis of length one that a reshape removed may have any role; it counts as an output axis.
    found = numbered([next(iter(roles[i]), "out") for i in range(rank)])
    return tuple(origin.stacks.get(i, name) for i, name in enumerate(found))
