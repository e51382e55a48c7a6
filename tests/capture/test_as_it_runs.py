"""What runs is what counts: not the layer that was declared, and never nothing in silence."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.jet import jet

import adafisher_jax as af

F64 = jnp.float64


def inputs(*shape):
    return jax.random.normal(jax.random.key(0), shape, F64)


def init(model, *args):
    return model.init(jax.random.key(1), *args)["params"]


def sum_of(model, interceptor=None):
    def loss(params, x):
        if interceptor is None:
            return jnp.sum(model.apply({"params": params}, x))
        with nn.intercept_methods(interceptor):
            return jnp.sum(model.apply({"params": params}, x))

    return loss


def captured(loss, params, *args):
    layout = af.trace_layout(loss, params, *args)
    return layout, af.value_and_grad(loss, layout)(params, *args)[2]


# Interceptors of the user's, and what is injected into a layer or overrides a part of it.

INTERCEPTORS = {
    "nothing": (lambda f, args, kwargs, context: f(*args, **kwargs), 1, 1),
    "its inputs": (lambda f, args, kwargs, context: f(2 * args[0], **kwargs), 2, 1),
    "its outputs": (lambda f, args, kwargs, context: 3 * f(*args, **kwargs), 1, 3),
}


@pytest.mark.parametrize("what", INTERCEPTORS)
def test_an_interceptor_inside_the_loss_changes(what, x64):
    interceptor, of_inputs, of_cotangents = INTERCEPTORS[what]
    model, x = nn.Dense(2, param_dtype=F64), inputs(8, 3)
    layout, factors = captured(sum_of(model, interceptor), init(model, x), x)
    assert layout.covered == 1
    np.testing.assert_allclose(factors[""].h[:, 0], np.mean((of_inputs * x) ** 2, 0), 1e-12)
    np.testing.assert_allclose(factors[""].s[0], [of_cotangents**2] * 2, 1e-12)


def test_an_interceptor_around_the_capture_hands_the_layer_what_it_gets(x64):
    model, x = nn.Dense(2, param_dtype=F64), inputs(8, 3)
    params = init(model, x)
    layout = af.trace_layout(sum_of(model), params, x)
    with nn.intercept_methods(INTERCEPTORS["its inputs"][0]):
        _, _, factors = af.value_and_grad(sum_of(model), layout)(params, x)
    np.testing.assert_allclose(factors[""].h[:, 0], np.mean((2 * x) ** 2, 0), 1e-12)


def test_a_norm_behind_an_interceptor_is_listed(x64):
    model, x = (
        nn.Sequential([nn.LayerNorm(param_dtype=F64), nn.Dense(2, param_dtype=F64)]),
        inputs(4, 3),
    )
    layout = af.trace_layout(sum_of(model, INTERCEPTORS["nothing"][0]), init(model, x), x)
    assert {row.leaf.path for row in layout.uncovered} == {"layers_0/bias", "layers_0/scale"}


def double(x, w, *args, **kwargs):
    return jax.lax.dot_general(2 * x, w, *args, **kwargs)


def normalized(x, w, *args, **kwargs):
    return jax.lax.dot_general(x, w / jnp.linalg.norm(w), *args, **kwargs)


def causal(x, w, strides, padding, **kwargs):
    return jax.lax.conv_general_dilated(x, w, strides, [(2, 0)], **kwargs)


def halved(*arrays, **kwargs):
    x, *others = nn.dtypes.promote_dtype(*arrays, **kwargs)
    return [x / 2, *others]


def nnx_halved(arrays, **kwargs):
    x, *others = nnx.nn.dtypes.promote_dtype(arrays, **kwargs)
    return [x / 2, *others]


def linen_factors(layer, x, **injected):
    model = layer(param_dtype=F64, **injected)
    return captured(sum_of(model), init(model, x), x)


def nnx_factors(layer, x, **injected):
    model = layer(rngs=nnx.Rngs(0), param_dtype=F64, **injected)
    layout = af.nnx.trace_layout(lambda m, x: jnp.sum(m(x)), model, x)
    return layout, af.nnx.value_and_grad(lambda m, x: jnp.sum(m(x)), layout)(model, x)[2]


def linear(**settings):
    return nnx.Linear(3, 2, **settings)


def dense(**settings):
    return nn.Dense(2, **settings)


@pytest.mark.parametrize(
    ("found", "layer"), [(linen_factors, dense), (nnx_factors, linear)], ids=["linen", "nnx"]
)
def test_an_injected_product(found, layer, x64):
    x = inputs(4, 3)
    layout, factors = found(layer, x, dot_general=double)
    assert layout.covered == 1
    np.testing.assert_allclose(factors[""].h[:, 0], np.mean((2 * x) ** 2, 0), 1e-12)
    layout = found(layer, x, dot_general=normalized)[0]
    assert {row.leaf.path: row.reason for row in layout.uncovered}["kernel"].startswith(
        "transformed"
    )


@pytest.mark.parametrize(
    ("found", "layer", "half"),
    [(linen_factors, dense, halved), (nnx_factors, linear, nnx_halved)],
    ids=["linen", "nnx"],
)
def test_injected_promotion(found, layer, half, x64):
    x = inputs(4, 3)
    _, factors = found(layer, x, promote_dtype=half)
    np.testing.assert_allclose(factors[""].h[:, 0], np.mean((x / 2) ** 2, 0), 1e-12)


@pytest.mark.parametrize(
    ("found", "layer"),
    [
        (linen_factors, lambda **settings: nn.Conv(1, (3,), **settings)),
        (nnx_factors, lambda **settings: nnx.Conv(1, 1, (3,), **settings)),
    ],
    ids=["linen", "nnx"],
)
def test_an_injected_convolution(found, layer, x64):
    x = inputs(1, 5, 1)
    layout, factors = found(layer, x, conv_general_dilated=causal)
    padded = np.pad(x[0, :, 0], (2, 0))
    assert layout.covered == 1
    np.testing.assert_allclose(
        factors[""].h.ravel(), [np.mean(padded[i : i + 5] ** 2) for i in range(3)], 1e-12
    )


class Standardized(nn.Conv):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        if name == "kernel":
            value = value - value.mean((0, 1, 2), keepdims=True)
            value = value / (value.std((0, 1, 2), keepdims=True) + 1e-5)
        return value


def test_an_overridden_param_is_listed(x64):
    model, x = Standardized(4, (3, 3), param_dtype=F64), inputs(2, 6, 6, 3)
    layout = af.trace_layout(sum_of(model), init(model, x), x)
    assert not layout.layers
    assert {row.leaf.path for row in layout.uncovered} == {"kernel", "bias"}


# What cannot be followed.


def remats(x):
    return nn.Dense(1, param_dtype=F64, name="o")(
        nn.remat(nn.Dense)(4, param_dtype=F64, name="r")(x)
    )


class Remats(nn.Module):
    @nn.compact
    def __call__(self, x):
        return remats(x)


@pytest.fixture
def remat3():
    jax.config.update("jax_remat3", True)
    yield
    jax.config.update("jax_remat3", False)


def test_a_layer_met_but_not_followed_is_an_error(x64, request):
    model, x = Remats(), inputs(8, 3)
    params = init(model, x)
    layout = af.trace_layout(sum_of(model), params, x)
    assert layout.covered == 1
    request.getfixturevalue("remat3")
    with pytest.raises(ValueError, match=r"the layer 'r' .* has no factors .* 'r/"):
        af.value_and_grad(sum_of(model), layout)(params, x)
    layout = af.trace_layout(sum_of(model), params, x)
    assert {row.leaf.path for row in layout.uncovered} == {"r/bias", "r/kernel"}
    assert all("takes no probe" in row.reason for row in layout.uncovered)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(nn.Dense(3, param_dtype=F64)(x)), None

        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack()(x, None)[0]


def test_a_scanned_model_works_while_jit_is_disabled(x64):
    model, x = Scanned(), inputs(4, 3)
    params = init(model, x)
    layout, want = captured(sum_of(model), params, x)
    with jax.disable_jit():
        again, found = captured(sum_of(model), params, x)
    assert again == layout
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12), found, want)


# Derivatives.


class Energy(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = jnp.tanh(nn.Dense(4, param_dtype=F64, name="hidden")(x))
        return nn.Dense(1, param_dtype=F64, name="last")(hidden)[..., 0]


def test_a_loss_of_derivatives_only_sees_the_last_layer_where_it_is_used(x64):
    """Its output is not: the force is the gradient, which goes through the kernel's transpose."""
    model, x = Energy(), inputs(5, 3)
    params = init(model, x)

    def force(params, x, shift):
        h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
        g = jnp.ones(1) @ params["last"]["kernel"].T + shift
        return (g[None] * (1 - h**2)) @ params["hidden"]["kernel"].T

    def loss(params, x):
        forces = jax.vmap(jax.grad(lambda x: model.apply({"params": params}, x)))(x)
        return jnp.mean((forces - 1) ** 2)

    layout, factors = captured(loss, params, x)
    rows = {row.leaf.path: row.reason for row in layout.uncovered}
    assert rows == {"last/bias": "no gradient of the loss reaches the output of its layer"}
    shifted = lambda shift: jnp.mean((force(params, x, shift) - 1) ** 2)  # noqa: E731
    np.testing.assert_allclose(shifted(jnp.zeros(4)), loss(params, x), 1e-12)
    np.testing.assert_allclose(
        factors["last"].s.ravel(), jax.grad(shifted)(jnp.zeros(4)) ** 2, 1e-9
    )
    assert factors["last"].h.ravel().tolist() == [1.0]
    assert factors["hidden"].rows == 5


def test_an_output_beside_the_loss_is_no_layer_of_it(x64):
    one, two, x = nn.Dense(2, param_dtype=F64), nn.Dense(3, param_dtype=F64), inputs(4, 3)
    params = {"one": init(one, x), "two": init(two, x)}

    def loss(params, x):
        aside = two.apply({"params": params["two"]}, x)
        return jnp.mean(one.apply({"params": params["one"]}, x) ** 2), aside

    layout = af.trace_layout(loss, params, x)
    assert [layer.path for layer in layout.layers] == ["one"]
    assert {row.reason for row in layout.uncovered} == {
        "no gradient of the loss reaches the output of its layer"
    }


def test_an_interpreter_with_a_rule_for_each_primitive_meets_none_of_ours(x64):
    model, x = Energy(), inputs(5, 3)
    params = init(model, x)

    def loss(params, x):
        along = (jnp.ones_like(x), jnp.zeros_like(x))
        y, (_, second) = jet(lambda x: model.apply({"params": params}, x), (x,), (along,))
        return jnp.mean(y**2 + second**2)

    layout = af.trace_layout(loss, params, x)
    value, grads, factors = af.value_and_grad(loss, layout)(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-12),
        (value, grads),
        jax.value_and_grad(loss)(params, x),
    )
    assert {layer.leaves[0].path for layer in layout.layers} == {"hidden/kernel", "last/kernel"}
    assert all(factor.rows > 0 for factor in factors.values())
