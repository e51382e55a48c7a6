"""What is trained: a model, a seeded batch and a cross-entropy, by name and size."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import adafisher_jax as af
from benchmarks.models import MLP, ConvNet, ResNet, Transformer, ViT


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification of images, vectors or next tokens.

    Running statistics of batch normalization are computed and dropped, the same for all.

    Attributes:
      name: as in `make`.
      model: of Linen.
      shape: of a batch of inputs.
      classes: how many; of tokens, the vocabulary.
      tokens: whether inputs are tokens, each with a label.
    """

    name: str
    model: nn.Module
    shape: tuple[int, ...]
    classes: int
    tokens: bool = False

    def batch(self) -> tuple[jax.Array, jax.Array]:
        """Inputs and labels."""
        keys = jax.random.split(jax.random.key(0))
        where = self.shape if self.tokens else self.shape[:1]
        labels = jax.random.randint(keys[0], where, 0, self.classes)
        if self.tokens:
            return jax.random.randint(keys[1], self.shape, 0, self.classes), labels
        return jax.random.normal(keys[1], self.shape), labels

    def shapes(self) -> Any:
        """Those of the parameters."""
        init = functools.partial(self.model.init, jax.random.key(0))
        return jax.eval_shape(init, jax.ShapeDtypeStruct(self.shape, self._dtype))["params"]

    def params(self) -> Any:
        """Weights of variance one over their inputs, scales one and biases zero."""
        rng = np.random.default_rng(0)

        def make(keys, leaf):
            if leaf.ndim == 1:
                return jnp.full(leaf.shape, float(keys[-1].key == "scale"))
            values = rng.standard_normal(leaf.shape, np.float32)
            return jnp.asarray(values * (leaf.shape[-1] / leaf.size) ** 0.5)

        return jax.tree_util.tree_map_with_path(make, self.shapes())

    @property
    def _dtype(self) -> Any:
        return jnp.int32 if self.tokens else jnp.float32

    def logits(self, params: Any, inputs: Any) -> Any:
        logits, _ = self.model.apply({"params": params}, inputs, mutable=["batch_stats"])
        return logits.astype(jnp.float32)

    def loss(self, params: Any, inputs: Any, labels: Any) -> Any:
        return cross_entropy(self.logits(params, inputs), labels)

    @functools.cached_property
    def layout(self) -> af.Layout:
        return af.trace_layout(self.loss, self.shapes(), *jax.eval_shape(self.batch))


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp(name: str, width: int, depth: int, batch: int) -> Task:
    return Task(name, MLP(width, depth, 16), (batch, width), 16)


def transformer(
    name: str, width: int, layers: int, length: int, vocabulary: int, batch: int, **options: Any
) -> Task:
    model = Transformer(layers, width, vocabulary, max(width // 64, 1), **options)
    return Task(name, model, (batch, length), vocabulary, tokens=True)


def conv_net(name: str, features: tuple[int, ...], side: int, batch: int, kernel: int = 3) -> Task:
    return Task(name, ConvNet(features, 10, kernel), (batch, side, side, 3), 10)


def resnet(name: str, side: int, batch: int, classes: int, **options: Any) -> Task:
    return Task(name, ResNet(outputs=classes, **options), (batch, side, side, 3), classes)


def vit(name: str, side: int, batch: int, classes: int, **options: Any) -> Task:
    return Task(name, ViT(outputs=classes, **options), (batch, side, side, 3), classes)


BF16 = {"dtype": jnp.bfloat16}
RESNET18 = {"stages": (2, 2, 2, 2), "bottleneck": False, "stem": False}
RESNET50 = {"stages": (3, 4, 6, 3), "bottleneck": True, "stem": True, **BF16}
VIT_B = {"layers": 12, "width": 768, "heads": 12, "patch": 16, **BF16}
PART = functools.partial
TRANSFORMER24 = PART(transformer, width=512, layers=24, length=128, vocabulary=4096, batch=8)

FULL = {
    "mlp": PART(mlp, width=1024, depth=4, batch=256),
    "wide_mlp": PART(mlp, width=2048, depth=12, batch=8),
    "transformer": PART(transformer, width=256, layers=4, length=128, vocabulary=4096, batch=8),
    "transformer24": TRANSFORMER24,
    "scanned_transformer24": PART(TRANSFORMER24, scanned=True),
    "conv_net": PART(conv_net, features=(64, 64, 128, 128), side=32, batch=64),
    "resnet18": PART(resnet, side=32, batch=16, classes=10, **RESNET18),
    "resnet50": PART(resnet, side=224, batch=128, classes=1000, **RESNET50),
    "vit_b": PART(vit, side=224, batch=64, classes=1000, **VIT_B),
    "gpt2_small": PART(
        transformer, width=768, layers=12, length=1024, vocabulary=50257, batch=8, tied=True, **BF16
    ),
}
TINY_TRANSFORMER = PART(transformer, width=64, layers=2, length=16, vocabulary=64, batch=2)
TINY_RESNET = {"side": 32, "batch": 4, "classes": 10, "width": 8}
QUICK = {
    "mlp": PART(mlp, width=64, depth=2, batch=16),
    "wide_mlp": PART(mlp, width=256, depth=3, batch=4),
    "transformer": TINY_TRANSFORMER,
    "transformer24": TINY_TRANSFORMER,
    "scanned_transformer24": PART(TINY_TRANSFORMER, scanned=True),
    "conv_net": PART(conv_net, features=(8, 8, 16, 16), side=16, batch=4),
    "resnet18": PART(resnet, **RESNET18 | {"stages": (1, 1)}, **TINY_RESNET),
    "resnet50": PART(resnet, **RESNET50 | {"stages": (1, 1)}, **TINY_RESNET),
    "vit_b": PART(vit, side=32, batch=4, classes=10, **VIT_B | {"layers": 2, "width": 48}),
    "gpt2_small": PART(TINY_TRANSFORMER, tied=True, **BF16),
}


def make(name: str, quick: bool = False) -> Task:
    return (QUICK if quick else FULL)[name](name)


def names(on_cpu: list[str], on_gpu: list[str]) -> list[str]:
    return on_cpu if jax.default_backend() == "cpu" else on_gpu


LARGE = ["resnet50", "vit_b", "gpt2_small"]
