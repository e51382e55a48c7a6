"""Losses that report themselves to optimizers which need to know them, such as K-FAC."""

import contextlib
import contextvars
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Reports = Mapping[Callable[..., Any], Callable[..., Any]]
_NONE: Reports = types.MappingProxyType({})
_reports: contextvars.ContextVar[Reports] = contextvars.ContextVar("_reports", default=_NONE)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over all labels, in float32; `labels` has the axes of `logits` without the last."""
    logits = logits.astype(jnp.float32)
    if report := _reports.get().get(cross_entropy):
        # K-FAC divides the sum by the number of examples, but a sequence has several labels.
        report(logits, labels, weight=len(labels) / labels.size)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over examples of half the squared distance, in float32."""
    outputs = outputs.astype(jnp.float32)
    if report := _reports.get().get(squared_error):
        report(outputs, targets)
    return 0.5 * jnp.square(outputs - targets).sum(-1).mean()


@contextlib.contextmanager
def reported_to(reports: Reports) -> Iterator[None]:
    """A context in which every traced loss calls its report with its arguments and a weight.

    kfac-jax needs this to find the distribution of the model. Other optimizers do not.
    """
    token = _reports.set(reports)
    try:
        yield
    finally:
        _reports.reset(token)
