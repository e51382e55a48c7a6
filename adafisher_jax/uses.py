"""Which parameter of a loss each layer's call used, read off the marks in its traced program.

What Linen and NNX share: an adapter reports the arrays a model was given as `Root`s and each
call of a layer as a `Use`. Here they are matched with the leaves of the loss's first argument,
which gives the `Layout` and, for each layer, the `Place`s of its probe.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from adafisher_jax.factors import Axes
from adafisher_jax.layout import Layer, Layout, Leaf, Uncovered, path_of
from adafisher_jax.lineage import Mark, Origin

Names = tuple[str, ...]


class Root(NamedTuple):
    """One array of the variables a model was given: the label of a root mark.

    Attributes:
      call: which call of a model, counted in program order.
      path: of the array within its variables.
    """

    call: int
    path: Names


@dataclasses.dataclass(frozen=True)
class Use:
    """One call of a layer: the label of its mark.

    Attributes:
      call: which call of a model it belongs to.
      kind: as in `adafisher_jax.layout.Layer`.
      weight: the name of its weight, or None, and of its bias.
      bias: the name of its bias, or None.
      holder: the path of the mapping or module that holds them.
      weight_axes: as the layer sees them, without stacked ones.
      bias_axes: likewise.
      groups: feature groups.
    """

    call: int
    kind: str
    weight: str | None
    bias: str | None
    holder: Names
    weight_axes: Axes
    bias_axes: Axes
    groups: int = 1


class Place(NamedTuple):
    """Where a probe goes: beside a weight, in the variables of one call of a model."""

    call: int
    holder: Names
    kind: str


class Trace(NamedTuple):
    """What a traced loss tells.

    Attributes:
      layout: its layers.
      places: where their probes go, and whose they are.
      nested: whether a model is called inside a function that JAX traces by itself, and so may
        have traced before.
    """

    layout: Layout
    places: dict[Place, str]
    nested: bool


def read_uses(marks: list[Mark], named: list[tuple[Any, Any]]) -> tuple[Layout, dict[Place, str]]:
    """Matches the uses of layers with parameters; returns a layout and the places of its probes.

    Args:
      marks: of a traced loss.
      named: the leaves of its first argument, with their pytree paths.

    Raises:
      ValueError: if there is no use, if layers of two kinds share a parameter, or if a function
        that applies a model was traced once for several sets of parameters.
    """
    reader = _Reader(_roots(marks), named)
    uses = [mark for mark in marks if isinstance(mark.label, Use)]
    if not uses:
        raise ValueError(
            "the capture met no layer: the loss called no Flax layer of a known kind. (A model "
            "of hand-written arithmetic is captured with adafisher_jax.tap.)"
        )
    for mark in uses:
        reader.add(mark)
    return reader.finish()


def _roots(marks: list[Mark]) -> dict[Root, Mark]:
    """The arrays handed to models, each with its origin among the loss's arguments."""
    roots: dict[Root, Mark] = {}
    for mark in marks:
        if isinstance(mark.label, Root):
            (origin,) = mark.origins
            if origin and isinstance(origin.source, Root):  # handed on by another model
                (before,) = roots[origin.source].origins
                origin = before and before.then(origin)
            found = dataclasses.replace(mark, origins=(origin,))
            if roots.setdefault(mark.label, found).origins != found.origins:
                raise ValueError(
                    f"a function that applies a model was traced once and called with different "
                    f"parameters ({'/'.join(mark.label.path)!r} differs), so their layers cannot "
                    "be told apart: apply the model outside jax.jit, or jit each call by itself"
                )
    return roots


class _Parameter(NamedTuple):
    """A layer's parameter, found among the leaves of the loss's first argument."""

    position: int
    leaf: Leaf
    layer_path: str
    place: Place
    frozen: bool
    problem: str | None


class _Found(NamedTuple):
    layer: Layer
    place: Place
    frozen: bool
    looped: bool


class _Reader:
    """Collects the uses of each weight and decides which layers are covered."""

    def __init__(self, roots: dict[Root, Mark], named: list[tuple[Any, Any]]):
        self.roots = roots
        self.named = named
        self.found: dict[int, list[_Found]] = {}
        self.reasons: dict[int, str] = {}
        self.owners: dict[str, set[int]] = {}

    def add(self, mark: Mark) -> None:
        """Notes one use of a layer."""
        use = mark.label
        assert isinstance(use, Use)
        roles = [
            (name, axes)
            for name, axes in ((use.weight, use.weight_axes), (use.bias, use.bias_axes))
            if name is not None
        ]
        parameters = {
            name: parameter
            for (name, axes), origin in zip(roles, mark.origins, strict=True)
            if (parameter := self._parameter(mark, use, name, axes, origin))
        }
        problems = [p.problem for p in parameters.values() if p.problem]
        if problems:
            self.reasons.update(
                dict.fromkeys((p.position for p in parameters.values()), problems[0])
            )
        elif main := parameters.get(use.weight or use.bias or ""):
            weight, bias = (parameters.get(name or "") for name in (use.weight, use.bias))
            layer = Layer(
                main.layer_path, use.kind, weight and weight.leaf, bias and bias.leaf, use.groups
            )
            found = _Found(layer, main.place, main.frozen, "while" in mark.inside)
            self.found.setdefault(main.position, []).append(found)
            for leaf in layer.leaves:
                self.owners.setdefault(leaf.path, set()).add(main.position)

    def _parameter(
        self, mark: Mark, use: Use, name: str, axes: Axes, origin: Origin | None
    ) -> _Parameter | None:
        """The parameter called `name`; None if it is none of ours."""
        label = self._label(use, name, origin)
        (root,) = self.roots[label].origins if label else (origin,)
        if root is None or not isinstance(root.source, int):
            return None
        if root.frozen and root.mixed:  # an averaged teacher: no gradient reaches the parameter
            return None
        problem = None
        if any(primitive.startswith("custom_") for primitive in mark.inside):
            problem = "used inside a function with its own derivative rule"
        elif label and mark.order > self.roots[label].order:
            problem = "differentiated inside the model"
        elif label is None or not root.whole:
            problem = "only a slice or a rearrangement of it reaches the model"
        elif origin is None or origin.source != label or not origin.untouched:
            problem = "transformed inside the model before its layer uses it"
        keys, array = self.named[root.source]
        if jnp.iscomplexobj(array):
            problem = "complex, for which the factors are not defined"
        named = () if problem or origin is None else _named_axes(axes, origin)
        leaf = Leaf(path_of(keys), jnp.shape(array), named)
        parts = tuple(path_of((key,)) for key in keys)
        layer_path = "/".join(holder(parts, name) if name in parts else parts[:-1])
        place = Place(use.call, use.holder, use.kind)
        if label:
            place = Place(label.call, holder(label.path, name), use.kind)
        return _Parameter(root.source, leaf, layer_path, place, root.frozen, problem)

    def _label(self, use: Use, name: str, origin: Origin | None) -> Root | None:
        """The array of the model's variables that a layer's parameter began as."""
        if origin is not None:
            return origin.source if isinstance(origin.source, Root) else None
        path = (*use.holder, name)
        return next(
            (r for r in self.roots if r.call == use.call and r.path[: len(path)] == path), None
        )

    def finish(self) -> tuple[Layout, dict[Place, str]]:
        """The layout of all that was added, and where the probes go."""
        layers: dict[str, Layer] = {}
        places: dict[Place, str] = {}
        for index, found in self.found.items():
            if index in self.reasons:
                continue
            found = _one_kind(found)
            layer = found[0].layer
            if any(f.layer != layer for f in found):
                problem = "used by several layers that differ in their bias or axes"
                self.reasons.update(dict.fromkeys(self._indices(found), problem))
                continue
            if any(self.owners[leaf.path] != {index} for leaf in layer.leaves):
                problem = "shares its bias with another layer"
                self.reasons.update(dict.fromkeys(self._indices(found), problem))
                continue
            if layer.path in layers:  # two layers in one mapping: each by its own weight
                layer = dataclasses.replace(layer, path=layer.leaves[0].path)
            layers[layer.path] = layer
            # Behind stop_gradient a layer counts only where it is not used live too, and not
            # in a loop that cannot be differentiated backwards.
            live = [f for f in found if not f.frozen] or [f for f in found if not f.looped]
            places.update({f.place: layer.path for f in live})
        inside = {leaf.path for layer in layers.values() for leaf in layer.leaves}
        uncovered = tuple(
            Uncovered(
                Leaf(path, jnp.shape(array)),
                self.reasons.get(index, "no layer of a known kind uses it as it is"),
            )
            for index, (keys, array) in enumerate(self.named)
            if (path := path_of(keys)) not in inside
        )
        return Layout(tuple(layers[path] for path in sorted(layers)), uncovered), places

    def _indices(self, found: list[_Found]) -> list[int]:
        paths = {leaf.path for f in found for leaf in f.layer.leaves}
        return [i for i, (keys, _) in enumerate(self.named) if path_of(keys) in paths]


def _one_kind(found: list[_Found]) -> list[_Found]:
    """The uses that describe a weight: of an embedding that is looked up, its lookups."""
    kinds = {f.layer.kind for f in found}
    if kinds == {"embedding", "attend"}:
        return [f for f in found if f.layer.kind == "embedding"]
    if len(kinds) > 1:
        raise ValueError(
            f"the parameter {found[0].layer.leaves[0].path!r} is used by layers of different "
            f"kinds, {' and '.join(sorted(kinds))}: one Fisher block cannot describe both"
        )
    return found


def _named_axes(inner: Axes, origin: Origin) -> Axes:
    """Names a whole parameter's axes, given those of the slice a layer sees."""
    names = dict(zip(origin.axes, inner, strict=True))
    names |= {axis: f"stack{i}" for i, axis in enumerate(origin.sliced)}
    return tuple(names[axis] for axis in range(len(names)))


def holder(path: Names, name: str) -> Names:
    """The path of the mapping or module that holds `name`, given the path of its array.

    Example:
      >>> holder(("Dense_0", "kernel", "value"), "kernel")
      ('Dense_0',)
    """
    return path[: len(path) - 1 - path[::-1].index(name)]
