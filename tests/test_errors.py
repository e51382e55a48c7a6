"""Every error of the contract: what it says, and that it says it before anything runs."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adafisher_jax as af
from adafisher_jax.layout import by_path

RULES = ("paper", "official", "centered")
X = jnp.ones((4, 3))


def net(hidden=5, out=2):
    return nn.Sequential([nn.Dense(hidden), jnp.tanh, nn.Dense(out)])


def init(model, x=X):
    return model.init(jax.random.key(0), x)["params"]


def loss_of(model):
    return lambda params, x: jnp.mean(jnp.square(model.apply({"params": params}, x)))


PARAMS, OTHER = init(net()), init(net(hidden=7))
LOSS = loss_of(net())
LAYOUT, OTHER_LAYOUT = (
    af.trace_layout(loss_of(model), init(model), X) for model in (net(), net(hidden=7))
)
ELSEWHERE = af.trace_layout(lambda p, x: LOSS(p["model"], x), {"model": PARAMS}, X)


@functools.cache
def captured():
    _, grads, factors = af.value_and_grad(LOSS, LAYOUT)(PARAMS, X)
    return grads, factors


def says(error, *parts):
    """Expects an error whose message has every part."""
    return pytest.raises(error, match="".join(f"(?=.*{re.escape(part)})" for part in parts))


def update(factors, layout=LAYOUT):
    tx = af.scale_by_adafisher(layout, rule="paper")
    jax.eval_shape(lambda g, s: tx.update(g, s, factors=factors), captured()[0], tx.init(PARAMS))


# Settings.


@pytest.mark.parametrize("make", [af.scale_by_adafisher, functools.partial(af.adafisher, 1e-3)])
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"rule": "kfac"}, ["rule", "'kfac'", "'paper'", "'official'", "'centered'"]),
        ({"damping": -1e-3}, ["damping", "-0.001", "at least 0"]),
        ({"damping": np.float32(-2)}, ["damping", "-2", "at least 0"]),
        ({"damping": jnp.array(-0.5)}, ["damping", "-0.5", "at least 0"]),
        ({"damping": float("nan")}, ["damping", "nan"]),
        ({"curvature_ema": 1.0}, ["curvature_ema", "1.0", "[0, 1)"]),
        ({"curvature_ema": -0.1}, ["curvature_ema", "-0.1", "[0, 1)"]),
        ({"curvature_ema": "none"}, ["curvature_ema", "'none'", "[0, 1)"]),
        ({"damping": "none"}, ["damping", "'none'", "at least 0"]),
        ({"damping": jnp.ones(2)}, ["damping", "at least 0"]),
        ({"b1": None}, ["b1", "None", "[0, 1)"]),
    ],
)
def test_bad_settings(make, options, parts):
    with says(ValueError, *parts):
        make(LAYOUT, **{"rule": "paper"} | options)


def test_a_momentum_of_integers():
    with says(TypeError, "mu_dtype", "int32", "floating-point"):
        af.scale_by_adafisher(LAYOUT, rule="paper", mu_dtype=jnp.int32)


@pytest.mark.parametrize("rule", RULES)
def test_extreme_settings_are_taken(rule):
    for options in ({"damping": 0}, {"damping": 0.0, "curvature_ema": 0.0}, {"damping": 1e9}):
        state = af.scale_by_adafisher(LAYOUT, rule=rule, **options).init(PARAMS)
        assert state.factors.keys() == {layer.path for layer in LAYOUT.layers}


@pytest.mark.parametrize("rule", RULES)
def test_traced_settings_are_not_checked(rule):
    def init_with(damping):
        return af.scale_by_adafisher(LAYOUT, rule=rule, damping=damping).init(PARAMS).count

    assert jax.jit(init_with)(-1.0) == 0


# Parameters.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", [None, LAYOUT])
def test_an_integer_parameter_to_init(rule, layout):
    params = {**PARAMS, "steps": {"count": jnp.arange(3)}}
    with says(TypeError, "'steps/count'", "int32", "floating-point"):
        af.scale_by_adafisher(layout, rule=rule).init(params)


@pytest.mark.parametrize("bad", [jnp.arange(3), np.zeros(2, bool), 3, jax.random.key(0)])
def test_an_integer_parameter_to_trace_layout(bad):
    params = {"model": PARAMS, "steps": {"count": bad}}
    with says(TypeError, "'steps/count'", str(jnp.result_type(bad)), "floating-point"):
        af.trace_layout(lambda p, x: LOSS(p["model"], x), params, X)


def test_two_parameters_of_one_path():
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    for refuses in (
        af.scale_by_adafisher(None, rule="paper").init,
        lambda p: af.trace_layout(LOSS, p, X),
    ):
        with says(ValueError, "same path", "'a/b'", "'/'"):
            refuses(params)


def test_init_with_another_models_parameters():
    with says(ValueError, "'layers_0/", "7", "5", "another model"):
        af.adafisher(1e-3, LAYOUT, rule="paper").init(OTHER)


def test_update_with_another_models_gradients():
    grads, factors = captured()
    tx = af.scale_by_adafisher(OTHER_LAYOUT, rule="paper")
    with says(ValueError, "'layers_0/", "7", "5", "another model"):
        tx.update(grads, tx.init(OTHER), factors=factors)


@pytest.mark.parametrize(
    "call", [lambda tx: tx.init(PARAMS), lambda tx: tx.update(PARAMS, None, factors=None)]
)
def test_parameters_none_of_which_the_layout_knows(call):
    """As when it was traced for a full variables dict, and the optimizer is given the params."""
    with says(ValueError, "does not know", "'layers_0/bias'", "'model/layers_0/bias'"):
        call(af.scale_by_adafisher(ELSEWHERE, rule="paper"))


# Factors.


def test_a_missing_layer():
    _, factors = captured()
    with says(ValueError, "factors", "'layers_2'", "missing", "'layers_0'"):
        update({"layers_0": factors["layers_0"]})
    with says(ValueError, "factors", "'layers_0'", "missing", "nothing"):
        update({})


@pytest.mark.parametrize("field", af.Factor._fields)
def test_factors_of_another_models_shapes(field):
    _, factors = captured()
    got = getattr(factors["layers_0"], field)
    bad = factors["layers_0"]._replace(**{field: jnp.zeros((2, *got.shape))})
    with says(ValueError, f"factors['layers_0'].{field}", str((2, *got.shape)), str(got.shape)):
        update({**factors, "layers_0": bad})


def test_factors_captured_from_another_model():
    _, _, factors = jax.eval_shape(
        af.value_and_grad(loss_of(net(hidden=7)), OTHER_LAYOUT), OTHER, X
    )
    with says(ValueError, "factors['layers_0'].s", "(1, 7)", "(1, 5)"):
        update(factors)


@pytest.mark.parametrize("bad", [[1.0, 2.0], (), 3.0, "factors"], ids=str)
def test_factors_that_are_no_dict(bad):
    with says(TypeError, "factors", type(bad).__name__, "dict", "value_and_grad"):
        update(bad)


@pytest.mark.parametrize("bad", [None, jnp.ones(3), (1, 2, 3, 4), {"h": 1}], ids=type)
def test_factors_that_are_no_factor(bad):
    with says(TypeError, "factors['layers_0']", type(bad).__name__, "Factor"):
        update({**captured()[1], "layers_0": bad})


# Captures.


def empty_losses():
    mean = lambda p, x: jnp.mean(x @ p["w"])  # noqa: E731
    return {
        "no module": (mean, {"w": jnp.ones((3, 2))}),
        "a constant": (lambda p, x: jnp.mean(x), PARAMS),
        "a module without parameters": (
            lambda p, x: mean(p, nn.Dropout(0.5, deterministic=True).apply({}, x)),
            {"w": jnp.ones((3, 2))},
        ),
    }


@pytest.mark.parametrize("how", empty_losses())
def test_an_empty_capture(how):
    loss, params = empty_losses()[how]
    with says(ValueError, "the capture met no layer", "Flax", "adafisher_jax.tap"):
        af.trace_layout(loss, params, X)
    unknown = tuple(af.Uncovered(af.Leaf(path, ()), "") for path in by_path(params)[0])
    with says(ValueError, "the capture met no layer"):
        af.value_and_grad(loss, af.Layout((), unknown))(params, X)


def test_a_gradient_with_another_models_layout():
    with says(ValueError, "'layers_0/", "5", "7", "another model"):
        af.value_and_grad(LOSS, OTHER_LAYOUT)(PARAMS, X)
    with says(ValueError, "does not know", "'layers_0/bias'", "'model/layers_0/bias'"):
        af.value_and_grad(LOSS, ELSEWHERE)(PARAMS, X)


def test_a_gradient_with_a_layout_of_equal_shapes_but_another_kind():
    """A table of three rows, and a matrix of three inputs."""

    def embed(params, tokens):
        table = {"embedding": params["kernel"]}
        return jnp.mean(nn.Embed(3, 5).apply({"params": table}, tokens))

    dense = loss_of(nn.Dense(5, use_bias=False))
    params = init(nn.Dense(5, use_bias=False))
    layout = af.trace_layout(embed, params, jnp.array([0, 2]))
    with says(ValueError, "dense", "embedding", "another model"):
        af.value_and_grad(dense, layout)(params, X)


def test_a_gradient_of_a_loss_that_calls_none_of_the_layers():
    """Two models in one loss, and a layout of the one that this loss leaves alone."""
    params = {"a": PARAMS, "b": PARAMS}
    layout = af.trace_layout(lambda p, x: LOSS(p["a"], x), params, X)
    with says(ValueError, "no layer of the layout"):
        af.value_and_grad(lambda p, x: LOSS(p["b"], x), layout)(params, X)


class TwoKinds(nn.Module):
    """One matrix, as a dense layer's and as an embedding's."""

    @nn.compact
    def __call__(self, x):
        table = self.param("table", nn.initializers.ones, (3, 3))
        dense = nn.Dense(3, use_bias=False).apply({"params": {"kernel": table}}, x)
        return dense + nn.Embed(3, 3).apply({"params": {"embedding": table}}, jnp.zeros(4, int))


def test_a_parameter_used_by_two_kinds_of_layer():
    def loss(params, x):
        dense = nn.Dense(3, use_bias=False).apply({"params": {"kernel": params["table"]}}, x)
        rows = nn.Embed(3, 3).apply({"params": {"embedding": params["table"]}}, jnp.zeros(4, int))
        return jnp.mean(dense * rows)

    with says(ValueError, "'table'", "dense", "embedding", "different kinds"):
        af.trace_layout(loss, {"table": jnp.ones((3, 3))}, X)
    with says(ValueError, "table'", "dense", "embedding", "different kinds"):
        af.trace_layout(loss_of(TwoKinds()), init(TwoKinds()), X)


def test_a_tied_embedding_is_no_error():
    def loss(params, tokens):
        embed = nn.Embed(6, 3)
        rows = embed.apply({"params": params}, tokens)
        return jnp.mean(embed.apply({"params": params}, rows, method="attend"))

    params = {"embedding": jnp.ones((6, 3))}
    layout = af.trace_layout(loss, params, jnp.array([1, 2]))
    assert [layer.kind for layer in layout.layers] == ["embedding"]


def test_an_error_of_the_losss_own_is_not_dressed_up():
    class Unhappy(Exception):
        pass

    def loss(params, x):
        model_loss = LOSS(params, x)
        raise Unhappy(model_loss.shape)

    with pytest.raises(Unhappy):
        af.trace_layout(loss, PARAMS, X)
    with pytest.raises(Unhappy):
        af.value_and_grad(loss, LAYOUT)(PARAMS, X)
    # And leaves nothing behind.
    _, grads, _ = af.value_and_grad(LOSS, LAYOUT)(PARAMS, X)
    jax.tree.map(np.testing.assert_array_equal, grads, jax.grad(LOSS)(PARAMS, X))


def test_an_argument_too_many_and_a_loss_that_is_no_scalar():
    with pytest.raises(TypeError, match="positional argument"):
        af.trace_layout(LOSS, PARAMS, X, X)
    with pytest.raises(TypeError, match="scalar"):
        af.value_and_grad(lambda p, x: net().apply({"params": p}, x), LAYOUT)(PARAMS, X)
    with pytest.raises(TypeError, match=r"pair|tuple|unpack|two"):
        af.value_and_grad(LOSS, LAYOUT, has_aux=True)(PARAMS, X)


def test_a_wrapped_transformation_raises_too():
    tx = optax.chain(optax.clip(1.0), af.adafisher(1e-3, LAYOUT, rule="paper"))
    grads, factors = captured()
    with says(ValueError, "'layers_2'", "missing"):
        tx.update(grads, tx.init(PARAMS), PARAMS, factors={"layers_0": factors["layers_0"]})
