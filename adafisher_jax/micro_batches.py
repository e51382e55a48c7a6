r"""Gradient accumulation: the loss, gradients and factors of a batch from its micro-batches.

The loss of the batch is :math:`L = \sum_k w_k L_k`, and a layer has :math:`n_k` rows in micro-batch
`k`. The cotangents of `L` in micro-batch `k` are :math:`w_k` times those of `L_k`. So

.. math::

    \nabla L = \sum_k w_k \nabla L_k, \qquad
    H = \sum_k \frac{n_k}{n} H_k, \qquad
    S = \sum_k \frac{n_k}{n} w_k^2 S_k, \qquad n = \sum_k n_k
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adafisher_jax.factors import Factor
from adafisher_jax.layout import Layer, Layout, check_factors, check_layout
from adafisher_jax.paths import by_path
from adafisher_jax.random_counts import check_random_counts


def accumulate(
    grad_fn: Callable[..., Any], layout: Layout, weights: Any = None
) -> Callable[..., Any]:
    """Runs a gradient function over micro-batches, in the memory of one micro-batch.

    Args:
      grad_fn: from `value_and_grad`.
      layout: the layout of `grad_fn`.
      weights: the weight of each micro-batch's loss in the batch's, of shape (k,). If the loss is
        a mean, a weight is the micro-batch's share of the (unmasked) rows; if it is a sum, weights
        are ones. None stands for equal shares, 1/k. A micro-batch of weight 0 may have a loss that
        is not finite.

    Returns:
      A function `(params, *args, **kwargs)` that returns what `grad_fn` returns, for the whole
      batch. Each array among its arguments is a stack of k micro-batches. Other arguments
      (`train=True`) are passed on unchanged. Sums are accumulated in at least float32. Auxiliary
      data are returned as a stack.

    Raises:
      TypeError: from the returned function, if `params` is an `nnx.Module` (use
        `adafisher_jax.nnx.accumulate` then), `layout` is no layout, or `grad_fn` returns something
        else.
      ValueError: from the returned function, if the arguments and `weights` differ in their
        leading axis, or if `grad_fn` drops the change to the random counts of an `nnx.Module`.

    Example:
      >>> import adafisher_jax as af, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(2), jnp.arange(12.0).reshape(4, 3)
      >>> params = model.init(jax.random.key(0), x)
      >>> loss_fn = lambda params, x: jnp.mean(model.apply(params, x) ** 2)
      >>> layout = af.trace_layout(loss_fn, params, x)
      >>> grad_fn = af.value_and_grad(loss_fn, layout)
      >>> _, _, factors = af.accumulate(grad_fn, layout)(params, x.reshape(2, 2, 3))
      >>> factors["params"].rows.item(), factors["params"].mean.ravel().tolist()
      (4.0, [4.5, 5.5, 6.5])
    """

    def accumulated(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(params, nnx.Module):
            raise TypeError(
                "params: got an nnx.Module, which a scan cannot carry as it is: write "
                "adafisher_jax.nnx.accumulate(grad_fn, layout)(model, ...)"
            )

        def one(nothing: Any, *args: Any, **kwargs: Any) -> Any:
            return nothing, grad_fn(params, *args, **kwargs)

        _, result = over_micro_batches(one, layout, weights, (), args, kwargs)
        return result

    return accumulated


def over_micro_batches(
    grad_fn: Callable[..., Any], layout: Layout, weights: Any, carried: Any, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """Accumulates as `accumulate` does, and carries arrays from each micro-batch to the next.

    Args:
      grad_fn: a function `(carried, *args, **kwargs)` that returns the new carried arrays, and the
        result of a function from `value_and_grad`.
      layout: as in `accumulate`.
      weights: as in `accumulate`.
      carried: a pytree of arrays, the carried arrays of the first micro-batch.
      args: the other arguments, stacked as in `accumulate`.
      kwargs: the other keyword arguments, stacked as in `accumulate`.

    Returns:
      The carried arrays after the last micro-batch, and the result for the whole batch.
    """
    check_layout(layout)
    leaves, structure = by_path({"args": args, "kwargs": kwargs})
    arrays = {p: leaf for p, leaf in leaves.items() if isinstance(leaf, jax.Array | np.ndarray)}
    k = _leading_axis(arrays)
    each = jnp.full(k, 1 / k) if weights is None else jnp.asarray(weights)
    if each.shape != (k,):
        raise ValueError(f"weights has shape {each.shape}, {k} micro-batches want ({k},)")

    @jax.jit  # traced once, for the shapes of its results and for the scan
    def run(carried: Any, arrays: dict[str, Any]) -> tuple[Any, Any, Any]:
        call = jax.tree.unflatten(structure, (leaves | arrays).values())
        carried, result = grad_fn(carried, *call["args"], **call["kwargs"])
        if not isinstance(result, tuple) or len(result) != 3:
            raise TypeError(
                f"grad_fn: it returns {type(result).__name__}, wanted (loss, grads, factors), as a "
                "function of adafisher_jax.value_and_grad does"
            )
        value, grads, factors = result
        loss, *aux = value if isinstance(value, tuple) else (value,)
        return carried, (loss, grads, factors), aux

    def add(before: Any, one: Any) -> tuple[Any, Any]:
        carried, total = before
        weight, arrays = one
        carried, result, aux = run(carried, arrays)
        return (carried, add_micro_batch(total, result, weight, layout)), aux

    first = {p: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for p, a in arrays.items()}
    program, (_, shapes, _) = jax.make_jaxpr(run, return_shape=True)(carried, first)
    check_random_counts(program)
    (carried, total), aux = jax.lax.scan(add, (carried, _nothing(shapes)), (each, arrays))
    loss, grads, factors = jax.tree.map(lambda a, like: a.astype(like.dtype), total, shapes)
    return carried, ((loss, *aux) if aux else loss, grads, factors)


def add_micro_batch(total: Any, result: Any, weight: Any, layout: Layout) -> Any:
    """Takes one step of `accumulate`, for a loop over micro-batches of different sizes.

    Args:
      total: the total of the micro-batches so far; None before the first.
      result: `(loss, grads, factors)` of one more micro-batch.
      weight: the weight of its loss in the batch's.
      layout: the layout of the factors.

    Returns:
      The new total `(loss, grads, factors)`, in at least float32.

    Example:
      >>> import adafisher_jax as af, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(2), jnp.arange(12.0).reshape(4, 3)
      >>> params = model.init(jax.random.key(0), x)
      >>> loss_fn = lambda params, x: jnp.mean(model.apply(params, x) ** 2)
      >>> layout = af.trace_layout(loss_fn, params, x)
      >>> grad_fn, total = af.value_and_grad(loss_fn, layout), None
      >>> for part in (x[:3], x[3:]):
      ...     total = af.add_micro_batch(total, grad_fn(params, part), len(part) / 4, layout)
      >>> total[2]["params"].rows.item(), total[2]["params"].mean.ravel().tolist()
      (4.0, [4.5, 5.5, 6.5])
    """
    loss, grads, factors = result
    if isinstance(loss, tuple):
        raise ValueError("result: its loss is a tuple, wanted the loss without auxiliary data")
    check_factors(factors, layout.layers)
    loss_sum, grads_sum, means = _nothing(result) if total is None else total
    loss, grads = jax.tree.map(
        lambda a, b: a + _weighted(weight, b.astype(a.dtype)), (loss_sum, grads_sum), (loss, grads)
    )
    pooled = {x.path: _pool(x, means[x.path], factors[x.path], weight) for x in layout.layers}
    return loss, grads, pooled


def _pool(layer: Layer, total: Factor, factor: Factor, weight: Any) -> Factor:
    """Returns the means over the rows of both; a factor without rows changes nothing."""
    rows = total.rows + factor.rows
    share = (factor.rows / jnp.maximum(rows, 1)).reshape(layer.stack_shape)
    s = _weighted(weight, _weighted(weight, factor.s))

    def move(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(share > 0, old + share * (new - old), old)

    return Factor(move(total.h, factor.h), move(total.s, s), rows, move(total.mean, factor.mean))


def _weighted(weight: Any, value: jax.Array) -> jax.Array:
    """Returns `weight * value`; 0 for a weight of 0, even if the value is not finite."""
    weight = jnp.asarray(weight, value.dtype)
    return jnp.where(weight == 0, 0, weight * value)


def _nothing(result: Any) -> Any:
    """Returns the total of no micro-batch: zeros in at least float32."""
    return jax.tree.map(
        lambda a: jnp.zeros_like(a, dtype=jnp.promote_types(a.dtype, jnp.float32)), result
    )


def _leading_axis(arrays: dict[str, Any]) -> int:
    """Returns the number of micro-batches, the length of every array's first axis."""
    wanted = "wanted arrays with one leading axis of micro-batches"
    if not arrays:
        raise ValueError(f"args: got no array, {wanted}")
    for path, array in arrays.items():
        if not array.ndim or not len(array):
            raise ValueError(f"{path} has shape {array.shape}, {wanted}")
    (path, array), *others = arrays.items()
    for other, found in others:
        if len(found) != len(array):
            raise ValueError(f"{path} has shape {array.shape}, {other} {found.shape}, {wanted}")
    return len(array)
