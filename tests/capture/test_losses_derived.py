"""Losses that differentiate the model themselves, and odd ones: exact, and covered or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adafisher_jax as af
from tests.support.losses import CASES, MODEL, ONE, TWO, P, Q, X, apply, freeze, size

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]
close = functools.partial(np.testing.assert_allclose, rtol=1e-10)


def per_example(derive):
    """Of the outputs' sum, for each example by itself; `zeros` are added to the layers' outputs."""

    def derivative(f, x, zeros):
        one = lambda x, zeros: f(x[None], jax.tree.map(lambda z: z[None], zeros)).sum()  # noqa: E731
        return jax.vmap(derive(one))(x, zeros)

    return derivative


DERIVATIVES = {
    "gradient penalty": per_example(jax.grad),
    "hessian": per_example(jax.hessian),
    "jvp": lambda f, x, z: jax.jvp(lambda x: f(x, z), (x,), (jnp.ones_like(x),))[1],
    "vjp": lambda f, x, z: jax.vjp(lambda x: f(x, z), x)[1](jnp.ones((6, 2)))[0],
    "linearize": lambda f, x, z: jax.linearize(lambda x: f(x, z), x)[1](jnp.ones_like(x)),
}


@pytest.mark.parametrize("how", DERIVATIVES)
def test_a_derivative_of_the_model_inside_the_loss(how):
    """Against the model written out, with a zero added to the output of each layer and call."""
    zeros = {ONE: jnp.zeros((6, 4)), TWO: jnp.zeros((6, 2))}

    def loss_of(f, x, zeros):
        once, again = zeros
        return size(f(x, once)) + jnp.mean(jnp.square(DERIVATIVES[how](f, x, again)))

    def loss(params, x):
        return loss_of(lambda x, _: apply(params, x), x, (zeros, zeros))

    def written_out(x, zeros):
        hidden = jnp.tanh(x @ P[ONE]["kernel"] + P[ONE]["bias"][None] + zeros[ONE])
        return hidden @ P[TWO]["kernel"] + P[TWO]["bias"][None] + zeros[TWO]

    layout = af.trace_layout(loss, P, X)
    value, grads, factors = jax.jit(af.value_and_grad(loss, layout))(P, X)
    expected = jax.jit(jax.value_and_grad(loss))(P, X)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), (value, grads), expected
    )
    cotangents = jax.jit(jax.grad(functools.partial(loss_of, written_out, X)))((zeros, zeros))
    inputs = {ONE: X, TWO: np.tanh(X @ P[ONE]["kernel"] + P[ONE]["bias"])}
    for path, x in inputs.items():
        found = factors[path]
        np.testing.assert_allclose(found.h[:, 0], np.mean(x**2, 0), rtol=1e-12)
        np.testing.assert_allclose(found.mean[:, 0], np.mean(x, 0), rtol=1e-12)
        squares = [np.sum(np.square(of[path]), 0) for of in cotangents]
        np.testing.assert_allclose(found.rows * found.s[0], sum(squares), rtol=1e-10)
        # A call whose output's value changes nothing (only its derivative does) has no rows.
        assert found.rows == sum(6 for square in squares if np.any(square))


def step(params, x, rate=0.1):
    """One step of gradient descent."""
    grads = jax.grad(lambda p: size(apply(p, x)))(params)
    return jax.tree.map(lambda p, g: p - rate * g, params, grads)


def steps(params, x):
    return jax.lax.scan(lambda p, _: (step(p, x), None), params, None, length=2)[0]


@jax.custom_vjp
def own_rule(params, x):
    return size(apply(params, x))


own_rule.defvjp(
    lambda p, x: (own_rule(p, x), p), lambda p, g: (jax.tree.map(lambda a: g * a, p), None)
)


def norm_of_gradient(p, x):
    grads = jax.grad(lambda p: size(apply(p, x)))(p)
    return sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))


def along(p, x):
    """A derivative along a direction in the parameters."""
    return jax.jvp(lambda p: size(apply(p, x)), (p,), (jax.tree.map(jnp.ones_like, p),))[1]


def one_row_held(p, x):
    one = p[ONE] | {"kernel": p[ONE]["kernel"].at[0].set(0.0)}
    return size(apply(p | {ONE: one}, x))


def low_rank(p, x):
    one = {"kernel": P[ONE]["kernel"] + p["a"] @ p["b"], "bias": P[ONE]["bias"]}
    return size(apply({ONE: one, TWO: p["head"]}, x))


FACTORS = {"a": np.ones((3, 1)), "b": np.ones((1, 4)), "head": P[TWO]}


def hidden(x, params=P):
    """What the second layer sees."""
    return np.tanh(x @ np.asarray(params[ONE]["kernel"]) + np.asarray(params[ONE]["bias"]))


SEEN = {ONE: X, TWO: hidden(X)}
FREE, RAISED = (
    dict(P) | {ONE: {"kernel": kernel, "bias": P[ONE]["bias"]}}
    for kernel in (P[ONE]["kernel"] * [[0], [1], [1]], P[ONE]["kernel"] + 1)
)


def stepped():
    """The inputs where a model is called on X, and again on 2X after a step."""
    with jax.enable_x64(True):
        after = step(P, X)
    return {ONE: np.concatenate([X, 2 * X]), TWO: np.concatenate([hidden(X), hidden(2 * X, after)])}


# How, the loss, its parameters, and what each of the covered layers sees.
ODD = {
    "a gradient step first": (lambda p, x: size(apply(step(p, x), 2 * x)), P, stepped()),
    "many gradient steps": (lambda p, x: size(apply(steps(p, x), x)), P, {}),
    "the gradient's norm": (norm_of_gradient, P, SEEN),
    "a directional derivative": (along, P, SEEN),
    "its own derivative rule": (own_rule, P, {}),
    "a random network": (
        lambda p, x: size(apply(p, x) - MODEL.init_with_output(jax.random.key(3), x)[0]),
        P,
        SEEN,
    ),
    "one row held": (one_row_held, P, {TWO: hidden(X, FREE)}),
    "a low-rank change": (low_rank, FACTORS, {"head": hidden(X, RAISED)}),
    "the mean of two models": (
        lambda p, x: size(apply(jax.tree.map(lambda a, b: (a + b) / 2, p["a"], p["b"]), x)),
        {"a": P, "b": Q},
        {},
    ),
    "a branch": (
        lambda p, x: jax.lax.cond(x[0, 0] < 9, lambda p: size(apply(p, x)), lambda p: 0.0, p),
        P,
        SEEN,
    ),
    "a loop without a gradient": (
        lambda p, x: (
            size(apply(p, x))
            + jax.lax.while_loop(lambda c: c < 3, lambda c: c + size(apply(freeze(p), x)), 0.0)
        ),
        P,
        SEEN,
    ),
}


@pytest.mark.parametrize("how", ODD)
def test_an_odd_loss_is_exact_and_its_layers_are_covered_or_listed(how):
    loss, params, covered = ODD[how]
    layout = af.trace_layout(loss, params, X)
    assert {layer.path for layer in layout.layers} == covered.keys()
    assert all(row.reason for row in layout.uncovered)
    value, grads, factors = jax.jit(af.value_and_grad(loss, layout))(params, X)
    jax.tree.map(close, (value, grads), jax.jit(jax.value_and_grad(loss))(params, X))
    for path, x in covered.items():
        close(factors[path].h[:, 0], np.mean(x**2, 0))
        close(factors[path].mean[:, 0], np.mean(x, 0))
        assert factors[path].rows % 6 == 0


def test_the_gradient_function_may_be_mapped_and_differentiated():
    """An ensemble by `vmap`, and a loss of the loss's gradients (meta-learning)."""
    loss = CASES["params"].loss
    grad_fn = af.value_and_grad(loss, af.trace_layout(loss, P, X))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), P, Q)
    mapped = jax.jit(jax.vmap(grad_fn, in_axes=(0, None)))(both, X)
    for i, params in enumerate((P, Q)):
        one = jax.tree.map(lambda a, i=i: a[i], mapped)
        jax.tree.map(close, one, jax.jit(grad_fn)(params, X))

    def outer(params, grad_fn):
        value, grads, *_ = grad_fn(params, X)
        return value + sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))

    plain, found = (
        jax.jit(jax.grad(functools.partial(outer, grad_fn=f)))(P)
        for f in (jax.value_and_grad(loss), grad_fn)
    )
    jax.tree.map(close, found, plain)
