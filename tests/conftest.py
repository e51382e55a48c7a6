"""A strict session: float64 where a test asks for it, no silent rank promotion."""

import os
import pathlib

import jax
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def x64():
    """Computes in double precision for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def golden():
    """The folder of recorded trajectories, where it lies beside the project."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the recorded trajectories (../shared/golden) are not beside this checkout")
    return folder
