"""Residual networks (He et al., CVPR 2016, arXiv:1512.03385)."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from examples.image_classification.models.conv_norm import ConvNorm


class BasicBlock(nn.Module):
    width: int
    strides: int
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(ConvNorm, dtype=self.dtype)
        y = nn.relu(conv(self.width, 3, self.strides)(x, train))
        y = conv(self.width, 3)(y, train)
        if x.shape != y.shape:
            x = conv(self.width, 1, self.strides, name="shortcut")(x, train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """A block whose 3x3 convolution has a fourth of the channels of the output."""

    width: int
    strides: int
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(ConvNorm, dtype=self.dtype)
        y = nn.relu(conv(self.width, 1)(x, train))
        y = nn.relu(conv(self.width, 3, self.strides)(y, train))
        y = conv(4 * self.width, 1)(y, train)
        if x.shape != y.shape:
            x = conv(4 * self.width, 1, self.strides, name="shortcut")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """`small_images` uses a stem that preserves the resolution, as for CIFAR."""

    stages: tuple[int, ...]
    block: type[nn.Module]
    classes: int
    small_images: bool
    width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        size, strides = (3, 1) if self.small_images else (7, 2)
        x = nn.relu(ConvNorm(self.width, size, strides, dtype=self.dtype, name="stem")(x, train))
        if not self.small_images:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.stages):
            for index in range(blocks):
                strides = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage}_block{index}"
                x = self.block(self.width * 2**stage, strides, self.dtype, name=name)(x, train)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x.mean((1, 2)))


ResNet18 = functools.partial(ResNet, (2, 2, 2, 2), BasicBlock)
ResNet50 = functools.partial(ResNet, (3, 4, 6, 3), Bottleneck)
ResNet101 = functools.partial(ResNet, (3, 4, 23, 3), Bottleneck)
