r"""The whole Kronecker factors of a layer. The optimizer uses only their diagonals."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adafisher_jax.capture import Form, value_and_grad
from adafisher_jax.diagnostics import rows
from adafisher_jax.diagnostics.pure import pure
from adafisher_jax.factors import Factor
from adafisher_jax.layout import Layer, Layout, check_layout
from adafisher_jax.tap import Statistic


class FullFactor(NamedTuple):
    r"""The Kronecker factors of one layer: `H = E[h̄h̄ᵀ]`, `S = E[ssᵀ]`.

    Attributes:
      h: the mean over rows of the products of inputs, (\*blocks, d_in, d_in). The input axes are
        flattened in the weight's order. With a bias, the constant 1 is one more input, the last.
        Blocks are the layers that lie stacked in one array.
      s: the mean over rows of the products of output cotangents, (\*blocks, d_out, d_out).
      rows: the number of rows, (\*blocks). If a layer took no part, it is 0 and factors are zero.
    """

    h: jax.Array
    s: jax.Array
    rows: jax.Array


def full_factors(
    loss_fn: Callable[..., Any], layout: Layout, paths: Iterable[str] | None = None
) -> Callable[..., dict[str, FullFactor]]:
    r"""Returns a function for the whole Kronecker factors of layers, in one backward pass.

    .. math:: H = \frac1N \sum_n \bar h_n \bar h_n^T, \qquad S = \frac1N \sum_n s_n s_n^T

    The diagonals are the `h` and `s` of `adafisher_jax.value_and_grad`. Patches and one-hot inputs
    are built for this, so use it to look at a model and not to train it.

    Args:
      loss_fn: a scalar loss of Linen parameters or an NNX module, as in `trace_layout`.
      layout: from `trace_layout`.
      paths: the paths of the layers. None means all except normalization layers and embeddings,
        whose `h` is diagonal and has the square of the vocabulary's size.

    Returns:
      A function of the loss's arguments that returns a `FullFactor` for each path. Jit it.

    Raises:
      TypeError: if `layout` is no layout, or `paths` is a string.
      ValueError: if a path is no layer's, or that of a layer without two factors (a normalization
        layer); from the returned function, as `adafisher_jax.value_and_grad`, and if the weight of
        a layer is multiplied in ranges (`w[:3]`).

    Example:
      >>> import adafisher_jax as af, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(1), jnp.array([[1.0, 2.0], [3.0, 0.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda params, x: jnp.sum(model.apply({"params": params}, x))
      >>> layout = af.trace_layout(loss_fn, params, x)
      >>> full_factors(loss_fn, layout)(params, x)[""].h.tolist()
      [[5.0, 1.0, 2.0], [1.0, 2.0, 1.0], [2.0, 1.0, 1.0]]
    """
    check_layout(layout)
    chosen = layout.only(layer.path for layer in choose(layout, paths))

    def factors_fn(first: Any, /, *args: Any, **kwargs: Any) -> dict[str, FullFactor]:
        loss, params = pure(loss_fn, layout, first)
        _, _, factors = value_and_grad(loss, chosen, False, params, args, kwargs, _FULL)
        return {layer.path: _matrices(layer, factors[layer.path]) for layer in chosen.layers}

    return factors_fn


def pool(batches: Iterable[Mapping[str, FullFactor]]) -> dict[str, FullFactor]:
    """Returns the factors of several batches together: the means over all rows.

    If the loss is a mean, the batches must have one size, because cotangents are smaller in a
    larger batch. Batches are taken one at a time, so a generator can make them.

    Example:
      >>> import jax.numpy as jnp
      >>> one = FullFactor(jnp.eye(2), jnp.eye(1), jnp.array(1.0))
      >>> three = FullFactor(5 * jnp.eye(2), jnp.eye(1), jnp.array(3.0))
      >>> pool([{"layer": one}, {"layer": three}])["layer"].h.tolist()
      [[4.0, 0.0], [0.0, 4.0]]
    """

    def add(total: FullFactor, one: FullFactor) -> FullFactor:
        both = total.rows + one.rows
        share = one.rows / jnp.maximum(both, 1)

        def move(old: jax.Array, new: jax.Array) -> jax.Array:
            return old + share[..., None, None] * (new - old)

        return FullFactor(move(total.h, one.h), move(total.s, one.s), both)

    return functools.reduce(
        lambda total, one: {path: add(factor, one[path]) for path, factor in total.items()},
        map(dict, batches),
    )


def choose(layout: Layout, paths: Iterable[str] | None) -> tuple[Layer, ...]:
    """Returns the layers at these paths; None means all with two factors except embeddings."""
    layers = {layer.path: layer for layer in layout.layers}
    if paths is None:
        paths = [x.path for x in layout.layers if x.ins and x.outs and x.kind != "embedding"]
    if isinstance(paths, str):
        raise TypeError(f"paths: got the string {paths!r}, wanted several of them")
    paths = sorted(set(paths))
    for path in paths:
        if path not in layers:
            raise ValueError(f"paths: got {path!r}, wanted some of {', '.join(map(repr, layers))}")
        if not (layers[path].ins and layers[path].outs):
            raise ValueError(
                f"paths: {path!r} is a {layers[path].kind} layer, which has no two factors"
            )
    return tuple(layers[path] for path in paths)


# In a tap a whole factor has the weight's rank, as the diagonals have, so that it goes where the
# weight goes. The second index of `h` is the first out axis; that of `s` is the first in axis.


def _zeros(layer: Layer, dtype: Any) -> Factor:
    zeros = layer.zeros(dtype)
    ins, outs = (math.prod(layer.shape[i] for i in axes) for axes in (layer.ins, layer.outs))
    h, s = list(zeros.h.shape), list(zeros.s.shape)
    h[layer.outs[0]], s[layer.ins[0]] = ins, outs
    return zeros._replace(h=jnp.zeros(h, dtype), s=jnp.zeros(s, dtype))


@dataclasses.dataclass(frozen=True)
class _SecondMoments:
    """A statistic with whole matrices for `h` and `s`."""

    diagonal: Any

    def of_inputs(self, *x: jax.Array) -> tuple[jax.Array, ...]:
        _, mean, *needed = self.diagonal.of_inputs(*x)
        return self._products(rows.of_inputs(self.diagonal, *x), "in", "out"), mean, *needed

    def of_cotangents(self, g: jax.Array, *needed: jax.Array) -> jax.Array:
        return self._products(rows.of_cotangents(self.diagonal, g), "out", "in")

    def rows(self, y: jax.Array, *needed: jax.Array) -> jax.typing.ArrayLike:
        count: jax.typing.ArrayLike = self.diagonal.rows(y, *needed)
        return count

    def _products(self, found: jax.Array, along: str, across: str) -> jax.Array:
        """Returns the sum over rows of products; the second index is the first axis `across`."""
        axes = self.diagonal.weight_axes
        first = [i for i, axis in enumerate(axes) if axis.startswith(along)]
        other = [i for i, axis in enumerate(axes) if axis.startswith(across)]
        blocks = [i for i in range(len(axes)) if i not in first + other]
        sizes = [found.shape[1 + i] for i in (*blocks, *first)]
        ordered = found.transpose(0, *(1 + i for i in (*blocks, *first, *other)))
        n = len(blocks)
        flat = ordered.reshape(len(found), math.prod(sizes[:n]), math.prod(sizes[n:]))
        products = jnp.einsum("nbi,nbj->bij", flat, flat, precision=jax.lax.Precision.HIGHEST)
        whole = products.reshape(*sizes, flat.shape[-1], *(1,) * (len(other) - 1))
        return whole.transpose(np.argsort((*blocks, *first, *other)))


def _full(statistic: Statistic) -> Statistic:
    if getattr(getattr(statistic, "layer", None), "apart", 1) > 1:
        raise ValueError(
            "a convolution with a stack of kernels, as `jax.vmap` makes it, has no whole factors "
            "here: leave its layer out of `paths`"
        )
    return _SecondMoments(statistic)


_FULL = Form(_zeros, _full, of_ranges=False)


def _matrices(layer: Layer, factor: Factor) -> FullFactor:
    def matrices(value: jax.Array, first: tuple[int, ...], second: int) -> jax.Array:
        order = (*layer.blocks, *first, second)
        rest = [i for i in range(value.ndim) if i not in order]
        size = value.shape[second]
        blocks = [value.shape[i] for i in layer.blocks]
        return value.transpose(*order, *rest).reshape(*blocks, size, size)

    h = matrices(factor.h, layer.ins, layer.outs[0])
    s = matrices(factor.s, layer.outs, layer.ins[0])
    blocks = h.shape[:-2]
    counts = jnp.broadcast_to(factor.rows.reshape(layer.stack_shape), layer.slot_shape)
    counts = counts.reshape(blocks)
    if layer.bias is not None:
        mean = layer.to_matrices(factor.mean).reshape(*blocks, -1, 1)
        slot = (counts > 0).astype(h.dtype)[..., None, None]
        h = jnp.block([[h, mean], [mean.mT, slot]])
    return FullFactor(h, s, counts)
