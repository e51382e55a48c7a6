r"""Training in a loop of another library, which calls `update(grads, state, params)` itself.

Such a loop passes gradients to the optimizer and nothing else. So the probes become a part of the
parameters. A probe is an array of zeros beside a weight, and its gradient is the layer's sums over
rows. The loop differentiates by the probes as by any parameter, and the optimizer takes its factors
out of the gradients.

| the loop | here |
| --- | --- |
| `params` | `add_probes(params, layout)` |
| `loss_fn` | `loss_with_probes(loss_fn, layout)` |
| `optimizer` | `optimizer_with_probes(optimizer, layout)` |

If the loop averages gradients over devices or micro-batches, it averages sums and row counts alike,
so their means are right; `rows` is that of one device or micro-batch. All is right if the loop
multiplies all gradients by a number, since one more probe tells the number. But the gradients of
the probes count in a global norm: if the loop clips by it, put the clip into the optimizer instead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adafisher_jax import capture
from adafisher_jax.factors import Factor
from adafisher_jax.layout import Layout, check_layout


class WithProbes(NamedTuple):
    """Parameters and probes, or their gradients, or their updates.

    Attributes:
      params: the parameters.
      probes: the probes by layer path, zeros. `rows` has the rank of the weight.
      unit: a zero, (), whose gradient is one, or by what a loop has multiplied all gradients.
    """

    params: Any
    probes: dict[str, Factor]
    unit: jax.Array


def add_probes(params: Any, layout: Layout) -> WithProbes:
    """Returns the parameters with a probe of zeros for each layer.

    Args:
      params: a pytree of floating-point arrays.
      layout: from `trace_layout`.

    Raises:
      TypeError: if `layout` is no layout.
      ValueError: if the layout is of another model.

    Example:
      >>> import adafisher_jax as af, jax, jax.numpy as jnp
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["w"] + params["b"]) ** 2)
      >>> layout = af.trace_layout(loss_fn, params, jnp.ones((8, 3)))
      >>> add_probes(params, layout).probes[""].h.shape
      (3, 1)
    """
    check_layout(layout)
    return WithProbes(params, capture.probes_of(layout, params), jnp.zeros(()))


def loss_with_probes(loss_fn: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    r"""Returns a loss of parameters with probes.

    The value and the gradient by the parameters are those of `loss_fn`. The gradient by a layer's
    probe is :math:`(\sum_n \bar h_n^2, \sum_n s_n^2, N, \sum_n \bar h_n)`, that by `unit` is 1.

    Args:
      loss_fn: a loss of parameters and further arguments, with or without auxiliary data.
      layout: from `trace_layout`.

    Returns:
      A function `(WithProbes, *args, **kwargs)` that returns what `loss_fn` returns.

    Raises:
      TypeError: if `layout` is no layout; from the returned function, if its first argument is
        no `WithProbes`.
      ValueError: from the returned function, if the layout is of another model or loss.

    Example:
      >>> import adafisher_jax as af, jax, jax.numpy as jnp
      >>> params, x = {"w": jnp.ones((3, 2))}, jnp.array([[1.0, 2.0, 3.0]])
      >>> loss_fn = lambda params, x: jnp.sum(x @ params["w"])
      >>> layout = af.trace_layout(loss_fn, params, x)
      >>> grads = jax.grad(loss_with_probes(loss_fn, layout))(add_probes(params, layout), x)
      >>> grads.probes[""].h.ravel().tolist()
      [1.0, 4.0, 9.0]
    """
    check_layout(layout)

    def loss(params: WithProbes, /, *args: Any, **kwargs: Any) -> Any:
        _check("params", params)
        probed, met = capture.probed(loss_fn, layout, params.params, args, kwargs)
        found = probed(params.params, {path: params.probes[path] for path in met})
        (value, *others), structure = jax.tree.flatten(found)
        return jax.tree.unflatten(structure, [_with_unit(value, params.unit), *others])

    return loss


def optimizer_with_probes(
    optimizer: optax.GradientTransformation, layout: Layout
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer of parameters with probes, whose gradients give it the factors.

    Args:
      optimizer: an optimizer that takes `factors`, such as `adafisher` or a chain with it.
      layout: the layout of the optimizer.

    Returns:
      A transformation of `WithProbes`. Its state is the optimizer's. Updates of probes are zero.

    Raises:
      TypeError: if `layout` is no layout; from `init` and `update`, if the argument is no
        `WithProbes`.

    Example:
      >>> import adafisher_jax as af, jax, jax.numpy as jnp, optax
      >>> params, x = {"w": jnp.ones((3, 2))}, jnp.eye(3)
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
      >>> layout = af.trace_layout(loss_fn, params, x)
      >>> tx = optimizer_with_probes(af.adafisher(3e-2, layout, rule="centered"), layout)
      >>> params, loss_fn = add_probes(params, layout), loss_with_probes(loss_fn, layout)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params)
      >>> loss_fn(optax.apply_updates(params, updates), x) < loss_fn(params, x)
      Array(True, dtype=bool)
    """
    check_layout(layout)
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params: WithProbes) -> Any:
        _check("params", params)
        return inner.init(params.params)

    def update_fn(
        updates: WithProbes, state: Any, params: WithProbes | None = None, **extra_args: Any
    ) -> tuple[WithProbes, Any]:
        _check("updates", updates)
        own = None if params is None else params.params
        by = jnp.where(updates.unit != 0, updates.unit, 1)
        factors = {
            path: factor._replace(rows=factor.rows / by)
            for path, factor in capture.means_of(layout, updates.probes).items()
        }
        new, state = inner.update(updates.params, state, own, factors=factors, **extra_args)
        zeros = jax.tree.map(jnp.zeros_like, updates)
        return zeros._replace(params=new), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.custom_vjp
def _with_unit(value: jax.Array, unit: jax.Array) -> jax.Array:
    """The value. The gradient by `unit` is one, as that of a row is, even if the loss is scaled."""
    return value


_with_unit.defvjp(lambda value, unit: (value, jnp.ones_like(unit)), lambda one, g: (g, one))


def _check(name: str, value: Any) -> None:
    if not isinstance(value, WithProbes):
        raise TypeError(
            f"{name}: got {type(value).__name__}, wanted adafisher_jax.add_probes(params, layout)"
        )
