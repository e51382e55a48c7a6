"""Arrays on explicit mesh axes, which say in their types where they lie."""

import jax


def everywhere(x: jax.Array) -> jax.Array:
    """An array that lies on explicit mesh axes (only these are in a type), whole on each device."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.sharding.reshard(x, whole)
