"""A strict session: float64 where a test asks for it, no silent rank promotion."""

import os
import pathlib

import jax
import jax.numpy as jnp
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


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
def x(x64):
    """Four rows of three inputs, in double precision."""
    return jnp.array([[0.3, -1.2, 0.7], [1.5, 0.2, -0.4], [0.1, 0.9, 2.0], [-0.6, 0.5, -1.1]])


@pytest.fixture
def golden():
    """The folder of recorded trajectories, where it lies beside the project."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the recorded trajectories (../shared/golden) are not beside this checkout")
    return folder
