r"""Measures how diagonal a symmetric matrix is, such as a whole Kronecker factor.

The analysis is that of arXiv:2405.16397, section 3.1 and appendix A.1, and of the thesis,
arXiv:2504.20096. It finds that factors concentrate on their diagonal, and that noise beside the
diagonal hardly moves their eigenvalues. Every function takes an array (n, n), and works under
`jax.vmap` for a stack of arrays.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def diagonal_energy(matrix: jax.Array) -> jax.Array:
    r"""Returns the diagonal's share of the squared Frobenius norm, in [0, 1].

    .. math:: \sum_i M_{ii}^2 \Big/ \sum_{ij} M_{ij}^2

    The share is 1 for a diagonal matrix, and 1/n for a matrix of equal entries.

    Example:
      >>> import jax.numpy as jnp
      >>> diagonal_energy(jnp.array([[2.0, 1.0], [1.0, 0.0]])).round(4).item()
      0.6667...
    """
    scaled = _unit(matrix)
    return jnp.sum(jnp.square(jnp.diagonal(scaled))) / jnp.sum(jnp.square(scaled))


class Discs(NamedTuple):
    """Gershgorin's discs of a symmetric matrix, which are intervals.

    Attributes:
      centers: the diagonal, (n,).
      radii: the sums of the other entries' absolute values in each row, (n,).
    """

    centers: jax.Array
    radii: jax.Array

    @property
    def bounds(self) -> tuple[jax.Array, jax.Array]:
        """The two bounds between which all eigenvalues lie."""
        return jnp.min(self.centers - self.radii, -1), jnp.max(self.centers + self.radii, -1)


def gershgorin(matrix: jax.Array) -> Discs:
    r"""Returns Gershgorin's discs, whose union holds all eigenvalues.

    .. math:: |\lambda - M_{ii}| \le R_i = \sum_{j \ne i} |M_{ij}|

    Example:
      >>> import jax.numpy as jnp
      >>> discs = gershgorin(jnp.array([[4.0, 1.0], [1.0, 2.0]]))
      >>> [bound.item() for bound in discs.bounds]
      [1.0, 5.0]
    """
    centers = jnp.diagonal(matrix)
    return Discs(centers, jnp.sum(jnp.abs(matrix - jnp.diag(centers)), 1))


def add_noise(matrix: jax.Array, scale: jax.typing.ArrayLike, key: jax.Array) -> jax.Array:
    r"""Returns the matrix with noise beside its diagonal; the diagonal does not change.

    .. math:: M + E, \qquad E_{ij} = E_{ji} \sim \mathcal N(0, \sigma^2), \qquad E_{ii} = 0

    By Weyl's inequality no eigenvalue moves by more than :math:`\|E\|_2`.

    Args:
      matrix: a symmetric matrix, (n, n).
      scale: the standard deviation σ (1e-3 in the publication).
      key: a key of `jax.random`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> noisy = add_noise(jnp.eye(2), 0.1, jax.random.key(0))
      >>> bool((noisy == noisy.T).all()), jnp.diagonal(noisy).tolist()
      (True, [1.0, 1.0])
    """
    upper = jnp.triu(scale * jax.random.normal(key, matrix.shape, matrix.dtype), 1)
    return matrix + upper + upper.T


def eigenvalues(matrix: jax.Array) -> jax.Array:
    """Returns the eigenvalues of a symmetric matrix, the largest first, (n,).

    Example:
      >>> import jax.numpy as jnp
      >>> eigenvalues(jnp.array([[2.0, 1.0], [1.0, 2.0]])).round(4).tolist()
      [3.0, 1.0]
    """
    return jnp.linalg.eigvalsh(matrix)[::-1]


def kaiser(values: jax.Array) -> jax.Array:
    r"""Returns which eigenvalues the Kaiser rule keeps: those above their average, (n,).

    .. math:: \lambda_i > \frac1n \sum_j \lambda_j

    The usual form of the rule is for a correlation matrix, whose eigenvalues average to 1.

    Example:
      >>> import jax.numpy as jnp
      >>> kaiser(jnp.array([5.0, 2.0, 1.0, 0.0])).tolist()
      [True, False, False, False]
    """
    return values > jnp.mean(values)


def fourier(matrix: jax.Array) -> jax.Array:
    r"""Returns the magnitudes of the 2-D discrete Fourier transform, (n, n), frequency 0 centred.

    .. math:: |\mathcal F_{uv}| = \Big|\sum_{jk} M_{jk}\, e^{-2 \pi i\,(u j + v k)/n}\Big|

    For a diagonal matrix they are constant along the lines :math:`u + v` = const, so a line across
    the middle shows a diagonal.

    Example:
      >>> import jax.numpy as jnp
      >>> fourier(jnp.eye(3)).round(4).tolist()
      [[0.0, 0.0, 3.0], [0.0, 3.0, 0.0], [3.0, 0.0, 0.0]]
    """
    return jnp.fft.fftshift(jnp.abs(jnp.fft.fft2(matrix)))


def signal_to_noise(matrix: jax.Array) -> jax.Array:
    r"""Returns the ratio of the diagonal to the entries above it, in decibels.

    .. math:: 10 \log_{10} \Big(\sum_i M_{ii}^2 \Big/ \sum_{i < j} M_{ij}^2\Big)

    The ratio is infinite for a diagonal matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> signal_to_noise(jnp.array([[3.0, 1.0], [1.0, 1.0]])).round(4).item()
      10.0
    """
    scaled = _unit(matrix)
    signal = jnp.sum(jnp.square(jnp.diagonal(scaled)))
    return 10 * jnp.log10(signal / jnp.sum(jnp.square(jnp.triu(scaled, 1))))


def _unit(matrix: jax.Array) -> jax.Array:
    """Returns the matrix over its largest entry, whose square may be out of float32's range."""
    largest = jnp.max(jnp.abs(matrix))
    return matrix / jnp.where(largest > 0, largest, 1)
