r"""The loss on the plane in which several optimizers moved the most.

The plane is spanned by principal components, as in arXiv:1712.09913, section 7.2 (Li et al., 2018).
There they are those of one trajectory, from its end. Here they are those of all trajectories
together, from the mean of their points. With the `k` points as the rows of :math:`X`, and the mean
subtracted,

.. math::

    X X^T = V \Lambda V^T, \qquad a_i = X^T v_i / \sqrt{\lambda_i}, \qquad
    \theta(x, y) = \bar\theta + x\, a_1 + y\, a_2

So only a matrix (k, k) is decomposed, for any number of parameters.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adafisher_jax.paths import by_path

LEAST = 1e-10  # the least second variance, relative to the largest: less is round-off


class Plane(NamedTuple):
    """Two directions in the space of parameters.

    Attributes:
      center: the parameters at the origin of the plane.
      axes: the two orthonormal directions: a pytree like the parameters, with a first axis of 2.
      shares: the share of the trajectories' variance along each direction, (2,).
    """

    center: Any
    axes: Any
    shares: jax.Array


def principal_plane(trajectories: Mapping[str, Sequence[Any]]) -> Plane:
    r"""Returns the plane of the two leading principal components of all points.

    Every point has the same weight, so a trajectory counts by the number of its points. The share
    of the variance along an axis is :math:`\lambda_i / \sum_j \lambda_j`. The signs of the axes are
    such that the first point has no positive coordinate. The plane is computed in float64, for one
    array of the parameters at a time.

    Args:
      trajectories: the parameters at some steps, by the name of the optimizer: pytrees of arrays of
        one structure. For an NNX module that is `nnx.state(module, nnx.Param)`.

    Raises:
      ValueError: if points differ in structure or shapes, are not finite, or lie on a line.

    Example:
      >>> import jax.numpy as jnp
      >>> corners = ([0.0, 0.0], [4.0, 0.0], [4.0, 2.0], [0.0, 2.0])
      >>> plane = principal_plane({"around": [{"w": jnp.array(at)} for at in corners]})
      >>> plane.center["w"].tolist(), [f"{share:.0%}" for share in plane.shares]
      ([2.0, 1.0], ['80%', '20%'])
    """
    points = _checked(trajectories)

    def products(*array: Any) -> np.ndarray:
        rows = _deviations(array)
        return rows @ rows.T

    gram = np.sum(jax.tree.leaves(jax.tree.map(products, *points)), axis=0)
    variances, vectors = np.linalg.eigh(gram)
    variances, vectors = variances[:-3:-1], vectors[:, :-3:-1]
    if not variances[1] > LEAST * variances[0]:
        raise ValueError("trajectories: got points on a line, wanted some that span a plane")
    vectors = np.where(vectors[0] > 0, -vectors, vectors)
    weights = (vectors / np.sqrt(variances)).T

    def axes(*array: Any) -> jax.Array:
        found = (weights @ _deviations(array)).reshape(2, *np.shape(array[0]))
        return jnp.asarray(found, jnp.promote_types(jnp.result_type(array[0]), jnp.float32))

    def center(*array: Any) -> jax.Array:
        mean = np.mean(np.stack(array), 0, dtype=np.float64)
        return jnp.asarray(mean, jnp.result_type(array[0]))

    return Plane(
        jax.tree.map(center, *points),
        jax.tree.map(axes, *points),
        jnp.asarray(variances / np.trace(gram), jnp.float32),
    )


def _checked(trajectories: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Returns all points, after checks that they have one structure and are finite."""
    points = [
        (f"trajectories[{name!r}][{number}]", point)
        for name, trajectory in trajectories.items()
        for number, point in enumerate(trajectory)
    ]
    if len(points) < 3:
        raise ValueError(f"trajectories: got {len(points)} points, wanted three or more")
    wanted = None
    for where, point in points:
        leaves, _ = by_path(point)
        shapes = {path: np.shape(leaf) for path, leaf in leaves.items()}
        wanted = wanted or shapes
        if shapes != wanted:
            raise ValueError(f"{where}: got arrays {shapes}, wanted those of the first, {wanted}")
        for path, leaf in leaves.items():
            if not np.isfinite(np.asarray(leaf, np.float64)).all():
                raise ValueError(f"{where}: {path!r} has values that are not finite")
    return [point for _, point in points]


def _deviations(array: tuple[Any, ...]) -> np.ndarray:
    """Returns the deviations of one array's values at all points from the mean, (points, size)."""
    rows = np.stack(array).reshape(len(array), -1).astype(np.float64)
    return rows - rows.mean(0)


def coordinates(plane: Plane, trajectory: Iterable[Any]) -> jax.Array:
    r"""Returns the coordinates of a trajectory's points, projected onto the plane, (points, 2).

    .. math:: \big(a_1^T (\theta - \bar\theta),\; a_2^T (\theta - \bar\theta)\big)

    Example:
      >>> import jax.numpy as jnp
      >>> corners = [jnp.array(at) for at in ([0.0, 0.0], [4.0, 0.0], [4.0, 2.0], [0.0, 2.0])]
      >>> plane = principal_plane({"around": corners})
      >>> coordinates(plane, corners).tolist()
      [[-2.0, -1.0], [2.0, -1.0], [2.0, 1.0], [-2.0, 1.0]]
    """
    return jnp.stack([_project(plane, point) for point in trajectory])


@jax.jit
def _project(plane: Plane, point: Any) -> jax.Array:
    def along(axes: jax.Array, center: jax.Array, value: jax.Array) -> jax.Array:
        away = value.astype(axes.dtype) - center
        return jnp.tensordot(axes, away, away.ndim, precision=jax.lax.Precision.HIGHEST)

    parts = jax.tree.map(along, plane.axes, plane.center, point)
    return jnp.sum(jnp.stack(jax.tree.leaves(parts)), 0)


def frame(
    paths: Iterable[jax.typing.ArrayLike], count: int = 40, margin: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Returns evenly spaced `xs` and `ys` around paths in the plane, for `evaluate`.

    Args:
      paths: the `coordinates` of each trajectory, (points, 2).
      count: the number of points on each axis.
      margin: the margin on every side, relative to the longer of the two extents of the paths.

    Example:
      >>> xs, ys = frame([[[0.0, 0.0], [10.0, 5.0]]], count=3)
      >>> xs.tolist(), ys.tolist()
      ([-2.0, 5.0, 12.0], [-2.0, 2.5, 7.0])
    """
    points = np.concatenate([np.asarray(path) for path in paths])
    low, high = points.min(0), points.max(0)
    extra = margin * np.max(high - low)
    xs, ys = np.linspace(low - extra, high + extra, count, axis=1)
    return xs, ys


def evaluate(
    loss_fn: Callable[..., Any],
    plane: Plane,
    xs: jax.typing.ArrayLike,
    ys: jax.typing.ArrayLike,
    *args: Any,
    at_once: int = 8,
) -> jax.Array:
    """Returns the losses at the points of a grid in the plane, (len(ys), len(xs)).

    The computation is compiled once for a loss and its shapes. It holds `at_once` copies of the
    parameters.

    Args:
      loss_fn: a scalar loss of the parameters and `args`.
      plane: from `principal_plane`.
      xs: the coordinates along the first axis, from `frame`.
      ys: the coordinates along the second axis.
      *args: arrays that are passed on to the loss.
      at_once: the number of points that are evaluated together.

    Example:
      >>> import jax.numpy as jnp
      >>> plane = Plane(jnp.array([1.0, 0.0]), jnp.eye(2), jnp.array([0.8, 0.2]))
      >>> evaluate(lambda w: jnp.sum(w**2), plane, [-1.0, 0.0], [0.0, 1.0, 2.0]).tolist()
      [[0.0, 1.0], [1.0, 2.0], [4.0, 5.0]]
    """
    grid = jnp.stack(jnp.meshgrid(jnp.asarray(xs), jnp.asarray(ys)), -1)
    return _losses(loss_fn, plane, grid.reshape(-1, 2), args, at_once).reshape(grid.shape[:2])


@functools.partial(jax.jit, static_argnames=("loss_fn", "at_once"))
def _losses(
    loss_fn: Callable[..., Any], plane: Plane, places: jax.Array, args: Any, at_once: int
) -> jax.Array:
    def loss_at(place: jax.Array) -> jax.Array:
        def move(center: jax.Array, axes: jax.Array) -> jax.Array:
            return (center + place[0] * axes[0] + place[1] * axes[1]).astype(center.dtype)

        return loss_fn(jax.tree.map(move, plane.center, plane.axes), *args)

    return jax.lax.map(loss_at, places, batch_size=at_once)
