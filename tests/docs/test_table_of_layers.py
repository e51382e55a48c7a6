"""The documentation's tables name every Flax layer, and say of each what the code does."""

import inspect
import pathlib
import re

import flax.linen as nn
import pytest
from flax import nnx

from adafisher_jax.capture import linen_layers, nnx_layers

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "layers.md"
READ = {"dense", "conv", "conv_local", "embedding", "norm"}


def table(flax):
    """Layer name → what the page says of it, from the table of one of Flax's two libraries."""
    section = PAGE.read_text().split(f"## Flax {flax} layers")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {name: kind.strip() for names, kind in rows for name in re.findall(r"`([\w.]+)`", names)}


def modules(flax):
    """Every module class that a library exports."""
    return [c for c in vars(flax).values() if inspect.isclass(c) and issubclass(c, flax.Module)]


@pytest.mark.parametrize("module", modules(nn), ids=lambda m: m.__name__)
def test_every_linen_layer_has_a_row_that_is_true(module):
    says = table("Linen")[module.__name__]
    method = inspect.unwrap(module.__dict__.get("__call__", nn.Module.__call__))
    if issubclass(module, nn.Conv | nn.ConvLocal):
        method = inspect.unwrap(module.__call__)
    assert (method in linen_layers.READERS) == (says in READ)


@pytest.mark.parametrize("module", modules(nnx), ids=lambda m: m.__name__)
def test_every_nnx_layer_has_a_row_that_is_true(module):
    says = table("NNX")[module.__name__]
    assert ((module, "__call__") in nnx_layers.READERS) == (says in READ)
