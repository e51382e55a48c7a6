"""The arithmetic of axes, against the indices of an array that says where its entries are from."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np

from adafisher_jax.capture import pieces
from adafisher_jax.capture.pieces import Piece


def indices(axes, shape):
    """Which entry of its source each entry of an array with these axes is."""
    source = np.arange(math.prod(shape)).reshape(shape)
    sizes = [pieces.size(axis) for axis in axes]
    grid = np.indices(sizes)
    places = [np.zeros(sizes, int) for _ in shape]
    for axis, at in zip(axes, grid, strict=True):
        for piece in reversed(axis):
            if piece.axis is not None:
                places[piece.axis] += at % piece.size * piece.inner
            at = at // piece.size
    return source[tuple(places)]


def factors_of(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def shapes_of(draw, n):
    """A shape of so many entries."""
    shape = []
    while n > 1 and len(shape) < 4:
        shape.append(draw(st.sampled_from(factors_of(n))))
        n //= shape[-1]
    return (*shape, n) if n > 1 or draw(st.booleans()) else tuple(shape)


@st.composite
def changes(draw):
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    steps, rank, n = [], len(shape), math.prod(shape)
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            steps.append(("transpose", tuple(draw(st.permutations(range(rank))))))
        else:
            to = draw(shapes_of(n))
            rank = len(to)
            steps.append(("reshape", to))
    return shape, steps


@hypothesis.given(changes())
@hypothesis.settings(deadline=None, max_examples=300)
def test_axes_after_reshapes_and_transposes(change):
    shape, steps = change
    axes = pieces.whole(shape)
    array = np.arange(math.prod(shape)).reshape(shape)
    for name, argument in steps:
        if name == "transpose":
            axes, array = tuple(axes[i] for i in argument), array.transpose(argument)
        else:
            before, array = axes, array.reshape(argument)
            axes = pieces.reshape(before, argument)
            if axes is None:  # a digit of one axis and a part of another's would be one axis
                assert len(array.shape) >= 1
                return
        assert tuple(map(pieces.size, axes)) == array.shape
        np.testing.assert_array_equal(indices(axes, shape), array)


def test_a_reshape_across_axes_is_none():
    assert pieces.reshape(pieces.whole((4, 9)), (6, 6)) is None
    assert pieces.reshape(pieces.whole((2, 9)), (3, 6)) is None
    assert pieces.reshape(pieces.whole((6, 4)), (8, 3)) is None
    assert pieces.reshape(pieces.whole((0, 4)), (4, 0)) is None


def test_a_split_that_is_merged_again_is_the_axis():
    split = pieces.reshape(pieces.whole((24,)), (2, 3, 4))
    assert pieces.reshape(split, (6, 4)) == ((Piece(0, 4, 6),), (Piece(0, 1, 4),))
    assert pieces.reshape(split, (24,)) == pieces.whole((24,))


def test_copies_stay_copies():
    axes = pieces.broadcast(pieces.whole((3,)), (4, 3), (1,))
    assert pieces.repeated(axes[0])
    assert not pieces.repeated(axes[1])
    (merged,) = pieces.reshape(axes, (12,))
    assert pieces.repeated(merged)
    assert pieces.broadcast(pieces.whole((1, 3)), (1, 3), (0, 1)) == pieces.whole((1, 3))


def test_pieces_within_an_array():
    outer = pieces.reshape(pieces.whole((8, 6)), (48,))
    assert pieces.within(outer, (Piece(0, 6, 8),)) == (Piece(0, 1, 8),)
    assert pieces.within(outer, (Piece(0, 1, 6),)) == (Piece(1, 1, 6),)
    assert pieces.within(outer, (Piece(None, 1, 6),)) is None
    assert pieces.within(pieces.whole((1, 0)), (Piece(0, 1, 1), Piece(1, 1, 0))) is not None
