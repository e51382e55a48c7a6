"""Data parallelism over the devices of this process.

Batches are split over the devices. Everything else is replicated.
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
    """The batch, split evenly over the devices.

    Raises:
      ValueError: if the batch size is not a multiple of the number of devices.
    """
    size, parts = len(jax.tree.leaves(batch)[0]), _mesh().size
    if size % parts:
        raise ValueError(f"a batch of {size} examples does not divide among {parts} devices")
    return jax.device_put(batch, split())


def put_evaluation(batch: Any) -> Any:
    """The batch, split evenly if possible, since the last batch of a pass may have any size."""
    size, parts = len(jax.tree.leaves(batch)[0]), _mesh().size
    return jax.device_put(batch, everywhere() if size % parts else split())
