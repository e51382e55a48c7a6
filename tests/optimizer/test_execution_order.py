"""An order among layers that nothing but the compiler sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import adafisher_jax as af
from adafisher_jax import execution_order
from tests.support.hand_made import layout_of, make_layer, random_factors, random_tree

LAYERS = [  # unlike: alike, they would be stepped together
    make_layer(name, "dense", (6, n), "in0 out0", "out0") for name, n in (("a", 4), ("b", 5))
]


def test_on_a_cpu_and_only_there_the_value_depends_on_the_others():
    def order(value, other):
        return execution_order.after(value, [other])

    lowered = jax.jit(order).trace(jnp.ones(()), jnp.ones(3))
    for platform, depends in {"cpu": True, "cuda": False}.items():
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.add" in text) == depends


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap, lambda f: f])
def test_the_value_is_as_it_was(transform):
    found = transform(lambda x: execution_order.after(3 * x, [jnp.full(2, 1e30)]))
    x = jnp.ones(4 if transform is jax.vmap else ())
    expected = transform(lambda x: 3 * x)(x)
    np.testing.assert_array_equal(found(x), expected)


def step():
    rng = np.random.default_rng(0)
    grads, factors = random_tree(rng, *LAYERS), random_factors(rng, *LAYERS)
    tx = af.scale_by_adafisher(layout_of(*LAYERS), rule="centered")
    return tx, grads, factors


@pytest.mark.slow
def test_a_layer_that_is_mapped_does_not_map_the_others():
    tx, grads, factors = step()
    state = tx.init(grads)

    def update(weight):
        changed = grads | {"a": grads["a"] | {"weight": weight}}
        return tx.update(changed, state, factors=factors)[0]

    stacked = jnp.stack([grads["a"]["weight"], 2 * grads["a"]["weight"]])
    axes = {"a": {"weight": 0, "bias": 0}, "b": None}
    found = jax.vmap(update, out_axes=axes)(stacked)
    jax.tree.map(np.testing.assert_array_equal, found["b"], update(stacked[0])["b"])


def test_a_layer_that_differs_between_devices_does_not_make_the_others_differ():
    tx, grads, factors = step()
    state = tx.init(grads)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def update(weight):
        changed = grads | {"a": grads["a"] | {"weight": weight[0]}}
        found = tx.update(changed, state, factors=factors)[0]
        return found["b"]

    mapped = jax.shard_map(update, mesh=mesh, in_specs=P("d"), out_specs=P())
    found = jax.jit(mapped)(grads["a"]["weight"][None])
    expected = jax.jit(tx.update)(grads, state, factors=factors)[0]["b"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), found, expected)
