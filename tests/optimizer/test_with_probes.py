"""Loops that are not ours: they differentiate a loss and call `update(grads, state, params)`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import pytest
from jax.sharding import PartitionSpec

import adafisher_jax as af
from tests.support.every_rule import every_rule
from tests.support.trees import close

STEPS = 3


def loss_fn(params, x):
    hidden = jnp.tanh(x @ params["up"]["w"] + params["up"]["b"][None])
    return jnp.mean((hidden @ params["down"]["w"] - jnp.sum(jnp.sin(x), 1, keepdims=True)) ** 2)


@pytest.fixture
def problem(x64):
    keys = jax.random.split(jax.random.key(0), 3)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float64) / 2  # noqa: E731
    params = {
        "up": {"w": normal(keys[0], 3, 6), "b": jnp.zeros(6)},
        "down": {"w": normal(keys[1], 6, 1)},
    }
    x = normal(keys[2], 3, 3)  # few rows, of which "centered" takes note
    return params, x, af.trace_layout(loss_fn, params, x)


def optimizer(layout, *around, rule="centered"):
    return optax.chain(*around, af.adafisherw(3e-2, layout, rule=rule))


def by_hand(tx, layout, params, x):
    """Our own loop."""
    state, grad_fn = tx.init(params), jax.jit(af.value_and_grad(loss_fn, layout))
    for _ in range(STEPS):
        _, grads, factors = grad_fn(params, x)
        updates, state = tx.update(grads, state, params, factors=factors)
        params = optax.apply_updates(params, updates)
    return params


def any_loop(tx, loss, params, x, grad=jax.grad):
    """Knows nothing of factors, nor of what its parameters are."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params


def given_away(tx, layout, params, x, **settings):
    """What a loop of someone else's makes of the parameters; their probes must still be zeros."""
    found = any_loop(
        af.optimizer_with_probes(tx, layout),
        af.loss_with_probes(loss_fn, layout),
        af.add_probes(params, layout),
        x,
        **settings,
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((found.probes, found.unit)))
    return found.params


@every_rule
def test_any_loop_does_what_our_own_does(rule, problem):
    params, x, layout = problem
    tx = optimizer(layout, rule=rule)
    close(given_away(tx, layout, params, x), by_hand(tx, layout, params, x), 1e-7)


def test_a_clip_inside_the_optimizer_sees_no_probe(problem):
    params, x, layout = problem
    tx = optimizer(layout, optax.clip_by_global_norm(0.1))
    close(given_away(tx, layout, params, x), by_hand(tx, layout, params, x), 1e-7)


@pytest.mark.parametrize("scale", [1e-3, 2.0])
def test_a_loop_that_scales_all_gradients_leaves_the_factors_right(scale, problem):
    params, x, layout = problem
    tx = optimizer(layout)

    def scaled(loss):
        return lambda *args: jax.tree.map(lambda g: scale * g, jax.grad(loss)(*args))

    by_scale = optax.chain(optax.scale(scale), tx)  # "centered" does not see it, but for rounding
    close(
        given_away(tx, layout, params, x, grad=scaled), by_hand(by_scale, layout, params, x), 1e-6
    )


def test_a_loop_that_scales_the_loss_and_takes_it_back_counts_the_same_rows(problem):
    params, x, layout = problem

    def scaled(loss):
        return lambda *args: jax.tree.map(
            lambda g: g / 1024, jax.grad(lambda *args: 1024 * loss(*args)["loss"])(*args)
        )

    def as_metrics(params, x):
        return {"loss": loss_fn(params, x)}

    tx = optimizer(layout)
    got = any_loop(
        af.optimizer_with_probes(tx, layout),
        af.loss_with_probes(as_metrics, layout),
        af.add_probes(params, layout),
        x,
        grad=scaled,
    )
    close(got.params, by_hand(tx, layout, params, x), 1e-6)


def test_a_loop_that_averages_over_devices(problem):
    params, x, layout = problem
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = PartitionSpec(), PartitionSpec("d")

    def averaged(loss):
        return jax.shard_map(
            lambda *args: jax.lax.pmean(jax.grad(loss)(*args), "d"),
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(),
        )

    tx = optimizer(layout)
    close(given_away(tx, layout, params, x, grad=averaged), by_hand(tx, layout, params, x), 1e-7)


def test_a_loop_that_averages_over_micro_batches_averages_over_all_rows(problem):
    params, x, layout = problem
    loss, params = af.loss_with_probes(loss_fn, layout), af.add_probes(params, layout)
    parts = [jax.grad(loss)(params, part).probes["up"] for part in (x[:2], x[2:])]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *parts).from_sums()
    np.testing.assert_allclose(mean.h.ravel(), np.mean(x**2, 0), 1e-12)
    np.testing.assert_allclose(mean.mean.ravel(), np.mean(x, 0), 1e-12)


def test_the_minimiser_of_optimistix(problem):
    params, x, layout = problem
    tx = optimizer(layout)
    solver = optimistix.OptaxMinimiser(af.optimizer_with_probes(tx, layout), rtol=0, atol=0)
    found = optimistix.minimise(
        af.loss_with_probes(loss_fn, layout),
        solver,
        af.add_probes(params, layout),
        args=x,
        max_steps=STEPS,
        throw=False,
    )
    wanted = by_hand(tx, layout, params, x)
    assert loss_fn(found.value.params, x) < loss_fn(params, x)
    close(
        found.value.params, wanted, 0.2
    )  # it returns the best of its points, maybe the last but one


def test_what_has_no_probes_is_refused(problem):
    params, x, layout = problem
    tx, loss = (
        af.optimizer_with_probes(optimizer(layout), layout),
        af.loss_with_probes(loss_fn, layout),
    )
    for call in (lambda: tx.init(params), lambda: loss(params, x)):
        with pytest.raises(TypeError, match=r"params: got dict, wanted adafisher_jax.add_probes"):
            call()
    with pytest.raises(TypeError, match=r"updates: got dict, wanted"):
        tx.update(params, tx.init(af.add_probes(params, layout)))
    with pytest.raises(TypeError, match="layout: got NoneType"):
        af.add_probes(params, None)
    with pytest.raises(ValueError, match="another model"):
        af.add_probes({"up": {"w": jnp.ones((2, 6)), "b": jnp.zeros(6)}}, layout)
