"""Probes reach their layers through every program within a traced loss, and disturb nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import checkify, io_callback
from jax.sharding import NamedSharding, PartitionSpec

import adafisher_jax as af
from tests.support.reference import (
    Block,
    Dense,
    assert_factors,
    captured,
    factors_of,
    loss_of,
    random_params,
    scalar,
    twin_factors,
    under,
)

pytestmark = pytest.mark.usefixtures("x64")


def apply(params, x):
    return Block().apply({"params": params}, x)


def named(params, x):
    return checkpoint_name(apply(params, x), "kept")


def mesh():
    return jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def everywhere():
    return NamedSharding(mesh(), PartitionSpec())


def in_shards(params, x, **options):
    specs = (PartitionSpec(), PartitionSpec("d"))
    run = jax.shard_map(apply, mesh=mesh(), in_specs=specs, out_specs=specs[1], **options)
    return run(params, x)


def checkpoint(policy):
    return jax.checkpoint(named, policy=policy)


def by_vjp(params, x):
    """Its output taken from the forward pass of a derivative."""
    y, pull_back = jax.vjp(apply, params, x)
    return y + 0 * pull_back(lax.stop_gradient(y))[1]


def by_jvp(params, x):
    return jax.jvp(lambda x: apply(params, x), (x,), (x,))[0]


def by_linearize(params, x):
    return jax.linearize(lambda x: apply(params, x), x)[0]


def twice(params, x):
    return apply(params, apply(params, x))


def while_frozen(params, x):
    """A loop without a gradient first, then the live use."""
    frozen = lax.stop_gradient(params)
    _, y = lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, apply(frozen, c[1])), (0, lax.stop_gradient(x))
    )
    return apply(params, x + 0 * y)


def printing(params, x):
    jax.debug.print("{}", x.sum())
    y = apply(params, x)
    jax.debug.callback(lambda _: None, y)
    return y


def once(block, x):
    return block(x)


def again(block, x):
    return block(block(x))


POLICIES = jax.checkpoint_policies
# A program around one use of a model, and the same without.
PROGRAMS = {
    "jit": (jax.jit(apply), once),
    "jit, in_shardings": (jax.jit(apply, in_shardings=(None, None)), once),
    "jit, placed": (
        lambda p, x: jax.jit(apply, in_shardings=everywhere(), out_shardings=everywhere())(p, x),
        once,
    ),
    "jit, donated": (lambda p, x: jax.jit(apply, donate_argnums=1)(p, x + 0), once),
    "jit, static arguments": (
        lambda p, x: jax.jit(lambda f, p, x: f(p, x), static_argnums=0)(apply, p, x),
        once,
    ),
    "jit, unused arguments": (
        lambda p, x: jax.jit(lambda p, q, x: apply(p, x), keep_unused=True)(p, x, x),
        once,
    ),
    "jit, inlined": (jax.jit(apply, inline=True), once),
    "jit of jit": (jax.jit(lambda p, x: jax.jit(apply)(p, x)), once),
    "jit, closed over": (lambda p, x: jax.jit(lambda x: apply(p, x))(x), once),
    "jit, twice": (lambda p, x: jax.jit(apply)(p, jax.jit(apply)(p, x)), again),
    "jit of two uses": (jax.jit(twice), again),
    "checkpoint, everything saved": (checkpoint(POLICIES.everything_saveable), once),
    "checkpoint, nothing saved": (checkpoint(POLICIES.nothing_saveable), once),
    "checkpoint, dots saved": (checkpoint(POLICIES.dots_saveable), once),
    "checkpoint, names saved": (checkpoint(POLICIES.save_only_these_names("kept")), once),
    "checkpoint, static arguments": (
        lambda p, x: jax.checkpoint(lambda f, p, x: f(p, x), static_argnums=0)(apply, p, x),
        once,
    ),
    "checkpoint, some inputs recomputed": (
        jax.checkpoint(apply, prevent_cse=(True, False)),
        once,
    ),
    "checkpoint of checkpoint": (jax.checkpoint(jax.checkpoint(apply)), once),
    "checkpoint of jit of checkpoint": (jax.checkpoint(jax.jit(jax.checkpoint(apply))), once),
    "named_call": (jax.named_call(apply, name="model"), once),
    "named_scope": (jax.named_scope("model")(apply), once),
    "vjp": (by_vjp, once),
    "jvp": (by_jvp, once),
    "linearize": (by_linearize, once),
    "closure_convert": (lambda p, x: jax.closure_convert(apply, p, x)[0](p, x), once),
    "shard_map": (in_shards, once),
    "shard_map, unchecked": (functools.partial(in_shards, check_vma=False), once),
    "jit of shard_map of checkpoint": (
        lambda p, x: jax.jit(
            jax.shard_map(
                jax.checkpoint(apply),
                mesh=mesh(),
                in_specs=(PartitionSpec(), PartitionSpec("d")),
                out_specs=PartitionSpec("d"),
            )
        )(p, x),
        once,
    ),
    "pmap": (lambda p, x: jax.pmap(apply, in_axes=(None, 0))(p, x[None])[0], once),
    "a while loop, frozen, beside it": (while_frozen, once),
    "debugging": (printing, once),
}


@pytest.mark.parametrize("how", PROGRAMS)
def test_a_program_around_a_model(how, x):
    run, plain = PROGRAMS[how]
    params = random_params(Block(), x)
    layout, factors = captured(lambda p, x: scalar(run(p, x)), params, x, exact=False)
    assert layout.covered == 1, str(layout)

    (expected,) = twin_factors(lambda blocks, x: plain(blocks[0], x), [params], x)
    assert_factors(factors, expected)


def branches(index, params, x):
    """Each branch with a layer of its own, the last one with two."""
    a, b, c = (functools.partial(apply, params[name]) for name in "abc")
    return lax.switch(index, [a, b, lambda x: a(c(x))], x)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
@pytest.mark.parametrize(("index", "ran"), [(0, "a"), (1, "b"), (2, "ca")])
def test_branches_with_different_layers(index, ran, wrap, x):
    """Only those of the branch that ran have rows."""
    one = random_params(Block(), x)
    params = {name: jax.tree.map(lambda a, i=i: a + i, one) for i, name in enumerate("abc")}
    loss_fn = lambda p, x, i: scalar(wrap(branches)(i, p, x))  # noqa: E731
    layout, factors = captured(loss_fn, params, x, index := jnp.asarray(index), exact=False)
    assert layout.covered == 1, str(layout)

    def plain(blocks, x):
        for name in ran:
            x = blocks["abc".index(name)](x)
        return x

    for name, expected in zip("abc", twin_factors(plain, list(params.values()), x), strict=True):
        found = {path: factors[f"{name}/{path}"] for path in ("up", "down")}
        if name in ran:
            assert_factors(found, expected)
        else:
            assert not any(np.any(part) for part in jax.tree.leaves(found))


def test_one_layer_in_all_branches(x):
    params = random_params(Block(), x)

    def loss_fn(params, x):
        y = lax.cond(x[0, 0] > 9, apply, lambda p, x: apply(p, 2 * x), params, x)
        return scalar(y)

    _, factors = captured(loss_fn, params, x)
    assert_factors(factors, factors_of(loss_of(Block()), params, 2 * x))


def test_one_compiled_function_on_several_parameters(x):
    """Also in a loop, where the function gets slices of some and another whole."""
    one = random_params(Block(), x)
    params = {
        "stack": jax.tree.map(lambda a: jnp.stack([a, jnp.cos(a)]), one),
        "whole": jax.tree.map(jnp.sin, one),
    }
    compiled = jax.jit(apply)

    def loss_fn(params, x):
        step = lambda x, p: (compiled(params["whole"], compiled(p, x)), None)  # noqa: E731
        return scalar(compiled(params["whole"], lax.scan(step, x, params["stack"])[0]))

    def plain(blocks, x):
        for block in (0, 2, 1, 2, 2):
            x = blocks[block](x)
        return x

    layout, factors = captured(loss_fn, params, x, exact=False)
    assert layout.covered == 1
    parts = [jax.tree.map(lambda a, i=i: a[i], params["stack"]) for i in range(2)]
    *members, whole = twin_factors(plain, [*parts, params["whole"]], x)
    expected = {
        path: af.Factor(*map(np.stack, zip(*(member[path] for member in members), strict=True)))
        for path in whole
    }
    assert_factors(factors, under("stack", expected) | under("whole", whole))


def noisy(seen):
    """A loss with effects before, between and after its layers, some in a loop."""

    def loss_fn(params, x):
        note = lambda what: lambda value: seen.append((what, float(value)))  # noqa: E731
        io_callback(note("in"), None, x.sum(), ordered=True)

        def step(x, _):
            y = jax.checkpoint(apply)(params, x)
            jax.debug.callback(note("step"), lax.stop_gradient(y.sum()), ordered=True)
            return y, None

        y = lax.scan(step, x, length=2)[0]
        io_callback(note("out"), None, lax.stop_gradient(y.sum()), ordered=True)
        return scalar(y)

    return loss_fn


def test_effects_are_kept_in_their_order(x):
    params, seen, plain = random_params(Block(), x), [], []
    layout = af.trace_layout(noisy(seen), params, x)
    assert not seen  # nothing has run
    jax.block_until_ready(jax.jit(af.value_and_grad(noisy(seen), layout))(params, x))
    jax.block_until_ready(jax.jit(jax.value_and_grad(noisy(plain)))(params, x))
    jax.effects_barrier()
    names = [name for name, _ in plain]
    assert {"in", "step", "out"} == set(names)
    assert [name for name, _ in seen] == names
    np.testing.assert_allclose([v for _, v in seen], [v for _, v in plain], 1e-12)


def test_a_checked_model(x):
    """`checkify` in the loss traces the model's program anew."""

    def loss_fn(params, x):
        error, y = checkify.checkify(apply)(params, x)
        return scalar(y), error

    params = random_params(Block(), x)
    layout = af.trace_layout(loss_fn, params, x)
    (_, error), _, factors = af.value_and_grad(loss_fn, layout, has_aux=True)(params, x)
    assert error.get() is None
    assert_factors(factors, factors_of(loss_of(Block()), params, x))


LONG = ["checkpoint, dots saved", "shard_map", "vjp"]


@pytest.mark.parametrize("how", ["jit", *(pytest.param(x, marks=pytest.mark.slow) for x in LONG)])
def test_a_loss_is_traced_once_and_leaks_nothing(how, x):
    params, calls = random_params(Block(), x), []

    def loss_fn(params, x):
        calls.append(how)
        return scalar(PROGRAMS[how][0](params, x))

    with jax.checking_leaks():
        layout = af.trace_layout(loss_fn, params, x)
        assert len(calls) == 1
        grad_fn = af.value_and_grad(loss_fn, layout)
        jax.block_until_ready(grad_fn(params, x))
        assert len(calls) == 2
        compiled = jax.jit(grad_fn)
        for _ in range(2):
            jax.block_until_ready(compiled(params, x))
    assert len(calls) == 3


def test_a_threaded_program_is_well_typed(x):
    """Every equation, with its probes, passes JAX's own checks."""
    params = random_params(Block(), x)
    run = jax.jit(lambda p, x: lax.scan(lambda x, _: (in_shards(p, x), None), x, length=2)[0])
    loss_fn = lambda p, x: scalar(jax.checkpoint(run)(p, x))  # noqa: E731
    with jax.enable_checks(True):
        layout = af.trace_layout(loss_fn, params, x)
        jax.make_jaxpr(af.value_and_grad(loss_fn, layout))(params, x)


def test_unused_factors_cost_nothing(x):
    """A program that drops them is the plain gradient's; one that does not has no mark left."""
    params = random_params(Block(), x)
    loss_fn = lambda p, x: scalar(jax.checkpoint(named)(p, x)) + scalar(apply(p, x))  # noqa: E731
    grad_fn = af.value_and_grad(loss_fn, af.trace_layout(loss_fn, params, x))
    lowered = jax.jit(grad_fn).lower(params, x)
    assert "adafisher" not in lowered.as_text()
    costs = [
        jax.jit(f).lower(params, x).compile().cost_analysis()
        for f in (lambda p, x: grad_fn(p, x)[:2], jax.value_and_grad(loss_fn))
    ]
    assert costs[0]["flops"] == costs[1]["flops"]
    assert lowered.compile().cost_analysis()["flops"] > costs[1]["flops"]


def test_layers_outside_the_layout_cost_nothing(x):
    """Their marks stay, and are nothing but identities."""
    params = {"a": random_params(Dense(3), x), "b": random_params(Dense(2), x)}
    dense = lambda n, p, x: Dense(n).apply({"params": p}, x)  # noqa: E731
    loss_fn = lambda p, x: scalar(dense(2, p["b"], dense(3, p["a"], x)))  # noqa: E731
    grad_fn = af.value_and_grad(loss_fn, af.trace_layout(loss_fn, params, x).only(()))
    value, grads, factors = grad_fn(params, x)
    assert factors == {}
    jax.tree.map(
        np.testing.assert_array_equal, (value, grads), jax.value_and_grad(loss_fn)(params, x)
    )
    costs = [
        jax.jit(f).lower(params, x).compile().cost_analysis()["flops"]
        for f in (grad_fn, jax.value_and_grad(loss_fn))
    ]
    assert costs[0] == costs[1]
