"""Which layers a loss calls, and with which of its parameters: read off the marks in its program.

What Linen and NNX share. A layer's call leaves a mark with a `Use`. Here the marks' parameters
are matched with the leaves of the loss's first argument, which gives the `Layout` and says which
marks are to be completed with whose probe.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from adafisher_jax.capture.lineage import RECOMPUTED, Mark, Origin, Place
from adafisher_jax.capture.probes import ENTERED, Carrier, Completion
from adafisher_jax.factors import Axes
from adafisher_jax.layout import Layer, Layout, Leaf, Uncovered, path_of


@dataclasses.dataclass(frozen=True)
class Use:
    """One call of a layer: what its mark notes.

    Attributes:
      kind: as in `adafisher_jax.layout.Layer`.
      weight: the name of its weight, or None.
      bias: the name of its bias, or None.
      weight_axes: as the layer sees them, without stacked ones.
      bias_axes: likewise.
      groups: feature groups.
      problem: why it cannot be captured, if so.
    """

    kind: str
    weight: str | None
    bias: str | None
    weight_axes: Axes
    bias_axes: Axes
    groups: int = 1
    problem: str = ""


class Uses(NamedTuple):
    """What a traced loss tells.

    Attributes:
      layout: its layers.
      sources: the position of the parameter beside which each layer's probe goes, by layer path.
      completions: by their places, the marks that are to be tapped.
    """

    layout: Layout
    sources: dict[str, int]
    completions: dict[Place, Completion]


def read_uses(marks: Sequence[Mark], named: Sequence[tuple[Any, Any]]) -> Uses:
    """Matches the calls of layers with parameters.

    Args:
      marks: of a traced loss.
      named: the leaves of its first argument, with their pytree paths.

    Raises:
      ValueError: if there is no mark, or if layers of two kinds share a parameter.
    """
    if not marks:
        raise ValueError(
            "the capture met no layer: the loss called no Flax layer of a known kind. (A model of "
            "hand-written arithmetic is captured with adafisher_jax.tap.)"
        )
    reader = _Reader(named)
    for mark in marks:
        reader.add(mark)
    return reader.finish()


class _Parameter(NamedTuple):
    """A layer's parameter, found among the leaves of the loss's first argument."""

    position: int
    leaf: Leaf
    layer_path: str
    origin: Origin
    problem: str


class _Found(NamedTuple):
    layer: Layer
    origin: Origin
    mark: Mark
    completion: Completion


class _Reader:
    """Collects the uses of each weight and decides which layers are covered."""

    def __init__(self, named: Sequence[tuple[Any, Any]]):
        self.named = named
        self.found: dict[int, list[_Found]] = {}
        self.reasons: dict[int, str] = {}
        self.owners: dict[str, set[int]] = {}

    def add(self, mark: Mark) -> None:
        """Notes one use of a layer."""
        use = mark.use
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
        if len({tuple(s.loop for s in p.origin.sliced) for p in parameters.values()}) > 1:
            problems.append("stacked unlike the layer's other parameter")
        if problems:
            self.reasons.update(
                dict.fromkeys((p.position for p in parameters.values()), problems[0])
            )
        elif main := parameters.get(use.weight or use.bias or ""):
            weight, bias = (parameters.get(name or "") for name in (use.weight, use.bias))
            layer = Layer(
                main.layer_path, use.kind, weight and weight.leaf, bias and bias.leaf, use.groups
            )
            found = _Found(layer, main.origin, mark, _completion(mark, main.origin))
            self.found.setdefault(main.position, []).append(found)
            for leaf in layer.leaves:
                self.owners.setdefault(leaf.path, set()).add(main.position)
        else:
            for bias in parameters.values():
                self.reasons[bias.position] = "the weight of its layer is no parameter as it is"

    def _parameter(
        self, mark: Mark, use: Use, name: str, axes: Axes, origin: Origin | None
    ) -> _Parameter | None:
        """The parameter called `name`; None if it is none of ours."""
        if origin is None or origin.source is None:
            return None
        if origin.frozen and (origin.mixed or origin.lost):
            return None  # an averaged teacher, say: no gradient reaches the parameter
        keys, array = self.named[origin.source]
        problem = use.problem or origin.lost or _closed(mark.inside)
        if not problem and None in origin.axes:
            problem = "repeated before its layer uses it"
        leaf = Leaf(path_of(keys), jnp.shape(array), () if problem else _named_axes(axes, origin))
        parts = tuple(path_of((key,)) for key in keys)
        layer_path = "/".join(_holder(parts, name))
        return _Parameter(origin.source, leaf, layer_path, origin, problem)

    def finish(self) -> Uses:
        """The layout of all that was added, and which marks to complete."""
        covered: dict[int, Layer] = {}
        completions: dict[Place, Completion] = {}
        for position, found in self.found.items():
            if position in self.reasons:
                continue
            found = _one_kind(found)
            layer = found[0].layer
            if any(f.layer != layer for f in found):
                self._refuse(found, "used by several layers that differ in their bias or axes")
                continue
            if any(self.owners[leaf.path] != {position} for leaf in layer.leaves):
                self._refuse(found, "shares its bias with another layer")
                continue
            covered[position] = layer
            # Behind stop_gradient a layer counts only where it is not used live too, and nothing
            # is captured in a loop that cannot be differentiated backwards.
            live = [f for f in found if not f.origin.frozen] or found
            completions |= {
                f.mark.place: f.completion for f in live if "while" not in f.mark.inside
            }
        holders = collections.Counter(layer.path for layer in covered.values())
        for position, layer in covered.items():
            if holders[layer.path] > 1:  # several layers in one module: each by its own weight
                covered[position] = dataclasses.replace(layer, path=layer.leaves[0].path)
        layers = {layer.path: layer for layer in covered.values()}
        sources = {layer.path: position for position, layer in covered.items()}
        inside = {leaf.path for layer in layers.values() for leaf in layer.leaves}
        uncovered = tuple(
            Uncovered(
                Leaf(path, jnp.shape(array)),
                self.reasons.get(position, "no layer of a known kind uses it as it is"),
            )
            for position, (keys, array) in enumerate(self.named)
            if (path := path_of(keys)) not in inside
        )
        layout = Layout(tuple(layers[path] for path in sorted(layers)), uncovered)
        return Uses(layout, sources, completions)

    def _refuse(self, found: list[_Found], why: str) -> None:
        paths = {leaf.path for f in found for leaf in f.layer.leaves}
        for position, (keys, _) in enumerate(self.named):
            if path_of(keys) in paths:
                self.reasons[position] = why


def _closed(inside: tuple[str, ...]) -> str:
    """Why no probe gets to a mark within some primitives; loops without end need none."""
    for name in inside:
        if name == RECOMPUTED:  # one call is two, and each has a share of its cotangent
            return "computed again by jax.checkpoint for a gradient inside the loss"
        if name.startswith("custom_"):
            return "used inside a function with its own derivative rule"
        if name not in ENTERED and name != "while":
            return f"used inside {name}, which takes no probe"
    return ""


def _one_kind(found: list[_Found]) -> list[_Found]:
    """The uses that describe a weight: of an embedding that is looked up, its lookups."""
    lookups = [f for f in found if f.layer.kind == "embedding"]
    if lookups and all(f in lookups or _attends(f.layer) for f in found):
        return lookups
    kinds = {f.layer.kind for f in found}
    if len(kinds) > 1:
        raise ValueError(
            f"the parameter {found[0].layer.leaves[0].path!r} is used by layers of different "
            f"kinds, {' and '.join(sorted(kinds))}: one Fisher block cannot describe both"
        )
    return found


def _attends(layer: Layer) -> bool:
    """Whether a layer multiplies by the transpose of its weight: `Embed.attend`, or by hand."""
    return layer.kind == "attend" or (layer.kind == "dense" and layer.axes == ("out0", "in0"))


def _completion(mark: Mark, origin: Origin) -> Completion:
    """Completes a mark with the probe of the parameter with `origin`, one of the mark's."""
    assert origin.source is not None
    carrier = Carrier(origin.source, origin.sliced).within(len(mark.place) - 1)
    parameter = mark.origins.index(origin)
    return Completion(carrier, parameter, mark.axes[parameter])


def _named_axes(inner: Axes, origin: Origin) -> Axes:
    """Names a whole parameter's axes, given those of the slice a layer sees."""
    names = {axis: name for axis, name in zip(origin.axes, inner, strict=True) if axis is not None}
    names |= {s.axis: f"stack{i}" for i, s in enumerate(origin.sliced)}
    return tuple(names[axis] for axis in range(len(names)))


def _holder(path: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The path of the mapping or module that holds `name`, given the path of its array."""
    return path[: -1 - path[::-1].index(name)] if name in path else path[:-1]
