"""Whole trajectories against the recorded ones, through the public API with Flax models."""

import jax
import numpy as np
import optax
import pytest

import adafisher_jax as af
from tests.support import golden
from tests.support.golden import CASES
from tests.support.golden_models import batch, make_loss, to_flax


def run(archive, rule, refresh_every):
    """Trains as the archive says: the losses before each step, the parameters after the last."""
    config = {k: archive[f"config/{k}"] for k in ("lr", "beta", "gamma", "Lambda", "weight_decay")}
    loss_fn = make_loss(archive)
    params = to_flax(archive, lambda name: archive[f"init/{name}"])
    layout = af.trace_layout(loss_fn, params, *batch(archive, 0))
    assert layout.covered == 1
    decoupled = bool(archive["config/decoupled_weight_decay"])
    tx = (af.adafisherw if decoupled else af.adafisher)(
        float(config["lr"]),
        layout,
        rule=rule,
        b1=float(config["beta"]),
        curvature_ema=float(config["gamma"]),
        damping=float(config["Lambda"]),
        weight_decay=float(config["weight_decay"]),
    )
    grad_fn = af.value_and_grad(loss_fn, layout)

    @jax.jit
    def refresh(params, state, x, y):
        loss, grads, factors = grad_fn(params, x, y)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def plain(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, factors=None)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for step in range(int(archive["config/num_steps"])):
        one = refresh if step % refresh_every == 0 else plain
        params, state, loss = one(params, state, *batch(archive, step))
        losses.append(loss)
    return losses, params


def close(a, b, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), a, b)


@pytest.mark.parametrize("case", CASES)
def test_official_follows_the_released_optimizer(case, x64):
    archive = golden.load(case)
    losses, params = run(archive, "official", int(archive["config/TCov"]))
    close(losses, [archive[f"loss/{step}"] for step in range(len(losses))], 1e-10)
    last = len(losses) - 1
    close(params, to_flax(archive, lambda name: archive[f"param/{last}/{name}"]), 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_paper_follows_equations_3_and_4(case, x64):
    archive = golden.load(case)
    losses, params = run(archive, "paper", 1)
    close(losses, list(archive["paper_zeros/loss"]), 1e-9)
    close(params, to_flax(archive, lambda name: archive[f"paper_zeros/param/{name}"][-1]), 1e-9)


@pytest.mark.skipif(not golden.WHOLE.is_dir(), reason="the whole trajectories are not here")
def test_what_is_stored_are_the_first_steps():
    for case, found in golden.stored().items():
        expected = golden.first_steps(golden.whole(case))
        assert found.keys() == expected.keys()
        jax.tree.map(np.testing.assert_array_equal, found, expected)
