"""The layout says which parameter belongs to which layer: static, hashable, printed as a table."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adafisher_jax.factors import Axes, Factor
from adafisher_jax.paths import named_leaves


def check_floating(leaves: Mapping[str, Any]) -> None:
    """Raises a TypeError for the first leaf that is no floating-point array or number."""
    for path, leaf in leaves.items():
        known = hasattr(leaf, "shape") or isinstance(leaf, numbers.Number)
        found = jnp.result_type(leaf) if known else type(leaf).__name__
        if not known or not jnp.issubdtype(found, jnp.inexact):
            raise TypeError(
                f"the parameter {path!r} is of type {found}, wanted a floating-point array: pass "
                "what is none as another argument of the loss"
            )


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter array.

    Attributes:
      path: the path of the array in the loss's first argument.
      shape: the shape, stacked axes included.
      axes: the role of each axis: `"in0"`, `"out0"`, `"batch0"` (independent maps within one
        layer) or `"stack0"` (layers stacked by a lifted transform); `""` for an axis of length 1
        that a bias has and its weight does not.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def unstacked(axes: Axes) -> tuple[int, ...]:
    """Returns which axes belong to each of the layers that lie stacked."""
    return tuple(i for i, axis in enumerate(axes) if not axis.startswith("stack"))


def _is_block(axis: str) -> bool:
    return axis.startswith(("stack", "batch"))


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that has factors (it is "under a Fisher block").

    A *block* is a part that is independent of the others: each of several layers or maps that lie
    stacked in one array is a block.

    Attributes:
      path: the path of the mapping or module that holds the layer's parameters.
      kind: dense, conv, conv_local, embedding, attend or norm.
      weight: the kernel, embedding or scale.
      bias: the bias or shift.
      groups: the number of feature groups of a convolution.
    """

    path: str
    kind: str
    weight: Leaf | None
    bias: Leaf | None
    groups: int = 1

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in (self.weight, self.bias) if leaf)

    @property
    def nameless(self) -> "Layer":
        """The layer without paths, which is equal for layers that differ only in their paths."""
        return self._with(lambda leaf: dataclasses.replace(leaf, path=""))

    def stacked(self, count: int) -> "Layer":
        """Returns `count` layers like this one, with arrays stacked along a new first axis."""
        return self._with(lambda leaf: Leaf("", (count, *leaf.shape), ("stack", *leaf.axes)))

    @property
    def one(self) -> "Layer":
        """One of the layers that `stacked` returns."""
        return self._with(lambda leaf: Leaf("", leaf.shape[1:], leaf.axes[1:]))

    def _with(self, change: Callable[[Leaf], Leaf]) -> "Layer":
        weight, bias = (leaf and change(leaf) for leaf in (self.weight, self.bias))
        return dataclasses.replace(self, path="", weight=weight, bias=bias)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight (else of the bias), whose rank and stacked axes factors have."""
        return self.leaves[0].shape

    @property
    def axes(self) -> Axes:
        return self.leaves[0].axes

    @property
    def inner(self) -> tuple[int, ...]:
        """The axes within one block."""
        return tuple(i for i, axis in enumerate(self.axes) if not _is_block(axis))

    @property
    def ins(self) -> tuple[int, ...]:
        """The axes of the inputs."""
        return tuple(i for i, axis in enumerate(self.axes) if axis.startswith("in"))

    @property
    def outs(self) -> tuple[int, ...]:
        """The axes of the outputs."""
        return tuple(i for i in self.inner if i not in self.ins)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The axes over independent blocks."""
        return tuple(i for i, axis in enumerate(self.axes) if _is_block(axis))

    @property
    def fan_in(self) -> int:
        return math.prod(self.shape[i] for i in self.ins)

    @property
    def fan_out(self) -> int:
        return math.prod(self.shape[i] for i in self.outs)

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """The shape of `rows`: one number for each stacked layer."""
        return tuple(n for n, axis in self._sized if axis.startswith("stack"))

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """`rows_shape` with the rank of the weight: axes that are not stacked are 1."""
        return tuple(n if axis.startswith("stack") else 1 for n, axis in self._sized)

    @property
    def slot_shape(self) -> tuple[int, ...]:
        """The shape of one number for each block, with the rank of the weight."""
        return tuple(n if _is_block(axis) else 1 for n, axis in self._sized)

    @property
    def _sized(self) -> tuple[tuple[int, str], ...]:
        return tuple(zip(self.shape, self.axes, strict=True))

    def dtype(self, leaves: Mapping[str, Any]) -> Any:
        """Returns the type of the layer's statistics, at least float32, given arrays by path."""
        own = [leaves[leaf.path] for leaf in self.leaves if leaf.path in leaves]
        return functools.reduce(jnp.promote_types, map(jnp.result_type, own), jnp.dtype("float32"))

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the parts of this layer's `Factor`."""
        s = tuple(1 if axis.startswith("in") else n for n, axis in self._sized)
        if self.kind == "norm":  # a pair, for scale and shift, in place of the channels
            slots = zip(self.slot_shape, self.axes, strict=True)
            h = tuple(2 if axis == "out0" else n for n, axis in slots)
        else:
            h = tuple(1 if axis.startswith("out") else n for n, axis in self._sized)
        return (h, s, self.rows_shape, h)

    def zeros(self, dtype: Any = jnp.float32) -> Factor:
        """Returns zero factors of this layer."""
        return Factor(*(jnp.zeros(shape, dtype) for shape in self.factor_shapes))

    def to_bias(self, value: jax.Array) -> jax.Array:
        """Turns an array like `s` (or a bias-shaped sum) from the weight's axes to the bias's."""
        assert self.bias is not None
        order = [self.axes.index(axis) for axis in self.bias.axes if axis]
        value = jnp.squeeze(value, [i for i in range(value.ndim) if i not in order])
        value = value.transpose([sorted(order).index(i) for i in order])
        return jnp.expand_dims(value, [i for i, axis in enumerate(self.bias.axes) if not axis])

    def from_bias(self, value: jax.Array) -> jax.Array:
        """Turns a bias-shaped array into one that broadcasts against the weight."""
        assert self.bias is not None
        value = jnp.squeeze(value, [i for i, axis in enumerate(self.bias.axes) if not axis])
        mine = [axis for axis in self.bias.axes if axis]
        order = [mine.index(axis) for axis in self.axes if axis in mine]
        shape = [value.shape[mine.index(a)] if a in mine else 1 for a in self.axes]
        return value.transpose(order).reshape(shape)

    def to_matrices(self, value: jax.Array) -> jax.Array:
        """Returns an array like the weight, `h` or `s` as matrices, (blocks, ins, outs)."""
        order = (*self.blocks, *self.ins, *self.outs)
        sizes = [
            math.prod(value.shape[i] for i in axes) for axes in (self.blocks, self.ins, self.outs)
        ]
        return value.transpose(order).reshape(sizes)

    def from_matrices(self, value: jax.Array) -> jax.Array:
        """Inverts `to_matrices`."""
        order = (*self.blocks, *self.ins, *self.outs)
        whole = {axis: value.shape[1 + (axis in self.outs)] != 1 for axis in order}
        sizes = [self.shape[i] if i in self.blocks or whole[i] else 1 for i in order]
        return value.reshape(sizes).transpose([order.index(i) for i in range(len(order))])


@dataclasses.dataclass(frozen=True)
class Uncovered:
    """A parameter that is not covered, and the reason."""

    leaf: Leaf
    reason: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layers found in a loss, and the parameters outside of them.

    `adafisher_jax.trace_layout` makes it. A layout holds no arrays, and compares and hashes by
    value, so it can be a static argument. Two traces of one model are equal.

    Attributes:
      layers: the layers that have factors, sorted by path.
      uncovered: the other parameters.
      left_out: the paths of the parameters that a filter (`wrt`) left out of an NNX model.
    """

    layers: tuple[Layer, ...]
    uncovered: tuple[Uncovered, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """All parameters, those of layers first."""
        inside = [leaf for layer in self.layers for leaf in layer.leaves]
        return (*inside, *(row.leaf for row in self.uncovered))

    @property
    def covered(self) -> float:
        """The fraction of all parameters, counted by entry, that belong to layers."""
        inside = sum(leaf.size for layer in self.layers for leaf in layer.leaves)
        return inside / max(sum(leaf.size for leaf in self.leaves), 1)

    def only(self, paths: Iterable[str]) -> "Layout":
        """Returns the layout with the layers at some paths; other parameters are uncovered."""
        kept = set(paths)
        left = [leaf for x in self.layers if x.path not in kept for leaf in x.leaves]
        rows = [*self.uncovered, *(Uncovered(Leaf(x.path, x.shape), "left out") for x in left)]
        rows.sort(key=lambda row: row.leaf.path)
        layers = tuple(x for x in self.layers if x.path in kept)
        return dataclasses.replace(self, layers=layers, uncovered=tuple(rows))

    def check_params(self, leaves: Mapping[str, Any]) -> None:
        """Checks arrays by path against the layout; parameters may be missing.

        Raises:
          ValueError: if the layout does not have one of the arrays, or has another shape of it.
        """
        known = {leaf.path for leaf in self.leaves}
        unknown = [path for path in leaves if path not in known]
        if unknown:
            raise ValueError(
                f"the layout does not know the parameters {_some(unknown)}; it has {_some(known)}. "
                "Trace it again: layout = adafisher_jax.trace_layout(loss_fn, params, ...) with "
                "these parameters as params"
            )
        for leaf in (leaf for layer in self.layers for leaf in layer.leaves):
            if leaf.path in leaves and (got := jnp.shape(leaves[leaf.path])) != leaf.shape:
                raise ValueError(
                    f"the parameter {leaf.path!r} has shape {got}, the layout wants "
                    f"{leaf.shape}: it was traced from another model"
                )

    def __str__(self) -> str:
        header = ("parameter", "layer", "in", "out", "stacked", "covered")
        rows = [_row(leaf, layer.kind) for layer in self.layers for leaf in layer.leaves]
        rows += [_row(one.leaf, "-", one.reason) for one in self.uncovered]
        rows = [header, *sorted(rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("-" * width for width in [*widths[:-1], len(header[-1])]))
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        total = sum(leaf.size for leaf in self.leaves)
        share = f"{self.covered:.1%} of {total:,} parameters under a Fisher block"
        others = ', others get momentum ("centered": over an RMS)'
        return "\n".join([*lines, share + (others if self.uncovered else "")])


def _row(leaf: Leaf, kind: str, reason: str = "") -> tuple[str, ...]:
    """Returns a parameter's line in the table."""
    if reason:
        sizes = ("-", "×".join(map(str, leaf.shape)) or "1", "-")
    else:
        sizes = (_sizes(leaf, "in"), _sizes(leaf, "out"), _sizes(leaf, "stack", "batch"))
    return (leaf.path or "(root)", kind, *sizes, f"no: {reason}" if reason else "yes")


def _sizes(leaf: Leaf, *roles: str) -> str:
    sizes = [str(n) for n, a in zip(leaf.shape, leaf.axes, strict=True) if a.startswith(roles)]
    return "×".join(sizes) or "-"


def check_layout(layout: Any) -> None:
    """Raises a TypeError if `layout` is not a `Layout`."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout: got {type(layout).__name__}, wanted a Layout")


def check_factors(factors: Mapping[str, Factor], layers: Iterable[Layer]) -> None:
    """Checks captured factors against the layers that need them.

    Raises:
      TypeError: if `factors` is not a mapping of `Factor`s.
      ValueError: if a wanted layer is missing or has other shapes.
    """
    if not isinstance(factors, Mapping):
        raise TypeError(
            f"factors: got {type(factors).__name__}, wanted the dict that "
            "adafisher_jax.value_and_grad returns"
        )
    for layer in layers:
        if layer.path not in factors:
            raise ValueError(
                f"factors: the layer {layer.path!r} of the layout is missing, got {_some(factors)}"
            )
        found = factors[layer.path]
        if not isinstance(found, Factor):
            raise TypeError(f"factors[{layer.path!r}]: got {type(found).__name__}, wanted a Factor")
        for name, want, got in zip(Factor._fields, layer.factor_shapes, found, strict=True):
            if jnp.shape(got) != want:
                raise ValueError(
                    f"factors[{layer.path!r}].{name} has shape {jnp.shape(got)}, the layout "
                    f"wants {want}: the factors are of another model or layout"
                )


def check_state(state: Any, wanted: Any) -> None:
    """Checks the shapes of a state, path by path, against one made for this model.

    Raises:
      ValueError: if a path is in only one of the two, or has another shape.
    """
    got, want = (
        {"/".join(names): jnp.shape(leaf) for names, leaf in named_leaves(tree)}
        for tree in (state, wanted)
    )
    for path in sorted([*want, *got], key=lambda path: path in got and path in want):
        if got.get(path) == want.get(path):
            continue
        if path not in got:
            found = f"{path!r} is missing, wanted shape {want[path]}"
        elif path not in want:
            found = f"{path!r} of shape {got[path]} is not wanted"
            if path.startswith("mu/"):
                found += f", since there is no gradient {path.removeprefix('mu/')!r}"
        else:
            found = f"{path!r} has shape {got[path]}, wanted {want[path]}"
        raise ValueError(f"the state is of another model, layout or rule: {found}")


def _some(paths: Any, most: int = 3) -> str:
    paths = sorted(paths)
    shown = ", ".join(map(repr, paths[:most])) or "nothing"
    return shown + (f" and {len(paths) - most} more" if len(paths) > most else "")
