"""AdaFisher for JAX: curvature-aware training as an optax transformation."""

from adafisher_jax import statistics
from adafisher_jax.factors import Factor
from adafisher_jax.layout import Layer, Layout, Leaf, Uncovered
from adafisher_jax.linen import trace_layout, value_and_grad
from adafisher_jax.optimizer import (
    ScaleByAdaFisherState,
    adafisher,
    adafisherw,
    scale_by_adafisher,
)
from adafisher_jax.tap import tap

__all__ = [
    "Factor",
    "Layer",
    "Layout",
    "Leaf",
    "ScaleByAdaFisherState",
    "Uncovered",
    "adafisher",
    "adafisherw",
    "scale_by_adafisher",
    "statistics",
    "tap",
    "trace_layout",
    "value_and_grad",
]
