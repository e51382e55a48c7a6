"""Experts: one matrix for each group of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adafisher_jax as af
from tests.support.every_rule import every_rule

SIZES = [2, 0, 3]  # of eight rows, three are nobody's


def scores(y):
    return jnp.sum(jnp.sin(y) * jnp.arange(1.0, y.size + 1).reshape(y.shape))


def ragged(params, x, sizes, shift=0.0):
    return scores(jax.lax.ragged_dot(x, params["w"], sizes) + shift)


@pytest.fixture
def problem(x64):
    keys = jax.random.split(jax.random.key(0), 2)
    w = jax.random.normal(keys[0], (3, 2, 4), jnp.float64)
    return {"w": w}, jax.random.normal(keys[1], (8, 2), jnp.float64), jnp.array(SIZES)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_ragged_groups_have_factors_of_their_own_rows(wrap, problem):
    params, x, sizes = problem
    loss = wrap(ragged)
    layout = af.trace_layout(loss, params, x, sizes)
    (layer,) = layout.layers
    assert (layer.kind, layer.axes) == ("dense", ("stack0", "in0", "out0"))
    _, grads, factors = af.value_and_grad(loss, layout)(params, x, sizes)
    np.testing.assert_array_equal(grads["w"], jax.grad(ragged)(*problem)["w"])
    cotangents = jax.grad(ragged, 3)(*problem, jnp.zeros((8, 4)))
    found = factors[""]
    assert found.rows.tolist() == SIZES
    for group, (start, size) in enumerate(zip(np.cumsum([0, *SIZES[:-1]]), SIZES, strict=True)):
        rows = slice(start, start + size)
        for got, want in (
            (found.h[group, :, 0], np.sum(x[rows] ** 2, 0)),
            (found.mean[group, :, 0], np.sum(x[rows], 0)),
            (found.s[group, 0], np.sum(cotangents[rows] ** 2, 0)),
        ):
            np.testing.assert_allclose(got, want / max(size, 1), 1e-12)


def test_experts_of_one_contraction_are_blocks(x64):
    params = {"w": jax.random.normal(jax.random.key(0), (3, 2, 4), jnp.float64)}
    x = jax.random.normal(jax.random.key(1), (3, 5, 2), jnp.float64)

    def loss(params, x, shift=0.0):
        return scores(jnp.einsum("ecm,emh->ech", x, params["w"]) + shift)

    layout = af.trace_layout(loss, params, x)
    _, _, factors = af.value_and_grad(loss, layout)(params, x)
    cotangents = jax.grad(loss, 2)(params, x, jnp.zeros((3, 5, 4)))
    np.testing.assert_allclose(factors[""].h[..., 0], np.mean(x**2, 1), 1e-12)
    np.testing.assert_allclose(factors[""].s[:, 0], np.mean(cotangents**2, 1), 1e-12)


@every_rule
def test_an_expert_without_rows_keeps_its_averages(rule, problem):
    params, x, sizes = problem
    layout = af.trace_layout(ragged, params, x, sizes)
    tx, grad_fn = af.scale_by_adafisher(layout, rule=rule), af.value_and_grad(ragged, layout)
    _, grads, factors = grad_fn(params, x, sizes)
    _, state = tx.update(grads, tx.init(params), params, factors=factors)
    updates, state = tx.update(grads, state, params, factors=factors)
    assert np.all(np.isfinite(updates["w"]))
    assert np.any(np.asarray(updates["w"])[[0, 2]])


def test_groups_along_another_axis_are_listed(problem):
    params, x, sizes = problem
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))

    def loss(params, x, sizes):
        return scores(jax.lax.ragged_dot_general(x, params["w"].mT, sizes, numbers))

    (row,) = af.trace_layout(loss, params, x, sizes).uncovered
    assert "ragged groups" in row.reason


def test_experts_have_no_whole_factors(problem):
    layout = af.trace_layout(ragged, *problem)
    with pytest.raises(ValueError, match="Groups has no whole factors here: leave its layer out"):
        af.diagnostics.full_factors(ragged, layout)(*problem)
