"""Groups of like layers, and how the arrays of a group are stacked.

Averages, scales and directions are small. Those of a group are stacked along a new first axis, so
that one operation serves the group. Weights, their momenta and their steps stay separate arrays. A
group is named by the path of its first layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from adafisher_jax.layout import Layer
from adafisher_jax.meshes import everywhere

MOST = 2**24  # entries of all weights in a group, whose steps are in memory together


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that differ in nothing but their paths, in the order of the paths."""

    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        return self.layers[0].path

    @property
    def stacked(self) -> Layer:
        """The group as one layer, its first axis over the layers."""
        return self.layers[0].stacked(len(self.layers))

    def dtype(self, leaves: Mapping[str, Any]) -> Any:
        """The type of the group's statistics."""
        return self.layers[0].dtype(leaves)

    def paths(self, leaves: Container[str]) -> tuple[tuple[str, ...] | None, ...]:
        """The paths of the weights and of the biases; None for either if none is in `leaves`."""
        pairs = zip(*((layer.weight, layer.bias) for layer in self.layers), strict=True)
        found = (tuple(leaf.path for leaf in of if leaf and leaf.path in leaves) for of in pairs)
        return tuple(of or None for of in found)


def groups(layers: Iterable[Layer], leaves: Mapping[str, Any]) -> list[Group]:
    """Groups of layers that differ in nothing but their paths, each of `MOST` entries at most.

    Args:
      layers: sorted by path.
      leaves: arrays by path; another optimizer may step the arrays that are missing.

    Example:
      >>> import adafisher_jax as af, jax.numpy as jnp
      >>> layers = [
      ...     af.Layer(path, "dense", af.Leaf(f"{path}/kernel", (3, n), ("in0", "out0")), None)
      ...     for path, n in (("a", 4), ("b", 5), ("c", 4))
      ... ]
      >>> leaves = {layer.weight.path: jnp.zeros(layer.weight.shape) for layer in layers}
      >>> [[layer.path for layer in group.layers] for group in groups(layers, leaves)]
      [['a', 'c'], ['b']]
    """
    found: list[list[Layer]] = []
    last: dict[Layer, tuple[Any, list[Layer]]] = {}
    for layer in layers:
        types = [
            leaves[leaf.path].dtype if leaf and leaf.path in leaves else None
            for leaf in (layer.weight, layer.bias)
        ]
        before, group = last.get(layer.nameless, (None, []))
        if types != before or (len(group) + 1) * layer.leaves[0].size > MOST:
            group = []
            found.append(group)
            last[layer.nameless] = types, group
        group.append(layer)
    return [Group(tuple(group)) for group in found]


def places(layers: Iterable[Layer], names: Container[str]) -> Iterator[tuple[Layer, str, int]]:
    """Each grouped layer, with the name of its group and its place in the group.

    Args:
      layers: the layers that `groups` was given; layers without a group are left out.
      names: the names of all groups.
    """
    last: dict[Layer, tuple[str, int]] = {}
    for layer in layers:
        kind = layer.nameless
        if layer.path in names:
            last[kind] = layer.path, 0
        elif kind in last:
            name, place = last[kind]
            last[kind] = name, place + 1
        else:
            continue
        yield layer, *last[kind]


def stack(trees: Iterable[Any]) -> Any:
    """One tree of arrays, stacked along a new first axis, from a tree for each layer."""
    return jax.tree.map(lambda *leaves: jnp.stack([everywhere(leaf) for leaf in leaves]), *trees)


def each(
    function: Callable[..., Any], arrays: Iterable[jax.Array], *stacked: jax.Array
) -> tuple[Any, ...]:
    """The function of each array and of its part of each stacked array.

    Parts are taken first. They then belong to the one loop over their array.
    """
    parts = map(jnp.unstack, stacked)
    return tuple(function(*of_one) for of_one in zip(arrays, *parts, strict=True))


def part(layers: int, count: int, stacked: Any, start: jax.Array) -> tuple[Any, jax.Array]:
    """The stacked arrays of `count` layers from `start` on, and where the next part starts.

    Each array has one entry for each of the `layers`, or one for each of their matrices.
    """
    # A call that XLA does not inline. So the loops over a part do not know which part it is, and
    # those of all parts are equal. XLA on a CPU compiles equal loops once.
    with set_xla_metadata(inlineable="false"):
        return _part(layers, count, stacked, start)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _part(layers: int, count: int, stacked: Any, start: jax.Array) -> tuple[Any, jax.Array]:
    def of(x: jax.Array) -> jax.Array:
        entries = len(x) // layers
        return jax.lax.dynamic_slice_in_dim(x, start * entries, count * entries)

    return jax.tree.map(of, stacked), start + count
