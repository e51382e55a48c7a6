"""The models that are trained: parameters float32, arithmetic in `dtype`."""

import itertools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


class MLP(nn.Module):
    width: int
    depth: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.outputs)(x)


class NNXMLP(nnx.Module):
    """`MLP`, in NNX."""

    def __init__(self, inputs, width, depth, outputs, rngs):
        sizes = [inputs, *[width] * depth, outputs]
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class Block(nn.Module):
    """Of a pre-norm transformer."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, mask=None):
        width = x.shape[-1]
        normalized = nn.LayerNorm(dtype=self.dtype)(x)
        x += nn.SelfAttention(self.heads, dtype=self.dtype)(normalized, mask)
        hidden = nn.Dense(4 * width, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(width, dtype=self.dtype)(nn.gelu(hidden))


class Transformer(nn.Module):
    """A causal decoder over tokens.

    Attributes:
      tied: its output weights are its embeddings.
      scanned: its blocks are one, called by `nn.scan` with parameters that lie stacked.
    """

    layers: int
    width: int
    vocabulary: int
    heads: int
    tied: bool = False
    scanned: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
        positions = nn.Embed(tokens.shape[1], self.width, dtype=self.dtype)
        x = embed(tokens) + positions(jnp.arange(tokens.shape[1]))[None]
        mask = nn.make_causal_mask(tokens)
        if self.scanned:
            split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            scan = nn.scan(lambda block, x, _: (block(x, mask), None), length=self.layers, **split)
            x, _ = scan(Block(self.heads, self.dtype), x, None)
        else:
            for _ in range(self.layers):
                x = Block(self.heads, self.dtype)(x, mask)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        return embed.attend(x) if self.tied else nn.Dense(self.vocabulary, dtype=self.dtype)(x)


class ViT(nn.Module):
    """A vision transformer over patches, averaged at its end."""

    layers: int
    width: int
    heads: int
    patch: int
    outputs: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images):
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, dtype=self.dtype)(images)
        x = x.reshape(len(x), -1, self.width)
        positions = nn.Embed(x.shape[1], self.width, dtype=self.dtype)
        x += positions(jnp.arange(x.shape[1]))[None]
        for _ in range(self.layers):
            x = Block(self.heads, self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x).mean(1)
        return nn.Dense(self.outputs, dtype=self.dtype)(x)


class ConvBN(nn.Module):
    """A convolution and its batch normalization."""

    features: int
    size: int
    strides: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        size = (self.size, self.size)
        x = nn.Conv(self.features, size, self.strides, use_bias=False, dtype=self.dtype)(x)
        return nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x)


class ConvNet(nn.Module):
    """Convolutions, each second one with stride 2."""

    features: tuple[int, ...]
    outputs: int
    kernel: int = 3

    @nn.compact
    def __call__(self, x):
        for index, features in enumerate(self.features):
            x = nn.relu(ConvBN(features, self.kernel, 1 + index % 2)(x))
        return nn.Dense(self.outputs)(x.mean((1, 2)))


class ResNet(nn.Module):
    """A residual network; `bottleneck`: blocks of three convolutions; `stem`: for large images."""

    stages: tuple[int, ...]
    outputs: int
    bottleneck: bool
    stem: bool
    width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        conv = lambda *args: ConvBN(*args, dtype=self.dtype)  # noqa: E731
        x = nn.relu(conv(self.width, 7 if self.stem else 3, 2 if self.stem else 1)(x))
        if self.stem:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.stages):
            width = self.width * 2**stage
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                if self.bottleneck:
                    y = nn.relu(conv(width, 1)(x))
                    y = conv(4 * width, 1)(nn.relu(conv(width, 3, strides)(y)))
                else:
                    y = conv(width, 3)(nn.relu(conv(width, 3, strides)(x)))
                if x.shape != y.shape:
                    x = conv(y.shape[-1], 1, strides)(x)
                x = nn.relu(x + y)
        return nn.Dense(self.outputs, dtype=self.dtype)(x.mean((1, 2)))
