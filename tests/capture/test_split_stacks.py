"""Layers stacked along one axis that the loss splits in two, as nested loops do to save memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import adafisher_jax as af

pytestmark = pytest.mark.usefixtures("numpy_rules")

RNG = np.random.default_rng(6)
X = RNG.normal(size=(5, 4))
PARAMS = {
    "w": RNG.normal(size=(6, 4, 4)),
    "b": RNG.normal(size=(6, 4)),
}


def layer(x, params):
    return jnp.tanh(x @ params["w"] + params["b"]), None


def in_turn(params, x):
    return lax.scan(layer, x, params)[0]


def parts(params, outer=2):
    return jax.tree.map(lambda p: p.reshape(outer, -1, *p.shape[1:]), params)


def apart(params, x):
    """Both halves of the layers see the inputs."""
    found = [in_turn(jax.tree.map(lambda p, i=i: p[i], parts(params)), x) for i in range(2)]
    return jnp.stack(found)


def loops(params, x):
    return lax.scan(lambda x, inner: (in_turn(inner, x), None), x, parts(params))[0]


def recomputed(params, x):
    def step(x, inner):
        return jax.checkpoint(in_turn)(inner, x), None

    return lax.scan(jax.checkpoint(step), x, parts(params, 3))[0]


def three_loops(params, x):
    def block(x, inner):
        return loops_of_one(inner, x), None

    def loops_of_one(inner, x):
        return lax.scan(lambda x, one: (in_turn(one, x), None), x, parts(inner, 3))[0]

    return lax.scan(block, x, parts(params))[0]


def mapped(params, x):
    return jax.vmap(in_turn, (0, None))(parts(params), x)


def mapped_inside(params, x):
    """The loop takes the inner part of the axis, `vmap` the outer."""
    xs = jnp.stack([x, x])
    inner_first = jax.tree.map(lambda p: jnp.moveaxis(p, 1, 0), parts(params))
    return lax.scan(lambda xs, ps: (jax.vmap(layer)(xs, ps)[0], None), xs, inner_first)[0]


CASES = {
    "a loop in a loop": (loops, in_turn),
    "with checkpoints": (recomputed, in_turn),
    "three loops": (three_loops, in_turn),
    "a loop in a map": (mapped, apart),
    "a map in a loop": (mapped_inside, apart),
}


def loss_of(run):
    return lambda params, x: jnp.sum(jnp.sin(run(params, x))) / 5


@pytest.mark.parametrize("case", CASES)
def test_split_stacks_have_the_factors_of_each_layer(case):
    run, plainly = CASES[case]
    loss_fn = loss_of(run)
    layout = af.trace_layout(loss_fn, PARAMS, X)
    (one,) = layout.layers
    assert one.axes == ("stack0", "in0", "out0")
    assert one.bias.axes == ("stack0", "out0")
    value, grads, factors = jax.jit(af.value_and_grad(loss_fn, layout))(PARAMS, X)
    wanted_value, wanted_grads = jax.value_and_grad(loss_of(plainly))(PARAMS, X)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10), grads, wanted_grads)

    def of_each(outputs):
        """The loss, with something added to the output of each product, and their inputs."""
        inputs = []

        def chain(x, layers):
            for i in layers:
                inputs.append(x)
                x = jnp.tanh(x @ PARAMS["w"][i] + PARAMS["b"][i] + outputs[i])
            return x

        found = chain(X, range(6)) if plainly is in_turn else None
        if found is None:
            found = jnp.stack([chain(X, range(3)), chain(X, range(3, 6))])
        return jnp.sum(jnp.sin(found)) / 5, jnp.stack(inputs)

    cotangents, inputs = jax.grad(of_each, has_aux=True)(jnp.zeros((6, 5, 4)))
    (factor,) = factors.values()
    np.testing.assert_allclose(factor.rows, np.full(6, 5))
    np.testing.assert_allclose(factor.h[:, :, 0], np.mean(inputs**2, 1), 1e-10)
    np.testing.assert_allclose(factor.mean[:, :, 0], np.mean(inputs, 1), 1e-10)
    np.testing.assert_allclose(factor.s[:, 0], np.mean(cotangents**2, 1), 1e-10)


def test_an_axis_of_which_a_loop_takes_a_part_of_the_outputs_is_not_covered():
    """Cross-entropy by chunks of the vocabulary."""

    def loss_fn(params, x):
        chunks = jnp.moveaxis(params["head"].reshape(4, 3, 2), 1, 0)
        total, _ = lax.scan(
            lambda most, w: (jnp.logaddexp(most, jax.nn.logsumexp(x @ w, -1)), None),
            jnp.full(5, -1e9),
            chunks,
        )
        return jnp.mean(total) + jnp.sum(x @ params["v"])

    params = {"head": RNG.normal(size=(4, 6)), "v": jnp.ones((4, 2))}
    layout = af.trace_layout(loss_fn, params, X)
    (row,) = layout.uncovered
    assert (row.leaf.path, row.reason) == (
        "head",
        "an axis of it is split between inputs, outputs and loops",
    )
