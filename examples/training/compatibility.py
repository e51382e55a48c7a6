"""Lets other optimizers run whose last releases are older than this JAX and optax.

Nothing here changes what those packages compute.
"""

import importlib
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp


def psgd() -> Any:
    """The module `psgd_jax.kron`. It imports, but does not use, a module that optax removed."""
    gone = "optax._src.clipping"
    if gone not in sys.modules:
        sys.modules[gone] = types.ModuleType(gone)
        importlib.import_module("optax._src").clipping = sys.modules[gone]
    return importlib.import_module("psgd_jax.kron")


def shampoo() -> Any:
    """The module of optax-shampoo, with the former names of JAX functions that it calls."""
    module = importlib.import_module("optax_shampoo.distributed_shampoo")
    tree = {f"tree_{name}": getattr(jax.tree, name) for name in ("map", "flatten", "unflatten")}
    module.jax = types.SimpleNamespace(**vars(jax), **tree)
    module.lax = types.SimpleNamespace(**vars(jax.lax) | {"while_loop": _while_loop})
    return module


def _while_loop(condition: Any, body: Any, start: Any) -> Any:
    """`jax.lax.while_loop` with the initial values cast to the types of the body's results."""
    wanted = jax.eval_shape(body, start)
    start = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), start, wanted)
    return jax.lax.while_loop(condition, body, start)


def kfac() -> Any:
    """The module `kfac_jax`. It expects the parameters of an equation in two parts."""
    module = importlib.import_module("kfac_jax")
    matcher = importlib.import_module("kfac_jax._src.tag_graph_matcher")

    def evaluate(equation, values):
        params = equation.primitive.get_bind_params(equation.params)
        functions, params = params if isinstance(params, tuple) else ((), params)
        found = equation.primitive.bind(*functions, *values, **params)
        return found if isinstance(found, list) else [found]

    matcher.eval_jaxpr_eqn = evaluate
    return module
