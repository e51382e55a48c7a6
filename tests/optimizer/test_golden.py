"""Whole trajectories against the recorded ones, through the public API with Flax models."""

import jax
import numpy as np
import optax
import pytest

import adafisher_jax as af
from tests.support.golden_models import batch, load, make_loss, to_flax

CASES = ["mlp", "mlp_nobias", "seq_linear", "cnn", "cnn_bn", "ln_block"]


def run(archive, rule, refresh_every):
    """Trains as the archive says; yields the parameters after each step."""
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

    state = tx.init(params)
    for step in range(int(archive["config/num_steps"])):
        one = refresh if step % refresh_every == 0 else plain
        params, state, loss = one(params, state, *batch(archive, step))
        yield step, params, loss


@pytest.mark.parametrize("case", CASES)
def test_official_follows_the_released_optimizer(case, golden, x64):
    archive = load(golden, case)
    for step, params, loss in run(archive, "official", int(archive["config/TCov"])):
        expected = to_flax(archive, lambda name: archive[f"param/{step}/{name}"])
        np.testing.assert_allclose(loss, archive[f"loss/{step}"], rtol=1e-10)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), params, expected
        )


@pytest.mark.parametrize("case", CASES)
def test_paper_follows_equations_3_and_4(case, golden, x64):
    archive = load(golden, case)
    for step, params, _ in run(archive, "paper", 1):
        expected = to_flax(archive, lambda name: archive[f"paper_zeros/param/{name}"][step])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), params, expected
        )
