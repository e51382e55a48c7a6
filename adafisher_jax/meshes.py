"""Arrays on explicit mesh axes, whose types contain their shardings."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def everywhere(x: jax.Array) -> jax.Array:
    """Returns an array whole on each device, if it is sharded over explicit mesh axes."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def beside(x: jax.Array, other: jax.Array, *axes: Any) -> jax.Array:
    """Returns an array that lies along some axes of the explicit mesh of another array."""
    where = along(other, *axes)
    return x if where is None else jax.sharding.reshard(x, where)


def along(x: jax.Array, *axes: Any) -> NamedSharding | None:
    """A sharding along axes of the explicit mesh of an array; None if there are none."""
    mesh = jax.typeof(x).sharding.mesh
    return NamedSharding(mesh, PartitionSpec(*axes)) if any(axes) else None
