"""Flax NNX: the layout of a loss, and its gradients together with its factors."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.nnx import extract
from flax.nnx.transforms.general import merge_inputs, split_inputs

from adafisher_jax import capture
from adafisher_jax.layout import Layout
from adafisher_jax.loss import check_loss, explaining


def trace_layout(
    loss_fn: Callable[..., Any],
    model: nnx.Module,
    /,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> Layout:
    """Finds the layers that `loss_fn(model, *args, **kwargs)` calls, without computing anything.

    Args:
      loss_fn: any traceable function that calls NNX layers of its first argument.
      model: the module; its `nnx.Param`s are the parameters.
      *args: further arguments. Arrays may be `jax.ShapeDtypeStruct`; what is no array
        (`train=True`) is passed on as it is.
      has_aux: whether `loss_fn` returns `(scalar, aux)`, which is then checked.
      **kwargs: likewise.

    Returns:
      A static, hashable `Layout`; print it to see what is covered. Paths are those of
      `nnx.state(model, nnx.Param)`; a module that is shared has its first one.

    Raises:
      TypeError: for a loss that is a module, a model that is none, an `nnx.Param` that is not
        floating-point, and what is no pair with `has_aux`.
      ValueError: as `adafisher_jax.trace_layout`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
      >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
      >>> print(trace_layout(loss_fn, model, jnp.ones((8, 3))))
      parameter        layer  in  out  stacked  covered
      ---------------  -----  --  ---  -------  -------
      layers/0/bias    dense  -   4    -        yes
      layers/0/kernel  dense  3   4    -        yes
      100.0% of 16 parameters under a Fisher block
    """
    check_loss(loss_fn)
    _check(model)
    explained = explaining(loss_fn, has_aux)
    model, args, kwargs = extract.to_tree((model, args, kwargs))
    params, rest = _parts(model)

    def loss(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        whole = _whole(model, params, rest)
        model_again, args, kwargs = extract.from_tree((whole, args, kwargs))
        result = explained(model_again, *args, **kwargs)
        return jax.tree.leaves(result)[:1]  # the loss: what else there is may be no pytree

    return capture.trace_layout(loss, params, (rest, args, kwargs), {})


def value_and_grad(
    loss_fn: Callable[..., Any], layout: Layout, has_aux: bool = False, *, when: Any = True
) -> Callable[..., Any]:
    """`nnx.value_and_grad`, with the layers' factors from the same backward pass.

    Args:
      loss_fn: as in `trace_layout`; it returns a scalar, or `(scalar, aux)` with `has_aux`.
      layout: from `trace_layout`.
      has_aux: whether `loss_fn` returns auxiliary data.
      when: whether there are factors; see `adafisher_jax.value_and_grad`.

    Returns:
      A function of `loss_fn`'s arguments that returns `(loss, grads, factors)`, or
      `((loss, aux), grads, factors)`: the first two are those of `nnx.value_and_grad`, which also
      carries over what the loss changes in its arguments (running statistics, random number
      counts); the third is a dict from layer path to `Factor`.

    Raises:
      TypeError, ValueError: as `trace_layout`, and if the layout is another model's or loss's.

    Example:
      >>> from flax import nnx
      >>> import adafisher_jax as af, jax.numpy as jnp
      >>> model, x = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), jnp.array([[1.0, 2.0, 3.0]])
      >>> loss_fn = lambda model, x: jnp.sum(model(x))
      >>> layout = af.nnx.trace_layout(loss_fn, model, x)
      >>> tx = af.adafisher(3e-2, layout, rule="centered")
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> loss, grads, factors = af.nnx.value_and_grad(loss_fn, layout)(model, x)
      >>> _ = optimizer.update(model, grads, factors=factors)
      >>> factors[""].h.ravel().tolist(), factors[""].s.ravel().tolist()
      ([1.0, 4.0, 9.0], [1.0])
    """
    check_loss(loss_fn)
    capture.check_layout(layout)
    when = capture.condition(when)
    explained = explaining(loss_fn, has_aux)

    def grad_fn(model: nnx.Module, /, *args: Any, **kwargs: Any) -> Any:
        _check(model)

        # These two exchange modules for pytrees on the way in, and carry changes out.
        @split_inputs
        def differentiated(model: Any, args: Any, kwargs: Any) -> Any:
            params, rest = _parts(model)

            def loss(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
                changed, result = merged(_whole(model, params, rest), args, kwargs)
                value, aux = result if has_aux else (result, None)
                return value, (changed, aux)

            (value, (changed, aux)), grads, factors = capture.value_and_grad(
                loss, layout, True, params, (rest, args, kwargs), {}, when=when
            )
            return changed, ((value, aux) if has_aux else value, grads, factors)

        @merge_inputs
        def merged(model: nnx.Module, args: Any, kwargs: Any) -> Any:
            return explained(model, *args, **kwargs)

        return differentiated(model, args, kwargs)

    return grad_fn


def _parts(model: Any) -> Any:
    """The parameters and the rest of a module that was exchanged for a pytree."""
    (state,) = model.states
    return nnx.split_state(state, nnx.Param, ...)


def _whole(model: Any, params: Any, rest: Any) -> Any:
    return model.replace(states=(nnx.merge_state(params, rest),))


def _check(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model: got {type(model).__name__}, wanted an nnx.Module; for the parameters of Linen "
            "there are adafisher_jax.trace_layout and adafisher_jax.value_and_grad"
        )
