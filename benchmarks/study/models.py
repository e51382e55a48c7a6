"""The models of the problems that are no other example's; all take `train` as a second argument."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from benchmarks import models


class MLP(nn.Module):
    hidden: Sequence[int]
    outputs: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x, train):
        for width in self.hidden:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


class DigitsCNN(nn.Module):
    """The quick start's."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return MLP((64,), 10)(x.reshape(len(x), -1), train)


class ConvNet(nn.Module):
    """Strided convolutions, each normalized; `batch_norm`: over the batch, and without biases."""

    batch_norm: bool
    features: Sequence[int] = (32, 64, 128)
    classes: int = 10
    kernel: int = 3

    @nn.compact
    def __call__(self, x, train):
        for features in self.features:
            x = nn.Conv(features, (self.kernel,) * 2, strides=2, use_bias=not self.batch_norm)(x)
            x = nn.relu(self._normalize(x, train))
        return nn.Dense(self.classes)(x.mean((1, 2)) if self.batch_norm else x.reshape(len(x), -1))

    def _normalize(self, x: jax.Array, train: bool) -> Any:
        if self.batch_norm:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.GroupNorm(8)(x)


class VisionTransformer(nn.Module):
    """Over the 64 patches of a small image."""

    @nn.compact
    def __call__(self, x, train):
        return models.ViT(layers=3, width=96, heads=4, patch=4, outputs=10)(x)


class Transformer(nn.Module):
    """Of heads of 32 features, with Flax's own initializers; `tied`, `scanned`: as in `models`."""

    vocabulary: int
    layers: int
    width: int
    tied: bool = False
    scanned: bool = False

    @nn.compact
    def __call__(self, tokens, train):
        sizes = self.layers, self.width, self.vocabulary, self.width // 32
        return models.Transformer(*sizes, self.tied, self.scanned)(tokens)


@dataclasses.dataclass(frozen=True)
class InNNX:
    """An NNX model with the two methods of a Linen module that a problem calls."""

    make: Callable[[nnx.Rngs], nnx.Module]

    def init(self, key, x, train):
        return {"params": nnx.state(self.make(nnx.Rngs(key)), nnx.Param)}

    def apply(self, variables, x, train, mutable):
        graph = nnx.graphdef(nnx.eval_shape(lambda: self.make(nnx.Rngs(0))))
        return nnx.merge(graph, variables["params"])(x), {}


class LSTM(nn.Module):
    vocabulary: int
    embedded: int = 64
    width: int = 128

    @nn.compact
    def __call__(self, tokens, train):
        x = nn.Embed(self.vocabulary, self.embedded)(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
        return nn.Dense(self.vocabulary)(x)
