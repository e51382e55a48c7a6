"""MobileNetV3 (Howard et al., ICCV 2019, arXiv:1905.02244): tables 1 and 2 of the paper."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from examples.image_classification.models.conv_norm import ConvNorm


class Row(NamedTuple):
    """One inverted residual block of the tables; `squeeze` adds squeeze-excite."""

    size: int
    expanded: int
    features: int
    squeeze: bool
    activation: Any
    strides: int


SMALL = (
    Row(3, 16, 16, True, nn.relu, 2),
    Row(3, 72, 24, False, nn.relu, 2),
    Row(3, 88, 24, False, nn.relu, 1),
    Row(5, 96, 40, True, nn.hard_swish, 2),
    Row(5, 240, 40, True, nn.hard_swish, 1),
    Row(5, 240, 40, True, nn.hard_swish, 1),
    Row(5, 120, 48, True, nn.hard_swish, 1),
    Row(5, 144, 48, True, nn.hard_swish, 1),
    Row(5, 288, 96, True, nn.hard_swish, 2),
    Row(5, 576, 96, True, nn.hard_swish, 1),
    Row(5, 576, 96, True, nn.hard_swish, 1),
)
LARGE = (
    Row(3, 16, 16, False, nn.relu, 1),
    Row(3, 64, 24, False, nn.relu, 2),
    Row(3, 72, 24, False, nn.relu, 1),
    Row(5, 72, 40, True, nn.relu, 2),
    Row(5, 120, 40, True, nn.relu, 1),
    Row(5, 120, 40, True, nn.relu, 1),
    Row(3, 240, 80, False, nn.hard_swish, 2),
    Row(3, 200, 80, False, nn.hard_swish, 1),
    Row(3, 184, 80, False, nn.hard_swish, 1),
    Row(3, 184, 80, False, nn.hard_swish, 1),
    Row(3, 480, 112, True, nn.hard_swish, 1),
    Row(3, 672, 112, True, nn.hard_swish, 1),
    Row(5, 672, 160, True, nn.hard_swish, 2),
    Row(5, 960, 160, True, nn.hard_swish, 1),
    Row(5, 960, 160, True, nn.hard_swish, 1),
)


class SqueezeExcite(nn.Module):
    """Scales each channel by a function of the means of all channels over the image."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        y = x.mean((1, 2))
        y = nn.relu(nn.Dense(_multiple_of_eight(channels / 4), dtype=self.dtype)(y))
        y = nn.hard_sigmoid(nn.Dense(channels, dtype=self.dtype)(y))
        return x * y[:, None, None]


def _multiple_of_eight(channels):
    """The nearest multiple of eight, or the next one if that loses more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class InvertedResidual(nn.Module):
    """Expands, applies a depthwise convolution, and projects without an activation."""

    row: Row
    strides: int
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(ConvNorm, dtype=self.dtype)
        activation, expanded, y = self.row.activation, self.row.expanded, x
        if expanded != x.shape[-1]:
            y = activation(conv(expanded, 1, name="expand")(y, train))
        y = conv(expanded, self.row.size, self.strides, groups=expanded, name="depthwise")(y, train)
        y = activation(y)
        if self.row.squeeze:
            y = SqueezeExcite(self.dtype)(y)
        y = conv(self.row.features, 1, name="project")(y, train)
        return x + y if x.shape == y.shape else y


class MobileNetV3(nn.Module):
    """`small_images` omits the first two downsampling steps, as for CIFAR."""

    rows: tuple[Row, ...]
    hidden: int
    classes: int
    small_images: bool
    dropout: float = 0.2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(ConvNorm, dtype=self.dtype)
        strides = [2, *(row.strides for row in self.rows)]
        if self.small_images:
            for _ in range(2):
                strides[strides.index(2)] = 1
        x = nn.hard_swish(conv(16, 3, strides[0], name="stem")(x, train))
        for index, row in enumerate(self.rows):
            block = InvertedResidual(row, strides[index + 1], self.dtype, name=f"block{index}")
            x = block(x, train)
        x = nn.hard_swish(conv(6 * x.shape[-1], 1, name="last")(x, train))
        x = nn.hard_swish(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x.mean((1, 2))))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)


MobileNetV3Small = functools.partial(MobileNetV3, SMALL, 1024)
MobileNetV3Large = functools.partial(MobileNetV3, LARGE, 1280)
