"""AdaFisher for JAX: curvature-aware training as an optax transformation."""

from adafisher_jax import diagnostics, nnx, statistics
from adafisher_jax.alias import adafisher, adafisherw
from adafisher_jax.factors import Factor
from adafisher_jax.layout import Layer, Layout, Leaf, Uncovered
from adafisher_jax.linen import trace_layout, value_and_grad
from adafisher_jax.micro_batches import accumulate, add_micro_batch
from adafisher_jax.optimizer import ScaleByAdaFisherState, scale_by_adafisher
from adafisher_jax.tap import tap
from adafisher_jax.train_state import TrainState
from adafisher_jax.with_probes import (
    WithProbes,
    add_probes,
    loss_with_probes,
    optimizer_with_probes,
)

__version__ = "0.1.0"

__all__ = [
    "Factor",
    "Layer",
    "Layout",
    "Leaf",
    "ScaleByAdaFisherState",
    "TrainState",
    "Uncovered",
    "WithProbes",
    "accumulate",
    "adafisher",
    "adafisherw",
    "add_micro_batch",
    "add_probes",
    "diagnostics",
    "loss_with_probes",
    "nnx",
    "optimizer_with_probes",
    "scale_by_adafisher",
    "statistics",
    "tap",
    "trace_layout",
    "value_and_grad",
]


def __dir__() -> list[str]:
    return __all__
