"""Flax's `TrainState`, with factors."""

import functools
from typing import Any, Self

import optax
from flax import serialization
from flax.training import train_state

from adafisher_jax.layout import check_state


class TrainState(train_state.TrainState):
    r"""Flax's `flax.training.train_state.TrainState` with an `apply_gradients` that takes factors.

    Example:
      >>> import adafisher_jax as af, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x, y = nn.Dense(1), jnp.ones((8, 3)), jnp.ones((8, 1))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda params, x, y: jnp.mean((model.apply({"params": params}, x) - y) ** 2)
      >>> layout = af.trace_layout(loss_fn, params, x, y)
      >>> state = af.TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=af.adafisher(3e-2, layout, rule="centered")
      ... )
      >>> loss, grads, factors = af.value_and_grad(loss_fn, layout)(state.params, x, y)
      >>> state = state.apply_gradients(grads=grads, factors=factors)
      >>> state.step
      1
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
        r"""Takes one step of `tx`, :math:`\theta \leftarrow \theta + \mathrm{tx}(g; H, S)`.

        Args:
          grads: gradients, shaped as `params`.
          **kwargs: `factors` from the same call of `adafisher_jax.value_and_grad`, or None to reuse
            the stored averages; and further fields to replace.

        Returns:
          The state with `step`, `params` and `opt_state` updated.

        Raises:
          ValueError, TypeError: as `update` of `scale_by_adafisher`, for example without `factors`.
          TypeError: if `factors` are given and `tx` takes none.
        """
        factors = {"factors": kwargs.pop("factors")} if "factors" in kwargs else {}
        update = functools.partial(self.tx.update, **factors)
        given = optax.GradientTransformation(self.tx.init, update)
        state = super(TrainState, self.replace(tx=given)).apply_gradients(grads=grads, **kwargs)
        return state.replace(tx=self.tx)

    def from_bytes(self, encoded: bytes) -> Self:
        """Returns the state that `flax.serialization.to_bytes` encoded, in the form of this state.

        Raises:
          ValueError: if a path is in only one of the two states, or has another shape.
            `flax.serialization.from_bytes` accepts such states.
        """
        stored = serialization.msgpack_restore(encoded)
        check_state(stored, serialization.to_state_dict(self))
        return serialization.from_state_dict(self, stored)
