"""A convolution with batch normalization, the building block of the convolutional models."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

he_normal_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNorm(nn.Module):
    """A convolution without bias, since the normalization has one."""

    features: int
    size: int
    strides: int = 1
    groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(
            self.features,
            (self.size, self.size),
            self.strides,
            padding=self.size // 2,
            feature_group_count=self.groups,
            use_bias=False,
            kernel_init=he_normal_out,
            dtype=self.dtype,
        )(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x)
