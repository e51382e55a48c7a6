"""One step of a group of like layers, and of a parameter outside of all layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from adafisher_jax.alike import stack
from adafisher_jax.factors import Factor
from adafisher_jax.layout import Layer
from adafisher_jax.rules import Curvature, Outcome, Pair, Rule, Vectors

# Jitted, so that groups of equal layers, and equal parameters, are traced and lowered once.


@functools.partial(jax.jit, static_argnums=0)
def step_group(
    layer: Layer,
    rule: Rule,
    b1: Any,
    correction: jax.Array,
    curvature: Curvature,
    fresh: tuple[Factor, ...] | None,
    mu: Pair,
    grads: Pair,
    scales: Pair,
) -> tuple[Curvature, Outcome, Pair, Pair, Pair]:
    """Returns the averages of a group, their `Outcome`, and momenta, steps and scales."""
    outcome = Outcome(*(jnp.zeros(layer.shape[0], bool) for _ in range(2)))
    if fresh is not None:
        curvature, outcome = rule.refresh(layer, curvature, stack(fresh))
    new = _typed_like(mu, _averages(b1, mu, grads))
    momentum = _momentum(rule, b1, correction, mu, grads)
    # Computed again for stacked vectors: otherwise XLA would store each momentum separately.
    together = (_vectors(layer, pair) for pair in (mu, grads))
    vectors = Vectors(_momentum(rule, b1, correction, *together), _vectors(layer, grads))
    steps, scales = rule.direction(layer, curvature, momentum, vectors, scales)
    return curvature, outcome, new, steps_like(grads, steps), scales


def _vectors(layer: Layer, pair: Pair) -> Pair:
    """Returns the biases, or all parameters of normalization layers, stacked."""
    weights, biases = pair
    kept = Pair(weights if layer.kind == "norm" else None, biases)
    return Pair(*(values and stack(values) for values in kept))


@jax.jit
def step_alone(
    rule: Rule, b1: Any, correction: jax.Array, mu: jax.Array, grad: jax.Array, scale: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """Returns the momentum, step and scale of a parameter outside of all layers."""
    new = _typed_like(mu, _averages(b1, mu, grad))
    step, scale = rule.fallback(_momentum(rule, b1, correction, mu, grad), grad, scale)
    return new, steps_like(grad, step), scale


def _typed_like(wanted: Any, values: Any) -> Any:
    return jax.tree.map(lambda like, value: value.astype(like.dtype), wanted, values)


def steps_like(grads: Any, steps: Any) -> Any:
    """Returns steps in the gradients' types, and 0 where they are not finite in these."""
    typed = _typed_like(grads, steps)
    return jax.tree.map(lambda step: jnp.where(jnp.isfinite(step), step, 0), typed)


def _momentum(rule: Rule, b1: Any, correction: jax.Array, mu: Any, grads: Any) -> Any:
    """The bias-corrected momentum, one step ahead if the rule asks for it."""
    used = _averages(b1, mu, grads)
    if rule.nesterov:
        used = _averages(b1, used, grads)
    return jax.tree.map(lambda m: m * correction.astype(m.dtype), used)


def _averages(b1: Any, mu: Any, grads: Any) -> Any:
    return jax.tree.map(functools.partial(_average, b1), mu, grads)


def _average(b1: Any, mu: jax.Array, grad: jax.Array) -> jax.Array:
    """Returns the momentum after `grad`, in at least float32; unchanged if `mu` cannot store it."""
    most = jnp.finfo(mu.dtype).max
    dtype = jnp.promote_types(jnp.promote_types(mu.dtype, grad.dtype), jnp.float32)
    mu, grad = mu.astype(dtype), grad.astype(dtype)
    new = b1 * mu + (1 - b1) * grad
    return jnp.where(jnp.abs(new) <= most.astype(jnp.finfo(dtype).dtype), new, mu)
