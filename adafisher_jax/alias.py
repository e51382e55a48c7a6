"""AdaFisher with a learning rate and weight decay, as optax has its optimizers."""

import math
from typing import Any

import optax

from adafisher_jax.layout import Layout
from adafisher_jax.optimizer import scale_by_adafisher
from adafisher_jax.required import shows_call
from adafisher_jax.rules import Rule, is_known, is_number
from adafisher_jax.step import steps_like


@shows_call('adafisher(3e-2, layout, rule="centered")')
def adafisher(
    learning_rate: optax.ScalarOrSchedule,
    layout: Layout | None,
    *,
    rule: str | Rule,
    b1: Any = 0.9,
    curvature_ema: Any = None,
    damping: Any = None,
    weight_decay: Any = 0.0,
    mask: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaFisher with coupled weight decay (Algorithm 1, arXiv:2405.16397).

    .. math:: \theta_t = \theta_{t-1} - \alpha\, d_t, \qquad g_t = \nabla L(\theta) + \kappa \theta

    `d` is the result of `scale_by_adafisher`, which documents the other arguments and errors.

    `learning_rate` is α, a number or a schedule. Begin with 3e-2 for `"centered"`; the paper has
    1e-3. `weight_decay` is κ, which is added to the gradient. `mask` says which parameters decay,
    as in `optax.add_decayed_weights`. A rate or a decay that is neither a number nor a schedule is
    a TypeError, one that is not finite a ValueError.

    Example:
      >>> import adafisher_jax as af, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> model, x, y = nn.Dense(1), jnp.ones((8, 3)), jnp.ones((8, 1))
      >>> params = model.init(jax.random.key(0), x)
      >>> loss_fn = lambda params, x, y: jnp.mean((model.apply(params, x) - y) ** 2)
      >>> layout = af.trace_layout(loss_fn, params, x, y)
      >>> tx = af.adafisher(3e-2, layout, rule="centered")
      >>> grad_fn = af.value_and_grad(loss_fn, layout)
      >>> loss, grads, factors = grad_fn(params, x, y)
      >>> updates, state = tx.update(grads, tx.init(params), params, factors=factors)
      >>> params = optax.apply_updates(params, updates)
    """
    return _chain(
        _decay(weight_decay, mask),
        scale_by_adafisher(
            layout,
            rule=rule,
            b1=b1,
            curvature_ema=curvature_ema,
            damping=damping,
            mu_dtype=mu_dtype,
        ),
        _scale(learning_rate),
    )


@shows_call('adafisherw(3e-2, layout, rule="centered")')
def adafisherw(
    learning_rate: optax.ScalarOrSchedule,
    layout: Layout | None,
    *,
    rule: str | Rule,
    b1: Any = 0.9,
    curvature_ema: Any = None,
    damping: Any = None,
    weight_decay: Any = 1e-2,
    mask: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaFisherW: `adafisher` with decoupled weight decay.

    .. math:: \theta_t = \theta_{t-1} - \alpha\,(d_t + \kappa \theta_{t-1})

    Arguments and errors are those of `adafisher`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = adafisherw(0.1, None, rule="centered", weight_decay=0.5)
      >>> params = jnp.array([2.0])
      >>> updates, _ = tx.update(jnp.array([0.0]), tx.init(params), params)
      >>> updates.tolist() == [-jnp.float32(0.1)]
      True
    """
    return _chain(
        scale_by_adafisher(
            layout,
            rule=rule,
            b1=b1,
            curvature_ema=curvature_ema,
            damping=damping,
            mu_dtype=mu_dtype,
        ),
        _decay(weight_decay, mask),
        _scale(learning_rate),
    )


def _chain(*links: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns a chain whose updates have the gradients' types, and are 0 where not finite."""
    chain = optax.chain(*links)

    def update(
        grads: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        updates, state = chain.update(grads, state, params, **extra_args)
        return steps_like(grads, updates), state

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _scale(learning_rate: Any) -> optax.GradientTransformation:
    _check_rate("learning_rate", learning_rate)
    return optax.scale_by_learning_rate(learning_rate)


def _decay(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """Returns weight decay; the identity, which needs no `params`, for the number zero."""
    _check_rate("weight_decay", weight_decay)
    if isinstance(mask, str):
        raise TypeError(f"mask: got {mask!r}, wanted a tree of Booleans or a function of params")
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)


def _check_rate(name: str, value: Any) -> None:
    if not (callable(value) or is_number(value)):
        raise TypeError(f"{name}: got {value!r:.60}, wanted a number or a schedule, as 3e-2")
    # Updates that are not finite are 0, so that nothing would ever move.
    if is_known(value) and not callable(value) and not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, wanted a finite number or a schedule")
