"""Trees of arrays compared leaf by leaf."""

import functools

import jax
import numpy as np


def close(found, wanted, rtol=1e-5, **options):
    """In double precision, which holds every type."""
    compare = functools.partial(np.testing.assert_allclose, rtol=rtol, **options)
    jax.tree.map(lambda a, b: compare(np.float64(a), np.float64(b)), found, wanted)


def equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
