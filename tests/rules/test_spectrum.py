"""The flattened step against the singular value decomposition it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adafisher_jax import spectrum
from tests.support.hand_made import make_layer

ONE = jnp.ones(1, bool)
SHAPES = pytest.mark.parametrize("shape", [(1, 12, 20), (1, 36, 10), (6, 12, 12)])


def matrices(shape, values, seed=0):
    """Random matrices with these singular values."""
    rng = np.random.default_rng(seed)
    count, rows, columns = shape
    found = []
    for _ in range(count):
        u, _ = np.linalg.qr(rng.normal(size=(rows, len(values))))
        v, _ = np.linalg.qr(rng.normal(size=(columns, len(values))))
        found.append(u @ np.diag(values) @ v.T)
    return jnp.asarray(np.array(found))


def of(step):
    """The layer of which these matrices are the blocks."""
    return make_layer("layer", "dense", step.shape, "batch0 in0 out0")


def follow(step, times):
    """What is left of a step that is taken several times, its directions and its squares' sum."""
    where = jnp.ones(len(step), bool)
    find = jax.jit(lambda basis: spectrum.leading_excess(of(step), [step], basis, where))
    basis = spectrum.start(step.shape)
    for _ in range(times):
        cut, basis = find(basis)
    return cut.subtract(of(step), [step])[0], basis, cut.square


@SHAPES
@pytest.mark.parametrize(("leading", "rounding"), [((8, 4), 1e-1), ((100, 10), 2e-3)])
def test_a_step_repeated_has_its_leading_singular_values_cut(shape, leading, rounding, x64):
    """To the others, or to a tenth of all. Near others, the rounding of directions shows."""
    n = min(shape[1:])
    k, others = n // 2, np.array([1, 0.8, 0.6, 0.5])
    values = np.array([*np.geomspace(*leading, k), *others])
    flat, _, squares = follow(matrices(shape, values), 12)
    cap = np.sqrt(max(np.sum(others**2) / (n - k), 0.01 * np.sum(values**2) / n))
    expected = np.sort([*[cap] * k, *others, *[0] * (n - k - 4)])[::-1]
    for one, square in zip(flat, squares, strict=True):
        found = np.linalg.svd(one, compute_uv=False)
        np.testing.assert_allclose(found, expected, atol=rounding * cap)
        np.testing.assert_allclose(square, np.sum(one**2), rtol=1e-10)


@pytest.mark.parametrize("shape", [(1, 12, 20), (1, 36, 10), (6, 12, 12), (2, 200, 220)])
def test_sums_are_exact_and_nothing_grows_before_directions_have_converged(shape, x64):
    step = matrices(shape, np.linspace(3, 2, 2 * min(shape[1:]) // 3))
    for times in (1, 2):
        flat, _, squares = follow(step, times)
        for one in flat:
            assert np.linalg.norm(one, 2) < 3.0 * (1 + 1e-12)
        np.testing.assert_allclose(jnp.sum(flat**2, (1, 2)), squares, rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 12, 20), (1, 20, 12)])
def test_the_product_of_a_vector_is_that_with_what_is_left(shape, x64):
    step = matrices(shape, [9.0, 3, 1, 1, 1, 1])
    where = jnp.ones(len(step), bool)
    basis = spectrum.start(shape)
    vector = jnp.asarray(np.random.default_rng(1).normal(size=(shape[0], 1, shape[1])))
    found, _ = jax.jit(spectrum.leading_excess, static_argnums=0)(
        of(step), [step], basis, where, vector
    )
    for cut in (found, spectrum.no_excess(of(step), [step], vector)):
        (left,) = cut.subtract(of(step), [step])
        np.testing.assert_allclose(cut.pulled, vector @ left, rtol=1e-10, atol=1e-12)


def test_32_directions_are_followed_but_half_of_the_shorter_side_at_most():
    start = spectrum.start
    assert start((1, 40, 50)).shape == (1, 20, 40)
    assert start((3, 500, 64)).shape == (3, 32, 64)
    assert start((1, 1024, 512)).shape == (1, 32, 512)
    assert start((2, 36, 10)).shape == (2, 5, 10)
    assert start((1, 3, 4)).shape == (1, 1, 3)
    assert start((1, 7, 1)) is None


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e25])
def test_steps_are_finite_whatever_their_size(size):
    """Down to where squares vanish, and up to where they are infinite: then nothing is cut."""
    step = jnp.float32(size) * matrices((1, 12, 20), [10.0, 1, 1, 1, 1, 1]).astype(jnp.float32)
    flat, basis, _ = follow(step, 3)
    assert jnp.all(jnp.isfinite(flat))
    assert np.linalg.matrix_rank(basis[0].astype(float)) == 6
    if size == 1.0:
        assert np.linalg.norm(flat[0], 2) < 1.1
    else:
        np.testing.assert_allclose(flat, step, rtol=1e-6)


@pytest.mark.parametrize("ratio", [1.2, 2.0])
def test_small_and_large_steps_are_cut_alike(ratio):
    """Squares of their weaker directions vanish much earlier than those of the whole step."""
    step = matrices((1, 96, 80), np.maximum(ratio ** -np.arange(80.0), 1e-4)).astype(jnp.float32)
    expected, _, square = follow(step, 5)
    for size in np.float32([1e-15, 1e-12, 1e12, 1e15]):
        flat, _, squares = follow(size * step, 5)
        np.testing.assert_allclose(flat / size, expected, atol=2e-5)
        np.testing.assert_allclose(squares / size / size, square, rtol=1e-2)
    for exponent in range(-22, -15):
        flat, *_ = follow(np.float32(10.0**exponent) * step, 5)
        assert jnp.all(jnp.isfinite(flat))


def test_directions_without_anything_in_them_do_not_follow_rounding():
    """Steps of rank one: whichever way they are rounded, the other directions are the same."""
    step = matrices((1, 12, 20), [1.0]).astype(jnp.float32)
    rounded = step * (1 + 1e-7 * jax.random.normal(jax.random.key(0), step.shape))
    one, other = (follow(x, 5)[1] for x in (step, rounded))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_directions_without_anything_in_them_are_not_lost_at_once():
    """A step of rank one leaves the others what they were, where it has nothing."""
    _, basis, _ = follow(matrices((1, 12, 20), [1.0]).astype(jnp.float32), 1)
    rows = np.asarray(basis[0], np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.linalg.matrix_rank(rows, 3e-2) == 6


@pytest.mark.parametrize("rank", [1, 3])
def test_of_a_matrix_of_low_rank_no_rounding_is_left_as_a_step(rank):
    step = matrices((1, 40, 50), [1.0] * rank).astype(jnp.float32)
    flat, _, squares = follow(step, 3)
    left, *others = np.split(np.linalg.svd(flat[0], compute_uv=False), [rank])
    np.testing.assert_allclose(left, 0.1 * np.sqrt(rank / 40), rtol=1e-2)
    assert np.max(others) < 1e-3 * left[0]
    assert 0.999 < squares[0] / np.sum(left**2) < 2


@pytest.mark.parametrize("shape", [(1, 30, 24), (1, 256, 300)])
@pytest.mark.parametrize("ratio", [1.3, 2.0, 6.0])
def test_single_precision_is_enough_for_steep_spectra(shape, ratio):
    """Directions would overlap, or never be found, where products lost what is small in them."""
    n = min(shape[1:])
    values = np.maximum(ratio ** -np.arange(n), 1e-3)
    step = matrices(shape, values).astype(jnp.float32)
    for times in (1, 2, 100):
        flat, _, squares = follow(step, times)
        expected, total = (jnp.sum(jnp.square(x)) for x in (flat, step))
        # Rows that overlap are left short: until they have parted, less is cut than is there.
        most = 1.001 if times == 100 else 1.6
        rounding = 3e-6 * total  # of what is left of it
        assert expected * 0.995 - rounding < squares[0] < expected * most + rounding
    k = spectrum.directions(n)
    rest = np.sqrt(np.sum(values[k:] ** 2) / (n - k))
    floor = np.sqrt(1e-2 * np.sum(values**2) / n)
    if ratio > 1.5:  # the closer they are to each other, the longer it takes
        largest = np.linalg.svd(flat[0], compute_uv=False)[0]
        np.testing.assert_allclose(largest, max(rest, floor, values[k]), rtol=5e-2)


@pytest.mark.parametrize("k", [5, 16, 17, 24, 31, 32])
def test_directions_are_orthonormal_however_many_there_are(k, x64):
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(3, k, 100)))
    found = spectrum._orthonormal(vectors)
    np.testing.assert_allclose(found @ found.mT, np.broadcast_to(np.eye(k), (3, k, k)), atol=1e-12)
    onto = np.asarray(vectors @ found.mT)  # as Gram and Schmidt find them, one by one
    np.testing.assert_allclose(onto, np.tril(onto), atol=1e-10)


def test_matrices_that_are_left_out_are_as_they_were():
    step = matrices((2, 12, 9), [9.0, 1, 1, 1, 1, 1])
    basis = spectrum.start(step.shape)
    cut, after = spectrum.leading_excess(of(step), [step], basis, jnp.array([True, False]))
    (flat,) = cut.subtract(of(step), [step])
    np.testing.assert_array_equal(flat[1], step[1])
    assert np.linalg.matrix_rank(np.concatenate([after[1], basis[1]]), 1e-6) == 4
    assert jnp.max(jnp.abs(flat[0] - step[0])) > 0.1
