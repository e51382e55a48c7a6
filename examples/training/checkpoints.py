"""The last two checkpoints of a run, written by Orbax before the next step starts."""

import pathlib
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from examples.training import devices


class Checkpoints:
    """The checkpoints in `folder/checkpoints`: arrays, and numbers on the host."""

    def __init__(self, folder: pathlib.Path):
        # Not in the background, since the next step reuses the memory of the arrays.
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
        """The last checkpoint, in the structure of `arrays`, or None.

        Raises:
          ValueError: if the checkpoint has other arrays.
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
    """The leaves by path, since Orbax does not support every container of the optimizers."""
    return [
        (jax.tree_util.keystr(keys, simple=True, separator="/"), leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
