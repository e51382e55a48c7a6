"""Models nobody here wrote: builds them, and prints how much of each is covered.

    pip install -e '.[third-party]'
    python -m benchmarks.third_party

Each model is built twice from its package's own class: at the size its authors publish it, whose
arrays are never made, for the printed table; and tiny, with random weights, for the tests.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import re
import unittest.mock
from collections.abc import Callable, Iterator
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
      is_nnx: whether it is an NNX module, for `af.nnx`.
      around: a context that the model needs wherever it runs.
      wrt: which variables of an NNX module are its parameters.
    """

    package: str
    module: str
    build: Callable[[bool], Problem]
    is_nnx: bool = False
    around: Callable[[], Any] = contextlib.nullcontext
    wrt: Any = nnx.Param

    def trace_layout(self, problem: Problem) -> af.Layout:
        options = {"wrt": self.wrt} if self.is_nnx else {}
        trace = af.nnx.trace_layout if self.is_nnx else af.trace_layout
        return trace(problem.loss, problem.params, *problem.args, **options)


def cross_entropy(logits: Any, labels: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def transformers_text(name: str, config: str, tiny: dict[str, Any], published: bool) -> Problem:
    """A language model of transformers, with the cross-entropy of each token's label."""
    import transformers

    sizes = {} if published else {"vocab_size": 64, **tiny}
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes), _do_init=False)
    tokens, labels = _text()
    decoded = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    key = jax.random.key(1)

    def loss(params, tokens, labels):
        logits = model(tokens, params=params, train=True, dropout_rng=key, **decoded).logits
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


def _text() -> tuple[Any, Any]:
    tokens, labels = np.random.default_rng(0).integers(0, 64, (2, 4, 8))
    return tokens, labels


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


def tunix_text(
    module: str,
    name: str,
    config: str,
    tiny: dict[str, Any],
    published: bool,
    prepare: Callable[..., nnx.Module] = lambda model, *args: model,
) -> Problem:
    """A language model of Tunix, in Flax NNX, with the cross-entropy of each token's label."""
    models = importlib.import_module(f"tunix.models.{module}.model")
    sizes = getattr(models.ModelConfig, config)()
    if not published:
        sizes = dataclasses.replace(sizes, **TUNIX, **tiny)
    tokens, labels = _text()
    batch, length = tokens.shape
    positions = np.tile(np.arange(length), (batch, 1))
    mask = np.tile(np.tri(length, dtype=bool), (batch, 1, 1))

    def make():
        model = getattr(models, name)(sizes, rngs=nnx.Rngs(0))
        return prepare(model, tokens, positions, None, mask)

    def loss(model, tokens, labels):
        logits, _ = model(tokens, positions, None, mask)
        return cross_entropy(logits.astype(jnp.float32), labels)

    return Problem(loss, nnx.eval_shape(make) if published else make(), (tokens, labels))


def qwix_lora(published: bool) -> Problem:
    """Low-rank updates that Qwix adds to each layer of Tunix's Llama, as Tunix trains them."""
    import qwix

    projections = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    provider = qwix.LoraProvider(
        module_path="|".join(f".*{name}" for name in projections), rank=4, alpha=8.0
    )

    def prepare(model, *args):
        return qwix.apply_lora_to_model(model, provider, *args, rngs=nnx.Rngs(1))

    return tunix_text(*IN_TUNIX["Llama 3.2"], published, prepare)


def equimo_vit(published: bool) -> Problem:
    """A vision transformer in Equinox, of one image; mapped over the batch."""
    import equimo.models
    import equinox as eqx

    sizes = {"img_size": 224, "dim": 768, "patch_size": 16, "num_heads": [12], "depths": [12]}
    tiny = {"img_size": 16, "dim": 64, "patch_size": 8, "num_heads": [4], "depths": [2]}
    sizes = sizes if published else tiny

    def make():
        return equimo.models.VisionTransformer(
            **sizes, in_channels=3, num_classes=3, reg_tokens=0, key=jax.random.key(0)
        )

    model = eqx.filter_eval_shape(make) if published else make()
    params, static = eqx.partition(model, lambda leaf: hasattr(leaf, "dtype"))

    def loss(params, images, labels):
        model = eqx.combine(params, static)
        keys = jax.random.split(jax.random.key(1), len(images))
        return cross_entropy(jax.vmap(lambda x, key: model(x, key=key))(images, keys), labels)

    return Problem(loss, params, _images(sizes["img_size"], channels_first=True))


def haiku_resnet(published: bool) -> Problem:
    """A ResNet-50 of Haiku; tiny, a ResNet-18 with few channels."""
    import haiku as hk

    tiny = {"blocks_per_group": (1, 1, 1, 1), "channels_per_group": (16, 16, 32, 32)}
    tiny |= {"bottleneck": False, "logits_config": {"w_init": hk.initializers.VarianceScaling()}}
    classes, side = (1000, 224) if published else (3, 16)

    def forward(images):
        if published:
            return hk.nets.ResNet50(classes)(images, is_training=True)
        return hk.nets.ResNet(num_classes=classes, **tiny)(images, is_training=True)

    model = hk.transform_with_state(forward)
    images, labels = _images(side)
    init = functools.partial(model.init, jax.random.key(0))
    params, state = jax.eval_shape(init, images) if published else jax.jit(init)(images)

    def loss(params, state, images, labels):
        logits, _ = model.apply(params, state, None, images)
        return cross_entropy(logits, labels)

    return Problem(loss, params, (state, images, labels))


def brax_ppo(published: bool) -> Problem:
    """The loss of Brax's PPO: a policy and a value function of one batch of a robot's steps."""
    from brax.training.acme import running_statistics, specs
    from brax.training.agents.ppo import losses, networks
    from brax.training.types import Transition

    seen, acts = (87, 8) if published else (6, 2)
    tiny = {"policy_hidden_layer_sizes": (16, 16), "value_hidden_layer_sizes": (16, 16)}
    both = networks.make_ppo_networks(seen, acts, **({} if published else tiny))
    keys = jax.random.split(jax.random.key(0), 2)
    params = losses.PPONetworkParams(
        policy=both.policy_network.init(keys[0]), value=both.value_network.init(keys[1])
    )
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=(4, 5, *shape)).astype(np.float32)

    policy = {"raw_action": normal(acts), "log_prob": normal()}
    policy |= {"distribution_params": normal(2 * acts)}
    steps = Transition(
        observation=normal(seen),
        action=normal(acts),
        reward=normal(),
        discount=np.ones((4, 5), np.float32),
        next_observation=normal(seen),
        extras={
            "policy_extras": policy,
            "state_extras": {"truncation": np.zeros((4, 5), np.float32)},
        },
    )
    normalizer = running_statistics.init_state(specs.Array((seen,), jnp.float32))

    def loss(params, normalizer, steps, key):
        value, _ = losses.compute_ppo_loss(params, normalizer, steps, key, both)
        return value

    return Problem(loss, params, (normalizer, steps, jax.random.key(1)))


def one_device(*axes: str) -> Any:
    shape = (1,) * len(axes)
    return jax.set_mesh(jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes)))


@contextlib.contextmanager
def older_clip() -> Iterator[None]:
    """`jnp.clip` with the names of its bounds that JAX dropped and FlaxT5 still says."""
    clip = jnp.clip

    def with_old_names(x, *args, **kwargs):
        return clip(x, *args, **{name.removeprefix("a_"): value for name, value in kwargs.items()})

    with unittest.mock.patch.object(jnp, "clip", with_old_names):
        yield


BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**BLOCKS, "hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": 32}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 8}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4}
VIT = {**BLOCKS, "hidden_size": 64, "intermediate_size": 256, "image_size": 16, "patch_size": 8}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
TUNIX = {"num_layers": 2, "embed_dim": 64, "hidden_dim": 256}
TUNIX |= {"num_heads": 4, "head_dim": 16, "num_kv_heads": 2}
IN_TRANSFORMERS = {
    "BERT, masked LM": (transformers_text, "FlaxBertForMaskedLM", "BertConfig", SMALL),
    "Llama": (transformers_text, "FlaxLlamaForCausalLM", "LlamaConfig", SMALL),
    "GPT-2": (transformers_text, "FlaxGPT2LMHeadModel", "GPT2Config", GPT2),
    "ViT": (transformers_images, "FlaxViTForImageClassification", "ViTConfig", VIT),
    "ResNet-50": (transformers_images, "FlaxResNetForImageClassification", "ResNetConfig", RESNET),
}
T5_SMALL = functools.partial(transformers_text, "FlaxT5ForConditionalGeneration", "T5Config", T5)
IN_TUNIX = {
    "Llama 3.2": ("llama3", "Llama3", "llama3p2_1b", {"vocab_size": 64}),
    "Gemma 2": ("gemma", "Gemma", "gemma2_2b", {"num_embed": 64}),
    "Gemma 3": ("gemma3", "Gemma3", "gemma3_1b_it", {"num_embed": 64}),
    "Qwen 2.5": ("qwen2", "Qwen2", "qwen2p5_0p5b", {"vocab_size": 64}),
    "Qwen 3": ("qwen3", "Qwen3", "qwen3_0p6b", {"vocab_size": 64}),
}
TUNIX_MESH = functools.partial(one_device, "fsdp", "tp")
MODELS = {
    **{
        name: Model("transformers", "transformers", functools.partial(build, *rest))
        for name, (build, *rest) in IN_TRANSFORMERS.items()
    },
    "T5": Model("transformers", "transformers", T5_SMALL, around=older_clip),
    "Stable Diffusion UNet": Model("diffusers", "diffusers", diffusers_unet),
    "ResNet-18": Model("flaxmodels", "flaxmodels", flaxmodels_resnet),
    "ViT, NNX": Model(
        "jax-image-models", "jimm", jimm_vit, True, functools.partial(one_device, "fsdp")
    ),
    **{
        f"{name}, NNX": Model(
            "google-tunix", "tunix.models", functools.partial(tunix_text, *rest), True, TUNIX_MESH
        )
        for name, rest in IN_TUNIX.items()
    },
    "LoRA of Llama 3.2, NNX": Model("qwix", "qwix", qwix_lora, True, TUNIX_MESH, nnx.LoRAParam),
    "PPO": Model("brax", "brax", brax_ppo),
    "ViT, Equinox": Model("equimo", "equimo", equimo_vit),
    "ResNet-50, Haiku": Model("dm-haiku", "haiku", haiku_resnet),
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
        with model.around():
            layout = model.trace_layout(model.build(True))
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
