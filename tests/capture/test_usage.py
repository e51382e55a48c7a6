"""Every way to call and share a model, and JAX's own transformations around it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen.batch_apply import BatchApply

from tests.support.reference import (
    Dense,
    assert_factors,
    captured,
    factors_of,
    loss_of,
    random_like,
    random_params,
    same_as_plain,
    scalar,
)

pytestmark = pytest.mark.usefixtures("x64")


class Block(nn.Module):
    """Two layers, in and out of three features."""

    def setup(self):
        self.up, self.down = Dense(4), Dense(3)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return jnp.tanh(self.up(x))

    def decode(self, x):
        return self.down(x)


def apply(params, x, **options):
    return Block().apply({"params": params}, x, **options)


def bound(params):
    return Block().bind({"params": params})


def unbound(params, x):
    model, variables = bound(params).unbind()
    return model.apply(variables, x)


def in_the_carry(params, x):
    return jax.lax.scan(lambda p, row: (p, apply(p, row)), params, x)[1]


def in_one_branch(params, x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: apply(params, x), lambda x: x, x)


def nested_vmap(params, x):
    inner = jax.vmap(apply, (None, 0))
    return jax.vmap(inner, (None, 0))(params, x.reshape(2, 2, 3)).reshape(4, 3)


CALLS = {
    "bind": lambda p, x: bound(p)(x),
    "bind, methods": lambda p, x: bound(p).decode(bound(p).encode(x)),
    "unbind": unbound,
    "nn.apply": lambda p, x: nn.apply(lambda m, x: m.decode(m.encode(x)), Block())(
        {"params": p}, x
    ),
    "method": lambda p, x: apply(p, apply(p, x, method="encode"), method=Block.decode),
    "a function as method": lambda p, x: apply(p, x, method=lambda m, x: m(x)),
    "intermediates": lambda p, x: apply(
        p, x, capture_intermediates=True, mutable=["intermediates"]
    )[0],
    "jit": lambda p, x: jax.jit(Block().apply)({"params": p}, x),
    "checkpoint": jax.checkpoint(apply),
    "checkpoint, closed over": lambda p, x: jax.checkpoint(lambda x: apply(p, x))(x),
    "jit of checkpoint": lambda p, x: jax.jit(jax.checkpoint(apply))(p, x),
    "vmap, closed over": lambda p, x: jax.vmap(lambda x: apply(p, x))(x),
    "vmap, in_axes": lambda p, x: jax.vmap(apply, (None, 0))(p, x),
    "vmap of vmap": nested_vmap,
    "vmap, last axis": lambda p, x: jax.vmap(apply, (None, 1), 1)(p, x.T).T,
    "vmap of jit": lambda p, x: jax.vmap(jax.jit(apply), (None, 0))(p, x),
    "lax.map": lambda p, x: jax.lax.map(lambda x: apply(p, x), x),
    "lax.map in batches": lambda p, x: jax.lax.map(lambda x: apply(p, x), x, batch_size=2),
    "lax.scan": lambda p, x: jax.lax.scan(lambda _, x: (_, apply(p, x)), 0, x)[1],
    "lax.scan, in the carry": in_the_carry,
    "lax.cond": in_one_branch,
    "frozen dict": lambda p, x: apply(nn.FrozenDict(p), x),
}


@pytest.mark.parametrize("run", CALLS.values(), ids=CALLS)
def test_ways_to_call_a_model(run, x):
    params = random_params(Block(), x)
    same_as_plain(lambda p, x: scalar(run(p, x)), loss_of(Block()), params, x)


def test_a_call_that_a_vmap_does_not_map(x):
    """It runs once, and so has the rows of one call."""
    params = random_params(Block(), x)

    def mapped(params, x):
        return scalar(jax.vmap(lambda row: apply(params, x[:2]) + row[None])(x))

    def plain(params, x):
        return scalar(apply(params, x[:2])[None] + x[:, None])

    same_as_plain(mapped, plain, params, x)


@pytest.mark.parametrize("outer", [0, 1, 3])
def test_vmap_over_images(outer):
    """Any axis of a batch of images may be the mapped one."""
    model = nn.Conv(2, (3, 2), strides=2, feature_group_count=2, param_dtype=jnp.float64)
    images = random_like(jax.ShapeDtypeStruct((3, 4, 5, 2), jnp.float64))
    params = random_params(model, images)

    def mapped(params, images):
        turned = jnp.moveaxis(images, 0, outer)
        run = jax.vmap(lambda image: model.apply({"params": params}, image), outer, outer)
        return scalar(jnp.moveaxis(run(turned), outer, 0))

    same_as_plain(mapped, loss_of(model), params, images)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("loop", ["fori_loop", "scan", "python"])
def test_one_model_many_times(loop, jit, x):
    """All the rows of all the calls, also where the model was traced once."""
    params = random_params(Block(), x)
    run = jax.jit(apply) if jit else apply

    def loss_fn(p, x):
        if loop == "fori_loop":
            return scalar(jax.lax.fori_loop(0, 3, lambda _, x: run(p, x), x))
        if loop == "scan":
            return scalar(jax.lax.scan(lambda x, _: (run(p, x), None), x, length=3)[0])
        return scalar(run(p, run(p, run(p, x))))

    same_as_plain(loss_fn, lambda p, x: scalar(apply(p, apply(p, apply(p, x)))), params, x)


def test_a_model_jitted_and_compiled_before(x):
    params = random_params(Block(), x)
    compiled = jax.jit(apply)
    before = compiled(params, x)
    jax.grad(lambda params: scalar(compiled(params, x)))(params)
    same_as_plain(lambda p, x: scalar(compiled(p, x)), loss_of(Block()), params, x)
    # What was traced under the capture is not used outside it.
    np.testing.assert_array_equal(compiled(params, x), before)
    assert "adafisher" not in str(jax.make_jaxpr(compiled)(params, x))


class Chain(nn.Module):
    """The plain twin of calls of two models in turn."""

    order: str

    @nn.compact
    def __call__(self, x):
        blocks = {name: Block(name=name) for name in "ab"}
        return functools.reduce(lambda x, name: blocks[name](x), self.order, x)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
@pytest.mark.parametrize("order", ["aab", "aba", "baa"])
def test_a_function_traced_once_does_not_shift_later_calls(order, wrap, x):
    """Its second call makes no model anew; the calls after it still get their own probes."""
    params = random_params(Chain("ab"), x)
    compiled = wrap(lambda params, x: apply(params, x))

    def loss_fn(params, x):
        for name in order:
            x = compiled(params[name], x) if name == "a" else apply(params[name], x)
        return scalar(x)

    same_as_plain(loss_fn, loss_of(Chain(order)), params, x)


def test_a_loop_body_traced_twice_does_not_shift_later_calls(x):
    params = random_params(Chain("ab"), x)

    def loss_fn(params, x):
        carry = (x.astype(jnp.float64), 0)  # the body makes the weak integer strong: traced anew
        body = lambda c, _: ((apply(params["a"], c[0]), c[1] + np.int64(1)), None)  # noqa: E731
        (x, _), _ = jax.lax.scan(body, carry, length=2)
        return scalar(apply(params["b"], x))

    same_as_plain(loss_fn, loss_of(Chain("aab")), params, x)


def test_one_jitted_model_on_two_sets_of_parameters(x):
    """Traced once, it is completed with the probes of each."""
    params = random_params(Chain("ab"), x)
    compiled = jax.jit(apply)

    def loss_fn(params, x):
        return scalar(compiled(params["b"], compiled(params["a"], x)))

    same_as_plain(loss_fn, loss_of(Chain("ab")), params, x)


@jax.custom_vjp
def own_rule(params, x):
    return apply(params, x)


own_rule.defvjp(
    lambda params, x: (apply(params, x), (params, x)),
    lambda saved, g: jax.vjp(apply, *saved)[1](2 * g),
)


@jax.custom_jvp
def own_forward_rule(params, x):
    return apply(params, x)


@own_forward_rule.defjvp
def _(primals, tangents):
    y, slope = jax.jvp(apply, primals, tangents)
    return y, 2 * slope


@pytest.mark.parametrize("run", [own_rule, own_forward_rule])
@pytest.mark.parametrize("used_plainly_too", [False, True])
def test_a_model_in_a_function_with_its_own_derivative(run, used_plainly_too, x):
    one = random_params(Block(), x)
    params = {"a": one, "b": jax.tree.map(jnp.sin, one)}

    def loss_fn(params, x):
        y = run(params["a"], apply(params["b"], x))
        return scalar(apply(params["a"], y) if used_plainly_too else y)

    layout, factors = captured(loss_fn, params, x)
    assert factors.keys() == {"b/up", "b/down"}
    reasons = {row.leaf.path: row.reason for row in layout.uncovered}
    assert reasons.keys() == {
        f"a/{layer}/{name}" for layer in ("up", "down") for name in ("kernel", "bias")
    }
    assert all("derivative rule" in reason for reason in reasons.values())


def looped(params, x):
    return jax.lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, apply(params, c[1])), (0, x)
    )[1]


FROZEN = {
    "parameters": lambda p, x: apply(jax.lax.stop_gradient(p), x),
    "output": lambda p, x: jax.lax.stop_gradient(apply(p, x)),
    "parameters in a while loop": lambda p, x: looped(jax.lax.stop_gradient(p), x),
    "output of a while loop": lambda p, x: jax.lax.stop_gradient(looped(p, x)),
}


@pytest.mark.parametrize("run", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("live", [False, True])
def test_frozen_uses(run, live, x):
    """Uses behind `stop_gradient` add nothing to live ones, and cost no derivative."""
    one = random_params(Block(), x)
    params = {"a": one, "b": jax.tree.map(jnp.sin, one)}

    def loss_fn(params, x):
        y = run(params["a"], x)
        return scalar(apply(params["a"] if live else params["b"], y))

    _, factors = captured(loss_fn, params, x)
    name = "a" if live else "b"
    y = run(one, x)
    expected = factors_of(loss_of(Block()), params[name], y)
    assert_factors({path: factors[f"{name}/{path}"] for path in expected}, expected)


def check(model, x, **options):
    """A model that the reference can run must be covered and right."""
    params = random_params(model, x)
    layout, factors = captured(loss_of(model, **options), params, x)
    assert layout.covered == 1, str(layout)
    assert_factors(factors, factors_of(loss_of(model, **options), params, x))
    return factors


class Repeated(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = Block(name="block")
        return block(jnp.sin(block(x[:2])))


class Shares(nn.Module):
    """A parent that applies a layer someone else made."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return Dense(3)(self.layer(x))


class TwoParents(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = Dense(3, name="shared")
        return Shares(layer, name="b")(jnp.tanh(Shares(layer, name="a")(x)))


class Scoped(nn.Module):
    def setup(self):
        self.inner = Block()
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "model", [Repeated(), TwoParents(), Scoped()], ids=lambda m: type(m).__name__
)
def test_sharing(model, x):
    factors = check(model, x)
    if isinstance(model, Scoped):
        assert factors.keys() == {"up", "down"}


def test_batch_apply(x):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return BatchApply(Dense(2, name="layer"))(x[None])

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dense(2, name="layer")(x)[None]

    same_as_plain(loss_of(Model()), loss_of(Plain()), random_params(Plain(), x), x)
