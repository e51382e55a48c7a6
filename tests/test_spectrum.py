"""The flattened step against the singular value decomposition it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adafisher_jax import spectrum
from tests.hand_made import LAYERS, make_layer
from tests.test_rules import blocks

WIDE = make_layer("wide", "dense", (12, 20), "in0 out0")
TALL = make_layer("tall", "conv", (3, 3, 4, 10), "in0 in1 in2 out0")
BLOCKS = make_layer("blocks", "dense", (2, 12, 3, 9), "stack0 in0 batch0 out0")


def matrix(layer, values, seed=0):
    """Random matrices with these singular values, as the weight of a layer."""
    rng = np.random.default_rng(seed)
    count = layer.extent(layer.blocks)
    ins, outs = layer.extent(layer.ins), layer.extent(layer.outs)
    values = np.broadcast_to(values, (count, len(values)))
    found = []
    for one in values:
        u, _ = np.linalg.qr(rng.normal(size=(ins, len(one))))
        v, _ = np.linalg.qr(rng.normal(size=(outs, len(one))))
        found.append(u @ np.diag(one) @ v.T)
    order = [*layer.blocks, *layer.ins, *layer.outs]
    shaped = np.reshape(found, [layer.shape[i] for i in order])
    return jnp.asarray(shaped.transpose(np.argsort(order)))


def follow(layer, step, times):
    """The directions after this step was taken several times."""
    everywhere = jnp.ones(layer.slot_shape, bool)
    find = jax.jit(lambda basis: spectrum.leading_excess(layer, step, basis, everywhere))
    basis = spectrum.start(layer, step.dtype)
    for _ in range(times):
        excess, basis, squares = find(basis)
    return excess.taken_from(step), basis, squares


@pytest.mark.parametrize("layer", [WIDE, TALL, BLOCKS], ids=lambda layer: layer.path)
def test_a_step_repeated_has_its_leading_singular_values_cut_to_the_others(layer, x64):
    values = np.array([100.0, 50, 20, 10, 1, 0.8, 0.6, 0.5, 0.1])
    n = layer.extent(layer.shorter_side)
    step = matrix(layer, values)
    flat, _, squares = follow(layer, step, 12)
    cap = np.sqrt(np.sum(values[4:] ** 2) / (n - 4))
    expected = np.sort([*[cap] * 4, *values[4:], *[0] * (n - 9)])[::-1]
    for block, square in zip(blocks(flat, layer.axes), np.ravel(squares), strict=True):
        np.testing.assert_allclose(np.linalg.svd(block, compute_uv=False), expected, atol=1e-5)
        np.testing.assert_allclose(square, np.sum(block**2), rtol=1e-10)


def test_directions_stay_orthonormal_and_sums_exact_before_they_have_converged(x64):
    step = matrix(WIDE, [3.0, 2.9, 2.8, 2.7, 2.6, 2.5])
    for times in (1, 2):
        flat, basis, squares = follow(WIDE, step, times)
        u = basis[:, 0]
        np.testing.assert_allclose(u.T @ u, np.eye(4), atol=1e-12)
        np.testing.assert_allclose(jnp.sum(flat**2), squares[0, 0], rtol=1e-12)


def test_the_shorter_side_is_followed_and_half_of_it_at_most():
    assert spectrum.start(WIDE, jnp.float32).shape == (12, 1, 4)
    assert spectrum.start(TALL, jnp.float32).shape == (1, 1, 1, 10, 4)
    assert spectrum.start(LAYERS["dense"], jnp.float32).shape == (3, 1, 1)
    column = make_layer("column", "dense", (7, 1), "in0 out0")
    assert spectrum.start(column, jnp.float32) is None
    assert spectrum.start(WIDE, jnp.complex64) is None


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e25])
def test_any_size_gives_finite_steps_and_the_same_shape_of_them(size):
    """Down to where squares vanish, and up to where they are infinite: then nothing is cut."""
    step = jnp.float32(size) * matrix(WIDE, [100.0, 1, 1, 1, 1, 1]).astype(jnp.float32)
    flat, basis, _ = follow(WIDE, step, 3)
    assert jnp.all(jnp.isfinite(flat))
    np.testing.assert_allclose(basis[:, 0].T @ basis[:, 0], np.eye(4), atol=1e-5)
    if size in (0.0, 1e-30, 1e25):
        np.testing.assert_allclose(flat, step, rtol=1e-6)
    else:
        assert np.linalg.norm(flat, 2) < 2


def test_directions_without_anything_in_them_do_not_follow_rounding():
    """Steps of rank one: whichever way they are rounded, the other directions are the same."""
    step = matrix(WIDE, [1.0]).astype(jnp.float32)
    rounded = step * (1 + 1e-7 * jax.random.normal(jax.random.key(0), step.shape))
    one, other = (follow(WIDE, x, 5)[1] for x in (step, rounded))
    np.testing.assert_allclose(one, other, atol=2e-2)


def test_blocks_that_are_left_out_are_as_they_were():
    step = matrix(BLOCKS, [9.0, 1, 1, 1, 1, 1])
    basis = spectrum.start(BLOCKS, step.dtype)
    where = jnp.zeros(BLOCKS.slot_shape, bool).at[0].set(True)
    excess, after, _ = spectrum.leading_excess(BLOCKS, step, basis, where)
    flat = excess.taken_from(step)
    np.testing.assert_array_equal(flat[1], step[1])
    np.testing.assert_allclose(abs(after[1]), abs(basis[1]), atol=1e-6)
    assert jnp.max(jnp.abs(flat[0] - step[0])) > 0.1


@pytest.mark.parametrize("layer", [WIDE, TALL, BLOCKS], ids=lambda layer: layer.path)
def test_an_excess_over_inputs_is_that_of_its_matrix(layer, x64):
    step = matrix(layer, [9.0, 3, 1, 1, 1, 1])
    everywhere = jnp.ones(layer.slot_shape, bool)
    basis = spectrum.start(layer, step.dtype)
    excess, *_ = spectrum.leading_excess(layer, step, basis, everywhere)
    shape = [1 if i in layer.outs else n for i, n in enumerate(layer.shape)]
    vector = jnp.asarray(np.random.default_rng(1).normal(size=shape))
    whole = step - excess.taken_from(step)
    expected = jnp.sum(vector * whole, layer.ins, keepdims=True)
    np.testing.assert_allclose(excess.over_inputs(layer, vector), expected, rtol=1e-10, atol=1e-12)
