"""Data parallelism over the devices of this process: batches are split, all else is everywhere.

One device is the case of one part.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@functools.cache
def _mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), ("batch",))


def everywhere() -> NamedSharding:
    return NamedSharding(_mesh(), PartitionSpec())


def split() -> NamedSharding:
    return NamedSharding(_mesh(), PartitionSpec("batch"))


def put_training(batch: Any) -> Any:
    """The batch, split evenly.

    Raises:
      ValueError: if it does not divide.
    """
    size, parts = len(jax.tree.leaves(batch)[0]), _mesh().size
    if size % parts:
        raise ValueError(f"a batch of {size} examples does not divide among {parts} devices")
    return jax.device_put(batch, split())


def put_evaluation(batch: Any) -> Any:
    """The batch, split evenly if it can be: the last of a pass may be of any size."""
    size, parts = len(jax.tree.leaves(batch)[0]), _mesh().size
    return jax.device_put(batch, everywhere() if size % parts else split())
