"""What is public: the names, and the version, which is written once."""

import importlib.metadata
import pathlib
import re
import tomllib

import adafisher_jax as af

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_dir_shows_the_public_names_alone():
    assert dir(af) == sorted(af.__all__)
    assert all(hasattr(af, name) for name in af.__all__)
    assert not any(name.startswith("_") for name in dir(af))


def test_the_version_is_that_of_the_distribution():
    """It is built from the package's own, so an installed one has no other."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", af.__version__)
    assert importlib.metadata.version("adafisher-jax") == af.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert f"## [{af.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
