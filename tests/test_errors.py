"""Every error of the contract: what it says, and that it says it before anything runs."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adafisher_jax as af
from adafisher_jax.paths import by_path

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
        ({"damping": float("inf")}, ["damping", "inf", "finite"]),
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


MAKERS = [
    (af.scale_by_adafisher, ()),
    (af.adafisher, (3e-2,)),
    (af.adafisherw, (3e-2,)),
]


@pytest.mark.parametrize(("make", "first"), MAKERS)
def test_a_layout_or_a_rule_left_out(make, first):
    rate = "3e-2, " if first else ""
    cure = f'{make.__name__}({rate}layout, rule="centered")'
    with says(TypeError, "missing a required argument: 'layout'", cure, "trace_layout", "None"):
        make(*first, rule="paper")
    with says(TypeError, "missing a required argument: 'rule'", cure, '"paper"', '"official"'):
        make(*first, None)
    with says(TypeError, "too many positional arguments", cure):
        make(*first, LAYOUT, "paper")
    assert make(*first, layout=None, rule="paper").init(PARAMS)


@pytest.mark.parametrize("make", [af.adafisher, af.adafisherw])
@pytest.mark.parametrize("bad", ["3e-2", None, PARAMS, jnp.ones(2)], ids=str)
def test_a_rate_or_a_decay_that_is_none(make, bad):
    with says(TypeError, "learning_rate", "a number or a schedule"):
        make(bad, LAYOUT, rule="centered")
    with says(TypeError, "weight_decay", "a number or a schedule"):
        make(3e-2, LAYOUT, rule="centered", weight_decay=bad)


def test_a_layout_that_is_none():
    with says(TypeError, "layout", "dict", "adafisher_jax.trace_layout(loss_fn, params, ...)"):
        af.adafisher(3e-2, PARAMS, rule="centered")


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


def test_what_is_no_array_among_the_parameters():
    for refuses in (
        af.scale_by_adafisher(None, rule="paper").init,
        lambda p: af.trace_layout(LOSS, p, X),
    ):
        with says(TypeError, "'a/name'", "str", "floating-point"):
            refuses({"a": {"name": "kernel"}})


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


GROWN = {**PARAMS, "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}


@pytest.mark.parametrize(
    "call",
    [
        lambda: af.adafisher(3e-2, LAYOUT, rule="centered").init(GROWN),
        lambda: af.scale_by_adafisher(LAYOUT, rule="paper").update(GROWN, None, factors=None),
        lambda: af.value_and_grad(LOSS, LAYOUT)(GROWN, X),
    ],
)
def test_a_model_that_grew(call):
    """Some of its parameters may be masked; new ones would silently have no layer."""
    cure = "layout = adafisher_jax.trace_layout(loss_fn, params, ...)"
    with says(ValueError, "does not know", "'head/bias', 'head/kernel'", cure):
        call()


def test_parameters_without_a_layer_are_known():
    def loss(params, x):
        return LOSS(params["model"], x * params["scale"])

    params = {"model": PARAMS, "scale": jnp.ones((1, 3))}
    layout = af.trace_layout(loss, params, X)
    assert [row.leaf.path for row in layout.uncovered] == ["scale"]
    state = af.adafisher(3e-2, layout, rule="centered").init({"scale": params["scale"]})
    assert optax.tree.get(state, "factors") == {}


# Factors.


@pytest.mark.parametrize(
    "wrap", [lambda tx: tx, lambda tx: optax.chain(tx), lambda tx: optax.apply_if_finite(tx, 3)]
)
def test_factors_left_out(wrap):
    """While it is traced; so it runs on none of them."""
    tx = wrap(af.adafisher(3e-2, LAYOUT, rule="centered"))
    cures = "tx.update(grads, opt_state, params, factors=factors)", "factors=None", "wrapper"
    with says(TypeError, "got no keyword factors", *cures):
        jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS), PARAMS)
    jax.eval_shape(functools.partial(tx.update, factors=None), PARAMS, tx.init(PARAMS), PARAMS)


def test_factors_left_out_of_nnxs_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    layout = af.nnx.trace_layout(lambda model, x: jnp.mean(model(x)), model, X)
    tx = af.adafisher(3e-2, layout, rule="centered")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    with says(TypeError, "got no keyword factors"):
        optimizer.update(model, grads)
    optimizer.update(model, grads, factors=None)


def test_without_a_layout_no_factors_are_asked_for():
    tx = af.adafisher(3e-2, None, rule="centered")
    found = [tx.update(PARAMS, tx.init(PARAMS), **e)[0] for e in ({}, {"factors": captured()[1]})]
    jax.tree.map(np.testing.assert_array_equal, *found)


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


# Losses.


MODULES = [net(), nnx.Linear(3, 2, rngs=nnx.Rngs(0))]


@pytest.mark.parametrize("bad", [*MODULES, LAYOUT, None], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("framework", [af, af.nnx])
def test_a_loss_that_is_no_function(framework, bad):
    cure = "lambda params, x: jnp.mean(model.apply(params, x) ** 2)"
    for call in (
        lambda: framework.trace_layout(bad, PARAMS, X),
        lambda: framework.value_and_grad(bad, LAYOUT),
    ):
        with says(TypeError, "loss_fn", f"got {type(bad).__name__}", "a function", cure):
            call()


def test_parameters_of_the_other_library():
    loss = lambda model, x: jnp.mean(model(x))  # noqa: E731
    for params in (MODULES[1], {"a": MODULES[1]}):
        for call in (af.trace_layout, lambda f, *args: af.value_and_grad(f, LAYOUT)(*args)):
            with says(TypeError, "params", "nnx.Module", "adafisher_jax.nnx.trace_layout"):
                call(loss, params, X)
    for call in (af.nnx.trace_layout, lambda f, *args: af.nnx.value_and_grad(f, LAYOUT)(*args)):
        with says(TypeError, "model", "dict", "nnx.Module", "adafisher_jax.value_and_grad"):
            call(LOSS, PARAMS, X)
    with says(TypeError, "params", "a module", 'model.init(key, x)["params"]'):
        af.trace_layout(LOSS, net(), X)


@pytest.mark.parametrize(
    ("returns", "got"),
    [
        (lambda value: value, "an array of shape ()"),
        (lambda value: [value, 1], "list"),
        (lambda value: (value, 1, 2), "tuple"),
        (lambda value: (value[None], 1), "a pair of which the first is an array of shape (1,)"),
    ],
)
def test_a_loss_without_the_pair_that_has_aux_promises(returns, got):
    model = MODULES[1]
    for call in (
        lambda: af.trace_layout(lambda p, x: returns(LOSS(p, x)), PARAMS, X, has_aux=True),
        lambda: af.value_and_grad(lambda p, x: returns(LOSS(p, x)), LAYOUT, True)(PARAMS, X),
        lambda: af.nnx.trace_layout(lambda m, x: returns(jnp.mean(m(x))), model, X, has_aux=True),
    ):
        with says(TypeError, "loss_fn", f"returns {got}", "has_aux=True", "(scalar, aux)"):
            call()


@pytest.mark.parametrize(
    ("returns", "got"),
    [
        (lambda loss: (loss, X), "tuple"),
        (lambda loss: {"loss": loss}, "dict"),
        (lambda loss: loss * X[:, 0], "an array of shape (4,)"),
    ],
)
def test_a_loss_that_is_no_scalar(returns, got):
    """A layout may be traced of it: other libraries have losses of several outputs."""

    def loss(params, x):
        return returns(LOSS(params, x))

    def nnx_loss(model, x):
        return returns(jnp.mean(model(x)))

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    for run in (
        lambda: af.value_and_grad(loss, af.trace_layout(loss, PARAMS, X))(PARAMS, X),
        lambda: af.nnx.value_and_grad(nnx_loss, af.nnx.trace_layout(nnx_loss, model, X))(model, X),
    ):
        with says(TypeError, "loss_fn", f"returns {got}", "scalar", "has_aux=True"):
            run()


def test_what_is_accumulated_that_has_no_factors():
    batches = jnp.ones((2, *X.shape))
    with says(TypeError, "grad_fn: it returns tuple", "value_and_grad"):
        af.accumulate(jax.value_and_grad(LOSS), LAYOUT)(PARAMS, batches)
    with says(TypeError, "layout: got function"):
        af.accumulate(LAYOUT, af.value_and_grad(LOSS, LAYOUT))(PARAMS, batches)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), np.float32(np.nan), jnp.array(-jnp.inf)]
)
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_rate_that_is_not_finite(name, value):
    settings = {"learning_rate": 1e-3, name: value}
    with says(ValueError, name, str(value), "finite"):
        af.adafisherw(layout=LAYOUT, rule="paper", **settings)


def test_a_mask_that_is_a_name():
    with says(TypeError, "mask", "'kernel'", "Booleans", "function"):
        af.adafisherw(1e-3, LAYOUT, rule="paper", mask="kernel")


def test_a_gradient_that_is_missing():
    tx = af.adafisher(1e-3, LAYOUT, rule="paper")
    grads = {**PARAMS, "layers_0": {"kernel": PARAMS["layers_0"]["kernel"]}}
    with says(ValueError, "the state", "no gradient 'layers_0/bias'"):
        tx.update(grads, tx.init(PARAMS), PARAMS, factors=None)


def test_a_layout_takes_has_aux_as_the_gradient_does():
    with_aux = lambda p, x: (LOSS(p, x), {"x": x, "name": "text"})  # noqa: E731
    assert af.trace_layout(with_aux, PARAMS, X, has_aux=True) == LAYOUT
    assert af.trace_layout(with_aux, PARAMS, X) == LAYOUT


class Named(nn.Module):
    """As data-parallel code has it."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, axis_name="data")(nn.Dense(4)(x))
        return nn.Dense(2)(x)


def test_a_mapped_axis_that_is_not_there():
    """The message's own recipe gives the layout, and the gradient where the axis is there."""

    def loss_fn(params, x):
        return jnp.mean(Named().apply({"params": params}, x, mutable=["batch_stats"])[0])

    init = jax.vmap(lambda x: Named().init(jax.random.key(0), x), axis_name="data", out_axes=None)
    params = init(X[None])["params"]
    cure = "jax.vmap(loss_fn, (None, 0), axis_name='data'), params, x[None])"
    with says(ValueError, "'data'", "nn.BatchNorm(axis_name=...)", cure):
        af.trace_layout(loss_fn, params, X)
    layout = af.trace_layout(jax.vmap(loss_fn, (None, 0), axis_name="data"), params, X[None])
    assert layout.covered == 1
    grad_fn = af.value_and_grad(loss_fn, layout)
    with says(ValueError, "'data'", "shard_map or pmap"):
        grad_fn(params, X)
    _, _, factors = jax.vmap(grad_fn, (None, 0), axis_name="data")(params, jnp.stack([X, 2 * X]))
    assert factors.keys() == {"BatchNorm_0", "Dense_0", "Dense_1"}


def test_a_name_that_the_loss_does_not_know_is_its_own_error():
    with pytest.raises(NameError, match="unknown_name"):
        af.trace_layout(lambda p, x: unknown_name, PARAMS, X)  # noqa: F821


# Captures.


def empty_losses():
    mean = lambda p, x: jnp.mean(x * jnp.sum(p["w"]))  # noqa: E731
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
    with says(ValueError, "the capture met no layer", "Flax", "multiplies none"):
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
