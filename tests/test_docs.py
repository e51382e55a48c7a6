"""The documentation's tables name every Flax layer, and say of each what the code does."""

import inspect
import pathlib
import re

import flax.linen as nn
import pytest

from adafisher_jax.linen_layers import READERS

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "layers.md"


def table():
    """Layer name → what the page says of it, from the first table."""
    section = PAGE.read_text().split("## Flax Linen layers")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {name: kind.strip() for names, kind in rows for name in re.findall(r"`([\w.]+)`", names)}


def linen_modules():
    """Every module class that `flax.linen` exports."""
    return [c for c in vars(nn).values() if inspect.isclass(c) and issubclass(c, nn.Module)]


@pytest.mark.parametrize("module", linen_modules(), ids=lambda m: m.__name__)
def test_every_layer_has_a_row_that_is_true(module):
    says = table()[module.__name__]
    method = inspect.unwrap(module.__dict__.get("__call__", nn.Module.__call__))
    if issubclass(module, nn.Conv | nn.ConvLocal):
        method = inspect.unwrap(module.__call__)
    read = method in READERS
    assert read == (says in {"dense", "conv", "conv_local", "embedding", "norm"})
