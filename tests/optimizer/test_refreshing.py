"""Whether a step has factors, decided within one compiled program."""

import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adafisher_jax as af
from adafisher_jax import statistics
from tests.capture.test_probes import PROGRAMS
from tests.support import nnx_reference
from tests.support.every_rule import every_rule
from tests.support.reference import Block, inputs_of, loss_of, random_params, scalar

pytestmark = pytest.mark.usefixtures("x64")


class Layers(nn.Module):
    """A layer of each kind, a stack of blocks, and one for each row."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda block, x, _: (jnp.tanh(block(x)), None),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=2,
        )
        vmap = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
        tokens = (x > 0).astype(int)
        x = nn.Embed(2, 3)(tokens) + nn.Conv(3, (2,), strides=1)(x[:, :, None])
        x = vmap(3)(nn.LayerNorm()(x))
        return nn.remat(nn.Dense)(2)(scan(Block(), x, None)[0])


def sometimes(loss_fn, layout, value_and_grad=af.value_and_grad, compiled=jax.jit):
    """A program of whether it is due, and of the loss's arguments."""
    return compiled(lambda due, *args: value_and_grad(loss_fn, layout, when=due)(*args))


LOSSES = {how: loss for how, (loss, _) in PROGRAMS.items() if "twice" not in how}
LONG = [how for how in LOSSES if how not in ("jit", "vjp", "shard_map", "pmap", "debugging")]


def check(loss_fn, params, x):
    layout = af.trace_layout(loss_fn, params, x)
    value, grads, factors = jax.jit(af.value_and_grad(loss_fn, layout))(params, x)
    program = sometimes(loss_fn, layout)
    for due in (True, False):
        *found, those = program(due, params, x)
        assert_same(tuple(found), (value, grads))
        assert_same(those, factors if due else jax.tree.map(jnp.zeros_like, factors))


def assert_same(found, wanted):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    jax.tree.map(close, found, wanted)


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.slow] * (how in LONG)) for how in LOSSES]
)
def test_through_a_program_around_a_model(how, x):
    params = random_params(Block(), x)
    check(lambda params, x: scalar(LOSSES[how](params, x)), params, x)


def test_through_layers_and_lifted_transforms(x):
    check(loss_of(Layers()), random_params(Layers(), x), x)


def test_of_an_nnx_model():
    model, x = nnx_reference.random_model(nnx_reference.Block), inputs_of((4, 3))
    layout = af.nnx.trace_layout(nnx_reference.loss_of, model, x)
    program = sometimes(nnx_reference.loss_of, layout, af.nnx.value_and_grad, nnx.jit)
    wanted = af.nnx.value_and_grad(nnx_reference.loss_of, layout)(model, x)
    assert_same(program(jnp.bool(True), model, x), wanted)
    *found, none = program(jnp.bool(False), model, x)
    assert_same(found, list(wanted[:2]))
    assert not any(leaf.any() for leaf in jax.tree.leaves(none))


def test_nothing_is_computed_where_it_is_not_due(x):
    """Statistics of inputs and of cotangents report that they are computed."""
    seen = []

    def reporting(name):
        original = getattr(statistics.Contraction, name)

        def method(self, array):
            def report(array):
                seen.append(name)
                return array

            return original(self, jax.pure_callback(report, jax.typeof(array), array))

        return mock.patch.object(statistics.Contraction, name, method)

    params, loss_fn = random_params(Block(), x), loss_of(Block())
    layout = af.trace_layout(loss_fn, params, x)
    with reporting("of_inputs"), reporting("of_cotangents"):
        program = sometimes(loss_fn, layout)
        program(False, params, x)
        jax.effects_barrier()
        assert not seen
        program(True, params, x)
        jax.effects_barrier()
    count = sum(layer.kind == "dense" for layer in layout.layers)
    assert sorted(seen) == ["of_cotangents"] * count + ["of_inputs"] * count


@pytest.mark.parametrize("when", [False, np.bool_(True), np.array(False)])
def test_what_is_known_when_tracing_leaves_no_branch(when, x):
    params, loss_fn = random_params(Layers(), x), loss_of(Layers())
    grad_fn = af.value_and_grad(loss_fn, af.trace_layout(loss_fn, params, x), when=when)
    assert "cond[" not in str(jax.make_jaxpr(grad_fn)(params, x))
    *_, factors = jax.jit(grad_fn)(params, x)
    assert all((factor.rows > 0).all() == when for factor in factors.values())


def test_it_may_differ_between_mapped_examples(x):
    params, loss_fn = random_params(Block(), x), loss_of(Block())
    program = sometimes(loss_fn, af.trace_layout(loss_fn, params, x))
    due = jnp.array([True, False, True])
    found = jax.vmap(program, in_axes=(0, None, None))(due, params, x)
    for i in range(3):
        assert_same(jax.tree.map(lambda a: a[i], found), program(due[i], params, x))


def test_micro_batches_share_it(x):
    params, loss_fn = random_params(Block(), x), loss_of(Block())
    layout = af.trace_layout(loss_fn, params, x)
    parts = x.reshape(2, 2, 3)

    @jax.jit
    def accumulated(due):
        grad_fn = af.value_and_grad(loss_fn, layout, when=due)
        return af.accumulate(grad_fn, layout)(params, parts)

    *found, factors = accumulated(True)
    *again, none = accumulated(False)
    assert_same(found, again)
    assert all(factor.rows == 4 for factor in factors.values())
    assert not any(leaf.any() for leaf in jax.tree.leaves(none))


@every_rule
def test_a_schedule_equals_leaving_factors_out(rule, x):
    params, loss_fn = random_params(Block(), x), loss_of(Block())
    layout = af.trace_layout(loss_fn, params, x)
    tx = af.adafisher(1e-3, layout, rule=rule)

    @jax.jit
    def scheduled(params, state, due):
        _, grads, factors = af.value_and_grad(loss_fn, layout, when=due)(params, x)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state

    @functools.partial(jax.jit, static_argnums=2)
    def chosen(params, state, due):
        _, grads, factors = af.value_and_grad(loss_fn, layout)(params, x)
        updates, state = tx.update(grads, state, params, factors=factors if due else None)
        return optax.apply_updates(params, updates), state

    one = two = params, tx.init(params)
    for due in [False, True, False, True, False]:
        one, two = scheduled(*one, due), chosen(*two, due)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), one, two)


@pytest.mark.parametrize("when", [1, 0.0, np.array([True]), "yes"])
@pytest.mark.parametrize("framework", [af, af.nnx])
def test_what_is_not_one_boolean_is_refused(framework, when):
    with pytest.raises(TypeError, match=r"when: got .*, wanted one Boolean"):
        framework.value_and_grad(jnp.sum, af.Layout(()), when=when)
