"""A weight that layers use transposed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import adafisher_jax as af
from tests.support.reference import (
    F64,
    Dense,
    assert_factors,
    captured,
    factors_of,
    loss_of,
    random_params,
    same_as_plain,
    scalar,
)

pytestmark = pytest.mark.usefixtures("x64")


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's kernel transposed."""

    def __call__(self, x):
        return self.call(jnp.tanh(self.call(x, 5, lambda v: v)), 3, self.transposed)

    @nn.compact
    def call(self, x, features, change):
        def run(module):
            return Dense(features, use_bias=False, name="dense")(x)

        return nn.map_variables(run, "params", change, change, mutable=True)(self)

    def transposed(self, variables):
        return jax.tree.map(jnp.transpose, variables)


class TiedByHand(Tied):
    """The same, the decoder given the encoder's variables as arrays."""

    @nn.compact
    def __call__(self, x):
        encoder = Dense(5, use_bias=False, name="dense")
        hidden = jnp.tanh(encoder(x))
        kernel = encoder.variables["params"]["kernel"]
        return Dense(3, use_bias=False, parent=None).apply({"params": {"kernel": kernel.T}}, hidden)


@pytest.mark.parametrize("model", [Tied(), TiedByHand()], ids=["map_variables", "by hand"])
def test_autoencoder_tied_by_a_transpose(model, x):
    """One kernel used in both directions has no single block: uncovered."""
    params = {"dense": random_params(Dense(5, use_bias=False), x)}
    with_head = {"tied": params, "head": random_params(Dense(2), x)}

    def loss_fn(p, x):
        return scalar(Dense(2).apply({"params": p["head"]}, model.apply({"params": p["tied"]}, x)))

    layout, factors = captured(loss_fn, with_head, x)
    assert factors.keys() == {"head"}
    (row,) = layout.uncovered
    assert row.leaf.path == "tied/dense/kernel"
    assert "differ in their axes" in row.reason


def test_a_weight_used_transposed_alone(x):
    """Its inputs lie along its last axis, and so do they in the factors."""
    model = Dense(2)
    params = random_params(model, x)
    turned = params | {"kernel": params["kernel"].T}

    def loss_fn(params, x):
        return loss_of(model)({**params, "kernel": params["kernel"].T}, x)

    layout, factors = captured(loss_fn, turned, x)
    assert layout.layers[0].weight == af.Leaf("kernel", (2, 3), ("out0", "in0"))
    (plain,) = factors_of(loss_of(model), params, x).values()
    assert_factors(factors, {"": plain._replace(h=plain.h.T, s=plain.s.T, mean=plain.mean.T)})


def test_an_embedding_tied_to_a_dense_layer_by_a_transpose():
    """It is described by its lookups, as one tied by `attend` is."""
    tokens = jnp.array([[0, 3, 1], [3, 2, 3]])
    embed = nn.Embed(5, 3, param_dtype=F64)
    params = random_params(embed, tokens)

    def loss_fn(params, tokens):
        h = jnp.tanh(embed.apply({"params": params}, tokens))
        head = {"kernel": params["embedding"].T}
        return scalar(Dense(5, use_bias=False).apply({"params": head}, h))

    def by_hand(params, tokens):  # the reference sees the lookups alone
        h = jnp.tanh(embed.apply({"params": params}, tokens))
        return scalar(jnp.einsum("bti,oi->bto", h, params["embedding"]))

    same_as_plain(loss_fn, by_hand, params, tokens)
