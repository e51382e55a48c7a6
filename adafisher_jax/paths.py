"""How the arrays of a pytree are named: by the keys on their way, without the boxes of Flax."""

from typing import Any

import jax
from flax import nnx
from flax.core.meta import AxisMetadata

Named = list[tuple[tuple[str, ...], Any]]


def named_leaves(tree: Any) -> Named:
    """Returns a tree's leaves in order, each with the names of the keys on its way.

    The `.value` of an array that Flax keeps in a box (`nnx.Variable`, `nn.Partitioned`) is no name.

    Example:
      >>> named_leaves({"encoder": {"kernel": 1.0}})
      [(('encoder', 'kernel'), 1.0)]
    """

    def is_box(node: Any) -> bool:
        return isinstance(node, nnx.Variable | AxisMetadata)

    found = []
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box):
        for own, leaf in jax.tree_util.tree_leaves_with_path(node):
            if is_box(node) and own[-1:] == (jax.tree_util.GetAttrKey("value"),):
                own = own[:-1]
            names = (jax.tree_util.keystr((key,), simple=True) for key in (*keys, *own))
            found.append((tuple(names), leaf))
    return found


def by_path(tree: Any) -> tuple[dict[str, Any], Any]:
    """Returns a tree's leaves by path, in order, and the structure of the tree.

    Raises:
      ValueError: if two leaves have the same path.
    """
    leaves = named_leaves(tree)
    paths = ["/".join(names) for names, _ in leaves]
    found = {path: leaf for path, (_, leaf) in zip(paths, leaves, strict=True)}
    if len(found) < len(leaves):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two arrays have the same path {twice!r}: a key contains '/'")
    return found, jax.tree.structure(tree)
