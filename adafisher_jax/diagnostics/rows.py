"""The rows of a layer: its inputs, patches included, and its output cotangents.

The optimizer never builds rows, because `adafisher_jax.statistics` reduces them. Here they are
built, for the few layers that someone wants to look at. Arrays follow the convention of
`adafisher_jax.factors`, with the rows on a first axis. The `h` of the factors is the mean over
`of_inputs(...)**2`, and `s` is the mean over `of_cotangents(...)**2`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adafisher_jax.statistics import (
    Contraction,
    Convolution,
    LocalConvolution,
    Lookup,
    Rearranged,
    wide,
)
from adafisher_jax.windows import Window

NO_ROWS = "has no whole factors here: leave its layer out of `paths`"


@functools.singledispatch
def of_inputs(statistic: Any, *x: jax.Array) -> jax.Array:
    """Returns the inputs of one call, (rows, *the axes of the weight) with every out axis 1."""
    raise ValueError(f"{type(statistic).__name__} {NO_ROWS}")


@functools.singledispatch
def of_cotangents(statistic: Any, g: jax.Array) -> jax.Array:
    """Returns the output cotangents of one call, as `of_inputs`, with every in axis 1."""
    raise ValueError(f"{type(statistic).__name__} {NO_ROWS}")


def _contracted(value: jax.Array, letters: str, weight: str) -> jax.Array:
    """Returns `value` with rows first, then the weight's axes; axes it does not have are 1."""
    rows = [i for i, c in enumerate(letters) if c not in weight]
    own = [letters.index(c) for c in weight if c in letters]
    sizes = [value.shape[letters.index(c)] if c in letters else 1 for c in weight]
    return value.transpose([*rows, *own]).reshape(math.prod(value.shape[i] for i in rows), *sizes)


@of_inputs.register
def _(statistic: Contraction, x: jax.Array) -> jax.Array:
    letters, weight, y = statistic.x, statistic.weight, statistic.y
    if any(c not in letters + y for c in weight):
        raise ValueError(
            f"the einsum {letters},{weight}->{y} sums its weight over an axis without inputs: "
            "its whole factors are not defined here, leave the layer out of `paths`"
        )
    alone = [i for i, c in enumerate(letters) if c not in weight + y]
    kept = "".join(c for i, c in enumerate(letters) if i not in alone)
    return _contracted(jnp.sum(wide(x), tuple(alone)), kept, weight)


@of_cotangents.register
def _(statistic: Contraction, g: jax.Array) -> jax.Array:
    return _contracted(wide(g), statistic.y, statistic.weight)


def _patches(x: jax.Array, windows: tuple[Window, ...]) -> jax.Array:
    """Returns what each output position reads, (batch, *outputs, *sizes, channels), or zeros."""
    rank = len(windows)
    x = wide(x).reshape(-1, *x.shape[-rank - 1 :])
    for axis, window in enumerate(windows):
        # Axes so far: the batch, (size, outputs) for each axis gathered, then what is left.
        reads, at = window.reads(), 1 + 2 * axis
        x = jnp.take(x, np.maximum(reads, 0), axis=at)
        inside = np.expand_dims(reads >= 0, [i for i in range(x.ndim) if i not in (at, at + 1)])
        x = jnp.where(inside, x, 0)
    outputs, sizes = range(2, 2 * rank + 1, 2), range(1, 2 * rank, 2)
    return x.transpose(0, *outputs, *sizes, 2 * rank + 1)


@of_inputs.register
def _(statistic: Convolution, x: jax.Array) -> jax.Array:
    found = _patches(x, statistic.windows)
    rank, groups = len(statistic.windows), statistic.groups
    *_, channels = found.shape
    sizes = found.shape[1 + rank : -1]
    alike = groups // statistic.apart
    found = found.reshape(-1, *sizes, statistic.apart, alike, channels // groups)
    # Groups share a slice of the kernel, so each is a row; the scale keeps the number of rows.
    found = jnp.moveaxis(found, (-2, -3), (0, -1)) / alike**0.5
    return found.reshape(-1, *sizes, channels // groups, statistic.apart)


@of_cotangents.register
def _(statistic: Convolution, g: jax.Array) -> jax.Array:
    return wide(g).reshape(-1, *(1,) * (len(statistic.windows) + 1), g.shape[-1])


@of_inputs.register
def _(statistic: LocalConvolution, x: jax.Array) -> jax.Array:
    found = _patches(x, statistic.windows)
    rank = len(statistic.windows)
    # The kernel's input axis holds the channels before the window's positions.
    found = jnp.moveaxis(found, -1, 1 + rank)
    return found.reshape(*found.shape[: 1 + rank], -1, 1)


@of_cotangents.register
def _(statistic: LocalConvolution, g: jax.Array) -> jax.Array:
    rank = len(statistic.windows)
    return wide(g).reshape(-1, *g.shape[-rank - 1 : -1], 1, g.shape[-1])


@of_inputs.register
def _(statistic: Rearranged, x: jax.Array) -> jax.Array:
    found = of_inputs(statistic.layer, jnp.transpose(x, statistic.x or range(x.ndim)))
    return jax.vmap(statistic.back)(found)


@of_cotangents.register
def _(statistic: Rearranged, g: jax.Array) -> jax.Array:
    found = of_cotangents(statistic.layer, jnp.transpose(g, statistic.y or range(g.ndim)))
    return jax.vmap(statistic.back)(found)


@of_inputs.register
def _(statistic: Lookup, x: jax.Array) -> jax.Array:
    one_hot = jax.nn.one_hot(statistic.index(x), statistic.size, dtype=jnp.float32)
    return of_inputs(statistic.map, one_hot)


@of_cotangents.register
def _(statistic: Lookup, g: jax.Array) -> jax.Array:
    return of_cotangents(statistic.map, g)
