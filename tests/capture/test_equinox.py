"""Equinox: a model is split into its arrays and the rest, and is mapped over the batch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adafisher_jax as af
from tests.support.by_definition import check_twin
from tests.support.every_rule import every_rule
from tests.support.plain_programs import check

pytestmark = pytest.mark.usefixtures("numpy_rules")

RNG = np.random.default_rng(3)
KEY = jax.random.key(0)


def size(y):
    weights = 1 + jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)
    return jnp.sum(jnp.sin(y) * weights) / y.size


def split(model, call=lambda model, x: model(x)):
    """A loss of a model's arrays and a batch, and the arrays."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, xs):
        model = eqx.combine(params, static)
        return size(jax.vmap(lambda x: call(model, x))(xs))

    return loss_fn, params


# A layer, the shape of a batch, and the axes of its inputs in its weight, (out, in, window...).
LAYERS = {
    "Linear": (lambda **o: eqx.nn.Linear(3, 4, **o), (5, 3)),
    "Linear of one output": (lambda **o: eqx.nn.Linear(3, "scalar", **o), (5, 3)),
    "Conv1d": (lambda **o: eqx.nn.Conv1d(2, 3, 3, stride=2, **o), (5, 2, 7)),
    "Conv2d": (lambda **o: eqx.nn.Conv2d(2, 3, (2, 3), dilation=2, padding=1, **o), (4, 2, 6, 7)),
    "Conv3d": (lambda **o: eqx.nn.Conv3d(2, 3, 2, **o), (2, 2, 3, 3, 2)),
}
MOVED = {
    "ConvTranspose1d": (lambda **o: eqx.nn.ConvTranspose1d(2, 3, 2, stride=2, **o), (5, 2, 4)),
    "ConvTranspose2d": (
        lambda **o: eqx.nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1, **o),
        (3, 2, 3, 4),
    ),
}


@pytest.mark.parametrize("name", LAYERS | MOVED)
def test_a_layer_has_the_factors_of_its_definition(name):
    make, shape = (LAYERS | MOVED)[name]
    layer = make(use_bias=False, key=KEY)

    def program(mode, params, xs):
        def run(xs, w):
            return jax.vmap(eqx.tree_at(lambda layer: layer.weight, layer, w))(xs)

        ins = tuple(range(1, layer.weight.ndim))
        out = (0, 1) if layer.weight.ndim > 2 else None
        return size(mode.product(run, xs, params["weight"], ins, out=out))

    check(program, {"weight": layer.weight}, RNG.normal(size=shape))


@pytest.mark.parametrize("name", LAYERS | MOVED)
def test_a_layer_and_its_bias_go_together(name):
    make, shape = (LAYERS | MOVED)[name]
    loss_fn, params = split(make(key=KEY))
    layout = af.trace_layout(loss_fn, params, RNG.normal(size=shape))
    assert layout.covered == 1, str(layout)
    [layer] = layout.layers
    assert layer.path == ""
    assert (layer.weight.path, layer.bias.path) == ("weight", "bias")


def test_a_table_is_described_by_its_lookups():
    layer = eqx.nn.Embedding(7, 3, key=KEY)

    def program(mode, params, ids):
        def run(ids, w):
            return jax.vmap(jax.vmap(eqx.tree_at(lambda layer: layer.weight, layer, w)))(ids)

        return size(mode.product(run, ids, params["weight"], (0,)))

    ids = RNG.integers(0, 7, (4, 5))
    check(program, {"weight": layer.weight}, ids, kinds={"weight": "embedding"})


def linear(product, path, layer, x):
    return product(path, x, x @ layer.weight.T) + (0 if layer.bias is None else layer.bias)


def test_an_mlp():
    model = eqx.nn.MLP(3, 2, 5, 2, activation=jnp.tanh, key=KEY)
    loss_fn, params = split(model)
    xs = jnp.asarray(RNG.normal(size=(6, 3)))

    def twin(product):
        x = xs
        for i, layer in enumerate(model.layers):
            x = linear(product, f"layers/{i}", layer, x)
            x = jnp.tanh(x) if i < 2 else x
        return size(x)

    layout = check_twin(loss_fn, params, twin, xs)
    assert [leaf.path for leaf in layout.layers[2].leaves] == ["layers/2/weight", "layers/2/bias"]


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    out: eqx.nn.Linear

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(2, 4, use_output_bias=True, key=key)
        self.norm = eqx.nn.LayerNorm(4)
        self.out = eqx.nn.Linear(4, 3, key=key)

    def __call__(self, x):
        return jax.vmap(lambda x: self.out(self.norm(x)))(x + self.attention(x, x, x))


def test_attention_and_a_norm_of_equinox_s_own():
    model = Block(KEY)
    loss_fn, params = split(model)
    xs = jnp.asarray(RNG.normal(size=(3, 5, 4)))

    def twin(product):
        of = model.attention
        q, k, v = (
            linear(product, f"attention/{name}_proj", getattr(of, f"{name}_proj"), xs)
            for name in ("query", "key", "value")
        )
        q, k, v = (y.reshape(3, 5, 2, 2) for y in (q, k, v))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(2.0))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(3, 5, 4)
        y = xs + linear(product, "attention/output_proj", of.output_proj, y)
        y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-5)
        return size(linear(product, "out", model.out, y))

    check_twin(loss_fn, params, twin, xs, uncovered=["norm/weight", "norm/bias"])


def test_an_lstm_in_a_scan():
    cell = eqx.nn.LSTMCell(3, 2, key=KEY)

    def over_time(cell, x):
        start = (jnp.zeros(2), jnp.zeros(2))
        return jax.lax.scan(lambda state, x: (cell(x, state), None), start, x)[0][0]

    loss_fn, params = split(cell, over_time)
    xs = jnp.asarray(RNG.normal(size=(4, 5, 3)))

    def twin(product):
        h = c = jnp.zeros((4, 2))
        for x in xs.transpose(1, 0, 2):
            gates = product("weight_ih", x, x @ cell.weight_ih.T)
            gates = gates + product("weight_hh", h, h @ cell.weight_hh.T) + cell.bias
            i, f, g, o = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return size(h)

    check_twin(loss_fn, params, twin, xs)


def test_a_gru_s_second_bias_is_of_a_part_of_the_outputs():
    cell = eqx.nn.GRUCell(3, 2, key=KEY)
    loss_fn, params = split(cell, lambda cell, x: cell(x, jnp.ones(2)))
    layout = af.trace_layout(loss_fn, params, jnp.ones((4, 3)))
    assert [layer.path for layer in layout.layers] == ["weight_hh", "weight_ih"]
    assert [row.leaf.path for row in layout.uncovered] == ["bias_n"]


@every_rule
def test_training(rule):
    model = eqx.nn.MLP(3, 1, 8, 1, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    xs = jnp.asarray(RNG.normal(size=(32, 3)))

    def loss_fn(params, xs):
        y = jax.vmap(eqx.combine(params, static))(xs)
        return jnp.mean((y - jnp.sin(xs.sum(1, keepdims=True))) ** 2)

    layout = af.trace_layout(loss_fn, params, xs)
    tx = af.adafisher(3e-2 if rule == "centered" else 1e-4, layout, rule=rule)
    grad_fn = af.value_and_grad(loss_fn, layout)

    @eqx.filter_jit
    def train_step(model, state, xs):
        params = eqx.filter(model, eqx.is_inexact_array)
        loss, grads, factors = grad_fn(params, xs)
        updates, state = tx.update(grads, state, params, factors=factors)
        return eqx.apply_updates(model, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(20):
        model, state, loss = train_step(model, state, xs)
        losses.append(loss)
    assert losses[-1] < 0.8 * losses[0]
    assert model.activation is static.activation


def test_state_of_a_batch_norm_is_another_argument():
    def make():
        keys = jax.random.split(KEY)
        norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch", dtype=jnp.float64)
        layers = [eqx.nn.Linear(3, 4, key=keys[0]), norm, eqx.nn.Linear(4, 2, key=keys[1])]
        return eqx.nn.Sequential(layers)

    model, state = eqx.nn.make_with_state(make)()
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, state, xs):
        mapped = jax.vmap(eqx.combine(params, static), (0, None), (0, None), axis_name="batch")
        y, state = mapped(xs, state)
        return size(y), state

    xs = jnp.asarray(RNG.normal(size=(6, 3)))
    layout = af.trace_layout(loss_fn, params, state, xs, has_aux=True)
    assert [layer.path for layer in layout.layers] == ["layers/0", "layers/2"]
    grad_fn = jax.jit(af.value_and_grad(loss_fn, layout, has_aux=True))
    (_, changed), grads, _ = grad_fn(params, state, xs)
    (_, wanted), wanted_grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        params, state, xs
    )
    for found, want in ((changed, wanted), (grads, wanted_grads)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-12), found, want)
    assert optax.tree.norm(grads) > 0


def test_a_model_that_was_not_split_is_refused():
    model = eqx.nn.MLP(3, 1, 8, 1, key=KEY)
    with pytest.raises(TypeError, match=r"activation.* as another argument"):
        af.trace_layout(lambda model, xs: size(jax.vmap(model)(xs)), model, jnp.ones((4, 3)))
