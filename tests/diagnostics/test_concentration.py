"""How diagonal a matrix is: known answers, NumPy's, and the theorems that bound eigenvalues."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adafisher_jax.diagnostics import (
    add_noise,
    diagonal_energy,
    eigenvalues,
    fourier,
    gershgorin,
    kaiser,
    signal_to_noise,
)

RNG = np.random.default_rng(0)
N = 6
ROWS = RNG.normal(size=(20, N)) + 1


def toeplitz(values):
    """The symmetric matrix whose entries depend on their distance from the diagonal."""
    places = np.arange(len(values))
    return np.asarray(values)[np.abs(places[:, None] - places)]


MATRICES = {
    "diagonal": np.diag([5.0, 3.0, 2.0, 1.0, 0.5, 0.0]),
    "identity": np.eye(N),
    "constant": np.full((N, N), 2.0),
    "Toeplitz": toeplitz([4.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
    "rank one": np.outer(ROWS[0], ROWS[0]),
    "second moments": ROWS.T @ ROWS / len(ROWS),
    "correlations": np.corrcoef(ROWS.T),
    "indefinite": ROWS[:N] + ROWS[:N].T,
}
# Scales at which a square is no float32, and none that rounding would show.
SCALES = [1.0, 2.0**-100, 2.0**100]

every_matrix = pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
every_scale = pytest.mark.parametrize("scale", SCALES)
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)


def single(matrix, scale=1.0):
    return jnp.asarray(matrix * scale, jnp.float32)


def sums(matrix):
    """Of the squares on the diagonal, and above it."""
    n = len(matrix)
    above = sum(matrix[i, j] ** 2 for i in range(n) for j in range(i + 1, n))
    return sum(matrix[i, i] ** 2 for i in range(n)), above


@every_scale
@every_matrix
def test_diagonal_energy_and_signal_to_noise(matrix, scale):
    on, above = sums(matrix)
    close(diagonal_energy(single(matrix, scale)), on / (on + 2 * above))
    with np.errstate(divide="ignore"):
        close(signal_to_noise(single(matrix, scale)), 10 * np.log10(on / np.float64(above)))


@pytest.mark.parametrize(
    ("name", "energy", "decibels"),
    [
        ("diagonal", 1.0, np.inf),
        ("constant", 1 / 6, 10 * np.log10(6 / 15)),
        ("Toeplitz", 96 / (96 + 10), 10 * np.log10(96 / 5)),
    ],
)
def test_known_answers(name, energy, decibels):
    close(diagonal_energy(single(MATRICES[name])), energy)
    close(signal_to_noise(single(MATRICES[name])), decibels)


def test_a_rank_one_matrix_has_the_energy_of_its_vector_s_fourth_powers():
    v = np.array([3.0, 1.0, 1.0])
    close(diagonal_energy(single(np.outer(v, v))), (81 + 1 + 1) / (9 + 1 + 1) ** 2)


def test_a_matrix_of_zeros_has_no_share():
    assert jnp.isnan(diagonal_energy(jnp.zeros((3, 3))))
    assert jnp.isnan(signal_to_noise(jnp.zeros((3, 3))))


@every_scale
@every_matrix
def test_discs_hold_every_eigenvalue(matrix, scale):
    discs = gershgorin(single(matrix, scale))
    np.testing.assert_array_equal(discs.centers, np.diag(single(matrix, scale)))
    radii = np.asarray(discs.radii) / scale
    off = np.abs(matrix) * (1 - np.eye(N))
    close(radii, off.sum(1))
    values = np.linalg.eigvalsh(matrix)
    rounding = 1e-5 * np.abs(matrix).max()
    within = np.abs(values[:, None] - np.diag(matrix)) <= radii + rounding
    assert within.any(1).all()
    low, high = (np.asarray(bound) / scale for bound in discs.bounds)
    close(low, np.min(np.diag(matrix) - off.sum(1)))
    close(high, np.max(np.diag(matrix) + off.sum(1)))
    assert low - rounding <= values.min()
    assert values.max() <= high + rounding


def test_a_radius_beside_a_large_center_is_not_lost():
    """In float32 the sum of the row would be the center."""
    discs = gershgorin(single(np.array([[1.0, 1e-9], [1e-9, 1e-10]])))
    np.testing.assert_allclose(discs.radii, [1e-9, 1e-9], rtol=1e-6)


@every_scale
@every_matrix
def test_eigenvalues_are_those_of_numpy_from_the_largest(matrix, scale):
    found = eigenvalues(single(matrix, scale)) / scale
    close(found, np.linalg.eigvalsh(matrix)[::-1], atol=2e-5 * np.abs(matrix).max())


def test_kaiser_keeps_what_is_above_the_average():
    np.testing.assert_array_equal(
        kaiser(eigenvalues(single(MATRICES["diagonal"]))), [True, True, True, False, False, False]
    )
    # Of correlations the average is 1: the rule in its usual form.
    values = np.linalg.eigvalsh(MATRICES["correlations"])[::-1]
    found = kaiser(eigenvalues(single(MATRICES["correlations"])))
    np.testing.assert_array_equal(found, values > 1)
    assert 0 < np.sum(found) < N
    tiny = eigenvalues(single(MATRICES["correlations"], 2.0**-100))
    np.testing.assert_array_equal(kaiser(tiny), found)


@every_scale
@every_matrix
def test_fourier_is_numpys_with_zero_frequency_in_the_middle(matrix, scale):
    found = fourier(single(matrix, scale)) / scale
    expected = np.fft.fftshift(np.abs(np.fft.fft2(matrix)))
    close(found, expected, atol=1e-5 * expected.max())
    np.testing.assert_allclose(found[N // 2, N // 2], np.abs(matrix.sum()), rtol=1e-5, atol=1e-5)


def test_a_diagonal_is_a_line_of_constant_frequency_sum():
    """And a constant matrix nothing but the middle."""
    found = np.asarray(fourier(single(MATRICES["diagonal"])))
    transform = np.abs(np.fft.fft(np.diag(MATRICES["diagonal"])))
    for u in range(N):
        for v in range(N):
            close(found[u, v], transform[(u + v - 2 * (N // 2)) % N])
    found = np.asarray(fourier(single(MATRICES["constant"])))
    close(found, np.where(np.arange(N * N).reshape(N, N) == N // 2 * (N + 1), 72, 0), atol=1e-4)


# Noise.


def noise_of(n=300, scale=1e-3, seed=0):
    """The noise alone, beside a diagonal that stays as it is."""
    diagonal = jnp.arange(1.0, n + 1)
    noisy = add_noise(jnp.diag(diagonal), scale, jax.random.key(seed))
    np.testing.assert_array_equal(jnp.diagonal(noisy), diagonal)
    return np.asarray(noisy - jnp.diag(diagonal))


def test_noise_is_symmetric_and_normal_with_its_deviation():
    noise = noise_of()
    np.testing.assert_array_equal(noise, noise.T)
    above = noise[np.triu_indices(300, 1)] / 1e-3
    many = len(above) ** 0.5
    assert abs(above.mean()) < 4 / many
    assert abs(above.std() - 1) < 4 / many
    # As many beyond one and two deviations as a normal distribution has.
    for deviations, share in ((1, 0.3173), (2, 0.0455)):
        assert abs(np.mean(np.abs(above) > deviations) - share) < 4 * share**0.5 / many
    assert not np.any(noise == noise_of(seed=1), where=~np.eye(300, dtype=bool))


def test_noise_grows_with_its_scale():
    np.testing.assert_allclose(noise_of(20, 0.5), 2 * noise_of(20, 0.25), rtol=1e-4, atol=1e-6)
    assert not np.any(noise_of(20, 0.0))


@every_matrix
def test_no_eigenvalue_moves_by_more_than_the_noise_s_norm(matrix, x64):
    matrix = jnp.asarray(matrix)
    noisy = add_noise(matrix, 0.1, jax.random.key(2))
    moved = np.abs(eigenvalues(noisy) - eigenvalues(matrix))
    norm = np.linalg.norm(noisy - matrix, 2)
    assert 0 < moved.max() <= norm * (1 + 1e-12)


# Stacks.


@pytest.mark.parametrize(
    "function",
    [
        diagonal_energy, eigenvalues, fourier, gershgorin, signal_to_noise,
        lambda m: gershgorin(m).bounds, lambda m: kaiser(eigenvalues(m)),
        lambda m: add_noise(m, 1e-3, jax.random.key(0)),
    ],
)  # fmt: skip
def test_a_stack_is_each_by_itself(function):
    matrices = [single(m, 2.0**-i) for i, m in enumerate(MATRICES.values())]
    found = jax.jit(jax.vmap(function))(jnp.stack(matrices))
    for i, matrix in enumerate(matrices):
        one = jax.tree.map(lambda leaf: leaf[i], found)
        jax.tree.map(close, one, function(matrix))


def test_the_bounds_of_a_stack_s_discs_are_each_matrix_s():
    stack = jnp.stack([single(MATRICES["Toeplitz"]), single(MATRICES["diagonal"])])
    low, high = jax.vmap(gershgorin)(stack).bounds
    assert (low.tolist(), high.tolist()) == ([2.0, 0.0], [6.0, 5.0])
