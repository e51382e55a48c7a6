"""How the axes of an array follow from the axes of the array it came from (the *source*).

A reshape splits and merges axes. So an axis of an array is written as its *pieces*. A piece is a
run of digits of the index along one axis of the source:

| an array made of a source (8, 6) | its axes |
| --- | --- |
| as it is | `((Piece(0, 1, 8),), (Piece(1, 1, 6),))` |
| transposed | `((Piece(1, 1, 6),), (Piece(0, 1, 8),))` |
| reshaped to (8, 2, 3) | `((Piece(0, 1, 8),), (Piece(1, 3, 2),), (Piece(1, 1, 3),))` |
| reshaped to (48,) | `((Piece(0, 1, 8), Piece(1, 1, 6)),)` |
| broadcast to (5, 8, 6) | `((Piece(None, 1, 5),), (Piece(0, 1, 8),), (Piece(1, 1, 6),))` |
| with an axis of size one before | `((), (Piece(0, 1, 8),), (Piece(1, 1, 6),))` |
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """A part of an axis of the source: the digit `index // inner % size` of the index along it.

    Attributes:
      axis: the axis of the source; None for copies along an axis that the source does not have.
      inner: the distance between neighbouring entries along that axis.
      size: the number of entries.
    """

    axis: int | None
    inner: int
    size: int


Axis = tuple[Piece, ...]
Axes = tuple[Axis, ...]


def whole(shape: Sequence[int]) -> Axes:
    """Returns the axes of the source itself."""
    return tuple((Piece(i, 1, n),) for i, n in enumerate(shape))


def repeated(axis: Axis) -> bool:
    """Whether the array holds copies along an axis."""
    return any(piece.axis is None for piece in axis)


def size(axis: Axis) -> int:
    """Returns the length of an axis."""
    return math.prod(piece.size for piece in axis)


def broadcast(axes: Axes, shape: Sequence[int], kept: Sequence[int]) -> Axes:
    """Returns the axes after a broadcast to `shape`; old axis `i` becomes axis `kept[i]`.

    Example:
      >>> broadcast(whole((1, 6)), (5, 6), (0, 1))
      ((Piece(axis=None, inner=1, size=5),), (Piece(axis=1, inner=1, size=6),))
    """
    old = dict(zip(kept, axes, strict=True))
    return tuple(
        old[i] if i in old and size(old[i]) == n else _copies(n) for i, n in enumerate(shape)
    )


def _copies(size: int) -> Axis:
    return () if size == 1 else (Piece(None, 1, size),)


def reshape(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """Returns the axes after a reshape; None if an axis would be no product of pieces.

    Example:
      >>> reshape(whole((8, 6)), (4, 2, 6))
      ((Piece(axis=0, inner=2, size=4),), (Piece(axis=0, inner=1, size=2),),
       (Piece(axis=1, inner=1, size=6),))
    """
    left = [piece for axis in axes for piece in axis]
    found = []
    for wanted in shape:
        taken: list[Piece] = []
        have = 1
        while left and (have < wanted or (wanted == 1 and not taken and left[0].size == 1)):
            piece, missing = left.pop(0), wanted // have
            if not piece.size or wanted % have or piece.size % min(piece.size, missing):
                return None
            if piece.size > missing:
                rest = piece.size // missing
                left.insert(0, piece._replace(size=rest))
                piece = piece._replace(inner=piece.inner * rest, size=missing)
            taken.append(piece)
            have *= piece.size
        if have != wanted:
            return None
        found.append(_joined(p for p in taken if p.size > 1 or wanted == 1))
    return tuple(found)


def _joined(taken: Iterable[Piece]) -> Axis:
    """Returns the pieces with neighbours of one axis joined."""
    joined: list[Piece] = []
    for piece in taken:
        last = joined[-1] if joined else None
        if last and last.axis == piece.axis and last.inner == piece.inner * piece.size:
            piece = Piece(piece.axis, piece.inner, last.size * piece.size)
            joined.pop()
        joined.append(piece)
    return tuple(joined)


def within(outer: Axes, axis: Axis) -> Axis | None:
    """Returns pieces of an array's axes as pieces of its source; None if they cannot be told.

    Example:
      >>> within(reshape(whole((8, 6)), (48,)), (Piece(0, 1, 48),))
      (Piece(axis=0, inner=1, size=8), Piece(axis=1, inner=1, size=6))
      >>> within(whole((8, 6)), (Piece(1, 3, 2),))
      (Piece(axis=1, inner=3, size=2),)
    """
    found: list[Piece] = []
    for piece in axis:
        if piece.axis is None:
            return None
        source = outer[piece.axis]
        if size(source) == piece.size:
            found += source
            continue
        split = reshape(
            (source,), (size(source) // (piece.size * piece.inner), piece.size, piece.inner)
        )
        if split is None:
            return None
        found += split[1]
    return _joined(found)
