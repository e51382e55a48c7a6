r"""Compares the diagonal-Kronecker curvature with the exact one, for layers small enough."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adafisher_jax.diagnostics.full_factors import FullFactor, choose, full_factors
from adafisher_jax.diagnostics.pure import pure
from adafisher_jax.layout import Layer, Layout, check_layout
from adafisher_jax.paths import by_path

LARGEST = 2000  # the most parameters of a layer whose exact matrix is built by default


class Deviation(NamedTuple):
    """How much a step differs from the exact step.

    Attributes:
      angle: the angle between the two steps, in degrees.
      error: the norm of their difference, relative to the norm of the exact step.
    """

    angle: jax.Array
    error: jax.Array


class Comparison(NamedTuple):
    """Three steps of one layer, compared with the step of its exact empirical Fisher.

    Attributes:
      gradient: the gradient, scaled to the length of the exact step.
      diagonal: the step of the diagonal-Kronecker curvature.
      kronecker: the step of the Kronecker curvature.
    """

    gradient: Deviation
    diagonal: Deviation
    kronecker: Deviation


def compare_steps(
    loss_fn: Callable[..., Any],
    layout: Layout,
    paths: Iterable[str] | None = None,
    *,
    damping: float = 0.1,
) -> Callable[..., dict[str, Comparison]]:
    r"""Returns a function that compares steps `(F + λI)⁻¹g` of three curvatures.

    With the gradients :math:`g_i` of `B` examples, and the factors of `full_factors` over `N` rows,

    .. math::

        F_{exact} = \frac1B \sum_i g_i g_i^T, \qquad
        F_{kron} = N B\, H \otimes S, \qquad
        F_{diag} = N B\, \mathrm{diag}(H) \otimes \mathrm{diag}(S)

    The factor `NB` turns cotangents of the mean loss into those of examples, and sums over the
    positions of an example as if they were independent. `λ` is `damping` times the average
    diagonal entry of the curvature.

    Args:
      loss_fn: a scalar loss of Linen parameters or an NNX module. It is the *mean over examples* of
        terms that depend on one example each (no batch statistics).
      layout: from `trace_layout`.
      paths: the paths of the layers; None for all with at most 2,000 parameters and two factors.
      damping: the relative damping, as above.

    Returns:
      A function of the loss's arguments that returns a `Comparison` for each path. Jit it. Arrays
      among the arguments have the examples on their first axis. For stacked layers the numbers are
      arrays.

    Raises:
      TypeError, ValueError: as `full_factors`; from the returned function, ValueError if arrays
        differ in the length of their first axis.

    Example:
      The Kronecker curvature is exact if all cotangents are equal:

      >>> import adafisher_jax as af, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(1), jax.random.normal(jax.random.key(1), (8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda params, x: jnp.mean(model.apply({"params": params}, x))
      >>> layout = af.trace_layout(loss_fn, params, x)
      >>> found = compare_steps(loss_fn, layout)(params, x)[""]
      >>> bool(found.kronecker.angle < 0.1), bool(found.diagonal.angle > 1)
      (True, True)
    """
    check_layout(layout)
    if paths is None:
        paths = [x.path for x in layout.layers if x.ins and x.outs and _size(x) <= LARGEST]
    chosen = choose(layout, paths)
    factors_fn = full_factors(loss_fn, layout, [layer.path for layer in chosen])

    def compare(first: Any, /, *args: Any, **kwargs: Any) -> dict[str, Comparison]:
        loss, params = pure(loss_fn, layout, first)
        each = _gradients(loss, params, args, kwargs)
        factors = factors_fn(first, *args, **kwargs)
        return {layer.path: _compare(layer, factors[layer.path], each, damping) for layer in chosen}

    return compare


def _size(layer: Layer) -> int:
    """Returns the number of parameters of one of the stacked layers."""
    blocks = math.prod(layer.shape[i] for i in layer.blocks)
    return sum(leaf.size for leaf in layer.leaves) // blocks


def _gradients(loss: Any, params: Any, args: Any, kwargs: Any) -> dict[str, jax.Array]:
    """Returns the gradients of every example's loss: arrays (examples, *shape) by path."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]
    counts = {np.shape(leaves[i])[:1] for i in arrays}
    if len(counts) != 1 or counts == {()}:
        shapes = ", ".join(str(np.shape(leaves[i])) for i in arrays)
        got = f"arrays of shapes {shapes}" if arrays else "no array"
        raise ValueError(f"args: got {got}, wanted the examples on axis 0")

    def gradient(*one: jax.Array) -> Any:
        whole = list(leaves)
        for i, value in zip(arrays, one, strict=True):
            whole[i] = value[None]
        args, kwargs = jax.tree.unflatten(structure, whole)
        return jax.grad(loss)(params, *args, **kwargs)

    found = jax.vmap(gradient)(*(leaves[i] for i in arrays))
    return by_path(found)[0]


def _compare(
    layer: Layer, factor: FullFactor, each: dict[str, jax.Array], damping: float
) -> Comparison:
    blocks = factor.h.shape[:-2]
    h, s = (part.reshape(-1, *part.shape[-2:]) for part in factor[:2])
    gradients = jax.vmap(lambda one: _vectors(layer, one), out_axes=1)(each)
    rows = factor.rows.reshape(-1)
    found = jax.vmap(_compare_block, (0, 0, 0, 0, None))(h, s, rows, gradients, damping)
    return jax.tree.map(lambda value: value.reshape(blocks), found)


def _vectors(layer: Layer, leaves: dict[str, jax.Array]) -> jax.Array:
    """Returns a layer's arrays as vectors, (blocks, n), in the order of inputs, the bias last."""
    whole = layer.to_matrices(leaves[layer.leaves[0].path])
    if layer.bias is not None:
        bias = layer.to_matrices(layer.from_bias(leaves[layer.bias.path]))
        whole = jnp.concatenate([whole, bias], 1)
    return whole.reshape(len(whole), -1)


def _compare_block(
    h: jax.Array, s: jax.Array, rows: jax.Array, each: jax.Array, damping: Any
) -> Comparison:
    examples, n = each.shape
    gradient = jnp.mean(each, 0)
    precision = jax.lax.Precision.HIGHEST
    curvatures = (
        jnp.matmul(each.T, each, precision=precision) / examples,
        rows * examples * jnp.kron(h, s),
        rows * examples * jnp.diag(jnp.kron(jnp.diagonal(h), jnp.diagonal(s))),
    )

    def step(curvature: jax.Array) -> jax.Array:
        extra = damping * jnp.trace(curvature) / n
        return jnp.linalg.solve(curvature + extra * jnp.eye(n, dtype=h.dtype), gradient)

    exact, kronecker, diagonal = map(step, curvatures)
    length = jnp.linalg.norm(exact)
    as_long = gradient * (length / jnp.linalg.norm(gradient))
    return Comparison(*(_deviation(one, exact) for one in (as_long, diagonal, kronecker)))


def _deviation(step: jax.Array, exact: jax.Array) -> Deviation:
    length = jnp.linalg.norm(exact)
    one, other = step / jnp.linalg.norm(step), exact / length
    half = jnp.arctan2(jnp.linalg.norm(one - other), jnp.linalg.norm(one + other))
    return Deviation(jnp.degrees(2 * half), jnp.linalg.norm(step - exact) / length)
