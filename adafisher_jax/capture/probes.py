"""Threads probes through a traced program to where statistics are taken.

A probe lies beside a parameter and must go where the parameter goes: in slices through a scan,
along the mapped axis of a `vmap`, whole through `jax.jit`, `jax.checkpoint`, branches and
`shard_map`. So every program that uses a layer gets the layer's probe as further inputs. Where one
slice of the parameter is taken (`w[2]`), or a range of an axis (`w[:3]`), so is that of the probe.
A mark with a probe becomes a tap. A product gets a tap on its output.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from adafisher_jax.capture.origins import Slice
from adafisher_jax.capture.pieces import Axes, repeated
from adafisher_jax.capture.places import Place, bodies
from adafisher_jax.capture.products import Linear
from adafisher_jax.factors import Factor
from adafisher_jax.tap import Statistic, tap

ENTERED = frozenset("jit closed_call checkpoint remat remat2 cond scan shard_map".split())
"""The primitives whose programs can be given further inputs."""


class Carrier(NamedTuple):
    """The part of a parameter that a probe belongs to, somewhere in a program.

    Attributes:
      source: the position of the parameter among the program's inputs.
      sliced: the axes that were sliced away, or cut to a range, on the way; not those that `vmap`
        took.
    """

    source: int
    sliced: tuple[Slice, ...]

    def within(self, depth: int) -> "Carrier":
        """Returns the carrier that is handed to a program, `depth` programs deep.

        Slices of loops are taken where the loops are. One alone, or a range, is taken before the
        next of these, or at the use.
        """
        loops = [isinstance(s.by, tuple) and len(s.by) <= depth for s in self.sliced]
        taken = max((i + 1 for i, here in enumerate(loops) if here), default=0)
        return Carrier(self.source, self.sliced[:taken])

    @property
    def before(self) -> "Carrier":
        """The carrier before what is sliced away last."""
        return Carrier(self.source, self.sliced[:-1])


class Completion(NamedTuple):
    """What turns a mark into a tap, or puts a tap on a product.

    Attributes:
      carrier: the carrier whose probe the tap gets.
      axes: the axes of the parameter, in the form in which the mark or the product has it.
      parameter: for a mark, the number of the parameter among the mark's parameters.
      linear: for a product, how it multiplies; None for a mark.
    """

    carrier: Carrier
    axes: Axes
    parameter: int = 0
    linear: Linear | None = None


def insert_probes(
    program: core.ClosedJaxpr,
    completions: Mapping[Place, Completion],
    probes: Mapping[int, Factor],
    statistic: Callable[[Statistic], Statistic],
    conditional: bool,
) -> Callable[..., list[Any]]:
    """Returns the program as a function of its inputs and of probes.

    Args:
      program: a traced program.
      completions: how statistics are taken, by place. Marks at other places stay as they are.
      probes: zeros beside parameters, by the positions of the parameters.
      statistic: a function that turns the statistic of a layer into the one that its tap gets.
      conditional: whether a probe may turn its taps off, by `rows` that are not zero.

    Returns:
      A function of the program's inputs, then the leaves of `probes`.
    """
    avals = {
        Carrier(source, ()): [jax.typeof(part) for part in probe]
        for source, probe in sorted(probes.items())  # in the order of jax.tree
    }
    threaded = _Threading(completions, statistic, conditional).program(program.jaxpr, (), avals)
    return core.jaxpr_as_fun(program.replace(jaxpr=threaded))


Vars = list[core.Var]


class _Threading:
    def __init__(
        self,
        completions: Mapping[Place, Completion],
        statistic: Callable[[Statistic], Statistic],
        conditional: bool,
    ):
        self.completions = completions
        self.statistic = statistic
        self.conditional = conditional
        self.needed: dict[tuple[Place, int], dict[Carrier, None]] = {}  # in order
        for place, completion in completions.items():
            for depth in range(1, len(place)):
                eqn = (place[: depth - 1], place[depth - 1][0])
                self.needed.setdefault(eqn, {})[completion.carrier.within(depth)] = None

    def program(
        self, jaxpr: core.Jaxpr, place: Place, avals: Mapping[Carrier, Sequence[Any]]
    ) -> core.Jaxpr:
        """Returns a program with further inputs at its end: the parts of the carriers' probes."""
        shadows = {c: [core.Var(aval) for aval in parts] for c, parts in avals.items()}
        eqns: list[core.JaxprEqn] = []
        for index, eqn in enumerate(jaxpr.eqns):
            here = (*place, (index, 0))
            if here in self.completions:
                eqns += self._tapped(eqn, self.completions[here], shadows)
            elif carriers := self.needed.get((place, index)):
                eqns += self._entered(eqn, here, [*carriers], shadows)
            else:
                eqns.append(eqn)
        invars = [*jaxpr.invars, *_flat(shadows[c] for c in avals)]
        return jaxpr.replace(invars=invars, eqns=eqns)

    def _tapped(
        self, eqn: core.JaxprEqn, completion: Completion, shadows: dict[Carrier, Vars]
    ) -> list[core.JaxprEqn]:
        """Returns the tap, after equations that give the probe the form of the parameter."""
        slices = _take(completion.carrier, shadows)
        probe, moves = _formed(shadows[completion.carrier], completion)
        if completion.linear is not None:
            product, tap = _on_output(eqn, completion.linear, probe)
        else:
            product, tap = [], _completed(eqn, completion, probe)
        own = {
            "statistic": self.statistic(tap.params["statistic"]),
            "conditional": self.conditional,
        }
        tap = tap.replace(params={**tap.params, **own})
        added = (*slices, *moves, tap)
        return [*product, *(new.replace(ctx=eqn.ctx) for new in added)]  # on its mesh

    def _entered(
        self,
        eqn: core.JaxprEqn,
        here: Place,
        carriers: list[Carrier],
        shadows: dict[Carrier, Vars],
    ) -> list[core.JaxprEqn]:
        """Returns the equation, changed to pass the carriers' probes to the programs in it."""
        name = eqn.primitive.name
        sliced = [c for c in carriers if c.sliced and c.sliced[-1].by == here]
        whole = [c for c in carriers if c not in sliced]
        outer = {c: shadows[c] for c in whole}
        moves: list[core.JaxprEqn] = []
        for carrier in sliced:
            moves += _take(carrier.before, shadows)
            outer[carrier], moved = _sliced_first(shadows[carrier.before], carrier.sliced)
            moves += moved
        avals = {c: [var.aval for var in outer[c]] for c in whole}
        if name == "shard_map":
            avals = {c: _on_device(eqn, parts) for c, parts in avals.items()}
        avals |= {c: _slices([var.aval for var in outer[c]]) for c in sliced}
        programs = [
            self.program(body, (*here[:-1], (here[-1][0], i)), avals)
            for i, body in enumerate(bodies(eqn))
        ]
        extra = _PARTS * len(carriers)
        operands = [*eqn.invars, *_flat(outer[c] for c in (*whole, *sliced))]
        params = dict(eqn.params)
        if name == "scan":  # inputs are in the order: constants, carried, sliced
            consts = params["num_consts"]
            n, fixed = len(eqn.invars), _PARTS * len(whole)
            order = [*range(consts), *range(n, n + fixed), *range(consts, n)]
            order += range(n + fixed, n + extra)
            operands = [operands[i] for i in order]
            programs = [p.replace(invars=[p.invars[i] for i in order]) for p in programs]
            params["num_consts"] = consts + fixed
        for key, value in _of_unspecified_input(eqn).items():
            params[key] = (*params[key], *(value,) * extra)
        return [*moves, eqn.replace(invars=operands, params=_with_bodies(params, programs))]


def _on_output(
    eqn: core.JaxprEqn, linear: Linear, probe: Vars
) -> tuple[list[core.JaxprEqn], core.JaxprEqn]:
    """Returns a product, and a tap on its output."""
    (out,) = eqn.outvars
    y, x = core.Var(out.aval), [eqn.invars[i] for i in linear.data]
    zeros: Any = Factor(*(var.aval for var in probe))  # type: ignore[arg-type]
    of_types = jax.make_jaxpr(functools.partial(tap, linear.statistic))
    (bare,) = of_types(tuple(v.aval for v in x), y.aval, zeros).eqns
    return [eqn.replace(outvars=[y])], bare.replace(invars=[y, *x, *probe], outvars=[out])


def _completed(eqn: core.JaxprEqn, completion: Completion, probe: Vars) -> core.JaxprEqn:
    """Returns the tap that a mark becomes."""
    _, axes, parameter, _ = completion
    inputs = 1 + eqn.params["inputs"]
    # Operands after `before` are the used probe of a capture inside this one.
    before = inputs + eqn.params["parameters"]
    levels = []
    for level in reversed(eqn.params["levels"]):  # outermost first
        dim, taken = level[inputs + parameter], None
        if dim is not None:
            if not repeated(axes[dim]):
                taken = sum(not repeated(axis) for axis in axes[:dim])
            axes = axes[:dim] + axes[dim + 1 :]
        levels.append((*level[:before], *(taken,) * _PARTS))
    params = {**eqn.params, "levels": tuple(reversed(levels))}
    return eqn.replace(invars=[*eqn.invars[:before], *probe], params=params)


_PARTS = len(Factor._fields)


def _flat(groups: Iterable[Sequence[Any]]) -> list[Any]:
    return [var for group in groups for var in group]


def _rank(probe: Vars) -> int:
    aval: Any = probe[0].aval
    return len(aval.shape)


def _sliced_first(probe: Vars, sliced: tuple[Slice, ...]) -> tuple[Vars, list[core.JaxprEqn]]:
    """Returns the parts of a probe with what is sliced last as their first axis, and equations."""
    return _applied(functools.partial(_first, sliced, _rank(probe)), probe)


def _take(carrier: Carrier, shadows: dict[Carrier, Vars]) -> list[core.JaxprEqn]:
    """Adds the probe of a carrier with slices taken alone to `shadows`; returns the equations.

    The product with a range of a weight is a part of the product with the whole weight, whose other
    inputs, or output cotangents, are zero. So statistics without the axis stay as they are.
    """
    if carrier in shadows:
        return []
    before = _take(carrier.before, shadows)
    probe, by = shadows[carrier.before], carrier.sliced[-1].by
    rank, axis = _rank(probe), _axis(carrier.sliced)
    sizes: list[Any] = [var.aval for var in probe]
    whole = max(aval.shape[axis] for aval in sizes)

    def one(part: jax.Array) -> jax.Array:
        if isinstance(by, range):
            own = part.shape[axis] == whole
            return jax.lax.slice_in_dim(part, by.start, by.stop, axis=axis) if own else part
        assert isinstance(by, int)
        return jax.lax.index_in_dim(_first(carrier.sliced, rank, part), by, keepdims=False)

    shadows[carrier], eqns = _applied(one, probe)
    return [*before, *eqns]


def _axis(sliced: tuple[Slice, ...]) -> int:
    """Returns the axis of a probe that is sliced last."""
    *before, last = sliced
    return last.axis - sum(s.axis < last.axis and s.left == 1 for s in before)


def _first(sliced: tuple[Slice, ...], rank: int, part: jax.Array) -> jax.Array:
    """Returns a part of a probe, of some rank, with what is sliced last as its first axis."""
    last, axis = sliced[-1], _axis(sliced)
    if last.left == 1:
        return jax.lax.transpose(part, [axis, *range(axis), *range(axis + 1, rank)])
    outer, after = part.shape[:axis], part.shape[axis + 1 :]
    size = part.shape[axis] // last.left
    digits = last.left // last.inner, size, last.inner
    split = jax.lax.reshape(part, (*outer, *digits, *after))
    order = [axis + 1, *range(axis + 1), *range(axis + 2, rank + 2)]
    return jax.lax.reshape(jax.lax.transpose(split, order), (size, *outer, last.left, *after))


def _formed(probe: Vars, completion: Completion) -> tuple[Vars, list[core.JaxprEqn]]:
    """Returns the parts of a probe in a parameter's form, without axes of copies, and equations."""
    carrier, axes = completion.carrier, [a for a in completion.axes if not repeated(a)]
    gone = {s.axis for s in carrier.sliced if s.left == 1}
    known = [i for i in range(_rank(probe) + len(gone)) if i not in gone]
    pieces = sorted((p for axis in axes for p in axis), key=lambda p: (p.axis, -p.inner))
    if axes == [(p,) for p in pieces] and [p.axis for p in pieces] == known:
        return probe, []

    def formed(part: jax.Array) -> jax.Array:
        sizes: dict[int | None, int] = dict(zip(known, part.shape, strict=True))
        if len({p.axis for p in pieces}) == len(pieces):  # an axis of a norm's pair is of size two
            size = {p: sizes[p.axis] for p in pieces}
        else:
            size = {p: 1 if sizes[p.axis] == 1 else p.size for p in pieces}
        if math.prod(part.shape) != math.prod(size.values()):
            raise ValueError(
                f"a weight whose axes are split before its product, as one of {len(known)} axes "
                f"into {tuple(math.prod(p.size for p in axis) for axis in axes)}, has no whole "
                "factors here: leave its layer out of `paths`"
            )
        part = jax.lax.reshape(part, [size[p] for p in pieces])
        part = jax.lax.transpose(part, [pieces.index(p) for axis in axes for p in axis])
        return jax.lax.reshape(part, [math.prod(size[p] for p in axis) for axis in axes])

    return _applied(formed, probe)


def _applied(
    function: Callable[[jax.Array], jax.Array], probe: Vars
) -> tuple[Vars, list[core.JaxprEqn]]:
    """Returns the parts of a probe after a function, and the equations of the function."""
    of_all = jax.make_jaxpr(lambda *parts: [function(part) for part in parts])
    program = of_all(*(var.aval for var in probe)).jaxpr
    new = dict(zip(program.invars, probe, strict=True))
    eqns = []
    for eqn in program.eqns:
        new |= {out: core.Var(out.aval) for out in eqn.outvars}
        invars, outvars = ([new.get(v, v) for v in side] for side in (eqn.invars, eqn.outvars))
        eqns.append(eqn.replace(invars=invars, outvars=outvars))
    return [new[v] for v in program.outvars], eqns


def _slices(avals: Sequence[Any]) -> list[Any]:
    """Returns the types that a scan's body sees of arrays that the scan slices."""
    program = jax.make_jaxpr(lambda *xs: jax.lax.scan(lambda c, x: (c, ()), (), xs))(*avals)
    return list(program.eqns[0].params["jaxpr"].in_avals)


def _on_device(eqn: core.JaxprEqn, avals: Sequence[Any]) -> list[Any]:
    """Returns the types that a `shard_map`'s body sees of arrays that all devices share."""
    same = jax.shard_map(
        lambda *xs: xs,
        mesh=eqn.params["mesh"],
        in_specs=jax.sharding.PartitionSpec(),
        out_specs=jax.sharding.PartitionSpec(),
        axis_names=set(eqn.params.get("newly_manual_axes") or eqn.params["manual_axes"]),
        check_vma=eqn.params["check_vma"],
    )
    (copied,) = jax.make_jaxpr(same)(*avals).eqns
    return [var.aval for var in copied.params["jaxpr"].invars]


def _of_unspecified_input(eqn: core.JaxprEqn) -> dict[str, Any]:
    """Returns, for each setting that an equation has per input, the default for a new input."""
    match eqn.primitive.name:
        case "jit":
            template = _jit_of_identity().params
            return {
                key: template[key][0] for key in ("in_shardings", "in_layouts", "donated_invars")
            }
        case "checkpoint" | "remat" | "remat2" if isinstance(eqn.params["prevent_cse"], tuple):
            return {"prevent_cse": True}
        case "shard_map":
            return {"in_specs": jax.sharding.PartitionSpec()}
        case "scan" if "linear" in eqn.params:
            return {"linear": False}
    return {}


@functools.cache
def _jit_of_identity() -> core.JaxprEqn:
    (eqn,) = jax.make_jaxpr(jax.jit(lambda x: x))(0.0).eqns
    return eqn


def _with_bodies(params: dict[str, Any], programs: list[core.Jaxpr]) -> dict[str, Any]:
    """Returns an equation's parameters with its programs replaced."""
    remaining = iter(programs)

    def replaced(value: Any) -> Any:
        if isinstance(value, core.ClosedJaxpr):
            return value.replace(jaxpr=next(remaining))
        return next(remaining) if isinstance(value, core.Jaxpr) else value

    for key in ("jaxpr", "call_jaxpr", "branches"):
        if key in params:
            value = params[key]
            params[key] = tuple(map(replaced, value)) if key == "branches" else replaced(value)
    return params
