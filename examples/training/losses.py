"""The loss of classifiers and language models, known to the optimizers that ask for it."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

_report: contextvars.ContextVar[Callable[..., Any] | None] = contextvars.ContextVar(
    "_report", default=None
)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over all labels, in float32; `labels` has all axes of `logits` but the last."""
    logits = logits.astype(jnp.float32)
    if report := _report.get():
        # K-FAC divides its sum by the number of examples, and a sequence has several labels.
        report(logits, labels, weight=len(labels) / labels.size)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@contextlib.contextmanager
def reported_to(report: Callable[..., Any]) -> Iterator[None]:
    """Where `report(logits, labels, weight=...)` is told of every cross-entropy that is traced.

    kfac-jax needs to know where the model's distribution is; the others do not care.
    """
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)
