"""A strict session: float64 where a test asks for it, no silent rank promotion."""

import os

import jax
import jax.numpy as jnp
import pytest

from tests.support.compiling import FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", FLAGS)


@pytest.fixture(autouse=True)
def no_rank_promotion():
    """For tests alone: examples in docs and docstrings are written as users write."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    """Computes in double precision for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def numpy_rules(x64):
    """Double precision, and the promotion that authors of models count on."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x(x64):
    """Four rows of three inputs, in double precision."""
    return jnp.array([[0.3, -1.2, 0.7], [1.5, 0.2, -0.4], [0.1, 0.9, 2.0], [-0.6, 0.5, -1.1]])


def share(text):
    """`I/N`, the Ith of N."""
    one, of = map(int, text.split("/"))
    if not 1 <= one <= of:
        raise ValueError(text)
    return one, of


def pytest_addoption(parser):
    parser.addoption("--slow-share", metavar="I/N", type=share, help="one of N parts of slow tests")


def pytest_collection_modifyitems(config, items):
    """Slow tests are dealt out in turn, so that those of one file, alike, go to all shares."""
    one, of = config.getoption("slow_share") or (1, 1)
    slow = [item for item in items if item.get_closest_marker("slow")]
    others = {*slow} - {*slow[one - 1 :: of]}
    config.hook.pytest_deselected(items=[item for item in slow if item in others])
    items[:] = [item for item in items if item not in others]
