"""Which parameter belongs to which layer: static, hashable, and printed as a table."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adafisher_jax.factors import Axes, Factor


def path_of(keys: tuple[Any, ...]) -> str:
    """A pytree path as this package writes it: without the `.value` of the box a leaf is in.

    Example:
      >>> import jax
      >>> [(keys, _)] = jax.tree_util.tree_leaves_with_path({"encoder": {"kernel": 1.0}})
      >>> path_of(keys)
      'encoder/kernel'
    """
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def by_path(tree: Any) -> tuple[dict[str, Any], Any]:
    """A tree's leaves by path, in order, and its structure.

    Raises:
      ValueError: if two leaves have the same path.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    found = {path_of(keys): leaf for keys, leaf in leaves}
    if len(found) < len(leaves):
        paths = [path_of(keys) for keys, _ in leaves]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two arrays have the same path {twice!r}: a key contains '/'")
    return found, treedef


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter array.

    Attributes:
      path: in the loss's first argument.
      shape: its shape, stacked axes included.
      axes: what each axis is: `"in0"`, `"out0"`, `"batch0"` (independent maps within the
        layer) or `"stack0"` (stacked by a lifted transform).
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _is_block(axis: str) -> bool:
    return axis.startswith(("stack", "batch"))


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer under a Fisher block.

    Attributes:
      path: of the mapping or module that holds its parameters.
      kind: dense, conv, conv_local, embedding, attend or norm.
      weight: kernel, embedding or scale.
      bias: or shift.
      groups: feature groups of a convolution.
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
        """What is the same of layers that differ in nothing but paths."""
        weight, bias = (x and dataclasses.replace(x, path="") for x in (self.weight, self.bias))
        return dataclasses.replace(self, path="", weight=weight, bias=bias)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array whose rank and stacked axes the factors share."""
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
        """`rows_shape`, with the rank of the weight."""
        return tuple(n if axis.startswith("stack") else 1 for n, axis in self._sized)

    @property
    def slot_shape(self) -> tuple[int, ...]:
        """One number for each block, with the rank of the weight."""
        return tuple(n if _is_block(axis) else 1 for n, axis in self._sized)

    @property
    def _sized(self) -> tuple[tuple[int, str], ...]:
        return tuple(zip(self.shape, self.axes, strict=True))

    def dtype(self, leaves: Mapping[str, Any]) -> Any:
        """The type of the layer's statistics, given arrays by path: at least float32."""
        own = [leaves[leaf.path] for leaf in self.leaves if leaf.path in leaves]
        return jnp.promote_types(jnp.result_type(*own), jnp.float32)

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the parts of this layer's `Factor`."""
        s = tuple(1 if axis.startswith("in") else n for n, axis in self._sized)
        if self.kind == "norm":  # a pair, for scale and shift, in place of the channels
            h = tuple(n if _is_block(axis) else 1 for n, axis in self._sized)
            h = tuple(2 if axis == "out0" else n for n, axis in zip(h, self.axes, strict=True))
        else:
            h = tuple(1 if axis.startswith("out") else n for n, axis in self._sized)
        return (h, s, self.rows_shape, h)

    def zeros(self, dtype: Any = jnp.float32) -> Factor:
        """Zero factors of this layer."""
        return Factor(*(jnp.zeros(shape, dtype) for shape in self.factor_shapes))

    def to_bias(self, value: jax.Array) -> jax.Array:
        """Turns an array like `s` (or a bias-shaped sum) from the weight's axes to the bias's."""
        assert self.bias is not None
        wanted = self.bias.axes
        order = [self.axes.index(axis) for axis in wanted]
        return jnp.squeeze(value, [i for i in range(value.ndim) if i not in order]).transpose(
            [sorted(order).index(i) for i in order]
        )

    def from_bias(self, value: jax.Array) -> jax.Array:
        """Turns a bias-shaped array into one that broadcasts against the weight."""
        assert self.bias is not None
        mine = self.bias.axes
        order = [mine.index(axis) for axis in self.axes if axis in mine]
        shape = [value.shape[mine.index(a)] if a in mine else 1 for a in self.axes]
        return value.transpose(order).reshape(shape)

    def to_matrices(self, value: jax.Array) -> jax.Array:
        """An array like the weight, `h` or `s` as matrices: (blocks, ins, outs)."""
        order = (*self.blocks, *self.ins, *self.outs)
        sizes = [
            math.prod(value.shape[i] for i in axes) for axes in (self.blocks, self.ins, self.outs)
        ]
        return value.transpose(order).reshape(sizes)

    def from_matrices(self, value: jax.Array) -> jax.Array:
        """The inverse of `to_matrices`."""
        order = (*self.blocks, *self.ins, *self.outs)
        whole = {axis: value.shape[1 + (axis in self.outs)] != 1 for axis in order}
        sizes = [self.shape[i] if i in self.blocks or whole[i] else 1 for i in order]
        return value.reshape(sizes).transpose([order.index(i) for i in range(len(order))])


@dataclasses.dataclass(frozen=True)
class Uncovered:
    """A parameter without a Fisher block, and why."""

    leaf: Leaf
    reason: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layers met in a loss, and the parameters outside them.

    Made by `adafisher_jax.trace_layout`. Holds no arrays, compares and hashes by value, so it
    can be a static argument; two traces of one model are equal.

    Attributes:
      layers: those under a Fisher block, sorted by path.
      uncovered: the other parameters.
    """

    layers: tuple[Layer, ...]
    uncovered: tuple[Uncovered, ...] = ()

    @property
    def covered(self) -> float:
        """The share of parameters, by count, under a Fisher block."""
        inside = sum(leaf.size for layer in self.layers for leaf in layer.leaves)
        outside = sum(row.leaf.size for row in self.uncovered)
        return inside / max(inside + outside, 1)

    def check_params(self, leaves: Mapping[str, Any]) -> None:
        """Checks arrays by path against the layers.

        Raises:
          ValueError: if none of the layers' parameters is there, or one has another shape.
        """
        known = [leaf for layer in self.layers for leaf in layer.leaves]
        if known and not any(leaf.path in leaves for leaf in known):
            raise ValueError(
                "none of the layout's layers is in params: the layout has "
                f"{_some(leaf.path for leaf in known)}, params has {_some(leaves)}"
            )
        for leaf in known:
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
        total = sum(leaf.size for layer in self.layers for leaf in layer.leaves)
        total += sum(one.leaf.size for one in self.uncovered)
        return "\n".join(
            [*lines, f"{self.covered:.1%} of {total:,} parameters under a Fisher block"]
        )


def _row(leaf: Leaf, kind: str, reason: str = "") -> tuple[str, ...]:
    """A parameter's line in the table."""
    if reason:
        sizes = ("-", "×".join(map(str, leaf.shape)) or "1", "-")
    else:
        sizes = (_sizes(leaf, "in"), _sizes(leaf, "out"), _sizes(leaf, "stack", "batch"))
    return (leaf.path or "(root)", kind, *sizes, f"no: {reason}" if reason else "yes")


def _sizes(leaf: Leaf, *roles: str) -> str:
    sizes = [str(n) for n, a in zip(leaf.shape, leaf.axes, strict=True) if a.startswith(roles)]
    return "×".join(sizes) or "-"


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
      ValueError: naming the first path that only one of them has, or else that differs.
    """
    got, want = (
        {path_of(keys): jnp.shape(leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (state, wanted)
    )
    for path in sorted([*want, *got], key=lambda path: path in got and path in want):
        if got.get(path) != want.get(path):
            has, wants = (f"shape {of[path]}" if path in of else "nothing" for of in (got, want))
            raise ValueError(
                f"the state is of another model, layout or rule: at {path!r} it has {has}, "
                f"wanted {wants}"
            )


def _some(paths: Any, most: int = 3) -> str:
    paths = sorted(paths)
    shown = ", ".join(map(repr, paths[:most])) or "nothing"
    return shown + (f" and {len(paths) - most} more" if len(paths) > most else "")
