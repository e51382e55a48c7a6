"""Reads what an optimizer's state holds of each layer; layers alike lie stacked in the state."""

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx

from adafisher_jax.alike import places
from adafisher_jax.factors import Factor
from adafisher_jax.layout import Layer, Layout, check_layout
from adafisher_jax.optimizer import ScaleByAdaFisherState
from adafisher_jax.paths import by_path
from adafisher_jax.rules import Curvature, Scale


class Stored(NamedTuple):
    """What the state holds of one layer, with a first axis of length 1: a group of one layer.

    Attributes:
      curvature: the averages of the layer.
      scale: the stored scale of the steps of its first parameter; None if the rule stores none.
      age: the number of steps since the averages changed, ().
      skipped: the number of refreshes that were skipped, ().
    """

    curvature: Curvature
    scale: Scale | None
    age: jax.Array
    skipped: jax.Array


def averages(opt_state: Any, layout: Layout) -> dict[str, Factor]:
    """Returns the running averages of each layer.

    Args:
      opt_state: the state of any transformation or `nnx.Optimizer` with AdaFisher in it.
      layout: the layout of the transformation.

    Returns:
      The averages by layer path, as stored. Under a rule whose averages start at zero, `h`, `s`,
      `mean` and `rows` are all smaller than averages by one factor, which approaches 1 with the
      refreshes.

    Raises:
      TypeError: if `layout` is no layout.
      ValueError: if the state has none of the layout's layers, or another number of equal layers.

    Example:
      >>> import adafisher_jax as af, jax.numpy as jnp
      >>> layers = [
      ...     af.Layer(name, "dense", af.Leaf(f"{name}/w", (3, 2), ("in0", "out0")), None)
      ...     for name in ("a", "b")
      ... ]
      >>> layout = af.Layout(tuple(layers))
      >>> tx = af.scale_by_adafisher(layout, rule="centered")
      >>> state = tx.init({name: {"w": jnp.zeros((3, 2))} for name in ("a", "b")})
      >>> {path: factor.h.shape for path, factor in state.factors.items()}
      {'a': (2, 3, 1)}
      >>> {path: factor.h.shape for path, factor in averages(state, layout).items()}
      {'a': (3, 1), 'b': (3, 1)}
    """
    check_layout(layout)
    found = {}
    for state in states(opt_state):
        for layer, stored in of_layers(state, layout):
            found[layer.path] = jax.tree.map(lambda part: part[0], stored.curvature.factor)
    if not found:
        raise ValueError("opt_state: got none with AdaFisher's factors of a layer of the layout")
    return dict(sorted(found.items()))


def of_layers(state: ScaleByAdaFisherState, layout: Layout) -> Iterator[tuple[Layer, Stored]]:
    """Yields the layers of the layout that the state has, each with what the state holds of it."""
    momenta = by_path(state.mu)[0]
    layers = sorted(layout.layers, key=lambda layer: layer.path)
    own = [layer for layer in layers if any(leaf.path in momenta for leaf in layer.leaves)]
    for leaf in (leaf for layer in own for leaf in layer.leaves if leaf.path in momenta):
        if (got := momenta[leaf.path].shape) != leaf.shape:
            raise ValueError(
                f"opt_state: the momentum of {leaf.path!r} has shape {got}, the layout wants "
                f"{leaf.shape}: it is of another model, or of several (look under jax.vmap then)"
            )
    first = {layer.path: layer for layer in own}  # a group has the name of its first layer
    found = list(places(own, state.factors))
    members = collections.Counter(name for _, name, _ in found)
    for index, (layer, name, place) in enumerate(found):
        if members[name] != (count := len(state.slots[name])):
            raise ValueError(
                f"layout: it has {members[name]} layers like {name!r}, the state has {count}: give "
                "the layout that the transformation has"
            )
        scale = state.scales.get(first[name].leaves[0].path)
        part = slice(place, place + 1)
        yield (
            layer,
            Stored(
                jax.tree.map(lambda x, part=part: x[part], state.curvature(name)),
                scale and Scale(scale.square[part], scale.bias_correction[part]),
                state.ages[index],
                state.skipped[index],
            ),
        )


def states(opt_state: Any) -> list[ScaleByAdaFisherState]:
    """Returns the states of AdaFisher with layers inside any optimizer's state."""

    def is_state(node: Any) -> bool:
        return isinstance(node, ScaleByAdaFisherState)

    plain = jax.tree.map(
        lambda leaf: leaf[...] if isinstance(leaf, nnx.Variable) else leaf,
        opt_state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    found = [node for node in jax.tree.leaves(plain, is_leaf=is_state) if is_state(node)]
    return [state for state in found if isinstance(state.factors, dict)]
