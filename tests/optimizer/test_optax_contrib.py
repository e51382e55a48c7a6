"""optax's own tests of its contributed optimizers, which it ships, run on AdaFisher."""

import functools
import importlib.util
import inspect
import itertools
import unittest

import jax.numpy as jnp
import optax
import pytest

import adafisher_jax as af
from adafisher_jax.paths import by_path

pytestmark = pytest.mark.slow

REASON = "this optax does not ship the tests of its contributed optimizers"
pytest.importorskip("absl.testing.parameterized", reason=REASON)
from absl.testing import parameterized  # noqa: E402

SUITE = importlib.util.find_spec("optax.contrib._common_test")
if SUITE is None:
    pytest.skip(REASON, allow_module_level=True)


# A layout and factors for any parameters: a vector is a norm's scale, the rest dense kernels.


def paths(tree):
    return by_path(tree)[0]


def layout_of(params):
    def layer(path, shape):
        axes = (*(f"in{i}" for i in range(len(shape) - 1)), "out0")
        return af.Layer(
            path, "dense" if shape[1:] else "norm", af.Leaf(path, shape, axes), bias=None
        )

    return af.Layout(tuple(layer(path, leaf.shape) for path, leaf in sorted(paths(params).items())))


def factors_of(layout, grads):
    """Row and column means of the squared gradient, which a Kronecker diagonal stands for."""

    def mean_like(square, like):
        if square.ndim == 1 and like.shape != square.shape:  # a norm's `h`: scale and shift
            return jnp.ones_like(like)
        out = [i for i, n in enumerate(like.shape) if n != square.shape[i]]
        return jnp.mean(square, out, keepdims=True).astype(like.dtype)

    found = {}
    for layer in layout.layers:
        zeros = layer.zeros()
        square = jnp.square(paths(grads)[layer.path].astype(zeros.h.dtype))
        h, s = mean_like(square, zeros.h), mean_like(square, zeros.s)
        found[layer.path] = af.Factor(h, s, jnp.ones_like(zeros.rows), jnp.zeros_like(zeros.mean))
    return found


def with_layout(make):
    """The same optimizer, with a layout of whatever parameters it meets, refreshed every step."""

    @functools.wraps(make)  # optax reads the signature
    def factory(*args, **options):
        def tx(params):
            return make(*args, **options | {"layout": layout_of(params)})

        def update(grads, state, params=None, **extra):
            factors = factors_of(layout_of(grads), grads)
            return tx(grads).update(grads, state, params, factors=factors, **extra)

        return optax.GradientTransformationExtraArgs(lambda params: tx(params).init(params), update)

    return factory


# optax's suite: its methods as they are, its lists of optimizers left out.


def load_suite():
    """The suite's module, and its test methods with the options each asks for."""
    cases = []

    def collect(*optimizers, **grid):
        def keep(method):
            for values in itertools.product(*grid.values()):
                options = dict(zip(grid, values, strict=True))
                cases.append(pytest.param(method, options, id=label(method.__name__, options)))
            return method

        return keep

    module = importlib.util.module_from_spec(SUITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameterized, "product", collect)
        SUITE.loader.exec_module(module)
    return module, cases


def label(name, options):
    return "-".join([name, *(str(getattr(v, "__name__", v)) for v in options.values())])


suite, CASES = load_suite()

MAKERS = {"adafisher": af.adafisher, "adafisherw": af.adafisherw}
FACTORIES = MAKERS | {f"{name} with layout": with_layout(make) for name, make in MAKERS.items()}
RATES = {"paper": 1e-3, "official": 1e-3, "centered": 1e-2}
# Their default damping, 1e-3, lets a step be 1000 times the gradient's: too far for Rosenbrock's.
DAMPING = {"paper": 0.1, "official": 0.1, "centered": None}

QUICK = {("adafisher", "centered"), ("adafisherw with layout", "paper")}
QUICK |= {("adafisher with layout", rule) for rule in RATES}
OPTIMIZERS = [
    pytest.param(
        name,
        {
            "learning_rate": RATES[rule],
            "layout": None,
            "rule": rule,
            "damping": DAMPING[rule],
        },
        None,
        None,
        id=f"{name}-{rule}",
        marks=[] if (name, rule) in QUICK else [pytest.mark.slow],
    )
    for name in FACTORIES
    for rule in RATES
]
OPTIMIZERS += [
    pytest.param(
        "adafisher with layout",
        options | {"layout": None, "rule": "centered"},
        wrapper,
        more,
        id=wrapper,
    )
    for wrapper, options, more in [
        ("mechanize", {"learning_rate": 1.0}, {"weight_decay": 0.0}),
        ("schedule_free", {"learning_rate": 1e-2, "b1": 0.0}, {"learning_rate": 1e-2}),
    ]
]


@pytest.mark.parametrize(("opt_name", "opt_kwargs", "wrapper_name", "wrapper_kwargs"), OPTIMIZERS)
@pytest.mark.parametrize(("method", "options"), CASES)
def test_as_optax_tests_its_own(
    monkeypatch, method, options, opt_name, opt_kwargs, wrapper_name, wrapper_kwargs
):
    monkeypatch.setattr(suite, "_get_opt_factory", FACTORIES.__getitem__)
    try:
        method(
            suite.ContribTest(),
            opt_name=opt_name,
            opt_kwargs=opt_kwargs,
            wrapper_name=wrapper_name,
            wrapper_kwargs=wrapper_kwargs,
            **options,
        )
    except unittest.SkipTest as reason:
        pytest.fail(f"optax skips this test for AdaFisher: {reason}")


def test_the_suite_is_all_there():
    names = {case.values[0].__name__ for case in CASES}
    methods = inspect.getmembers(suite.ContribTest, inspect.isfunction)
    assert names == {name for name, _ in methods if name.startswith("test_")}
    assert len(names) >= 7
