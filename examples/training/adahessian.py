"""AdaHessian (Yao et al., arXiv:2006.00719): Adam with the Hessian's diagonal.

    D_t = z ⊙ H z,  z random signs             Hutchinson's estimate of diag(H)
    m_t = b1 m + (1-b1) g,   v_t = b2 v + (1-b2) D_t²
    θ ← θ - α m̂ / (√v̂ + eps),   m̂ = m / (1-b1^t),   v̂ = v / (1-b2^t)

This is Algorithm 1 of the paper with Hessian power 1, without averaging D over the positions of a
kernel. H z is the derivative of the gradient along z, computed together with the gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.training.task import Task


def scale_by_adahessian(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-4) -> Any:
    """The direction m̂ / (√v̂ + eps); `update` takes D_t as `hessian`."""

    def init(params):
        mu, nu = (optax.tree.zeros_like(params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(grads, state, params=None, *, hessian, **_):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(hessian, state.nu, b2, 2)
        mean = optax.tree.bias_correction(mu, b1, count)
        square = optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (v**0.5 + eps), mean, square)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def of_hessian(task: Task) -> Callable[..., Any]:
    """The `find` of AdaHessian: gradients, and an estimate of the Hessian's diagonal."""
    value_and_grad = jax.value_and_grad(task.loss, has_aux=True)

    def find(params, model_state, opt_state, batch, key):
        key, probe = jax.random.split(key)
        signs = optax.tree.random_like(probe, params, jax.random.rademacher)

        def gradient(params):
            value, grads = value_and_grad(params, model_state, batch, key)
            return grads, value

        grads, products, value = jax.jvp(gradient, (params,), (signs,), has_aux=True)
        return value, grads, {"hessian": jax.tree.map(lambda z, hz: z * hz, signs, products)}

    return find
