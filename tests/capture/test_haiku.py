"""Haiku: a transformed function and its nested dict of parameters."""

import haiku as hk
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

RNG = np.random.default_rng(4)
KEY = jax.random.key(0)


def size(y):
    weights = 1 + jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)
    return jnp.sum(jnp.sin(y) * weights) / y.size


def transformed(forward, *data):
    """A loss of a function's parameters and data, and the parameters."""
    model = hk.without_apply_rng(hk.transform(forward))
    params = jax.jit(model.init)(KEY, *data)
    # Biases and norms begin as zeros and ones, which would hide what they do.
    params = jax.tree.map(lambda a: jnp.asarray(RNG.normal(size=a.shape)), params)
    return (lambda params, *data: size(model.apply(params, *data))), params


# A layer, a batch, the axes of its weight that are of inputs, and its axis of outputs with that
# of the output.
LAYERS = {
    "Linear": (lambda **o: hk.Linear(4, **o), (5, 3), (0,), None),
    "Conv1D": (lambda **o: hk.Conv1D(3, 3, stride=2, **o), (4, 7, 2), (0, 1), (2, 2)),
    "Conv2D": (lambda **o: hk.Conv2D(3, (2, 3), rate=2, **o), (3, 6, 7, 2), (0, 1, 2), (3, 3)),
    "channels first": (
        lambda **o: hk.Conv2D(3, 2, data_format="NCHW", **o),
        (3, 2, 4, 5),
        (0, 1, 2),
        (3, 1),
    ),
    "Conv3D": (lambda **o: hk.Conv3D(3, 2, **o), (2, 3, 3, 3, 2), (0, 1, 2, 3), (4, 4)),
    "Conv2DTranspose": (
        lambda **o: hk.Conv2DTranspose(3, 3, stride=2, **o),
        (2, 3, 4, 2),
        (0, 1, 3),
        (2, 3),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_the_factors_of_its_definition(name):
    make, shape, ins, out = LAYERS[name]
    x = RNG.normal(size=shape)
    model = hk.without_apply_rng(hk.transform(lambda x: make(with_bias=False)(x)))
    [(holder, params)] = jax.jit(model.init)(KEY, x).items()

    def program(mode, params, x):
        def run(x, w):
            return model.apply({holder: {"w": w}}, x)

        return size(mode.product(run, x, params["w"], ins, out=out))

    check(program, params, x)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_bias_go_together(name):
    make, shape, *_ = LAYERS[name]
    x = RNG.normal(size=shape)
    loss_fn, params = transformed(lambda x: make()(x), x)
    layout = af.trace_layout(loss_fn, params, x)
    assert layout.covered == 1, str(layout)
    [layer] = layout.layers
    assert [layer.path] == list(params)
    assert (layer.weight.path, layer.bias.path) == (f"{layer.path}/w", f"{layer.path}/b")


@pytest.mark.parametrize("style", ["ARRAY_INDEX", "ONE_HOT"])
def test_a_table_by_either_style(style):
    ids = RNG.integers(0, 7, (4, 5))
    loss_fn, params = transformed(lambda ids: hk.Embed(7, 3, lookup_style=style)(ids), ids)

    def twin(product):
        rows = jax.nn.one_hot(ids, 7)
        return size(product("embed", rows, rows @ params["embed"]["embeddings"]))

    check_twin(loss_fn, params, twin, ids)


def linear(product, path, params, x):
    return product(path, x, x @ params[path]["w"]) + params[path]["b"]


def test_attention_and_a_norm_of_haiku_s_own():
    x = jnp.asarray(RNG.normal(size=(3, 5, 4)))

    def forward(x):
        init = hk.initializers.VarianceScaling()
        x = x + hk.MultiHeadAttention(2, 2, w_init=init, model_size=4, name="attention")(x, x, x)
        return hk.nets.MLP([6, 3], activation=jnp.tanh)(hk.LayerNorm(-1, True, True)(x))

    loss_fn, params = transformed(forward, x)

    def twin(product):
        q, k, v = (
            linear(product, f"attention/{name}", params, x).reshape(3, 5, 2, 2)
            for name in ("query", "key", "value")
        )
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(2.0))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(3, 5, 4)
        y = x + linear(product, "attention/linear", params, y)
        y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-5)
        y = y * params["layer_norm"]["scale"] + params["layer_norm"]["offset"]
        y = jnp.tanh(linear(product, "mlp/~/linear_0", params, y))
        return size(linear(product, "mlp/~/linear_1", params, y))

    check_twin(loss_fn, params, twin, x, uncovered=["layer_norm/offset", "layer_norm/scale"])


def test_an_lstm_in_a_scan():
    xs = jnp.asarray(RNG.normal(size=(5, 4, 3)))

    def forward(xs):
        cell = hk.LSTM(2)
        return hk.dynamic_unroll(cell, xs, cell.initial_state(4))[0]

    loss_fn, params = transformed(forward, xs)

    def twin(product):
        h = c = jnp.zeros((4, 2))
        ys = []
        for x in xs:
            both = jnp.concatenate([x, h], -1)
            i, g, f, o = jnp.split(linear(product, "lstm/linear", params, both), 4, -1)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            ys.append(h)
        return size(jnp.stack(ys))

    check_twin(loss_fn, params, twin, xs)


def test_stacked_layers_under_remat():
    x = jnp.asarray(RNG.normal(size=(6, 4)))

    def forward(x):
        def block(x):
            return hk.remat(lambda x: x + jnp.tanh(hk.Linear(4)(x)))(x)

        return hk.experimental.layer_stack(3)(block)(x)

    loss_fn, params = transformed(forward, x)
    layout = af.trace_layout(loss_fn, params, x)
    [layer] = layout.layers
    assert layout.covered == 1
    assert layer.weight.axes == ("stack0", "in0", "out0")
    _, _, factors = jax.jit(af.value_and_grad(loss_fn, layout))(params, x)
    [stack] = params.values()

    def zeros_added(zeros):
        h, inputs = x, []
        for w, b, z in zip(stack["w"], stack["b"], zeros, strict=True):
            inputs.append(h)
            h = h + jnp.tanh(h @ w + b + z)
        return size(h), jnp.stack(inputs)

    s, inputs = jax.grad(zeros_added, has_aux=True)(jnp.zeros((3, 6, 4)))
    np.testing.assert_allclose(factors[layer.path].h[..., 0], (inputs**2).mean(1), rtol=1e-9)
    np.testing.assert_allclose(factors[layer.path].s[:, 0], (s**2).mean(1), rtol=1e-9)


def test_a_gru_s_recurrent_weight_is_used_in_parts():
    xs = jnp.ones((5, 4, 3))

    def forward(xs):
        cell = hk.GRU(2)
        return hk.dynamic_unroll(cell, xs, cell.initial_state(4))[0]

    loss_fn, params = transformed(forward, xs)
    layout = af.trace_layout(loss_fn, params, xs)
    assert [layer.weight.path for layer in layout.layers] == ["gru/w_h", "gru/w_i"]
    assert {row.leaf.path for row in layout.uncovered} == {"gru/b"}


@every_rule
def test_training(rule):
    xs = jnp.asarray(RNG.normal(size=(32, 3)))
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 1])(x)))
    params = model.init(KEY, xs)

    def loss_fn(params, xs):
        return jnp.mean((model.apply(params, xs) - jnp.sin(xs.sum(1, keepdims=True))) ** 2)

    layout = af.trace_layout(loss_fn, params, xs)
    tx = af.adafisher(3e-2 if rule == "centered" else 1e-4, layout, rule=rule)
    grad_fn = af.value_and_grad(loss_fn, layout)

    @jax.jit
    def train_step(params, state, xs):
        loss, grads, factors = grad_fn(params, xs)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(20):
        params, state, loss = train_step(params, state, xs)
        losses.append(loss)
    assert losses[-1] < 0.8 * losses[0]
