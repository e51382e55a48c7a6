"""What a loss may do with its parameters: each way, its value, gradients and factors."""

import functools
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import adafisher_jax as af
from tests.support.losses import (
    CASES,
    ONE,
    RNG,
    TWO,
    UNJITTED,
    UNJITTED_CALLS,
    P,
    Q,
    R,
    X,
    Z,
    apply,
    assert_factors,
    dense_factors,
    freeze,
    half,
    identical,
    jitted,
    size,
    teacher,
)

pytestmark = pytest.mark.usefixtures("x64")


def watched(loss_fn, seen):
    """The loss, noting the structure and types of what it is given first."""

    @functools.wraps(loss_fn)
    def wrapped(params, *args, **kwargs):
        seen.append(jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), params))
        return loss_fn(params, *args, **kwargs)

    return wrapped


@pytest.mark.parametrize("name", CASES)
def test_value_gradients_and_factors(name):
    case = CASES[name]
    seen = []
    layout = af.trace_layout(watched(case.loss, seen), case.params, *case.args, **case.kwargs)
    grad_fn = af.value_and_grad(watched(case.loss, seen), layout, has_aux=case.has_aux)
    value, grads, factors = grad_fn(case.params, *case.args, **case.kwargs)

    plain = jax.value_and_grad(case.loss, has_aux=case.has_aux)
    identical((value, grads), plain(case.params, *case.args, **case.kwargs))
    types = jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), case.params)
    assert len(seen) >= 2
    assert all(one == types and type(one) is type(types) for one in seen)

    calls = UNJITTED_CALLS.get(name, case.calls)
    loss = UNJITTED.get(name, case.loss)
    expected = dense_factors(loss, calls, case.params, *case.args, **case.kwargs)
    assert_factors(factors, expected, case.precision)
    assert {layer.path for layer in layout.layers} == factors.keys()
    others = {path for path in factors if path not in expected}
    assert all(path.endswith("norm") for path in others)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(factors))


@pytest.mark.parametrize("name", ["batch statistics", "models of equal structure, cast", "jit"])
def test_jitted_is_eager(name):
    case = CASES[name]
    layout = af.trace_layout(case.loss, case.params, *case.args)
    grad_fn = af.value_and_grad(case.loss, layout, has_aux=case.has_aux)
    eager, compiled = (f(case.params, *case.args) for f in (grad_fn, jax.jit(grad_fn)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager[2], compiled[2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), eager[0], compiled[0])


def test_arguments_may_be_shapes():
    """Of the parameters too: a model may be laid out before it is made."""
    abstract = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype))
    keyword = CASES["keywords"]
    for case in (keyword, CASES["batch statistics"], CASES["dropout"]):
        layout = af.trace_layout(case.loss, case.params, *case.args, **case.kwargs)
        args = abstract(case.args)
        assert af.trace_layout(case.loss, abstract(case.params), *args, **case.kwargs) == layout
    with pytest.raises(TypeError, match="train"):
        af.trace_layout(keyword.loss, abstract(P), X)  # what the loss needs, it needs here too


def test_arguments_that_are_no_arrays_reach_the_loss_as_they_are():
    given = (True, "a string", None, 2.5, 3, len)

    def loss(params, x, *rest, **kwargs):
        assert rest == given
        assert kwargs == {"train": True}
        assert all(type(a) is type(b) for a, b in zip(rest, given, strict=True))
        return size(apply(params, x))

    layout = af.trace_layout(loss, P, X, *given, train=True)
    af.value_and_grad(loss, layout)(P, X, *given, train=True)


def test_a_cast_to_bfloat16_leaves_the_statistics_in_float32():
    """And accumulated there: four thousand ones do not add up in bfloat16."""
    with jax.enable_x64(False):
        single = jax.tree.map(jnp.float32, P)
        x = jnp.concatenate([jnp.ones((4096, 1)), jnp.asarray(RNG.normal(size=(4096, 2)))], 1)
        wide = lambda p, x: jnp.mean(jnp.square(apply(p, x)))  # noqa: E731
        layout = af.trace_layout(wide, single, x)
        cast = lambda p, x: wide(half(p), half(x)).astype(jnp.float32)  # noqa: E731
        assert af.trace_layout(cast, single, x) == layout
        _, _, exact = af.value_and_grad(wide, layout)(single, x)
        _, _, found = af.value_and_grad(cast, layout)(single, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    assert_factors(found, exact, 2e-2)
    assert (found[ONE].h[0, 0], found[ONE].mean[0, 0], found[ONE].rows) == (1, 1, 4096)


@pytest.mark.parametrize("frozen", [[ONE], [TWO], [ONE, TWO]])
def test_stop_gradient_on_some_layers(frozen):
    """Their gradients are zero; their factors are still what the layer sees."""

    def loss(params, x):
        held = {k: jax.lax.stop_gradient(v) if k in frozen else v for k, v in params.items()}
        return size(apply(held, x))

    layout = af.trace_layout(loss, P, X)
    value, grads, factors = af.value_and_grad(loss, layout)(P, X)
    identical((value, grads), jax.value_and_grad(loss)(P, X))
    expected = dense_factors(loss, [ONE, TWO], P, X)
    live = {path: factor for path, factor in expected.items() if path not in frozen}
    assert_factors(factors, live, 1e-12)
    for path in set(frozen) & factors.keys():  # captured as it is, or as having had no part
        if np.any(factors[path].rows):
            assert_factors(factors, {path: expected[path]}, 1e-12)
        else:
            assert not any(np.any(leaf) for leaf in factors[path])


def test_parameters_that_only_serve_a_teacher_are_uncovered():
    """A mean of frozen parameters and others: no gradient reaches them, and no factor is theirs."""

    def loss(params, x):
        return size(apply(params["b"], x) - apply(teacher(freeze(params["a"]), Q), x))

    layout = af.trace_layout(loss, {"a": P, "b": R}, X)
    assert {layer.path for layer in layout.layers} == {"b/one", "b/two"}
    assert {row.leaf.path.split("/")[0] for row in layout.uncovered} == {"a"}


def test_parameters_rebuilt_from_one_vector_are_uncovered():
    flat, unravel = ravel_pytree(P)
    loss = lambda flat, x: size(apply(unravel(flat), x))  # noqa: E731
    layout = af.trace_layout(loss, flat, X)
    assert (layout.layers, layout.covered) == ((), 0)
    assert layout.uncovered[0].reason
    value, grads, factors = af.value_and_grad(loss, layout)(flat, X)
    identical((value, grads), jax.value_and_grad(loss)(flat, X))
    assert factors == {}


def test_one_parameter_in_two_places_is_one_layer():
    """A head shared by reference: the same array under two names of one model."""

    def loss(params, x):
        model = nn.Sequential([nn.Dense(3), jnp.tanh, nn.Dense(3)])
        return size(model.apply({"params": {"layers_0": params, "layers_2": params}}, x))

    params = {"kernel": RNG.normal(size=(3, 3)), "bias": RNG.normal(size=3)}
    layout = af.trace_layout(loss, params, X)
    _, _, factors = af.value_and_grad(loss, layout)(params, X)
    assert_factors(factors, dense_factors(loss, ["", ""], params, X), 1e-12)


def test_a_compiled_apply_is_unharmed():
    """What was compiled before a capture, and what the capture compiled, do not meet."""
    case = CASES["jit"]
    before = jitted({"params": P}, X)
    layout = af.trace_layout(case.loss, P, X)
    af.value_and_grad(case.loss, layout)(P, X)
    identical(jitted({"params": P}, X), before)
    identical(
        jax.grad(case.loss)(P, X), jax.grad(lambda p, x: size(jitted({"params": p}, x)))(P, X)
    )
    jitted({"params": Q}, Z)  # a first compilation, after the capture


def test_a_layer_that_takes_no_part_has_zero_factors():
    """One layout of two models serves a loss that, today, calls one of them."""

    def loss(params, x, *, train_both):
        left = size(apply(params["a"], x))
        return left + size(apply(params["b"], x)) if train_both else left

    params = {"a": P, "b": Q}
    layout = af.trace_layout(loss, params, X, train_both=True)
    grad_fn = af.value_and_grad(loss, layout)
    value, grads, factors = grad_fn(params, X, train_both=False)
    identical((value, grads), jax.value_and_grad(loss)(params, X, train_both=False))
    assert_factors(
        factors, dense_factors(loss, ["a/one", "a/two"], params, X, train_both=False), 1e-12
    )
    absent = [factor for path, factor in factors.items() if path.startswith("b")]
    assert len(absent) == 2
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(absent))
    assert np.all(grad_fn(params, X, train_both=True)[2]["b/one"].rows == 6)


def test_a_loss_that_changes_is_followed():
    """It may close over settings: each eager call runs it afresh, as with `jax.grad`."""
    order = ["a", "b"]

    def loss(params, x):
        first, second = order
        return size(apply(params[second], apply(params[first], x) @ jnp.ones((2, 3))))

    params = {"a": P, "b": Q}
    grad_fn = af.value_and_grad(loss, af.trace_layout(loss, params, X))
    for _ in range(2):
        calls = [f"{model}/{layer}" for model in order for layer in (ONE, TWO)]
        assert_factors(grad_fn(params, X)[2], dense_factors(loss, calls, params, X), 1e-12)
        order.reverse()


def test_an_interceptor_of_ones_own_is_still_called():
    names = []

    def note(call, args, kwargs, context):
        names.append(context.module.name)
        return call(*args, **kwargs)

    case = CASES["params"]
    layout = af.trace_layout(case.loss, P, X)
    with nn.intercept_methods(note):
        _, _, factors = af.value_and_grad(case.loss, layout)(P, X)
    assert {ONE, TWO} <= set(names)
    assert_factors(factors, dense_factors(case.loss, [ONE, TWO], P, X), 1e-12)


@pytest.mark.parametrize(
    "name", ["models of equal structure, cast", "batch statistics", "microbatches"]
)
def test_nothing_leaks(name):
    case = CASES[name]
    with jax.checking_leaks():
        layout = af.trace_layout(case.loss, case.params, *case.args)
        grad_fn = af.value_and_grad(case.loss, layout, case.has_aux)
        jax.make_jaxpr(grad_fn)(case.params, *case.args)


def test_threads_do_not_disturb_each_other():
    """Two models traced and differentiated at once, again and again."""
    names = ("siamese", "models of equal structure, cast", "batch statistics")
    expected, found, barrier = {}, {}, threading.Barrier(len(names))

    def work(name):
        case = CASES[name]
        with jax.enable_x64(True):  # a thread has settings of its own
            layout = af.trace_layout(case.loss, case.params, *case.args)
            return layout, af.value_and_grad(case.loss, layout, case.has_aux)(
                case.params, *case.args
            )

    def thread(name):
        barrier.wait()
        found[name] = [work(name) for _ in range(3)]

    expected = {name: work(name) for name in names}
    threads = [threading.Thread(target=thread, args=(name,)) for name in names]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for name in names:
        assert len(found[name]) == 3
        for layout, values in found[name]:
            assert layout == expected[name][0]
            identical(values, expected[name][1])
