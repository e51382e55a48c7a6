"""The models of the recorded trajectories, rebuilt with Flax, and their parameters."""

import flax.linen as nn
import jax.numpy as jnp
import optax


class Model(nn.Module):
    """One of the recorded architectures, with the layer settings an archive holds."""

    archive: dict

    def layer(self, name):
        kind = str(self.setting(name, "kind"))
        bias = bool(self.setting(name, "bias"))
        if kind == "linear":
            return nn.Dense(
                int(self.setting(name, "out_features")), use_bias=bias, name=name, **F64
            )
        if kind == "conv2d":
            return nn.Conv(
                int(self.setting(name, "out_channels")),
                self.pair(name, "kernel_size"),
                strides=self.pair(name, "stride"),
                padding=[(p, p) for p in self.pair(name, "padding")],
                feature_group_count=int(self.setting(name, "groups")),
                use_bias=bias,
                name=name,
                **F64,
            )
        epsilon = float(self.setting(name, "eps"))
        if kind == "batchnorm2d":
            return nn.BatchNorm(use_running_average=False, epsilon=epsilon, name=name, **F64)
        return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name, **F64)

    def setting(self, name, key):
        return self.archive[f"layer/{name}/{key}"]

    def pair(self, name, key):
        return tuple(int(n) for n in self.setting(name, key))

    @nn.compact
    def __call__(self, x):
        match str(self.archive["config/arch"]):
            case "mlp":
                x = jnp.tanh(self.layer("fc1")(x))
                x = jnp.tanh(self.layer("fc2")(x))
                return self.layer("fc3")(x)
            case "cnn":
                for name in ("conv1", "conv2", "conv3"):
                    x = nn.relu(self.layer(name)(x))
                return self.layer("head")(x.mean((1, 2)))
            case "cnn_bn":
                x = nn.relu(self.layer("bn")(self.layer("conv")(x)))
                return self.layer("head")(x.mean((1, 2)))
            case "ln_block":
                inner = self.layer("fc1")(self.layer("ln1")(x))
                x = x + self.layer("fc2")(nn.gelu(inner, approximate=True))
                return self.layer("head")(self.layer("ln_f")(x).mean(1))
        raise ValueError(f"unknown architecture {self.archive['config/arch']}")


F64 = {"param_dtype": jnp.float64}
NAMES = {"linear": ("kernel", "bias"), "conv2d": ("kernel", "bias")}


def to_flax(archive, prefix):
    """The parameters stored under a prefix, in Flax's names and layouts."""
    params = {}
    for name in archive["names/params"]:
        module, _, which = str(name).partition(".")
        kind = str(archive[f"layer/{module}/kind"])
        weight, bias = NAMES.get(kind, ("scale", "bias"))
        value = prefix(str(name))
        if which == "weight" and kind == "linear":
            value = value.T
        elif which == "weight" and kind == "conv2d":
            value = value.transpose(2, 3, 1, 0)
        params.setdefault(module, {})[weight if which == "weight" else bias] = jnp.asarray(value)
    return params


def batch(archive, step):
    """The inputs, channels last, and targets of a step."""
    x, y = archive[f"batch/{step}/x"], archive[f"batch/{step}/y"]
    return jnp.asarray(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x), jnp.asarray(y)


def make_loss(archive):
    model = Model({key: archive[key] for key in archive if key.startswith(("layer", "config"))})

    def loss_fn(params, x, y):
        out, _ = model.apply({"params": params}, x, mutable=["batch_stats"])
        if "softmax" in str(archive["config/loss"]):
            return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()
        return jnp.mean(jnp.square(out - y))

    return loss_fn
