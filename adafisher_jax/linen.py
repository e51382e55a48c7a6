"""Layout, gradients and factors of a loss of a pytree of parameters, as of Flax Linen."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from adafisher_jax import capture
from adafisher_jax.layout import Layout, check_layout
from adafisher_jax.loss import check_loss, explaining


def trace_layout(
    loss_fn: Callable[..., Any], params: Any, /, *args: Any, has_aux: bool = False, **kwargs: Any
) -> Layout:
    """Finds the layers that `loss_fn(params, *args, **kwargs)` calls, without computing anything.

    Args:
      loss_fn: any traceable function that multiplies parameters in its first argument by data, as
        Flax Linen modules do.
      params: parameters, a full dict of variables, or a pytree with those of several models.
      *args: further arguments. Arrays may be `jax.ShapeDtypeStruct`. Other values (`train=True`)
        are passed on unchanged.
      has_aux: whether `loss_fn` returns a pair `(scalar, aux)`.
      **kwargs: further arguments, as `args`.

    Returns:
      A static, hashable `Layout`. Print it to see what is covered.

    Raises:
      TypeError: if the loss or `params` is a module, a leaf of `params` is not floating-point, or
        the loss with `has_aux` returns no pair.
      ValueError: if the loss calls no layer and multiplies no parameter by data, layers of two
        kinds share a parameter, or the loss names a mapped axis that does not exist here.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), jnp.ones((8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> print(trace_layout(loss_fn, params, x))
      parameter        layer  in  out  stacked  covered
      ---------------  -----  --  ---  -------  -------
      layers_0/bias    dense  -   4    -        yes
      layers_0/kernel  dense  3   4    -        yes
      layers_2/bias    dense  -   2    -        yes
      layers_2/kernel  dense  4   2    -        yes
      100.0% of 26 parameters under a Fisher block
    """
    check_loss(loss_fn)
    _check(params)
    return capture.trace_layout(explaining(loss_fn, has_aux or None), params, args, kwargs)


def value_and_grad(
    loss_fn: Callable[..., Any], layout: Layout, has_aux: bool = False, *, when: Any = True
) -> Callable[..., Any]:
    """Returns `jax.value_and_grad` of a loss, with the factors from the same backward pass.

    Args:
      loss_fn: the loss of `trace_layout`; it returns a scalar, or `(scalar, aux)` with `has_aux`.
      layout: from `trace_layout`.
      has_aux: whether `loss_fn` returns auxiliary data.
      when: whether to compute factors: a Boolean or a scalar array, such as `step % 10 == 0`. If it
        is false, factors are zeros of zero rows, which change no average, and cost nothing.

    Returns:
      A function of `loss_fn`'s arguments that returns `(loss, grads, factors)`, or
      `((loss, aux), grads, factors)`. The first two are those of `jax.value_and_grad`. The third is
      a dict from layer path to `Factor`.

    Call the returned function inside the jitted train step: an eager call traces the loss anew.

    Raises:
      TypeError: if the loss is a module, `layout` is no layout, or `when` is not one Boolean.
      ValueError: from the returned function, if the layout is of another model or loss, or does
        not have a parameter.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(2), jnp.array([[1.0, 2.0, 3.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda params, x: jnp.sum(model.apply({"params": params}, x))
      >>> layout = trace_layout(loss_fn, params, x)
      >>> loss, grads, factors = value_and_grad(loss_fn, layout)(params, x)
      >>> factors[""].h.ravel().tolist(), factors[""].s.ravel().tolist()
      ([1.0, 4.0, 9.0], [1.0, 1.0])
    """
    check_loss(loss_fn)
    check_layout(layout)
    when = capture.condition(when)
    loss = explaining(loss_fn, has_aux)

    def grad_fn(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check(params)
        return capture.value_and_grad(loss, layout, has_aux, params, args, kwargs, when=when)

    return grad_fn


def _check(params: Any) -> None:
    modules = nnx.Module | nn.Module
    for leaf in jax.tree.leaves(params, is_leaf=lambda one: isinstance(one, modules)):
        if isinstance(leaf, nnx.Module):
            raise TypeError(
                "params: got an nnx.Module, for which there are adafisher_jax.nnx.trace_layout and "
                "adafisher_jax.nnx.value_and_grad"
            )
        if isinstance(leaf, nn.Module):
            raise TypeError(
                "params: got a module, wanted its parameters, as "
                'params = model.init(key, x)["params"]'
            )
