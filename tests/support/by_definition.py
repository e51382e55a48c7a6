"""Factors of dense layers by their definition, from a twin in plain JAX that shows its products.

A twin is a function of `product`, which it calls with the path of a layer, its inputs and its
outputs, rows by features, and takes the outputs back. There zeros are added; the loss's gradient
with respect to them are the output cotangents.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np

import adafisher_jax as af
from tests.support.losses import assert_factors


def factors_by_definition(twin):
    """The factors of the layers that a twin's loss names, averaged over all their rows."""

    def run(zeros):
        left = iter(zeros)
        seen = []

        def product(path, x, y):
            seen.append((path, x, y))
            return y + next(left, 0.0)

        return twin(product), seen

    def found():
        _, seen = run([])
        cotangents, named = jax.grad(run, has_aux=True)([jnp.zeros_like(y) for *_, y in seen])
        return [(x, s) for (_, x, _), s in zip(named, cotangents, strict=True)]

    paths = [path for path, *_ in run([])[1]]
    rows = collections.defaultdict(list)
    for path, (x, s) in zip(paths, jax.jit(found)(), strict=True):
        rows[path].append([np.reshape(v, (-1, v.shape[-1])) for v in (x, s)])
    factors = {}
    for path, of in rows.items():
        x, s = (np.concatenate(parts) for parts in zip(*of, strict=True))
        factors[path] = af.Factor(np.mean(x**2, 0), np.mean(s**2, 0), len(x), np.mean(x, 0))
    return factors


def check_twin(loss_fn, params, twin, *data, uncovered=()):
    """Compares a loss's value, gradients and factors with those of its twin; returns the layout."""
    layout = af.trace_layout(loss_fn, params, *data)
    assert [row.leaf.path for row in layout.uncovered] == list(uncovered), str(layout)
    value, grads, factors = jax.jit(af.value_and_grad(loss_fn, layout))(params, *data)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(loss_fn))(params, *data)
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    np.testing.assert_allclose(value, twin(lambda path, x, y: y), rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), grads, wanted_grads
    )
    vectors = {
        path: af.Factor(*(np.ravel(part) for part in factor)) for path, factor in factors.items()
    }
    expected = factors_by_definition(twin)
    assert factors.keys() == expected.keys()
    assert_factors(vectors, expected, 1e-9)
    return layout
