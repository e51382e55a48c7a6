"""Decides which layers a loss has, and which parameters belong to each.

The marks and products of the traced program are matched with the leaves of the loss's first
argument. The result is the `Layout`, and where in the program the statistics of a layer are taken.
"""

import collections
import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from adafisher_jax.capture.found import (
    RECOMPUTED,
    Found,
    Mark,
    Product,
    Refusal,
    without_probe,
)
from adafisher_jax.capture.origins import COMPUTED, REARRANGED, Origin
from adafisher_jax.capture.places import Place
from adafisher_jax.capture.probes import ENTERED, Carrier, Completion
from adafisher_jax.capture.products import keep_apart
from adafisher_jax.capture.roles import named_axes, source_axes
from adafisher_jax.factors import Axes
from adafisher_jax.layout import Layer, Layout, Leaf, Uncovered
from adafisher_jax.paths import Named

_NO_GRADIENT = "no gradient of the loss reaches the output of its layer"


class Uses(NamedTuple):
    """What is known of a traced loss.

    Attributes:
      layout: the layers of the loss.
      sources: the positions of the parameters that have a probe beside them, by their paths.
      completions: how statistics are taken, by place.
      refused: the reasons why parameters cannot be captured, by their paths.
    """

    layout: Layout
    sources: dict[str, int]
    completions: dict[Place, Completion]
    refused: dict[str, str]


def read_uses(found: Found, reached: set[Place], named: Named) -> Uses:
    """Matches the uses of parameters with the parameters.

    Args:
      found: the uses in a traced loss.
      reached: the places that a gradient of the loss passes through.
      named: the leaves of the loss's first argument, each after the names on its path.

    Raises:
      ValueError: if there is no use at all, or if layers of two kinds share a parameter.
    """
    reader = _Reader(named)
    for use in found:
        match use:
            case Refusal():
                reader.add_refusal(use, use.place in reached)
            case Mark():
                reader.add_mark(use, use.place in reached)
            case Product():
                reader.add_product(use, use.place in reached)
    if not found:
        raise ValueError(
            "the capture met no layer: the loss calls no Flax layer and multiplies none of its "
            "parameters by data"
        )
    return reader.finish()


class _Parameter(NamedTuple):
    """A layer's parameter, found among the leaves of the loss's first argument."""

    position: int
    leaf: Leaf
    layer_path: str
    origin: Origin
    problem: str


class _Found(NamedTuple):
    """One use of a weight.

    Attributes:
      layer: the layer that the use makes of the weight.
      origin: the origin of the weight.
      place: the place of the mark or product.
      completion: how statistics are taken there.
      mark: whether the use is a mark; otherwise it is a product.
      derived: see `Product`.
      written: see `Product`; None of a mark.
      learned: see `Product`.
    """

    layer: Layer
    origin: Origin
    place: Place
    completion: Completion
    mark: bool
    derived: bool
    written: Any
    learned: bool

    @property
    def form(self) -> tuple[str, Leaf | None]:
        return self.layer.kind, self.layer.weight

    def is_tangent(self, other: "_Found") -> bool:
        """Whether this use, which has no bias, is the tangent of one that has a bias."""
        same = self.form == other.form and self.written == other.written
        return same and bool(self.written)


class _Reader:
    """Collects the uses of each weight and decides which layers are covered."""

    def __init__(self, named: Named):
        self.named = named
        self.paths = ["/".join(names) for names, _ in named]
        self.found: dict[int, list[_Found]] = {}
        self.unused: dict[int, str] = {}
        self.reasons: dict[int, str] = {}  # why a use of a parameter is no layer
        self.problems: dict[int, str] = {}  # reasons that hold whatever other uses there are

    def add_refusal(self, use: Refusal, reached: bool) -> None:
        """Notes a use that cannot be captured."""
        outweighs = use.outweighs and reached
        (self.problems if outweighs else self.reasons).setdefault(use.source, use.why)

    def add_mark(self, mark: Mark, reached: bool) -> None:
        """Notes one call of a known layer."""
        use = mark.use
        roles = [
            (name, axes)
            for name, axes in ((use.weight, use.weight_axes), (use.bias, use.bias_axes))
            if name is not None
        ]
        parameters = {
            name: parameter
            for (name, axes), origin in zip(roles, mark.origins, strict=True)
            if (parameter := self._named(mark, name, axes, origin))
        }
        positions = [p.position for p in parameters.values()]
        if not reached:
            self.unused.update(dict.fromkeys(positions, _NO_GRADIENT))
            return
        if use.weight and (computed := mark.origins[0]) and computed.lost:
            self.problems |= dict.fromkeys(computed.behind, computed.lost)
        problems = [p.problem for p in parameters.values() if p.problem]
        if len({*map(_stacked, parameters.values())}) > 1:
            problems.append("stacked unlike the layer's other parameter")
        if problems:
            self.problems.update(dict.fromkeys(positions, problems[0]))
        elif main := parameters.get(use.weight or use.bias or ""):
            weight, bias = (parameters.get(name or "") for name in (use.weight, use.bias))
            layer = Layer(
                main.layer_path, use.kind, weight and weight.leaf, bias and bias.leaf, use.groups
            )
            i = mark.origins.index(main.origin)
            carrier = _carrier(main.origin, mark.place)
            completion = Completion(carrier, mark.axes[i], parameter=i)
            found = _Found(layer, main.origin, mark.place, completion, True, False, None, False)
            self._add(main, found)
        else:
            for bias in parameters.values():
                self.problems[bias.position] = "the weight of its layer is no parameter as it is"

    def add_product(self, product: Product, reached: bool) -> None:
        """Notes one product of a parameter with data."""
        linear, origin = product.linear, product.weight
        assert isinstance(origin.source, int)
        if not reached:
            self.unused[origin.source] = _NO_GRADIENT
            return
        if origin.frozen and (origin.mixed or origin.multiplied):
            return
        names, array = self.named[origin.source]
        linear = keep_apart(linear, origin, jnp.shape(array))
        problem = _problem(product.inside, origin)
        inner = linear.statistic.weight_axes
        axes = None if problem else source_axes(inner, origin, array.ndim, linear.apart)
        if axes is None:
            why = problem or "an axis of it is split between inputs, outputs and loops"
            again = RECOMPUTED in product.inside
            outweighs = (again or not product.derived) and not origin.frozen
            self.add_refusal(Refusal(origin.source, why, product.place, outweighs), reached)
            return
        leaf = Leaf(self.paths[origin.source], jnp.shape(array), axes)
        weight = _Parameter(origin.source, leaf, "/".join(names[:-1]), origin, "")
        layer = Layer(
            weight.layer_path, linear.kind, leaf, self._bias(product, leaf), linear.groups
        )
        completion = Completion(_carrier(origin, product.place), origin.axes, linear=linear)
        of_use = product.derived, product.written, product.learned
        self._add(weight, _Found(layer, origin, product.place, completion, False, *of_use))

    def _bias(self, product: Product, weight: Leaf) -> Leaf | None:
        """Returns the bias of a product; None unless each of its axes is one of the weight's."""
        if product.bias is None:
            return None
        assert isinstance(product.bias.source, int)
        _, array = self.named[product.bias.source]
        names = {mine: weight.axes[its] for mine, its in product.bias_axes}
        names |= product.bias.stacks
        axes = tuple(names.get(i, "") for i in range(array.ndim))
        sizes = dict(zip(weight.axes, weight.shape, strict=True))
        outside = {a for a in weight.axes if not a.startswith("in") and a not in axes}
        if any(sizes[a] != 1 for a in outside) or any(
            sizes.get(a, 1) != n for a, n in zip(axes, array.shape, strict=True)
        ):
            return None
        return Leaf(self.paths[product.bias.source], jnp.shape(array), axes)

    def _add(self, main: _Parameter, found: _Found) -> None:
        self.found.setdefault(main.position, []).append(found)

    def _named(self, mark: Mark, name: str, axes: Axes, origin: Origin | None) -> _Parameter | None:
        """Returns the parameter that a mark calls `name`; None if no gradient is taken of it."""
        if origin is None or not isinstance(origin.source, int):
            return None
        if origin.frozen and (origin.mixed or origin.multiplied or origin.lost):
            return None  # as an averaged teacher: no gradient reaches the parameter
        names, array = self.named[origin.source]
        problem = mark.use.problem or origin.lost or _problem(mark.inside, origin)
        own = () if problem else named_axes(axes, origin, array.ndim)
        if own is None or (origin.ranges and not problem):
            problem = REARRANGED
        leaf = Leaf(self.paths[origin.source], jnp.shape(array), own or ())
        path = "/".join(_holder(names, name))
        return _Parameter(origin.source, leaf, path, origin, problem)

    def finish(self) -> Uses:
        """Returns the layout of all uses that were added, and where to take statistics."""
        covered: dict[int, Layer] = {}
        completions: dict[Place, Completion] = {}
        chosen = {
            position: _describing(_live([self._with_sound_bias(f) for f in found]))
            for position, found in self.found.items()
            if position not in self.problems
        }
        owners: dict[str, set[int]] = {}
        for position, found in chosen.items():
            for leaf in {leaf for f in found for leaf in f.layer.leaves}:
                owners.setdefault(leaf.path, set()).add(position)
        for position, found in chosen.items():
            if len({_without_bias(f.layer) for f in found}) > 1:
                paths = {leaf.path for f in found for leaf in f.layer.leaves}
                self._refuse(paths, "used by several layers that differ in their axes")
                continue
            layer = found[0].layer
            biases = {f.layer.bias for f in found}
            paths = {bias.path for bias in biases if bias}
            shared = any(len(owners[path]) > 1 for path in paths)
            if layer.weight and (len(biases) > 1 or shared or layer.weight.path in paths):
                layer = _without_bias(layer)
                self._refuse(paths, "a bias of several layers, or of some uses of a weight alone")
            covered[position] = layer
            completions |= {f.place: f.completion for f in found}
        holders = collections.Counter(layer.path for layer in covered.values())
        for position, layer in covered.items():
            if holders[layer.path] > 1:  # several layers in one module: the path is the weight's
                covered[position] = dataclasses.replace(layer, path=layer.leaves[0].path)
        layers = {layer.path: layer for layer in covered.values()}
        if len(layers) < len(covered):
            count = collections.Counter(layer.path for layer in covered.values())
            raise ValueError(
                f"two layers have the same path {max(count, key=count.__getitem__)!r}: a key "
                "contains '/'"
            )
        sources = {layer.leaves[0].path: position for position, layer in covered.items()}
        inside = {leaf.path for layer in layers.values() for leaf in layer.leaves}
        refused = self.reasons | self.problems
        reasons = self.unused | refused
        outside = {
            path: (position, Leaf(path, jnp.shape(array)))
            for position, (path, (_, array)) in enumerate(zip(self.paths, self.named, strict=True))
            if path not in inside
        }
        uncovered = tuple(
            Uncovered(leaf, reasons.get(position, COMPUTED)) for position, leaf in outside.values()
        )
        layout = Layout(tuple(layers[path] for path in sorted(layers)), uncovered)
        met = {path: refused[i] for path, (i, _) in outside.items() if i in refused}
        return Uses(layout, sources, completions, met)

    def _with_sound_bias(self, found: _Found) -> _Found:
        """Takes a bias away that has another use, for which there is no layer."""
        bias = found.layer.bias
        if bias is None or bias.path not in (self.paths[i] for i in self.problems):
            return found
        return found._replace(layer=_without_bias(found.layer))

    def _refuse(self, paths: set[str], why: str) -> None:
        self.problems |= {i: why for i, path in enumerate(self.paths) if path in paths}


def _problem(inside: tuple[str, ...], origin: Origin) -> str:
    """Returns why no probe reaches a use inside some primitives; empty if one does."""
    for name in inside:
        if name == RECOMPUTED:  # the call runs twice, and each run has a part of its cotangent
            return "computed again by jax.checkpoint for a gradient inside the loss"
        if name.startswith("custom_"):
            return "used inside a function with its own derivative rule"
        if name not in ENTERED:
            return without_probe(name)
    return "repeated before its layer uses it" if origin.repeated else ""


def _without_bias(layer: Layer) -> Layer:
    return dataclasses.replace(layer, bias=None)


def _live(found: list[_Found]) -> list[_Found]:
    """Returns the uses that are not behind `stop_gradient`, or all if there are no others."""
    return [f for f in found if not f.origin.frozen] or found


def _describing(found: list[_Found]) -> list[_Found]:
    """Returns the uses of a weight whose rows its factors average."""
    found = [f for f in found if not f.derived] or found
    of_data = [f for f in found if not f.learned] or found
    forms = {f.form for f in of_data}
    found = [f for f in found if f.form in forms]
    biased = [f for f in found if f.layer.bias]
    found = [f for f in found if f.layer.bias or not any(map(f.is_tangent, biased))]
    # An embedding that is looked up is described by its lookups.
    lookups = [f for f in found if f.layer.kind == "embedding"]
    if lookups and all(f in lookups or _attends(f.layer) for f in found):
        found = lookups
    kinds = {f.layer.kind for f in found if f.mark}
    if len(kinds) > 1:
        raise ValueError(
            f"the parameter {found[0].layer.leaves[0].path!r} is used by layers of different "
            f"kinds, {' and '.join(sorted(kinds))}: one Fisher block cannot describe both"
        )
    # A product written beside a layer is one more use of it.
    named = next((f.layer for f in found if f.mark), found[0].layer)
    with_bias = next((f.layer for f in found if f.layer.bias), named)

    def like(layer: Layer) -> Layer:
        same = layer.weight == named.weight and layer.kind == named.kind
        free = layer.bias is None
        return dataclasses.replace(named, bias=with_bias.bias) if same and free else layer

    # One range with a bias does not speak for the others.
    return [f if f.mark or f.origin.ranges else f._replace(layer=like(f.layer)) for f in found]


def _attends(layer: Layer) -> bool:
    """Whether a layer multiplies by the transpose of its weight, as `Embed.attend` does."""
    return layer.kind == "attend" or (layer.kind == "dense" and layer.axes == ("out0", "in0"))


def _stacked(parameter: _Parameter) -> tuple[tuple[Any, int, int], ...]:
    """How a parameter is stacked, and which of its slices is used."""
    shape = parameter.leaf.shape
    return tuple((s.by, s.inner, shape[s.axis]) for s in parameter.origin.sliced)


def _carrier(origin: Origin, place: Place) -> Carrier:
    """Returns the carrier of the parameter with `origin` at a place."""
    assert isinstance(origin.source, int)
    here = [s for s in origin.sliced if not isinstance(s.by, tuple) or len(s.by) < len(place)]
    return Carrier(origin.source, tuple(here))


def _holder(path: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Returns the path of the mapping or module that holds `name`, given the array's path."""
    return path[: -1 - path[::-1].index(name)] if name in path else path[:-1]
