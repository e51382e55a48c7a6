"""Traces a loss: finds the layout of its layers, and its gradients together with the factors."""

from adafisher_jax.capture.gradient import (
    DIAGONAL,
    Form,
    condition,
    means_of,
    probed,
    probes_of,
    trace_layout,
    value_and_grad,
)

__all__ = [
    "DIAGONAL",
    "Form",
    "condition",
    "means_of",
    "probed",
    "probes_of",
    "trace_layout",
    "value_and_grad",
]
