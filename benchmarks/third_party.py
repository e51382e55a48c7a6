"""Models nobody here wrote: builds them, and prints how much of each is covered.

    pip install -e '.[third-party]'
    python -m benchmarks.third_party

Each model is built twice from its package's own class: at the size its authors publish it, whose
arrays are never made, for the printed table; and tiny, with random weights, for the tests.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType

import adafisher_jax as af


class Problem(NamedTuple):
    """What `trace_layout` is asked about: `loss(params, *args)`."""

    loss: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]


class Model(NamedTuple):
    """A model of a package.

    Attributes:
      package: its name in the registry.
      module: the name it is imported by.
      build: makes the problem; told whether at the published size.
      adapter: the module of adafisher_jax with `trace_layout` and `value_and_grad`.
      around: a context that the model needs wherever it runs.
    """

    package: str
    module: str
    build: Callable[[bool], Problem]
    adapter: str = "adafisher_jax"
    around: Callable[[], Any] = contextlib.nullcontext


def cross_entropy(logits: Any, labels: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def transformers_text(name: str, config: str, tiny: dict[str, Any], published: bool) -> Problem:
    """A language model of transformers, with the cross-entropy of each token's label."""
    import transformers

    sizes = {} if published else {"vocab_size": 64, **tiny}
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes), _do_init=False)
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 64, (2, 4, 8))
    key = jax.random.key(1)

    def loss(params, tokens, labels):
        logits = model(tokens, params=params, train=True, dropout_rng=key).logits
        return cross_entropy(logits, labels)

    return Problem(loss, _weights(model, published), (tokens, labels))


def transformers_images(name: str, config: str, tiny: dict[str, Any], published: bool) -> Problem:
    """An image classifier of transformers; running statistics, if any, are not trained."""
    import transformers

    sizes = {} if published else {"num_labels": 3, **tiny}
    side = 224 if published else 16
    config = getattr(transformers, config)(**sizes)
    shape = {"input_shape": (1, side, side, 3)} if "ResNet" in name else {}
    model = getattr(transformers, name)(config, _do_init=False, **shape)
    weights = _weights(model, published)
    statistics = weights.get("batch_stats")

    def loss(params, statistics, images, labels):
        if statistics is not None:
            params = {"params": params, "batch_stats": statistics}
            output, _ = model(images, params=params, train=True)
        else:
            output = model(images, params=params, train=True, dropout_rng=jax.random.key(1))
        return cross_entropy(output.logits, labels)

    images, labels = _images(side, channels_first=True)
    return Problem(loss, weights.get("params", weights), (statistics, images, labels))


def _weights(model: Any, published: bool) -> Any:
    init = functools.partial(model.init_weights, jax.random.key(0), model.input_shape)
    return jax.eval_shape(init) if published else jax.jit(init)()


def _images(side: int, channels_first: bool = False) -> tuple[Any, Any]:
    images = np.random.default_rng(0).normal(size=(4, side, side, 3)).astype(np.float32)
    return images.transpose(0, 3, 1, 2) if channels_first else images, np.array([0, 1, 2, 1])


def diffusers_unet(published: bool) -> Problem:
    """The denoiser of Stable Diffusion, asked for the noise."""
    import diffusers

    tiny = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    }
    model = diffusers.FlaxUNet2DConditionModel(**({} if published else tiny))
    init = functools.partial(model.init_weights, jax.random.key(0))
    params = jax.eval_shape(init) if published else jax.jit(init)()
    rng = np.random.default_rng(0)
    size, width = model.sample_size, model.cross_attention_dim
    noisy, noise = rng.normal(size=(2, 2, 4, size, size)).astype(np.float32)
    text = rng.normal(size=(2, 5, width)).astype(np.float32)

    def loss(params, noisy, text, noise):
        found = model.apply({"params": params}, noisy, jnp.array([3, 7]), text).sample
        return jnp.mean(jnp.square(found - noise))

    return Problem(loss, params, (noisy, text, noise))


def flaxmodels_resnet(published: bool) -> Problem:
    """A ResNet-18 with a batch normalization of its package's own."""
    import flaxmodels

    classes, side = (1000, 224) if published else (3, 16)
    model = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=classes)
    images, labels = _images(side)
    init = functools.partial(model.init, jax.random.key(0))
    variables = jax.eval_shape(init, images) if published else jax.jit(init)(images)

    def loss(params, statistics, images, labels):
        variables = {"params": params, "batch_stats": statistics}
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, labels)

    return Problem(loss, variables["params"], (variables["batch_stats"], images, labels))


def jimm_vit(published: bool) -> Problem:
    """A vision transformer in Flax NNX, its layers stacked by a scan."""
    import jimm
    from jimm.common.sharding import NoSharding

    tiny = {"num_classes": 3, "img_size": 16, "patch_size": 8, "hidden_size": 64}
    tiny |= {"num_layers": 2, "num_heads": 4, "mlp_dim": 256}
    sizes = {} if published else tiny

    def make():
        return jimm.VisionTransformer(
            **sizes, dropout_rate=0.0, sharding=NoSharding, rngs=nnx.Rngs(0)
        )

    def loss(model, images, labels):
        return cross_entropy(model(images), labels)

    model = nnx.eval_shape(make) if published else make()
    return Problem(loss, model, _images(224 if published else 16))


def one_device() -> Any:
    return jax.set_mesh(jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,)))


BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**BLOCKS, "hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": 32}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 8}
VIT = {**BLOCKS, "hidden_size": 64, "intermediate_size": 256, "image_size": 16, "patch_size": 8}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
IN_TRANSFORMERS = {
    "BERT, masked LM": (transformers_text, "FlaxBertForMaskedLM", "BertConfig", SMALL),
    "Llama": (transformers_text, "FlaxLlamaForCausalLM", "LlamaConfig", SMALL),
    "GPT-2": (transformers_text, "FlaxGPT2LMHeadModel", "GPT2Config", GPT2),
    "ViT": (transformers_images, "FlaxViTForImageClassification", "ViTConfig", VIT),
    "ResNet-50": (transformers_images, "FlaxResNetForImageClassification", "ResNetConfig", RESNET),
}
MODELS = {
    **{
        name: Model("transformers", "transformers", functools.partial(build, *rest))
        for name, (build, *rest) in IN_TRANSFORMERS.items()
    },
    "Stable Diffusion UNet": Model("diffusers", "diffusers", diffusers_unet),
    "ResNet-18": Model("flaxmodels", "flaxmodels", flaxmodels_resnet),
    "ViT, NNX": Model("jax-image-models", "jimm", jimm_vit, "adafisher_jax.nnx", one_device),
}


def uncovered(layout: af.Layout) -> dict[tuple[str, str], int]:
    """How many parameters are not covered: by name, its numbers as `*`, and reason."""
    sizes: dict[tuple[str, str], int] = {}
    for row in layout.uncovered:
        name = re.sub(r"\d+", "*", "/".join(row.leaf.path.split("/")[-3:]))
        sizes[name, row.reason] = sizes.get((name, row.reason), 0) + row.leaf.size
    return sizes


def main() -> None:
    print("| package | model | parameters | covered | not covered |")
    print("| --- | --- | --- | --- | --- |")
    for name, model in MODELS.items():
        adapter = importlib.import_module(model.adapter)
        with model.around():
            loss, params, args = model.build(True)
            layout = adapter.trace_layout(loss, params, *args)
        leaves = [leaf for layer in layout.layers for leaf in layer.leaves]
        total = sum(leaf.size for leaf in [*leaves, *(row.leaf for row in layout.uncovered)])
        version = importlib.metadata.version(model.package)
        rest = "; ".join(
            f"`{leaf}` ({size / total:.2%}): {reason}"
            for (leaf, reason), size in uncovered(layout).items()
        )
        print(f"| {model.package} {version} | {name} | {total:,} | {layout.covered:.2%} | {rest} |")


if __name__ == "__main__":
    main()
