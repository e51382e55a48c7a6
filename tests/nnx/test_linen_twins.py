"""One network in Linen and in NNX: the same layout, factors and training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adafisher_jax as af
from tests.support.every_rule import every_rule
from tests.support.nnx_reference import attention_in_double, random_model
from tests.support.reference import F64, assert_factors, inputs_of, scalar

pytestmark = pytest.mark.usefixtures("x64")

# Gentle, so that round-off stays small: "official" divides the rate by about its damping, 1e-3.
RATES = {"paper": 1e-3, "official": 1e-5, "centered": 1e-3}
TOKENS = np.array([[0, 3, 3, 1], [5, 0, 1, 1]])


class LinenCNN(nn.Module):
    def setup(self):
        self.conv = nn.Conv(4, (3, 3), strides=2, use_bias=False, param_dtype=F64)
        self.norm = nn.BatchNorm(use_running_average=False, param_dtype=F64)
        self.head = nn.Dense(2, param_dtype=F64)

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(self.conv(x))).mean((1, 2)))


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), strides=2, use_bias=False, param_dtype=F64, rngs=rngs)
        self.norm = nnx.BatchNorm(4, param_dtype=F64, rngs=rngs)
        self.head = nnx.Linear(4, 2, param_dtype=F64, rngs=rngs)

    __call__ = LinenCNN.__call__


class LinenTransformer(nn.Module):
    def setup(self):
        self.embed = nn.Embed(6, 4, param_dtype=F64)
        self.before = nn.LayerNorm(param_dtype=F64)
        self.attention = nn.MultiHeadDotProductAttention(
            2, attention_fn=attention_in_double, param_dtype=F64
        )
        self.after = nn.RMSNorm(param_dtype=F64)
        self.up, self.down = nn.Dense(8, param_dtype=F64), nn.Dense(4, param_dtype=F64)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.before(x))
        x = x + self.down(nn.gelu(self.up(self.after(x))))
        return self.embed.attend(x)


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(6, 4, param_dtype=F64, rngs=rngs)
        self.before = nnx.LayerNorm(4, param_dtype=F64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 4, attention_fn=attention_in_double, decode=False, param_dtype=F64, rngs=rngs
        )
        self.after = nnx.RMSNorm(4, param_dtype=F64, rngs=rngs)
        self.up = nnx.Linear(4, 8, param_dtype=F64, rngs=rngs)
        self.down = nnx.Linear(8, 4, param_dtype=F64, rngs=rngs)

    __call__ = LinenTransformer.__call__


class LinenCell(nn.SimpleCell):
    """A cell with NNX's names for its layers."""

    @nn.compact
    def __call__(self, carry, x):
        y = nn.Dense(5, param_dtype=F64, name="dense_i")(x)
        y = nn.tanh(y + nn.Dense(5, use_bias=False, param_dtype=F64, name="dense_h")(carry))
        return y, y


class LinenRecurrent(nn.Module):
    def setup(self):
        self.rnn = nn.RNN(LinenCell(5, param_dtype=F64))
        self.head = nn.Dense(2, param_dtype=F64)

    def __call__(self, x):
        return self.head(self.rnn(x))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.SimpleCell(3, 5, dtype=F64, param_dtype=F64, rngs=rngs))
        self.head = nnx.Linear(5, 2, param_dtype=F64, rngs=rngs)

    __call__ = LinenRecurrent.__call__


NETWORKS = {
    "CNN": (LinenCNN, CNN, lambda: inputs_of((4, 6, 6, 3))),
    "transformer": (LinenTransformer, Transformer, lambda: TOKENS),
    "RNN": (LinenRecurrent, Recurrent, lambda: inputs_of((4, 5, 3))),
}


def both(network):
    """The Linen loss and parameters, the NNX loss and model, and the data."""
    linen, make, data = NETWORKS[network]
    model = random_model(make)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def loss_fn(params, x):
        y, _ = linen().apply({"params": params}, x, mutable=["batch_stats"])
        return scalar(y)

    return loss_fn, params, lambda model, x: scalar(model(x)), model, data()


@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_layout_and_factors(network):
    linen_loss, params, nnx_loss, model, x = both(network)
    layout = af.trace_layout(linen_loss, params, x)
    assert af.nnx.trace_layout(nnx_loss, model, x) == layout
    assert layout.covered == 1

    expected = jax.jit(af.value_and_grad(linen_loss, layout))(params, x)
    graphdef, state = nnx.split(model)
    grad_fn = af.nnx.value_and_grad(nnx_loss, layout)
    found = jax.jit(lambda state: grad_fn(nnx.merge(graphdef, state), x))(state)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    assert_factors(found[2], expected[2])


@every_rule
@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_training(network, rule):
    linen_loss, params, nnx_loss, model, x = both(network)
    layout = af.trace_layout(linen_loss, params, x)
    tx = af.adafisherw(RATES[rule], layout, rule=rule)

    @jax.jit
    def linen_step(params, state):
        loss, grads, factors = af.value_and_grad(linen_loss, layout)(params, x)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def nnx_step(state):
        model, optimizer = nnx.merge(graphdef, state)
        loss, grads, factors = af.nnx.value_and_grad(nnx_loss, layout)(model, x)
        optimizer.update(model, grads, factors=factors)
        return nnx.state((model, optimizer)), loss

    state = tx.init(params)
    graphdef, ours = nnx.split((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))
    for _ in range(5):
        params, state, loss = linen_step(params, state)
        ours, found = nnx_step(ours)
        np.testing.assert_allclose(found, loss, rtol=1e-9)
    trained, _ = nnx.merge(graphdef, ours)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        nnx.to_pure_dict(nnx.state(trained, nnx.Param)),
        params,
    )
