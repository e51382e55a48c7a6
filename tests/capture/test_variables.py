"""What a model may do with its variables: map, box, differentiate, look at and hand on."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adafisher_jax as af
from tests.support.reference import (
    F64,
    Dense,
    assert_factors,
    captured,
    factors_of,
    loss_of,
    random_like,
    random_params,
    same_as_plain,
    scalar,
    slices,
    stack,
)

pytestmark = pytest.mark.usefixtures("x64")


def mapped(change, init=False, mutable=False):
    """A dense layer behind `nn.map_variables`, between two plain ones."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Dense(3, name="first")(x)
            layer = nn.map_variables(nn.Dense, "params", change, init=init, mutable=mutable)
            x = layer(3, param_dtype=F64, name="mapped")(x)
            return Dense(2, name="last")(x)

    return Model()


def rebuilt(variables):
    return {"params": {**variables["params"]}}


def picked(variables):
    return {"params": {name: variables["params"][name] for name in ("kernel", "bias")}}


def masked(variables):
    params = variables["params"]
    return {"params": {"kernel": jnp.triu(params["kernel"]), "bias": params["bias"]}}


CHANGES = {
    "as is": lambda v: v,
    "rebuilt": rebuilt,
    "picked": picked,
    "doubled": lambda v: jax.tree.map(lambda leaf: 2 * leaf, v),
    "masked": masked,
    "two trees": lambda v: jax.tree.map(jnp.add, v, jax.tree.map(jnp.ones_like, v)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_variables_handed_on_or_changed_element_by_element(change, x):
    """Covered, as if the loss had changed them: the factors are those of what the layer uses."""
    model = mapped(change)
    params = random_params(mapped(lambda v: v, init=True, mutable=True), x)
    same_as_plain(loss_of(model), loss_of(model), params, x)


def normalized(variables):
    params = variables["params"]
    kernel = params["kernel"] / jnp.linalg.norm(params["kernel"], axis=0, keepdims=True)
    return {"params": {"kernel": kernel, "bias": params["bias"]}}


def test_variables_scaled_by_what_depends_on_them_are_uncovered(x):
    """As a weight norm does; their neighbours are not disturbed."""
    model = mapped(normalized)
    params = random_params(mapped(lambda v: v, init=True, mutable=True), x)
    layout, factors = captured(loss_of(model), params, x)
    expected = factors_of(loss_of(model), params, x)
    assert_factors(factors, {path: expected[path] for path in ("first", "last")})
    reasons = {row.leaf.path: row.reason for row in layout.uncovered}
    assert reasons.keys() == {"mapped/kernel", "mapped/bias"}
    assert set(reasons.values()) == {"transformed before its layer uses it"}


class Functional(nn.Module):
    """Calls a layer, and calls it again as a function of its own variables."""

    by_hand: bool

    @nn.compact
    def __call__(self, x):
        layer = Dense(3, name="layer")
        x = jnp.tanh(layer(x))
        if self.by_hand:
            return Dense(3, parent=None).apply(layer.variables, x[:2])
        return layer(x[:2])


def test_variables_handed_to_another_apply(x):
    """Both uses count, or neither does: a part of the rows would be silently wrong."""
    params = random_params(Functional(by_hand=False), x)
    same_as_plain(loss_of(Functional(by_hand=True)), loss_of(Functional(by_hand=False)), params, x)


def reversed_gradient(module, x):
    """A layer with its own derivative rule: the signs of its gradients are turned."""

    def run(module, x):
        return module(x)

    def forward(module, x):
        return nn.vjp(run, module, x)

    def backward(vjp, g):
        params, x = vjp(g)
        return jax.tree.map(jnp.negative, params), x

    return nn.custom_vjp(run, forward, backward)(module, x)


class OwnRule(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Dense(3, name="first")(x)
        x = reversed_gradient(Dense(3, name="inner"), x)
        return Dense(2, name="last")(x)


def test_custom_vjp_is_uncovered(x):
    params = random_params(OwnRule(), x)
    layout, factors = captured(loss_of(OwnRule()), params, x)
    reasons = {row.leaf.path: row.reason for row in layout.uncovered}
    assert reasons.keys() == {"inner/kernel", "inner/bias"}
    assert all("derivative rule" in reason for reason in reasons.values())

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dense(2, name="last")(Dense(3, name="inner")(Dense(3, name="first")(x)))

    expected = factors_of(loss_of(Plain()), params, x)  # the input's cotangent is as ever
    assert_factors(factors, {path: expected[path] for path in ("first", "last")})


def slope_of(by, inner, y):
    """The derivative of the sum of `tanh(inner(y))`, taken in one of several ways."""
    params = inner.variables["params"]

    def run(inner, y):
        return jnp.sum(jnp.tanh(inner(y)))

    match by:
        case "nn.vjp":
            return nn.vjp(run, inner, y, vjp_variables=False)[1](1.0)[-1]
        case "nn.vjp, variables":
            gradients, slope = nn.vjp(run, inner, y)[1](1.0)
            jax.tree.map(jnp.add, gradients, {"params": params})
            return slope
        case "nn.jvp" | "nn.jvp, variables":
            tangents = {"params": jax.tree.map(jnp.zeros_like, params)} if "," in by else {}
            steps = jnp.eye(y.size).reshape(-1, *y.shape)
            slopes = [nn.jvp(run, inner, (y,), (step,), tangents)[1] for step in steps]
            return jnp.stack(slopes).reshape(y.shape)
        case "jax.jvp":
            steps = jnp.eye(y.size).reshape(-1, *y.shape)
            slopes = [jax.jvp(lambda y: run(inner, y), (y,), (step,))[1] for step in steps]
            return jnp.stack(slopes).reshape(y.shape)
        case "jax.jacfwd":
            return jax.jacfwd(lambda y: run(inner, y))(y)
        case "nn.grad":
            return nn.grad(run, inner, y)[0]
        case "jax.grad":
            return jax.grad(lambda y: run(inner, y))(y)
    by_hand = lambda y: y @ params["kernel"] + params["bias"][None]  # noqa: E731
    return jax.grad(lambda y: run(by_hand, y))(y)


WAYS = [
    "nn.vjp", "nn.vjp, variables", "nn.jvp", "nn.jvp, variables", "nn.grad",
    "jax.grad", "jax.jvp", "jax.jacfwd",
]  # fmt: skip


class Slopes(nn.Module):
    """A model that differentiates a layer of its own, as energies and flows do."""

    by: str

    @nn.compact
    def __call__(self, x):
        inner = Dense(1, name="inner")
        y = Dense(3, name="first")(x)
        return inner(y) if self.is_initializing() else slope_of(self.by, inner, y)


@pytest.mark.parametrize("by", WAYS)
def test_a_gradient_inside_the_model(by, x):
    x = x[:2]
    params = random_params(Slopes(by), x)
    layout, factors = captured(loss_of(Slopes(by)), params, x)
    first = factors_of(loss_of(Slopes("by hand")), params, x)["first"]
    assert_factors({"first": factors["first"]}, {"first": first})
    if "inner" not in factors:
        assert by.endswith("variables")
        assert {row.leaf.path for row in layout.uncovered} == {"inner/kernel", "inner/bias"}
        return

    # Zeros added to the inner layer's outputs move its slopes; each `jvp` calls it anew.
    y = Dense(3).apply({"params": params["first"]}, x)
    kernel, bias = params["inner"]["kernel"], params["inner"]["bias"][None]
    calls = y.size if "jvp" in by else 1

    def moved(zeros):
        slope = jax.grad(lambda y, zeros: jnp.sum(jnp.tanh(y @ kernel + bias + zeros)))
        slopes = [slope(y, zeros[i % calls]).ravel()[i] for i in range(y.size)]
        return scalar(jnp.stack(slopes).reshape(y.shape))

    g = jax.jit(jax.grad(moved))(jnp.zeros((calls, 2, 1)))
    np.testing.assert_allclose(factors["inner"].h[:, 0], jnp.mean(y**2, 0), 1e-9)
    np.testing.assert_allclose(factors["inner"].s[0], jnp.mean(g**2, (0, 1)), 1e-9)
    assert factors["inner"].rows == 2 * calls


@pytest.mark.parametrize("wrap", [jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd])
def test_a_gradient_inside_the_loss_that_computes_a_layer_again(derivative, wrap, x):
    """Of two computations of one output each has a share of its cotangent: that is refused."""
    model = Dense(3)
    params = random_params(model, x)

    def loss_with(wrap):
        def loss_fn(params, x):
            f = wrap(lambda x: jnp.sum(jnp.tanh(model.apply({"params": params}, x)) ** 2))
            return jnp.mean(derivative(f)(x) ** 2)

        return loss_fn

    layout, factors = captured(loss_with(wrap), params, x)
    if derivative is jax.grad:
        assert layout.covered == 0
        assert all("computed again" in row.reason for row in layout.uncovered)
    else:
        assert_factors(factors, captured(loss_with(lambda f: f), params, x)[1])


def owning(layer, name, shape):
    """A model that holds an array of its own beside the parameters of a layer in its scope."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = layer()
            nn.share_scope(self, inner)
            return inner(x) * jnp.sum(self.param(name, nn.initializers.ones, shape, F64))

    return Model()


OWNING = {
    "dense": (functools.partial(Dense, 3, use_bias=False), "bias", (3,)),
    "another length": (functools.partial(Dense, 3, use_bias=False), "bias", (5,)),
    "a scalar": (functools.partial(Dense, 3, use_bias=False), "bias", ()),
    "without a scale": (functools.partial(nn.LayerNorm, use_scale=False), "scale", (3,)),
    "RMSNorm": (nn.RMSNorm, "bias", (3,)),
}


@pytest.mark.parametrize(("layer", "name", "shape"), OWNING.values(), ids=OWNING)
def test_what_only_has_the_name_of_a_layers_parameter_is_not_the_layers(layer, name, shape, x):
    model = owning(layer, name, shape)
    params = model.init(jax.random.key(0), x)["params"]
    layout, _ = captured(loss_of(model), params, x)
    assert [row.leaf.path for row in layout.uncovered] == [name]


@pytest.mark.parametrize("frozen", [True, False], ids=["SAM", "MAML"])
def test_a_model_at_parameters_moved_by_its_own_gradient(frozen, x):
    """The use that carries the gradient is never dropped; one behind a stop adds no rows."""
    model = Dense(2)
    params = random_params(model, x)

    def loss_fn(params, x):
        gradient = jax.grad(loss_of(model))(params, x)
        if frozen:
            gradient = jax.lax.stop_gradient(gradient)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        return loss_of(model)(moved, 2 * x)

    layout, factors = captured(loss_fn, params, x)
    assert layout.covered == 1, str(layout)
    rows = [2 * x] if frozen else [x, 2 * x]
    np.testing.assert_allclose(factors[""].h[:, 0], jnp.mean(jnp.concatenate(rows) ** 2, 0), 1e-9)
    assert factors[""].rows == 4 * len(rows)
    if frozen:
        gradient = jax.grad(loss_of(model))(params, x)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        assert_factors(factors, factors_of(loss_of(model), moved, 2 * x))


def partitioned(init):
    return nn.with_partitioning(init, ("a", None))


class Boxed(nn.Module):
    """Parameters in boxes that name their axes, some stacked by a scan."""

    @nn.compact
    def __call__(self, x):
        layer = functools.partial(Dense, kernel_init=partitioned(nn.initializers.lecun_normal()))
        x = layer(3, name="first")(x)
        scan = nn.scan(
            lambda module, x, _: (jnp.tanh(module(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(layer(3, name="stack"), x, None)[0]


@pytest.mark.parametrize("boxed", [True, False])
def test_boxed_parameters(boxed, x):
    shapes = jax.eval_shape(Boxed().init, jax.random.key(0), x)["params"]
    params = random_like(shapes)
    plain = nn.unbox(params)

    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Dense(3, name="first")(x)
            for i in range(2):
                x = jnp.tanh(Dense(3, name=f"{i}")(x))
            return x

    rows = slices(plain["stack"])
    expected = factors_of(loss_of(Twin()), {"first": plain["first"], "0": rows[0], "1": rows[1]}, x)
    layout, factors = captured(loss_of(Boxed()), params if boxed else plain, x)
    assert layout.covered == 1, str(layout)
    stacks = {"first": expected["first"], "stack": stack([expected["0"], expected["1"]])}
    assert_factors(factors, stacks)


class Nosy(nn.Module):
    """Looks at its own variables in every way Flax offers."""

    look: Any

    @nn.compact
    def __call__(self, x):
        layer = Dense(3, name="layer")
        x = layer(x)
        self.sow("intermediates", "y", x)
        for tree in (
            self.variables,
            layer.variables,
            self.scope.root.variables(),
            self.get_variable("params", "layer"),
            self.scope.get_variable("params", "layer"),
            layer.get_variable("params", "kernel"),
            dict(self.scope.root.mutable_variables()),
        ):
            self.look(jax.tree.structure(tree))
        return x


def test_the_model_never_sees_a_probe(x):
    plain, watched = [], []
    params = random_params(Nosy(lambda _: None), x)

    def loss_fn(seen, params, x):
        y, updated = Nosy(seen.append).apply({"params": params}, x, mutable=True)
        seen.append(jax.tree.structure(updated))
        return scalar(y), updated

    jax.value_and_grad(functools.partial(loss_fn, plain), has_aux=True)(params, x)
    watched_loss = functools.partial(loss_fn, watched)
    layout = af.trace_layout(watched_loss, params, x)
    (_, aux), _, factors = af.value_and_grad(watched_loss, layout, has_aux=True)(params, x)
    assert factors.keys() == {"layer"}
    assert "adafisher" not in str(aux)
    assert len(watched) >= 2 * len(plain)
    assert watched == plain * (len(watched) // len(plain))


class Counting(nn.Module):
    """Keeps a mapping whose keys are no strings."""

    @nn.compact
    def __call__(self, x):
        seen = self.variable("state", "seen", lambda: {0: jnp.zeros(())})
        seen.value = {0: seen.value[0] + 1}
        return Dense(2)(x)


def test_variables_of_any_mapping(x):
    params = random_params(Counting(), x)

    def loss_fn(params, x):
        y, updated = Counting().apply({"params": params}, x, mutable="state")
        return scalar(y) + updated["state"]["seen"][0]

    layout, factors = captured(loss_fn, params, x)
    assert layout.covered == 1
    assert_factors(factors, factors_of(loss_fn, params, x))
