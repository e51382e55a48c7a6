"""How often a convolution's kernel reads each input position, against counting every read."""

import random
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adafisher_jax as af
from adafisher_jax import statistics
from adafisher_jax.statistics import Convolution
from adafisher_jax.windows import Window


def windows(seed, many):
    """Random windows of every padding, stride, dilation and direction."""
    rng = random.Random(seed)
    while many:
        size, inputs = rng.randint(1, 6), rng.randint(2, 12)
        stride, dilation, spacing = (rng.choice([1, 1, 2, 3, 5]) for _ in range(3))
        margin = tuple(rng.choice([0, 0, 1, 3]) % inputs for _ in range(2))
        low, high = rng.randint(-2, 7), rng.randint(0, 7)
        length = (inputs + sum(margin) - 1) * spacing + 1 + low + high
        outputs = (length - (size - 1) * dilation - 1) // stride + 1
        if outputs > 0:
            many -= 1
            mode, flip = rng.choice(["constant", "wrap", "reflect"]), rng.random() < 0.5
            yield Window(size, inputs, outputs, stride, low, spacing, dilation, margin, mode, flip)


def count(window):
    """Literally: each output position reads one input position for each of the kernel's."""
    return np.stack([np.bincount(row[row >= 0], minlength=window.inputs) for row in window.reads()])


def test_counts_are_those_of_every_read():
    for i, window in enumerate(windows(0, 300)):
        expected, every = count(window), np.arange(window.inputs)
        np.testing.assert_array_equal(window.counts(every), expected, str(window))
        some = every[i % 3 :: 2]
        np.testing.assert_array_equal(window.counts(some), expected[:, some], str(window))
        inner = np.setdiff1d(every, window.edges())
        regular = window.regular()[:, inner % window.stride]
        np.testing.assert_array_equal(regular, expected[:, inner], str(window))


def test_sums_are_the_product_with_the_counts():
    for window in windows(1, 15):
        totals = np.random.default_rng(0).integers(0, 9, (2, window.inputs, 3))
        found = window.sums(jnp.asarray(totals, jnp.float32))
        expected = np.einsum("kp,bpc->bkc", count(window), totals)
        np.testing.assert_array_equal(found, expected, str(window))


def test_a_long_kernel_has_the_statistics_of_a_short_one(monkeypatch, x64):
    """The counts are a matrix where that is small; without one it is the same."""
    windows = (Window(3, 7, 7, low=1), Window(5, 12, 6, 2, low=1, margin=(2, 1), mode="wrap"))
    statistic = Convolution(windows, groups=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 12, 4)))
    expected = statistic.of_inputs(x)
    monkeypatch.setattr(statistics, "ENTRIES", 0)
    for found, one in zip(statistic.of_inputs(x), expected, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-12)


@pytest.mark.parametrize("stride", [1, 2048])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CAUSAL"])
def test_a_long_convolution_is_traced_in_the_memory_of_its_kernel_and_input(padding, stride):
    size, inputs = 2048, 16384
    model = nn.Conv(1, (size,), strides=stride, padding=padding)
    x = jax.ShapeDtypeStruct((1, inputs, 1), jnp.float32)
    params = {"kernel": jnp.ones((size, 1, 1)), "bias": jnp.ones(1)}

    def loss_fn(params, x):
        return jnp.sum(model.apply({"params": params}, x) ** 2)

    layout = af.trace_layout(loss_fn, params, x)
    tracemalloc.start()
    program = jax.make_jaxpr(af.value_and_grad(loss_fn, layout))(params, x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16e6
    assert sum(np.size(constant) for constant in program.consts) < 4 * (size + inputs)
    assert len(str(program).splitlines()) < 2000
