"""Embeddings, attention, recurrent cells and norms against the brute-force reference."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adafisher_jax as af
from tests.support.reference import (
    F64,
    assert_factors,
    captured,
    factors_of,
    inputs_of,
    loss_of,
    random_like,
    random_params,
    scalar,
)

f64 = functools.partial(functools.partial, param_dtype=F64)
TOKENS = np.array([[0, 3, 3], [1, 3, 0]])

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]


def check(model, *inputs, **options):
    """Everything in a model must be covered, with the factors of the reference."""
    params = random_params(model, *inputs, **options)
    layout, factors = captured(loss_of(model, **options), params, *inputs)
    assert layout.covered == 1, str(layout)
    assert_factors(factors, factors_of(loss_of(model, **options), params, *inputs))
    return factors


class Tied(nn.Module):
    """An embedding that is looked up and, transposed, gives logits."""

    look_up: bool = True
    attend: bool = True

    @nn.compact
    def __call__(self, tokens, x):
        embed = nn.Embed(5, 4, param_dtype=F64)
        x = embed(tokens) if self.look_up else x
        x = jnp.tanh(nn.Dense(4, param_dtype=F64)(x))
        return embed.attend(x) if self.attend else x


@pytest.mark.parametrize("attend", [False, True])
@pytest.mark.parametrize("look_up", [False, True])
def test_embedding(look_up, attend):
    if look_up or attend:
        factors = check(Tied(look_up, attend), TOKENS, inputs_of((2, 3, 4)))
        attends = not look_up
        h, s = factors["Embed_0"].h, factors["Embed_0"].s
        assert (h.shape, s.shape) == (((1, 4), (5, 1)) if attends else ((5, 1), (1, 4)))
        if look_up:  # token frequencies
            np.testing.assert_allclose(h.ravel(), np.array([2, 1, 0, 3, 0]) / 6)


@pytest.mark.parametrize("tokens", [np.array([-1, 2, -3, 2]), np.array(1), TOKENS.astype(np.int8)])
def test_embedding_of_odd_tokens(tokens):
    check(nn.Embed(5, 2, param_dtype=F64), tokens)


@pytest.mark.parametrize("tokens", [np.zeros((2, 3), int), np.array([0, 0, 0])])
def test_embedding_of_one_token(tokens):
    factors = check(nn.Embed(1, 2, param_dtype=F64), tokens)
    assert factors[""].h == 1


def test_attend_by_itself():
    check(nn.Embed(5, 4, param_dtype=F64), inputs_of((2, 3, 4)), method="attend")


ATTENTION = {
    "self": (nn.MultiHeadDotProductAttention(2, param_dtype=F64), ["x"]),
    "cross": (nn.MultiHeadDotProductAttention(2, qkv_features=6, param_dtype=F64), ["x", "kv"]),
    "key and value": (
        nn.MultiHeadDotProductAttention(2, out_features=3, use_bias=False, param_dtype=F64),
        ["x", "kv", "kv"],
    ),
    "normalized": (
        nn.MultiHeadDotProductAttention(2, normalize_qk=True, param_dtype=F64),
        ["x"],
    ),
    "new name": (nn.MultiHeadAttention(2, param_dtype=F64), ["x"]),
}


@pytest.mark.parametrize(("model", "names"), ATTENTION.values(), ids=ATTENTION)
def test_attention(model, names):
    given = {"x": inputs_of((2, 3, 4)), "kv": inputs_of((2, 5, 4), seed=2)}
    factors = check(model, *(given[name] for name in names))
    assert factors["query"].h.shape == (4, 1, 1)
    assert factors["out"].s.shape[:2] == (1, 1)


def test_masked_self_attention():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(x[..., 0])
            return nn.MultiHeadDotProductAttention(2, param_dtype=F64)(x, mask=mask)

    check(Model(), inputs_of((2, 3, 4)))


CELLS = {
    "LSTM": f64(nn.LSTMCell)(3),
    "optimized LSTM": f64(nn.OptimizedLSTMCell)(3),
    "GRU": f64(nn.GRUCell)(3),
    "MGU": f64(nn.MGUCell)(3),
    "MGU without reset": f64(nn.MGUCell)(3, reset_gate=False),
    "simple": f64(nn.SimpleCell)(3),
    "simple, residual": f64(nn.SimpleCell)(3, residual=True),
    "convolutional LSTM": f64(nn.ConvLSTMCell)(3, (2,)),
}


class Recurrent(nn.Module):
    """One cell over time, unrolled in one of several ways."""

    cell: nn.Module
    how: str

    @nn.compact
    def __call__(self, xs):
        carry = self.cell.initialize_carry(jax.random.key(0), xs[:, 0].shape)
        carry = jax.tree.map(lambda leaf: leaf + 0.1, carry)  # rows of zeros would hide mistakes
        match self.how:
            case "once":
                return self.cell(carry, xs[:, 0])
            case "loop":
                ys = []
                for step in range(xs.shape[1]):
                    carry, y = self.cell(carry, xs[:, step])
                    ys.append(y)
                return carry, jnp.stack(ys, 1)
            case "nn.RNN":
                rnn = nn.RNN(self.cell, return_carry=True)
                return rnn(xs, initial_carry=carry)
            case "nn.scan":
                scan = nn.scan(
                    lambda cell, carry, x: cell(carry, x),
                    variable_broadcast="params",
                    split_rngs={"params": False},
                    in_axes=1,
                    out_axes=1,
                )
                return scan(self.cell, carry, xs)
        raise ValueError(self.how)


@functools.cache
def plain_factors(cell, once):
    """The parameters, inputs and factors of a cell called once or in a Python loop."""
    xs = inputs_of((2, 2, 4, 2)) if isinstance(cell, nn.ConvLSTMCell) else inputs_of((2, 2, 2))
    if isinstance(cell, nn.OptimizedLSTMCell):
        cell = nn.LSTMCell(cell.features, param_dtype=F64)
    model = Recurrent(cell, "once" if once else "loop")
    params = random_params(model, xs)
    return params, xs, factors_of(loss_of(model), params, xs)


@pytest.mark.parametrize("how", ["once", "loop", "nn.RNN", "nn.scan"])
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_recurrent_cell(cell, how):
    params, xs, expected = plain_factors(cell, how == "once")
    # A loop's body is compiled otherwise with the probes in it, and rounds otherwise.
    layout, factors = captured(loss_of(Recurrent(cell, how)), params, xs, exact=False)
    assert layout.covered == 1, str(layout)
    assert_factors(factors, expected)
    positions = 4 if isinstance(cell, nn.ConvLSTMCell) else 1
    calls = 1 if how == "once" else 2
    assert {int(f.rows) for f in factors.values()} == {2 * positions * calls}


def test_bidirectional_rnn():
    class Twin(nn.Module):
        @nn.compact
        def __call__(self, xs):
            ys = []
            for name, order in (("forward_rnn", 1), ("backward_rnn", -1)):
                cell = nn.SimpleCell(3, param_dtype=F64, name=name)
                carry = cell.initialize_carry(jax.random.key(0), xs[:, 0].shape)
                outputs = []
                for step in range(2)[::order]:
                    carry, y = cell(carry, xs[:, step])
                    outputs.append(y)
                ys.append(jnp.stack(outputs[::order], 1))
            return jnp.concatenate(ys, -1)

    xs = inputs_of((2, 2, 2))
    model = nn.Bidirectional(*(nn.RNN(nn.SimpleCell(3, param_dtype=F64)) for _ in range(2)))
    params = random_params(model, xs)
    layout, factors = captured(loss_of(model), params, xs, exact=False)
    assert layout.covered == 1
    inner = {name: rnn["cell"] for name, rnn in params.items()}
    expected = factors_of(loss_of(Twin()), inner, xs)
    assert_factors({path.replace("/cell", ""): f for path, f in factors.items()}, expected)


SHARED = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}
LIFTED = {
    "remat": nn.remat(nn.Dense)(4, param_dtype=F64),
    "jit": nn.jit(nn.Dense)(4, param_dtype=F64),
    "vmap": nn.vmap(nn.Dense, **SHARED)(4, param_dtype=F64),
    "vmap of attend": nn.vmap(nn.Embed, methods=["attend"], **SHARED)(4, 3, param_dtype=F64),
    "remat of attend": nn.remat(nn.Embed, methods=["attend"])(4, 3, param_dtype=F64),
    "remat of a conv": nn.remat(nn.Conv)(4, (2,), strides=2, param_dtype=F64),
    "jit of a norm": nn.jit(nn.LayerNorm)(param_dtype=F64),
}


@pytest.mark.parametrize("model", LIFTED.values(), ids=LIFTED)
def test_a_layer_class_that_is_lifted_itself(model):
    """No module of the user's own around it; the layer's class is Flax's, renamed."""
    x = inputs_of((2, 5, 3))
    method = "attend" if isinstance(model, nn.Embed) else None
    base = type(model).__mro__[1]
    fields = {name: getattr(model, name) for name in model.__dataclass_fields__ if name != "parent"}
    plain = base(**fields)
    params = random_params(plain, x, method=method)
    layout, factors = captured(loss_of(model, method=method), params, x)
    assert layout.covered == 1
    assert_factors(factors, factors_of(loss_of(plain, method=method), params, x))


def test_a_cell_class_that_is_scanned_itself():
    cell = nn.SimpleCell(3, param_dtype=F64)
    params, xs, expected = plain_factors(cell, False)
    loop = {"variable_broadcast": "params", "split_rngs": {"params": False}}
    model = nn.scan(nn.SimpleCell, in_axes=1, out_axes=1, **loop)(3, param_dtype=F64)

    def loss_fn(params, xs):
        return scalar(model.apply({"params": params}, jnp.full((2, 3), 0.1), xs))

    layout, factors = captured(loss_fn, params["cell"], xs, exact=False)
    assert layout.covered == 1
    assert_factors({f"cell/{path}": factor for path, factor in factors.items()}, expected)


NORMS = {
    "batch": (f64(nn.BatchNorm)(use_running_average=False), (3, 4, 5, 2)),
    "batch, sequence": (f64(nn.BatchNorm)(use_running_average=False), (3, 4, 2)),
    "batch, 2-D": (f64(nn.BatchNorm)(use_running_average=False), (3, 2)),
    "batch, eval": (f64(nn.BatchNorm)(use_running_average=True), (3, 4, 5, 2)),
    "batch, axis": (f64(nn.BatchNorm)(use_running_average=False, axis=1), (3, 2, 5)),
    "batch without scale": (f64(nn.BatchNorm)(use_running_average=False, use_scale=False), (3, 2)),
    "layer": (f64(nn.LayerNorm)(), (3, 4, 2)),
    "layer, 2-D": (f64(nn.LayerNorm)(), (3, 4)),
    "layer, 4-D": (f64(nn.LayerNorm)(), (3, 4, 5, 2)),
    "layer without bias": (f64(nn.LayerNorm)(use_bias=False), (3, 4, 2)),
    "layer without scale": (f64(nn.LayerNorm)(use_scale=False), (3, 4, 2)),
    "layer of two axes": (
        f64(nn.LayerNorm)(reduction_axes=(-2, -1), feature_axes=(-2, -1)),
        (3, 4, 5, 2),
    ),
    "RMS": (f64(nn.RMSNorm)(), (3, 4, 2)),
    "group": (f64(nn.GroupNorm)(num_groups=2), (3, 4, 5, 4)),
    "group size": (f64(nn.GroupNorm)(num_groups=None, group_size=1), (3, 5, 4)),
    "instance": (f64(nn.InstanceNorm)(), (3, 4, 5, 2)),
}


@pytest.mark.parametrize(("layer", "shape"), NORMS.values(), ids=NORMS)
def test_norm(layer, shape):
    x = inputs_of(shape)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    params = random_like(shapes["params"])
    stats = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes.get("batch_stats", {})
    )

    def loss_fn(params, x):
        y, updated = layer.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return scalar(y), updated

    layout, factors = captured(loss_fn, params, x, has_aux=True)
    assert layout.covered == 1, str(layout)
    expected = factors_of(lambda *args: loss_fn(*args)[0], params, x)
    names = ("h", "s", "mean")  # what `rows` counts here is the rules' own affair
    for name in names:
        np.testing.assert_allclose(
            getattr(factors[""], name), getattr(expected[""], name), 1e-9, 1e-13, err_msg=name
        )
    assert factors[""].rows > 0


class Stack(nn.Module):
    """Some layers around one that rebuilds or owns parameters in its own way."""

    inner: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, param_dtype=F64, name="first")(x)
        match self.inner:
            case "WeightNorm":
                x = nn.WeightNorm(nn.Dense(3, param_dtype=F64, name="wrapped"), param_dtype=F64)(x)
            case "SpectralNorm":
                wrapped = nn.Dense(3, param_dtype=F64, name="wrapped")
                x = nn.SpectralNorm(wrapped)(x, update_stats=True)
            case "PReLU":
                x = nn.PReLU(param_dtype=F64, name="prelu")(x)
            case "own":
                x = Own(name="own")(x)
        return nn.Dense(2, param_dtype=F64, name="last")(x)


class Own(nn.Module):
    """A user's module with parameters of its own beside a known layer."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (3, 3), F64)
        gain = self.param("gain", nn.initializers.ones, (), F64)
        return jnp.tanh(x @ kernel) * gain + nn.Dense(3, param_dtype=F64)(x)


UNCOVERED = {
    "WeightNorm": {
        "WeightNorm_0/wrapped/kernel/scale": "transformed",
        "wrapped/kernel": "transformed",
        "wrapped/bias": "the weight of its layer",
    },
    "SpectralNorm": {
        "wrapped/kernel": "transformed before its layer uses it",
        "wrapped/bias": "the weight of its layer",
    },
    "PReLU": {"prelu/negative_slope": "no layer of a known kind uses it"},
    "own": {"own/gain": "no layer"},
}


@pytest.mark.parametrize("inner", UNCOVERED)
def test_uncovered_parameters_are_listed_and_disturb_nothing(inner):
    model, x = Stack(inner), inputs_of((4, 2))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    params = random_like(shapes["params"])
    rest = random_like({k: v for k, v in shapes.items() if k != "params"})

    def loss_fn(params, x):
        y, updated = model.apply({"params": params, **rest}, x, mutable=list(rest))
        return scalar(y), updated

    layout, factors = captured(loss_fn, params, x, has_aux=True)
    known = {"first", "last", *(["own/Dense_0"] if inner == "own" else [])}
    assert factors.keys() == known | ({"own"} if inner == "own" else set())
    factors.pop("own", None)  # a product without a module, which the reference does not see
    expected = factors_of(lambda *args: loss_fn(*args)[0], params, x)
    assert_factors(factors, {path: expected[path] for path in known})
    reasons = {row.leaf.path: row.reason for row in layout.uncovered}
    assert reasons
    for path, reason in reasons.items():
        (wanted,) = [text for prefix, text in UNCOVERED[inner].items() if path.startswith(prefix)]
        assert wanted in reason
        assert any(path in line and reason in line for line in str(layout).splitlines())


def test_layers_around_uncovered_ones_only():
    """A model of nothing but a user's own parameters is refused, and told about `tap`."""

    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("gain", nn.initializers.ones, (), F64)

    x = inputs_of((4, 2))
    with pytest.raises(ValueError, match="the capture met no layer"):
        af.trace_layout(loss_of(Bare()), random_params(Bare(), x), x)
