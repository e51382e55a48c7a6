"""Flax Linen: finds the layers a loss calls, places their probes, and taps them.

Linen gives a model its variables when a root scope is made. There, and not in the tree the
loss sees, each covered layer gets its probe, as one more entry beside its weight; lifted
transforms then slice, stack and broadcast it as they do the weight. A method interceptor puts
the tap on the layer's output. Which parameters a root scope was given is read off the traced
program (`adafisher_jax.lineage`), so the loss may cast, mask or freeze them first.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.core import FrozenDict

from adafisher_jax import capture
from adafisher_jax.capture import Probes
from adafisher_jax.layout import Layout
from adafisher_jax.lineage import mark, mark_root
from adafisher_jax.linen_layers import Reading
from adafisher_jax.linen_watch import RootMade, probe_name, watched
from adafisher_jax.tap import tap
from adafisher_jax.uses import Names, Place, Root, Trace, Use


def trace_layout(loss_fn: Callable[..., Any], params: Any, /, *args: Any, **kwargs: Any) -> Layout:
    """Finds the layers that `loss_fn(params, *args, **kwargs)` calls, without computing anything.

    Args:
      loss_fn: any traceable function that calls Flax Linen modules on (a part of) its first
        argument.
      params: parameters, a full variables dict, or a pytree holding several models'.
      *args: further arguments. Arrays may be `jax.ShapeDtypeStruct`; what is no array
        (`train=True`) is passed on as it is.
      **kwargs: likewise.

    Returns:
      A static, hashable `Layout`; print it to see what is covered.

    Raises:
      TypeError: for a leaf of `params` that is not floating-point.
      ValueError: if no layer was met, or layers of two kinds share a parameter.

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
    return capture.trace_layout(
        functools.partial(_trace, loss_fn),
        functools.partial(_probed, loss_fn),
        params,
        args,
        kwargs,
    )


def value_and_grad(
    loss_fn: Callable[..., Any], layout: Layout, has_aux: bool = False
) -> Callable[..., Any]:
    """`jax.value_and_grad`, with the layers' factors from the same backward pass.

    Args:
      loss_fn: as in `trace_layout`; it returns a scalar, or `(scalar, aux)` with `has_aux`.
      layout: from `trace_layout`.
      has_aux: whether `loss_fn` returns auxiliary data.

    Returns:
      A function of `loss_fn`'s arguments that returns `(loss, grads, factors)`, or
      `((loss, aux), grads, factors)`: the first two are those of `jax.value_and_grad`, the
      third is a dict from layer path to `Factor`.

    Call it inside the jitted train step. Called eagerly it traces the loss at every call, and
    compiles anew each jitted function in the loss that applies a model.

    Raises:
      ValueError: from the returned function, if the layout is another model's or no layer of it
        was met.

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
    return capture.value_and_grad(
        functools.partial(_trace, loss_fn), functools.partial(_probed, loss_fn), layout, has_aux
    )


def _trace(loss_fn: Callable[..., Any], params: Any, /, *args: Any, **kwargs: Any) -> Trace:
    nested = False

    def on_root(root: RootMade) -> None:
        nonlocal nested
        nested |= root.nested
        if "params" in root.variables:
            root.variables["params"] = jax.tree_util.tree_map_with_path(
                lambda keys, leaf: mark_root(leaf, Root(root.call, _names(keys))),
                root.variables["params"],
            )

    def on_layer(call: int, path: Names, found: Reading, held: Mapping[str, Any], y: Any) -> Any:
        weight, bias = (name if name in held else None for name in (found.weight, found.bias))
        use = Use(
            call,
            found.kind,
            weight,
            bias,
            path,
            found.statistic.weight_axes,
            found.statistic.bias_axes,
            found.groups,
        )
        parameters = [jax.tree.leaves(held[name])[0] for name in (weight, bias) if name]
        (y,) = mark([y], parameters, use)
        return y

    run = watched(loss_fn, on_root, on_layer, fresh=True)
    layout, places = capture.trace(run, params, args, kwargs)
    return Trace(layout, places, nested)


def _probed(loss_fn: Callable[..., Any], probes: Probes, nested: bool) -> Callable[..., Any]:
    missing = set(probes)

    def on_root(root: RootMade) -> None:
        for place in [place for place in probes if place.call == root.call]:
            root.variables["params"] = _inserted(
                root.variables["params"], place.holder, probe_name(place.kind), probes[place]
            )
            missing.discard(place)

    def on_layer(call: int, path: Names, found: Reading, held: Mapping[str, Any], y: Any) -> Any:
        if (entry := probe_name(found.kind)) in held:
            return tap(found.statistic, found.x, y, held[entry])
        if Place(call, path, found.kind) in probes:
            raise ValueError(f"its variables {'/'.join(path)!r} are rebuilt on the way to it")
        return y

    run = watched(loss_fn, on_root, on_layer, fresh=nested)

    def probed(*args: Any, **kwargs: Any) -> Any:
        value = run(*args, **kwargs)
        if missing:
            paths = ", ".join(sorted(repr("/".join(place.holder)) for place in missing))
            raise ValueError(f"the loss called other models than when traced: {paths} not met")
        return value

    return probed


def _names(keys: tuple[Any, ...]) -> Names:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _inserted(tree: Mapping[str, Any], path: Names, name: str, value: Any) -> Mapping[str, Any]:
    """A copy of nested mappings with one more entry."""
    if path:
        value = _inserted(tree[path[0]], path[1:], name, value)
        name = path[0]
    copied = {**tree, name: value}
    return FrozenDict(copied) if isinstance(tree, FrozenDict) else copied
