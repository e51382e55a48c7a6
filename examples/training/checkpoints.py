"""Checkpoints of a run, by Orbax: the latest two, written before the next step is taken."""

import pathlib
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from examples.training import devices


class Checkpoints:
    """Those in `folder/checkpoints`: arrays, and numbers of the host's beside them."""

    def __init__(self, folder: pathlib.Path):
        # Not in the background: the next step is given the arrays' memory.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.resolve() / "checkpoints", options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def save(self, step: int, arrays: Any, numbers: dict[str, Any]) -> None:
        leaves = dict(_named(arrays))
        what = {"arrays": ocp.args.StandardSave(leaves), "numbers": ocp.args.JsonSave(numbers)}
        self._manager.save(step, args=ocp.args.Composite(**what))

    def latest(self, arrays: Any) -> tuple[Any, dict[str, Any]] | None:
        """What was saved last, in the structure of `arrays`; None if nothing was.

        Raises:
          ValueError: if other arrays were saved.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        everywhere = devices.everywhere()
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
            for name, leaf in _named(arrays)
        }
        what = {"arrays": ocp.args.StandardRestore(wanted), "numbers": ocp.args.JsonRestore()}
        found = self._manager.restore(step, args=ocp.args.Composite(**what))
        leaves = [found["arrays"][name] for name, _ in _named(arrays)]
        return jax.tree.unflatten(jax.tree.structure(arrays), leaves), found["numbers"]


def _named(tree: Any) -> list[tuple[str, Any]]:
    """Leaves by path: Orbax does not know all of the optimizers' own containers."""
    return [
        (jax.tree_util.keystr(keys, simple=True, separator="/"), leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
