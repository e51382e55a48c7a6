"""Compact convolutional transformer (Hassani et al., 2021, arXiv:2104.05704).

CCT-2/3x2 makes tokens with 2 convolutions of size 3x3, and has 2 transformer layers.
"""

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


class Tokenizer(nn.Module):
    """Convolutions, each followed by a pooling that halves the side."""

    features: tuple[int, ...]
    size: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        for features in self.features:
            x = nn.Conv(
                features,
                (self.size, self.size),
                padding=self.size // 2,
                use_bias=False,
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
            )(x)
            x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), ((1, 1), (1, 1)))
        return x.reshape(len(x), -1, x.shape[-1])


class EncoderLayer(nn.Module):
    """As in the authors' code: the second normalization is on the residual path."""

    heads: int
    drop: float
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        attention = SelfAttention(self.heads, 0.1, False, self.dtype)
        y = attention(nn.LayerNorm(dtype=self.dtype)(x), train)
        x = nn.LayerNorm(dtype=self.dtype)(x + StochasticDepth(self.drop)(y, train))
        y = MLP(x.shape[-1], self.dtype)(x)
        return x + StochasticDepth(self.drop)(y, train)


class SequencePooling(nn.Module):
    """A weighted mean over tokens in place of a class token; the tokens determine the weights."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        scores = nn.Dense(1, kernel_init=small_normal, dtype=self.dtype)(x)
        return (nn.softmax(scores, 1) * x).sum(1)


class CCT(nn.Module):
    classes: int
    convolutions: tuple[int, ...] = (64, 128)  # features of each; the last is the tokens' width
    size: int = 3
    layers: int = 2
    heads: int = 2
    drop: float = 0.1  # drop rate of the last layer; the first layer has none
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        x = Tokenizer(self.convolutions, self.size, self.dtype, name="tokenizer")(x)
        tokens, width = x.shape[1:]
        # An Embed, and not a bare parameter, so that AdaFisher has a layer to look at.
        positions = nn.Embed(
            tokens,
            width,
            embedding_init=nn.initializers.truncated_normal(0.2),
            dtype=self.dtype,
            name="positions",
        )
        x += positions(jnp.arange(tokens))[None]
        for index, drop in enumerate(np.linspace(0, self.drop, self.layers).tolist()):
            x = EncoderLayer(self.heads, drop, self.dtype, name=f"layer{index}")(x, train)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        x = SequencePooling(self.dtype, name="pooling")(x)
        return nn.Dense(self.classes, kernel_init=small_normal, dtype=self.dtype, name="head")(x)
