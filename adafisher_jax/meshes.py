"""Arrays on explicit mesh axes, whose types contain their shardings."""

import jax


def everywhere(x: jax.Array) -> jax.Array:
    """Returns an array whole on each device, if it is sharded over explicit mesh axes."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.sharding.reshard(x, whole)
