"""The tap: an identity whose backward pass returns a layer's statistics.

For a layer `y = W h̄` with `s = ∂L/∂y`, the forward pass knows the sums over rows of `h̄²` and `h̄`,
and the backward pass knows those of `s²`. A tap on `y` passes `y` on. In the backward pass it
passes `s` on, and returns the sums *as the cotangent of a probe*: a `Factor` of zeros among the
differentiated arguments. So one ordinary backward pass yields gradients and factors together. What
a transformation does to the probe (slice, stack, broadcast, sum over uses or devices) it does to
the statistics.

While a loss is traced, a layer that is called has parameters but no probe. It gets a *mark*: a tap
that records the parameters instead of a probe. `adafisher_jax.capture.probes` turns marks of the
traced program into taps. A mark that stays is an identity.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from adafisher_jax.factors import Axes, Factor


class Statistic(Protocol):
    """The sums over rows that a kind of layer contributes to its factors.

    Implementations are hashable and hold no arrays; see `adafisher_jax.statistics`.
    """

    def of_inputs(self, *x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the sums over rows of squared inputs and of inputs, and `needed` arrays."""
        ...

    def of_cotangents(self, g: jax.Array, *needed: jax.Array) -> jax.Array:
        """Returns the sum over rows of the squared output cotangents."""
        ...

    def rows(self, y: jax.Array, *needed: jax.Array) -> jax.typing.ArrayLike:
        """Returns the number of rows of the output."""
        ...


def tap(statistic: Statistic, x: Any, y: jax.Array, probe: Factor) -> jax.Array:
    r"""Returns `y`, and makes `probe`'s gradient the layer's statistics.

    The gradient of a loss with respect to `probe`, summed over all taps that have it, is

    .. math:: \Big(\sum_n \bar h_n^2,\ \sum_n s_n^2,\ N,\ \sum_n \bar h_n\Big)

    with one row `n` for each example (and position). `Factor.from_sums` turns it into means.

    Args:
      statistic: how the layer's inputs and cotangents are reduced, for example
        `adafisher_jax.statistics.einsum("ni,io->no")`.
      x: the layer's input, of any float or integer type; a tuple if the layer has several.
      y: the layer's output.
      probe: a `Factor` of zeros with the shapes of the statistic. Statistics are accumulated in its
        type, which is at least float32.

    Returns:
      `y`. Gradients with respect to everything except `probe` do not change.

    Example:
      A layer written by hand, without Flax:

      >>> import jax, jax.numpy as jnp
      >>> import adafisher_jax as af
      >>> w, x = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 0.0], [2.0, 1.0]])
      >>> def loss(w, probe):
      ...     y = af.tap(af.statistics.einsum("ni,io->no"), x, x @ w, probe)
      ...     return jnp.sum(y) / 2
      >>> probe = af.Factor(jnp.zeros((2, 1)), jnp.zeros((1, 2)), jnp.zeros(()), jnp.zeros((2, 1)))
      >>> grads, sums = jax.grad(loss, argnums=(0, 1))(w, probe)
      >>> factor = sums.from_sums()
      >>> factor.h.ravel().tolist(), factor.s.ravel().tolist(), float(factor.rows)
      ([2.5, 0.5], [0.25, 0.25], 2.0)
    """
    inputs = jax.tree.leaves(x)
    own = {"statistic": statistic, "use": None, "inputs": len(inputs), "parameters": 0}
    return tap_p.bind(y, *inputs, *probe, **own, levels=(), conditional=False)


@dataclasses.dataclass(frozen=True)
class Use:
    """What a mark records of one call of a layer.

    Attributes:
      kind: as in `adafisher_jax.layout.Layer`.
      weight: the name of the weight, or None.
      bias: the name of the bias, or None.
      weight_axes: the axes of the weight as the layer sees it, without stacked axes.
      bias_axes: the axes of the bias as the layer sees it, without stacked axes.
      groups: the number of feature groups.
      problem: why the call cannot be captured; empty if it can.
    """

    kind: str
    weight: str | None
    bias: str | None
    weight_axes: Axes
    bias_axes: Axes
    groups: int = 1
    problem: str = ""


def mark(
    statistic: Statistic, x: jax.Array, y: jax.Array, parameters: Sequence[jax.Array], use: Use
) -> jax.Array:
    """Returns `y`, and records in the traced program that a layer made it with `parameters`.

    Interpreters that need a rule for each primitive, as `jax.experimental.jet`, get no mark. The
    layer is then described by its products.
    """
    own = {"statistic": statistic, "use": use, "inputs": 1, "parameters": len(parameters)}
    try:
        return tap_p.bind(y, x, *parameters, **own, levels=(), conditional=False)
    except (KeyError, NotImplementedError):  # no rule for a mark
        return y


# A tap is two primitives and no `custom_vjp`, so that forward-mode differentiation, and any number
# of derivatives, pass through a tapped layer. Both primitives return their first operand. The
# forward pass runs `tap_p`. Its tangent is `_tangent_p`, which is linear in `y` and the probe; the
# transpose of `_tangent_p` yields the statistics.
#
# Operands of `tap_p`: y, the layer's inputs and parameters (their numbers are `inputs` and
# `parameters`), and the four parts of the probe or nothing. Operands of `_tangent_p`: y, the probe,
# what the statistic returns of the inputs and, if the tap is `conditional`, whether statistics are
# due: if the `rows` of the probe are not zero, none are computed.
# `levels` holds the mapped axes of the operands for each `vmap` around, innermost first.

tap_p = core.Primitive("adafisher_tap")
_tangent_p = core.Primitive("adafisher_tap_tangent")

Levels = tuple[tuple[int | None, ...], ...]


class Operands(NamedTuple):
    """The operands of `tap_p`, or one value for each operand."""

    y: Any
    x: Sequence[Any]
    parameters: Sequence[Any]
    probe: Sequence[Any]

    @classmethod
    def of(cls, operands: Sequence[Any], params: Mapping[str, Any]) -> "Operands":
        """Sorts operands by the primitive's parameters, which have the number of each sort."""
        y, *rest = operands
        n, m = params["inputs"], params["inputs"] + params["parameters"]
        return cls(y, rest[:n], rest[n:m], rest[m:])


def _first(*operands: Any, **_: Any) -> Any:
    return operands[0]


def _lower_first(_: Any, *operands: Any, **__: Any) -> Any:
    return [operands[0]]


def _batch(primitive: Any, operands: Any, dims: Any, *, levels: Levels, **params: Any) -> Any:
    if dims[0] is None:  # only the probe is mapped
        size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
        y = jnp.broadcast_to(operands[0], (size, *operands[0].shape))
        operands, dims = (y, *operands[1:]), (0, *dims[1:])
    return primitive.bind(*operands, levels=(*levels, tuple(dims)), **params), dims[0]


for _primitive in (tap_p, _tangent_p):
    _primitive.def_impl(_first)
    _primitive.def_abstract_eval(_first)
    mlir.register_lowering(_primitive, _lower_first)
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _primitive)


def _tap_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    statistic, levels, conditional = (params[k] for k in ("statistic", "levels", "conditional"))
    y = tap_p.bind(*primals, **params)
    moving, still = (Operands.of(values, params) for values in (tangents, primals))
    if all(type(tangent) is ad.Zero for tangent in moving.probe):
        return y, moving.y
    due = [jnp.all(Factor(*still.probe).rows == 0)] if conditional else []
    of_inputs: Any = statistic.of_inputs
    mapped = [Operands.of(level, params) for level in levels]
    for of in mapped:
        if any(axis is not None for axis in of.x):
            of_inputs = jax.vmap(of_inputs, in_axes=tuple(of.x))
    linear = [ad.instantiate_zeros(moving.y)]
    linear += [vary_like(ad.instantiate_zeros(part), y) for part in moving.probe]
    known = _where_due(of_inputs, *still.x, due=due)
    inner = tuple(
        (
            of.y,
            *of.probe,
            *(None if set(of.x) == {None} else 0 for _ in known),
            *(None for _ in due),
        )
        for of in mapped
    )
    own = {"statistic": statistic, "conditional": conditional}
    return y, _tangent_p.bind(*linear, *known, *due, levels=inner, **own)


def _tap_transpose(g: Any, y: Any, *rest: Any, **_: Any) -> list[Any]:
    """Transposes the identity, for a layer that is transposed as a linear map."""
    return [
        g if ad.is_undefined_primal(y) else None,
        *(ad.Zero(v.aval) if ad.is_undefined_primal(v) else None for v in rest),
    ]


def vary_like(value: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `value`; inside a `shard_map`, with the type of one that may differ as `like` does.

    The gradient of a value that is equal on all devices is the sum over devices.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        value = value + jax.lax.full_like(like, 0, value.dtype, ())
    return value


def _tangent_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    # The tangent of a tangent is no output of the layer, so it gets no tap.
    return _tangent_p.bind(*primals, **params), tangents[0]


def _tangent_transpose(
    g: Any, y: Any, *rest: Any, statistic: Statistic, levels: Levels, conditional: bool
) -> list[Any]:
    probe, known = rest[:4], rest[4:]
    own = g if ad.is_undefined_primal(y) else None
    nothing = [None for _ in known]
    if type(g) is ad.Zero or not ad.is_undefined_primal(probe[0]):
        zeros = [ad.Zero(p.aval) if ad.is_undefined_primal(p) else None for p in probe]
        return [own, *zeros, *nothing]
    shapes = [_unmapped(p.aval.shape, [dims[i] for dims in levels]) for i, p in enumerate(probe, 1)]

    due = len(known) - conditional

    def all_parts(g: jax.Array, h: jax.Array, mean: jax.Array, *needed: jax.Array) -> Any:
        s = statistic.of_cotangents(g, *needed)
        found = (h, s, jnp.asarray(statistic.rows(g, *needed), s.dtype), mean)
        return [jnp.broadcast_to(v, shape) for v, shape in zip(found, shapes, strict=True)]

    def statistics(g: jax.Array, *known: jax.Array) -> Any:
        return _where_due(all_parts, g, *known[:due], due=known[due:])

    for dims in levels:
        statistics = _mapped(statistics, dims)
    found = [vary_like(v, g) for v in statistics(g, *known)]
    found = [_typed_like(v, part.aval) for v, part in zip(found, probe, strict=True)]
    return [own, *found, *nothing]


def _where_due(fun: Callable[..., Any], *args: jax.Array, due: Sequence[jax.Array]) -> Any:
    """Returns `fun(*args)`; if `due` is given and false, zeros, without computing anything."""

    def zeros(*args: jax.Array) -> Any:  # calls `fun` for the types of its results
        return jax.tree.map(lambda found: jax.lax.full_like(found, 0), fun(*args))

    return jax.lax.cond(due[0], fun, zeros, *args) if due else fun(*args)


def _typed_like(value: jax.Array, aval: Any) -> jax.Array:
    """Returns a cotangent in its primal's type, which on explicit mesh axes has a sharding."""
    value = value.astype(aval.dtype)
    found, wanted = jax.typeof(value).sharding, aval.sharding
    if found.spec != wanted.spec:
        value = jax.sharding.reshard(value, jax.sharding.NamedSharding(found.mesh, wanted.spec))
    elif found.mesh != wanted.mesh and wanted.mesh.explicit_axes:  # in `jax.sharding.auto_axes`
        value = jax.sharding.reshard(value, wanted)
    return value


def _unmapped(shape: tuple[int, ...], axes: list[int | None]) -> list[int]:
    """Returns the shape of a probe inside the `vmap`s around its tap."""
    sizes = list(shape)
    for axis in reversed(axes):
        if axis is not None:
            del sizes[axis]
    return sizes


def _mapped(fun: Callable[..., list[jax.Array]], dims: tuple[int | None, ...]) -> Any:
    """Returns `fun` under one `vmap`; results for a probe that is not mapped are summed."""
    y, probe, known = dims[0], dims[1:5], dims[5:]

    def mapped(*operands: jax.Array) -> list[jax.Array]:
        found = jax.vmap(fun, in_axes=(y, *known))(*operands)
        return [
            jnp.sum(v, axis=0) if axis is None else jnp.moveaxis(v, 0, axis)
            for v, axis in zip(found, probe, strict=True)
        ]

    return mapped


ad.primitive_jvps[tap_p] = _tap_jvp
ad.primitive_transposes[tap_p] = _tap_transpose
ad.primitive_jvps[_tangent_p] = _tangent_jvp
ad.primitive_transposes[_tangent_p] = _tangent_transpose
