"""NNX models and Flax's classes are left as they were; what cannot be captured is refused."""

import contextlib
import functools
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import adafisher_jax as af
from tests.support.nnx_reference import (
    METHODS,
    Block,
    captured,
    check,
    loss_of,
    random_model,
)
from tests.support.reference import F64, inputs_of, scalar

pytestmark = pytest.mark.usefixtures("x64")

X = (4, 3)


class Other(nnx.Module):
    """A model with other paths than `Block`'s, and one layer under two names."""

    def __init__(self, rngs):
        self.one = nnx.Linear(3, 3, param_dtype=F64, rngs=rngs)
        self.same = nnx.List([self.one])

    def __call__(self, x):
        return self.same[0](self.one(x))


def methods():
    """The methods that are exchanged while a loss is watched, and one that is not."""
    watched = [*METHODS, (nnx.LoRA, "__call__"), (nnx.MultiHeadAttention, "__call__")]
    return [vars(layer)[name] for layer, name in watched]


@contextlib.contextmanager
def left_as_it_was(model):
    """Every module, attribute, variable and array is the same object as before."""
    nodes = [node for _, node in nnx.iter_graph(model)]
    modules = [(m, type(m), dict(vars(m))) for m in nodes if isinstance(m, nnx.Module)]
    arrays = [(v, v.get_value()) for v in jax.tree.leaves(nnx.state(model), is_leaf=is_variable)]
    before = methods()
    yield
    assert all(a is b for a, b in zip(methods(), before, strict=True))
    for module, kind, attributes in modules:
        assert type(module) is kind
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
    for variable, array in arrays:
        assert variable.get_value() is array


def is_variable(x):
    return isinstance(x, nnx.Variable)


def test_a_model_is_left_as_it_was():
    """Tracing changes nothing; a step changes only what the loss changes."""
    model, x = random_model(Other), inputs_of(X)
    with left_as_it_was(model):
        layout = af.nnx.trace_layout(loss_of, model, x)
    graphdef = nnx.graphdef(model)
    af.nnx.value_and_grad(loss_of, layout)(model, x)
    assert nnx.graphdef(model) == graphdef
    dropping = random_model(lambda rngs: Block(rngs, dropout=0.5))
    with left_as_it_was(dropping):
        af.nnx.trace_layout(loss_of, dropping, x)


@pytest.mark.parametrize("of", ["trace_layout", "value_and_grad", "a traced step"])
def test_an_exception_leaves_everything_as_it_was(of):
    def loss_fn(model, x):
        model.up(x)
        model.seen = nnx.Intermediate(x)
        raise KeyError("on purpose")

    model, x = random_model(Block), inputs_of(X)
    layout = af.nnx.trace_layout(loss_of, model, x)
    grad_fn = af.nnx.value_and_grad(loss_fn, layout)
    run = {
        "trace_layout": lambda: af.nnx.trace_layout(loss_fn, model, x),
        "value_and_grad": lambda: grad_fn(model, x),
        "a traced step": lambda: nnx.jit(grad_fn)(model, x),
    }[of]
    with left_as_it_was(model), pytest.raises(KeyError, match="on purpose"):
        run()
    check(loss_of, model, x)


def test_a_method_that_the_user_exchanged_stays():
    original, model, x = nnx.Linear.__call__, random_model(Block), inputs_of(X)

    def doubled(layer, x):
        return 2 * original(layer, x)

    with mock.patch.object(nnx.Linear, "__call__", doubled):
        captured(loss_of, model, x)
        assert nnx.Linear.__call__ is doubled


def test_while_one_thread_watches_another_does_not():
    model, x = random_model(Block), inputs_of(X)
    graphdef, state = nnx.split(model)
    inside, finish = threading.Event(), threading.Event()
    before = methods()

    def loss_fn(model, x):
        inside.set()
        assert finish.wait(60)
        return loss_of(model, x)

    def apply(state, x):
        return loss_of(nnx.merge(graphdef, state), x)

    other_model, found = random_model(Other), []

    def watch():
        with jax.enable_x64(True):
            found.append(af.nnx.trace_layout(loss_fn, other_model, x))

    other = threading.Thread(target=watch)
    other.start()
    try:
        assert inside.wait(60)
        assert "adafisher" not in str(jax.make_jaxpr(apply)(state, x))
        layout, _ = check(loss_of, model, x)
    finally:
        finish.set()
        other.join()
    assert [layer.path for layer in layout.layers] == ["down", "up"]
    assert [layer.path for layer in found[0].layers] == ["one"]
    assert all(a is b for a, b in zip(methods(), before, strict=True))


# What is refused.


class Integer(Block):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.count = nnx.Param(jnp.zeros(2, int))


class TwoKinds(nnx.Module):
    """An embedding and a dense layer with one array."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(3, 3, param_dtype=F64, rngs=rngs)
        self.linear = nnx.Linear(3, 3, param_dtype=F64, rngs=rngs)
        self.linear.kernel = self.embed.embedding

    def __call__(self, x):
        return self.linear(self.embed(jnp.argmax(x, -1)))


def another_layout():
    return af.nnx.trace_layout(loss_of, random_model(Other), inputs_of(X))


def wider():
    model = random_model(Block)
    model.up = random_model(lambda rngs: nnx.Linear(3, 5, param_dtype=F64, rngs=rngs))
    return af.nnx.trace_layout(lambda m, x: scalar(m.up(x)), model, inputs_of(X))


def step_with(layout, loss_fn=loss_of):
    return af.nnx.value_and_grad(loss_fn, layout)(random_model(Block), inputs_of(X))


REFUSED = {
    "no module": (
        lambda: af.nnx.trace_layout(loss_of, {"a": random_model(Block)}, inputs_of(X)),
        (TypeError, "model: got dict, wanted an nnx.Module"),
    ),
    "a state": (
        lambda: af.nnx.value_and_grad(loss_of, another_layout())(nnx.state(random_model(Block))),
        (TypeError, "model: got State, wanted an nnx.Module"),
    ),
    "no layout": (lambda: step_with({}), (TypeError, "layout: got dict, wanted a Layout")),
    "another model's layout": (
        lambda: step_with(another_layout()),
        (ValueError, "does not know the parameters 'down/bias'.*it has 'one/bias'"),
    ),
    "a wider model's layout": (lambda: step_with(wider()), (ValueError, "up/")),
    "an integer": (
        lambda: af.nnx.trace_layout(loss_of, Integer(nnx.Rngs(0)), inputs_of(X)),
        (TypeError, "'count' is of type int64"),
    ),
    "no layer": (
        lambda: af.nnx.trace_layout(lambda m, x: jnp.sum(x), random_model(Block), inputs_of(X)),
        (ValueError, "met no layer"),
    ),
    "two kinds": (
        lambda: af.nnx.trace_layout(loss_of, random_model(TwoKinds), inputs_of(X)),
        (ValueError, "different kinds"),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    run, (error, message) = REFUSED[what]
    with pytest.raises(error, match=message):
        run()


# A variable that is differentiated, and is another argument too.


TWICE = {  # further arguments, and what is found there
    "the model": (lambda model: ((model,), {}), "'down/bias' is 'args/0/down/bias'"),
    "a layer": (lambda model: ((), {"other": [model.up]}), "'up/bias' is 'kwargs/other/0/bias'"),
    "a parameter": (lambda model: ((model.up.kernel,), {}), "'up/kernel' is 'args/0'"),
    "random numbers": (
        lambda model: ((model.dropout.rngs,), {}), "'dropout/rngs/count' is 'args/0/count'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TWICE)
def test_what_is_given_twice_is_refused_as_flax_does(what):
    make, message = TWICE[what]
    model, x = random_model(lambda rngs: Block(rngs, dropout=0.5)), inputs_of(X)
    args, kwargs = make(model)

    def loss_fn(model, one=None, other=None):
        return loss_of(model, x)

    layout = af.nnx.trace_layout(loss_of, model, x)
    with pytest.raises(ValueError, match="Inconsistent aliasing"):
        nnx.value_and_grad(loss_fn)(model, *args, **kwargs)
    grad_fn = af.nnx.value_and_grad(loss_fn, layout)
    trace = functools.partial(af.nnx.trace_layout, loss_fn)
    for run in (grad_fn, trace, af.nnx.accumulate(grad_fn, layout)):
        with pytest.raises(ValueError, match=f"inconsistent aliasing: .*{message}.*nnx.clone"):
            run(model, *args, **kwargs)


def test_other_arguments_may_share():
    model, teacher, x = random_model(Block), random_model(Other), inputs_of(X)

    def loss_fn(model, one, two):
        return scalar(model(x) - one(x) * two(x))

    captured(loss_fn, model, teacher, teacher)
