"""Swin transformer (Liu et al., ICCV 2021, arXiv:2103.14030), for square images.

Attention stays within windows of an image; every second block shifts them by half a window.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from examples.image_classification.models.transformer import (
    MLP,
    SelfAttention,
    StochasticDepth,
    small_normal,
)


def to_windows(x, window):
    """(examples, side, side, channels) to (examples, windows, window², channels)."""
    examples, side, _, channels = x.shape
    across = side // window
    x = x.reshape(examples, across, window, across, window, channels).swapaxes(2, 3)
    return x.reshape(examples, across**2, window**2, channels)


def from_windows(x, side):
    """The inverse of `to_windows`."""
    examples, windows, area, channels = x.shape
    across, window = round(windows**0.5), round(area**0.5)
    x = x.reshape(examples, across, across, window, window, channels).swapaxes(2, 3)
    return x.reshape(examples, side, side, channels)


def relative_positions(window):
    """The index of the offset between each pair in a window, (window², window²)."""
    rows, columns = (grid.reshape(-1) for grid in np.mgrid[:window, :window])
    down, right = (axis[:, None] - axis[None] + window - 1 for axis in (rows, columns))
    return down * (2 * window - 1) + right


def shift_bias(side, window, shift):
    """Masks pairs that only a cyclic shift made neighbours, (windows, 1, window², window²)."""
    part = np.digitize(np.arange(side), [side - window, side - shift])
    regions = 3 * part[:, None] + part[None]
    regions = to_windows(regions[None, :, :, None], window)[0, :, :, 0]
    return np.where(regions[:, :, None] == regions[:, None], 0.0, -100.0)[:, None]


class WindowAttention(nn.Module):
    heads: int
    window: int
    shift: int
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        side = x.shape[1]
        # The table is an Embed, and not a bare parameter, so that AdaFisher has a layer to look at.
        table = nn.Embed(
            (2 * self.window - 1) ** 2,
            self.heads,
            embedding_init=small_normal,
            dtype=self.dtype,
            name="position_bias",
        )
        bias = table(relative_positions(self.window)).transpose(2, 0, 1)[None]
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), (1, 2))
            bias += jnp.asarray(shift_bias(side, self.window, self.shift), bias.dtype)
        attention = SelfAttention(self.heads, 0.0, True, self.dtype, name="attention")
        x = from_windows(attention(to_windows(x, self.window), train, bias[None]), side)
        return jnp.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


class SwinBlock(nn.Module):
    heads: int
    window: int
    shift: int
    drop: float
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        attention = WindowAttention(self.heads, self.window, self.shift, self.dtype)
        x += StochasticDepth(self.drop)(attention(norm()(x), train), train)
        hidden = MLP(4 * x.shape[-1], self.dtype)(norm()(x))
        return x + StochasticDepth(self.drop)(hidden, train)


class PatchMerging(nn.Module):
    """Halves the side, doubles the channels."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        examples, side, _, channels = x.shape
        x = x.reshape(examples, side // 2, 2, side // 2, 2, channels)
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(examples, side // 2, side // 2, 4 * channels)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        return nn.Dense(2 * channels, use_bias=False, kernel_init=small_normal, dtype=self.dtype)(x)


class Swin(nn.Module):
    classes: int
    patch: int
    window: int
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    drop: float = 0.2  # drop rate of the last block; the first block has none
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, dtype=self.dtype, name="patches")(x)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        drops = iter(np.linspace(0, self.drop, sum(self.depths)).tolist())
        for stage, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            if stage > 0:
                x = PatchMerging(self.dtype, name=f"merge{stage}")(x)
            side = x.shape[1]
            window = min(self.window, side)
            if side % window:
                raise ValueError(f"stage {stage} has side {side}, no multiple of window {window}")
            for index in range(depth):
                shift = window // 2 if index % 2 and window < side else 0
                name = f"stage{stage}_block{index}"
                block = SwinBlock(heads, window, shift, next(drops), self.dtype, name=name)
                x = block(x, train)
        x = nn.LayerNorm(dtype=self.dtype)(x).mean((1, 2))
        return nn.Dense(self.classes, kernel_init=small_normal, dtype=self.dtype, name="head")(x)
