"""An order for the compiler: a value as it is, but not before others are there.

On a CPU, XLA starts all that it can at once, each part in memory of its own that is new in every
call, and it drops optimization barriers before it decides on that. What remains is to make one
value depend on others without being changed by them.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

_after_p = core.Primitive("adafisher_after")


def after(value: jax.Array, others: Iterable[jax.Array]) -> jax.Array:
    """`value`, in a program for a CPU not before `others`, which must be finite.

    Elsewhere, eagerly and under `jax.vmap` there is no such order. The value never becomes what
    the others are: mapped, or different between devices.
    """
    return _after_p.bind(value, *others)


def _first(value: Any, *_: Any) -> Any:
    return value


def _depending(value: jax.Array, *others: jax.Array) -> jax.Array:
    for other in others:
        value = value + jnp.sum(0 * other).astype(value.dtype)
    return value


_after_p.def_impl(_first)
_after_p.def_abstract_eval(_first)
mlir.register_lowering(_after_p, lambda _, value, *__: [value])
mlir.register_lowering(_after_p, mlir.lower_fun(_depending, False), platform="cpu")
batching.primitive_batchers[_after_p] = lambda operands, axes: (operands[0], axes[0])
ad.primitive_jvps[_after_p] = lambda primals, tangents: (_after_p.bind(*primals), tangents[0])
