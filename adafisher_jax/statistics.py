"""Statistics: the sums over rows of `h̄²`, `h̄` and `s²`, for each kind of layer.

A row is one example or, in sequences and convolutions, one position of one example. Every statistic
names the axes of its weight, and of a bias if a known layer has one: `"in0"`, `"out0"`, and
`"batch0"` if the layer holds several independent maps. The arrays follow the convention of
`adafisher_jax.factors`. Sums are accumulated in at least float32. The patches of a convolution are
never built.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from adafisher_jax.factors import Axes
from adafisher_jax.meshes import everywhere
from adafisher_jax.windows import Window


def wide(x: jax.Array) -> jax.Array:
    """Returns an array in at least float32."""
    narrow = x.dtype.itemsize < 4  # JAX promotes 8-bit floats and 4-bit integers to no other type
    return x.astype(jnp.float32 if narrow else jnp.promote_types(x.dtype, jnp.float32))


def _sum_squares(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    return jnp.sum(jnp.square(wide(x)), axis=tuple(axes))


def numbered(roles: Sequence[str]) -> Axes:
    """Numbers the axes of each role: (in, in, out) becomes (in0, in1, out0)."""
    return tuple(f"{role}{list(roles[:i]).count(role)}" for i, role in enumerate(roles))


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A linear map written as `einsum(x, weight) -> y`, with one letter per axis.

    A letter of the weight is an *out* axis if `y` has it and `x` does not, a *batch* axis if both
    have it, and an *in* axis otherwise. The other letters of `y` are rows. Letters of `x` alone are
    summed over before the map.
    """

    x: str
    weight: str
    y: str

    def _role(self, letter: str) -> str:
        if letter not in self.y:
            return "in"
        return "batch" if letter in self.x else "out"

    @property
    def weight_axes(self) -> Axes:
        return numbered([self._role(letter) for letter in self.weight])

    @property
    def bias_axes(self) -> Axes:
        named = dict(zip(self.weight, self.weight_axes, strict=True))
        return tuple(named[letter] for letter in self.y if letter in named)

    def _like_weight(self, value: jax.Array, letters: str) -> jax.Array:
        order = [letters.index(c) for c in self.weight if c in letters]
        sizes = [value.shape[letters.index(c)] if c in letters else 1 for c in self.weight]
        return value.transpose(order).reshape(sizes)

    def of_inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        alone = [i for i, c in enumerate(self.x) if c not in self.weight + self.y]
        letters = "".join(c for i, c in enumerate(self.x) if i not in alone)
        x = jnp.sum(wide(x), axis=tuple(alone)) if alone else x
        rows = tuple(i for i, c in enumerate(letters) if c not in self.weight)
        kept = "".join(c for c in letters if c in self.weight)
        return (
            self._like_weight(_sum_squares(x, rows), kept),
            self._like_weight(jnp.sum(wide(x), axis=rows), kept),
        )

    def of_cotangents(self, g: jax.Array) -> jax.Array:
        rows = [i for i, c in enumerate(self.y) if c not in self.weight]
        return self._like_weight(
            _sum_squares(g, rows), "".join(c for c in self.y if c in self.weight)
        )

    def rows(self, y: jax.Array) -> int:
        return math.prod(n for n, c in zip(y.shape, self.y, strict=True) if c not in self.weight)


def einsum(equation: str) -> Contraction:
    """Returns the statistic of a layer `y = einsum(equation, x, weight)`, with or without bias.

    Args:
      equation: an explicit equation, without ellipsis and without a letter twice in one operand.

    Raises:
      ValueError: if the equation has another form.

    Example:
      >>> einsum("bti,io->bto").weight_axes
      ('in0', 'out0')
      >>> einsum("bhi,hio->bho").weight_axes
      ('batch0', 'in0', 'out0')
    """
    operands, _, y = equation.replace(" ", "").partition("->")
    x, _, weight = operands.partition(",")
    letters = x + weight + y
    if not letters.isalpha() or any(len(set(part)) < len(part) for part in (x, weight, y)):
        raise ValueError(
            f"expected an einsum equation 'x,weight->y' of distinct letters, got {equation!r}"
        )
    return Contraction(x, weight, y)


def dense(ndim: int, axis: Sequence[int] = (-1,), batch: int = 0, features: int = 1) -> Contraction:
    """Returns the statistic of a `DenseGeneral` layer on an input of rank `ndim`.

    Args:
      ndim: the rank of the input.
      axis: the axes of the input that are summed over, in the kernel's order.
      batch: the number of leading axes that input, kernel and output share.
      features: the number of axes that the output gains.

    Example:
      >>> dense(3)
      Contraction(x='abc', weight='cd', y='abd')
    """
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    x, out = letters[:ndim], letters[ndim : ndim + features]
    summed = "".join(x[a] for a in axis)
    y = "".join(c for c in x if c not in summed) + out
    return Contraction(x, x[:batch] + summed + out, y)


ENTRIES = 2**18  # the largest matrix of counts, which is a constant of the program
EDGES = 64  # the most positions at a window's edges that are summed one by one


def _is_small(window: Window, positions: int) -> bool:
    return window.size * positions <= ENTRIES


def _counts(window: Window) -> np.ndarray | None:
    """Returns the counts of all positions; None if their matrix is too large."""
    every = np.arange(window.inputs)
    return window.counts(every) if _is_small(window, len(every)) else None


@dataclasses.dataclass(frozen=True)
class Convolution:
    r"""A convolution of any rank, stride, dilation, padding and group count, channels last.

    On one axis, the matrix `A` counts how often kernel position `i` reads input position `p`. Then

    .. math:: \sum_n \bar h_{n,ijc}^2 = \sum_{p,q} A_{ip} A_{jq} \sum_b x_{bpqc}^2

    so only sums of the input are needed, and no patches. On the last spatial axis `A` repeats with
    the stride except at the edges. So the batch sum there is one sum for each phase of the stride,
    and one for each position at an edge. On a CPU a sum over rows of contiguous channels is many
    times faster than one that keeps all positions. `A` itself is built only if it is small.

    Attributes:
      windows: one window for each spatial axis.
      groups: the number of feature groups. `h` and `mean` average over the groups of a layer.
      apart: the number of layers in the convolution, each a run of groups with its own `h` and
        `mean`. The kernel's last axis runs over the layers and over their outputs.
    """

    windows: tuple[Window, ...]
    groups: int = 1
    apart: int = 1

    @property
    def weight_axes(self) -> Axes:
        return numbered(["in"] * (len(self.windows) + 1) + ["out"])

    @property
    def bias_axes(self) -> Axes:
        return ("out0",)

    def of_inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not self.windows:  # a window without axes has one position
            point = dataclasses.replace(self, windows=(Window(1, 1, 1),))
            return jax.tree.map(lambda found: found[0], point.of_inputs(x[..., None, :]))
        *others, last = self.windows
        batch = tuple(range(x.ndim - len(self.windows) - 1))
        edges = last.edges()
        few = len(edges) <= min(last.inputs // 4, EDGES)
        phased = last.inputs % last.stride == 0 and few and _is_small(last, last.stride)
        counts = [_counts(window) for window in others]
        if phased:
            regular = last.regular()
            at_edges = last.counts(edges) - regular[:, edges % last.stride]
            differ = at_edges.any(axis=0)
            edges, at_edges = edges[differ], at_edges[:, differ]
            counts.append(np.concatenate([regular, at_edges], axis=1))
        else:
            counts.append(_counts(last))

        def total(function: Callable[[jax.Array], jax.Array]) -> jax.Array:
            if not phased:
                return jnp.sum(function(x), batch)
            *space, width, channels = x.shape
            phases = x.reshape(*space, width // last.stride, last.stride, channels)
            parts = [jnp.sum(function(phases), (*batch, x.ndim - 2))]
            parts += [jnp.sum(function(x[..., i : i + 1, :]), batch) for i in edges]
            return jnp.concatenate(parts, axis=-2)

        totals = jnp.stack([total(lambda x: jnp.square(wide(x))), total(wide)], axis=-2)
        squares, sums = jnp.moveaxis(self._gather(totals, counts), -3, 0)
        return jnp.maximum(squares, 0), sums

    def _gather(self, totals: jax.Array, counts: Sequence[np.ndarray | None]) -> jax.Array:
        """Sums batch sums of the input, (*positions, sums, channels), into the kernel's axes."""
        *space, channels = totals.shape
        alike = self.groups // self.apart
        totals = totals.reshape(*space, self.apart, alike, channels // self.groups)
        totals = jnp.moveaxis(jnp.sum(totals, axis=-2) / alike, -2, -1)
        shape = totals.shape
        for axis, (window, of_axis) in enumerate(zip(self.windows, counts, strict=True)):
            # One product for each position on the axes before: this needs no transposition.
            before = math.prod(totals.shape[:axis])
            rows = totals.reshape(before, totals.shape[axis], -1)
            if of_axis is None:
                found = window.sums(rows)
            else:
                each = jnp.asarray(np.broadcast_to(of_axis, (before, *of_axis.shape)), totals.dtype)
                found = jnp.matmul(each, rows, precision=jax.lax.Precision.HIGHEST)
            totals = found.reshape(*totals.shape[:axis], window.size, *shape[axis + 1 :])
        return totals

    def of_cotangents(self, g: jax.Array) -> jax.Array:
        s = _sum_squares(g, range(g.ndim - 1))
        return s.reshape((1,) * (len(self.windows) + 1) + s.shape)

    def rows(self, y: jax.Array) -> int:
        return math.prod(y.shape[:-1])


@dataclasses.dataclass(frozen=True)
class LocalConvolution:
    """A convolution with a kernel of its own at every output position.

    The kernel is (*positions, channels × window, features); the window's last axis varies fastest.
    Each position is a block. The rows of a block are the batch.
    """

    windows: tuple[Window, ...]

    @property
    def weight_axes(self) -> Axes:
        return numbered(["batch"] * len(self.windows) + ["in", "out"])

    @property
    def bias_axes(self) -> Axes:
        return numbered(["batch"] * len(self.windows) + ["out"])

    def of_inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch = tuple(range(x.ndim - len(self.windows) - 1))
        return self._gather(_sum_squares(x, batch)), self._gather(jnp.sum(wide(x), axis=batch))

    def _gather(self, total: jax.Array) -> jax.Array:
        """Gathers a batch sum of the input into the input axes of the kernel."""
        rank = len(self.windows)
        for axis, window in enumerate(self.windows):
            # Axes so far: (size, outputs) per axis gathered, then what is left.
            found = window.reads()
            part = jnp.take(total, np.maximum(found, 0), axis=2 * axis)
            shape = [1] * part.ndim
            shape[2 * axis : 2 * axis + 2] = found.shape
            total = part * jnp.asarray(found >= 0, part.dtype).reshape(shape)
        order = [*range(1, 2 * rank, 2), 2 * rank, *range(0, 2 * rank, 2)]
        return total.transpose(order).reshape(*(w.outputs for w in self.windows), -1, 1)

    def of_cotangents(self, g: jax.Array) -> jax.Array:
        s = _sum_squares(g, range(g.ndim - len(self.windows) - 1))
        return jnp.expand_dims(s, -2)

    def rows(self, y: jax.Array) -> int:
        return math.prod(y.shape[: y.ndim - len(self.windows) - 1])


@dataclasses.dataclass(frozen=True)
class Rearranged:
    """A statistic of arrays whose axes have another order than a `Convolution` expects.

    Attributes:
      layer: the statistic of arrays in the order of `Convolution`.
      x: for each axis of the input in that order, its number here; None if the orders are equal.
      weight: the same for the weight.
      y: the same for the output.
    """

    layer: Convolution
    x: tuple[int, ...] | None
    weight: tuple[int, ...]
    y: tuple[int, ...] | None

    @property
    def weight_axes(self) -> Axes:
        return tuple(self.layer.weight_axes[self.weight.index(i)] for i in range(len(self.weight)))

    @property
    def bias_axes(self) -> Axes:
        return self.layer.bias_axes

    def back(self, value: jax.Array) -> jax.Array:
        """Returns an array like the weight in the order of axes that the weight has here."""
        return value.transpose([self.weight.index(i) for i in range(len(self.weight))])

    def of_inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        squares, sums = self.layer.of_inputs(jnp.transpose(x, self.x or range(x.ndim)))
        return self.back(squares), self.back(sums)

    def of_cotangents(self, g: jax.Array) -> jax.Array:
        return self.back(self.layer.of_cotangents(jnp.transpose(g, self.y or range(g.ndim))))

    def rows(self, y: jax.Array) -> int:
        return self.layer.rows(jnp.transpose(y, self.y or range(y.ndim)))


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A lookup in a table. Its inputs are one-hot vectors, so `h` counts tokens.

    A row is one lookup. Indices are numbers or vectors. Numbers mean what they mean in
    `jax.numpy.take`: negative indices count from the end, and a table of one row is always used.
    Vectors mean what they mean in `jax.lax.gather`.

    Attributes:
      map: the linear map of the one-hot vectors; the last axis of its input is the table's.
      size: the length of that axis.
      component: for vectors, the entry that is the index; None for numbers.
      clips: whether an index outside of the table means the nearest row; otherwise it means none.
    """

    map: Contraction
    size: int
    component: int | None = None
    clips: bool = False

    @property
    def weight_axes(self) -> Axes:
        return self.map.weight_axes

    @property
    def bias_axes(self) -> Axes:
        return ()

    def of_inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        letters, looked_up = self.map.x[:-1], self.map.x[-1]
        index = everywhere(self.index(x))
        batch = [i for i, c in enumerate(letters) if c in self.map.weight]
        sizes = [index.shape[i] for i in batch]
        places = [jax.lax.broadcasted_iota(jnp.int32, index.shape, i) for i in batch]
        counts = jnp.zeros((*sizes, self.size), jnp.float32).at[(*places, index)].add(1)
        kept = "".join(letters[i] for i in batch) + looked_up
        counts = self.map._like_weight(counts, kept)
        return counts, counts

    def index(self, x: jax.Array) -> jax.Array:
        """Returns the indices, with `size`, which is no row, for indices that mean no row."""
        if self.component is None and self.size == 1:
            return jnp.zeros(x.shape, jnp.int32)
        x = x if self.component is None else x[..., self.component]
        x = x.astype(jnp.int32) if x.dtype.itemsize < 4 else x  # one byte may not hold `size`
        if self.clips:
            return jnp.clip(x, 0, self.size - 1)
        if self.component is None:
            x = jnp.where(x < 0, x + self.size, x)
        return jnp.where(x < 0, self.size, x)

    def of_cotangents(self, g: jax.Array) -> jax.Array:
        return self.map.of_cotangents(g)

    def rows(self, y: jax.Array) -> int:
        return self.map.rows(y)


def lookup(ndim: int, size: int) -> Lookup:
    """Returns the lookup of whole rows of a table (size, features), for indices of rank `ndim`."""
    return Lookup(dense(ndim + 1), size)


@dataclasses.dataclass(frozen=True)
class Groups:
    """A product in which each group of consecutive rows has a matrix of its own (experts).

    The inputs are the rows (n, in) and the number of rows of each group. Rows after the last group
    do not count. The groups of the weight (groups, in, out) are stacked layers.
    """

    @property
    def weight_axes(self) -> Axes:
        return ("stack0", "in0", "out0")

    def of_inputs(self, x: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        squares, sums = (_by_group(v, sizes) for v in (jnp.square(wide(x)), wide(x)))
        return squares[:, :, None], sums[:, :, None], sizes

    def of_cotangents(self, g: jax.Array, sizes: jax.Array) -> jax.Array:
        return _by_group(jnp.square(wide(g)), sizes)[:, None, :]

    def rows(self, y: jax.Array, sizes: jax.Array) -> jax.Array:
        return sizes[:, None, None]


def _by_group(rows: jax.Array, sizes: jax.Array) -> jax.Array:
    """Returns the sum of the rows of each group."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
    return jax.ops.segment_sum(rows, group, len(sizes))


@dataclasses.dataclass(frozen=True)
class Normalization:
    r"""The released code's statistics of a normalization layer, from its un-normalised input.

    `h` is a pair, for the scale and the shift. `s` has one entry for each channel. Let `B` be the
    batch size, `k` run over the `K` entries of the axes that are not summed (the channels; axis 1
    for layer norms, as released), and `n` be the number of other positions of one example:

    .. math:: v_k = \frac{1}{n^2} \sum x, \quad
              h = \Big(\frac{1}{B^2} \sum_k v_k^2,\ \frac{K}{B^2}\Big), \quad
              s_c = \frac{1}{B} \left(\sum g_c\right)^2

    These are no sums over rows. They are multiplied by the number of rows, so that the division by
    it returns them and several uses of a layer are averaged.

    Attributes:
      channels: the axes of the scale and shift.
      keeps_tokens: whether `k` runs over axis 1 instead of the channels.
    """

    channels: tuple[int, ...]
    keeps_tokens: bool

    @property
    def weight_axes(self) -> Axes:
        return numbered(["out"] * len(self.channels))

    @property
    def bias_axes(self) -> Axes:
        return self.weight_axes

    def of_inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        weight, shape, channels = self.rows(x), x.shape, self.channels
        if x.ndim == len(channels):  # one example, without its batch axis
            shape, channels = (1, *shape), tuple(c + 1 for c in channels)
        x = wide(x).reshape(shape)
        keep = (1,) if self.keeps_tokens else channels
        others = tuple(i for i in range(x.ndim) if i not in keep)
        n = math.prod(shape[i] for i in others if i > 0)
        batch = 1 if 0 in keep else max(shape[0], 1)
        v = jnp.sum(x, axis=others) / max(n, 1) ** 2
        pair = jnp.stack([jnp.sum(jnp.square(v)), jnp.asarray(v.size, v.dtype)]) / batch**2
        pair = (weight * pair).reshape((2,) + (1,) * (len(channels) - 1))
        return pair, jnp.zeros_like(pair)

    def of_cotangents(self, g: jax.Array) -> jax.Array:
        others = tuple(i for i in range(g.ndim) if i not in self.channels)
        batch = max(g.shape[0], 1) if others and others[0] == 0 else 1
        return self.rows(g) * jnp.square(jnp.sum(wide(g), axis=others)) / batch

    def rows(self, y: jax.Array) -> int:
        return math.prod(n for i, n in enumerate(y.shape) if i not in self.channels)
