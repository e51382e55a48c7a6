"""Where does each layer's parameter come from?  Read off the traced program.

A loss may hand a model its parameters as they are, cast, masked, partly
frozen, out of a larger structure, or through `jax.jit` and `jax.checkpoint`;
a lifted transform may slice them.  None of that can be told from names or
array identities, but all of it is plain in the program JAX traces.  So the
adapters leave *marks* in it, and `find_marks` follows the data:

* `mark(outputs, parameters, label)` notes that a layer used `parameters`;
* `mark_root(leaf, label)` notes the array a model's variables began as, which
  then counts as a source of its own.

An array's `Origin` is the source it came from and how it got here.  The marks
are identities and exist only while a layout is traced, never in a computation
that runs.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching


@dataclasses.dataclass(frozen=True)
class Origin:
    """The source an array came from, and what happened on the way.

    Attributes:
      source: the label of a root mark, or the position of a program input.
      axes: for each axis of the array, the source's axis it is.
      sliced: the source's axes that are gone, in the order they went: a scan
        or a `vmap` hands out one slice at a time.
      frozen: passed through `stop_gradient`.
      cast: changed its type.
      mixed: combined element by element with other arrays (a mask, noise).
      lost: sliced or rearranged in a way that is not followed.
    """

    source: Hashable
    axes: tuple[int, ...]
    sliced: tuple[int, ...] = ()
    frozen: bool = False
    cast: bool = False
    mixed: bool = False
    lost: bool = False

    def drop(self, axis: int) -> "Origin":
        """The origin of one slice along `axis`."""
        if self.lost:
            return self
        kept = self.axes[:axis] + self.axes[axis + 1 :]
        return dataclasses.replace(self, axes=kept, sliced=(*self.sliced, self.axes[axis]))

    def then(self, later: "Origin") -> "Origin":
        """The origin of an array whose own origin in this one is `later`."""
        if self.lost or later.lost:
            return dataclasses.replace(self, lost=True)
        return Origin(
            self.source,
            tuple(self.axes[axis] for axis in later.axes),
            (*self.sliced, *(self.axes[axis] for axis in later.sliced)),
            self.frozen or later.frozen,
            self.cast or later.cast,
            self.mixed or later.mixed,
        )

    @property
    def whole(self) -> bool:
        """Every axis of the source is there, in its place."""
        return not self.lost and not self.sliced and self.axes == tuple(sorted(self.axes))

    @property
    def untouched(self) -> bool:
        """Nothing happened but slicing: the axes that are left are in their order."""
        in_order = self.axes == tuple(sorted(self.axes))
        return in_order and not (self.frozen or self.cast or self.mixed or self.lost)


@dataclasses.dataclass(frozen=True)
class Mark:
    """One mark met in a program.

    Attributes:
      label: what the adapter called it.
      origins: of the marked arrays; `None` where no single source is behind one.
      inside: the primitives (`"jit"`, `"scan"`, …) it lies within, outermost first.
      order: how many times the program differentiates with respect to a marked array here.
    """

    label: Hashable
    origins: tuple[Origin | None, ...]
    inside: tuple[str, ...]
    order: int


_mark_p = core.Primitive("adafisher_mark")
_mark_p.multiple_results = True


def mark(outputs: Sequence[Any], parameters: Sequence[Any], label: Hashable) -> list[Any]:
    """Returns `outputs` unchanged, noting that they were computed with `parameters`."""
    removed = ((),) * len(parameters)
    return _mark_p.bind(*outputs, *parameters, label=label, removed=removed, order=0)


def mark_root(leaf: Any, label: Hashable) -> Any:
    """Returns `leaf` unchanged; from here on it is the source called `label`."""
    (leaf,) = _mark_p.bind(leaf, label=label, removed=None, order=0)
    return leaf


# `removed` lists, for each observed parameter, the axes that enclosing `vmap`s took away,
# innermost first; it is None for a root, whose one operand is both output and observed.


def _outputs(operands: Sequence[Any], removed: Any) -> list[Any]:
    return list(operands[: len(operands) - len(removed or ())])


@_mark_p.def_impl
def _mark_impl(*operands: Any, removed: Any, **_: Any) -> list[Any]:
    return _outputs(operands, removed)


@_mark_p.def_abstract_eval
def _mark_abstract_eval(*operands: Any, removed: Any, **_: Any) -> list[Any]:
    return _outputs(operands, removed)


def _mark_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, label: Hashable, removed: Any, order: int
) -> tuple[list[Any], list[Any]]:
    outputs = _outputs(tangents, removed)
    observed = tangents if removed is None else tangents[len(outputs) :]
    order += any(type(tangent) is not ad.Zero for tangent in observed)
    return _mark_p.bind(*primals, label=label, removed=removed, order=order), outputs


def _mark_batch(
    operands: Sequence[Any], dims: Sequence[Any], *, label: Hashable, removed: Any, order: int
) -> tuple[list[Any], list[Any]]:
    if removed is None:  # a slice of a source is no root: the mark is dropped
        return list(operands), list(dims)
    n = len(operands) - len(removed)
    removed = tuple(
        axes if dim is None else (*axes, dim) for axes, dim in zip(removed, dims[n:], strict=True)
    )
    return _mark_p.bind(*operands, label=label, removed=removed, order=order), list(dims[:n])


ad.primitive_jvps[_mark_p] = _mark_jvp
batching.primitive_batchers[_mark_p] = _mark_batch


def find_marks(fun: Callable[..., Any], first: Any, *args: Any) -> list[Mark]:
    """Traces `fun(first, *args)` and returns its marks, in program order.

    Args:
      fun: a traceable function of arrays.
      first: its first argument; leaf `i` is the source `i`.
      *args: its other arguments, which are no sources.

    A marked array inside a loop is reported once; a function that is traced
    once and called twice is reported at each call.
    """
    closed = jax.make_jaxpr(fun)(first, *args)
    n = len(jax.tree.leaves(first))
    sources: list[Origin | None] = [
        Origin(i, tuple(range(_rank(var)))) if i < n else None
        for i, var in enumerate(closed.jaxpr.invars)
    ]
    marks: list[Mark] = []
    _follow(closed.jaxpr, sources, marks, ())
    return marks


_SAME = frozenset(
    "convert_element_type stop_gradient copy copy_p reduce_precision sharding_constraint "
    "optimization_barrier name pvary pcast mesh_cast reshard layout_constraint".split()
)
_REARRANGING = frozenset("reshape squeeze slice dynamic_slice gather rev broadcast_in_dim".split())
_ELEMENTWISE = frozenset("add sub mul div max min select_n clamp neg add_any".split())


def _follow(
    jaxpr: core.Jaxpr,
    arguments: Sequence[Origin | None],
    marks: list[Mark],
    inside: tuple[str, ...],
) -> list[Origin | None]:
    """The origins of a program's outputs; appends the marks met on the way."""
    origins: dict[core.Var, Origin | None] = dict(zip(jaxpr.invars, arguments, strict=True))

    def origin(atom: Any) -> Origin | None:
        return None if isinstance(atom, core.Literal) else origins.get(atom)

    for eqn in jaxpr.eqns:
        operands = [origin(atom) for atom in eqn.invars]
        within = (*inside, eqn.primitive.name)
        if eqn.primitive is _mark_p:
            outputs = _follow_mark(eqn, operands, marks, inside)
        elif eqn.primitive.name == "scan":
            outputs = _follow_scan(eqn, operands, marks, within)
        elif eqn.primitive.name == "while":
            outputs = _follow_while(eqn, operands, marks, within)
        elif bodies := list(_bodies(eqn)):
            skip = 1 if eqn.primitive.name == "cond" else 0
            branches = [_follow(body, operands[skip:], marks, within) for body in bodies]
            outputs = [_common(branch) for branch in zip(*branches, strict=True)]
        else:
            outputs = _follow_array_op(eqn, operands)
        origins.update(zip(eqn.outvars, outputs, strict=True))
    return [origin(atom) for atom in jaxpr.outvars]


def _common(origins: Sequence[Origin | None]) -> Origin | None:
    return origins[0] if all(o == origins[0] for o in origins) else None


def _bodies(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The functions an equation calls with its own operands, in order."""
    taken = len(eqn.invars) - (eqn.primitive.name == "cond")
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(value):
            body: Any = getattr(value, "jaxpr", value)
            if len(body.invars) == taken and len(body.outvars) == len(eqn.outvars):
                yield body


def _rank(atom: Any) -> int:
    return len(atom.aval.shape)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _follow_mark(
    eqn: core.JaxprEqn, operands: list[Origin | None], marks: list[Mark], inside: tuple[str, ...]
) -> list[Origin | None]:
    label, removed, order = (eqn.params[name] for name in ("label", "removed", "order"))
    if removed is None:
        marks.append(Mark(label, tuple(operands), inside, order))
        return [Origin(label, tuple(range(_rank(eqn.invars[0]))))]
    n = len(operands) - len(removed)
    seen = []
    for found, axes in zip(operands[n:], removed, strict=True):
        # The last `vmap` to remove an axis is the outermost: undo it first.
        for axis in reversed(axes):
            found = found and found.drop(axis)
        seen.append(found)
    marks.append(Mark(label, tuple(seen), inside, order))
    return operands[:n]


def _follow_scan(
    eqn: core.JaxprEqn, operands: list[Origin | None], marks: list[Mark], inside: tuple[str, ...]
) -> list[Origin | None]:
    body = eqn.params["jaxpr"].jaxpr
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    fixed = operands[:consts]
    carry = operands[consts : consts + carries]
    slices = [x and x.drop(0) for x in operands[consts + carries :]]
    carry = _invariant(lambda c: _follow(body, [*fixed, *c, *slices], [], inside)[:carries], carry)
    outputs = _follow(body, [*fixed, *carry, *slices], marks, inside)
    return outputs[:carries] + [None] * (len(outputs) - carries)


def _follow_while(
    eqn: core.JaxprEqn, operands: list[Origin | None], marks: list[Mark], inside: tuple[str, ...]
) -> list[Origin | None]:
    body = eqn.params["body_jaxpr"].jaxpr
    skip, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed, carry = operands[skip : skip + consts], operands[skip + consts :]
    carry = _invariant(lambda c: _follow(body, [*fixed, *c], [], inside), carry)
    return _follow(body, [*fixed, *carry], marks, inside)


def _invariant(
    step: Callable[[list[Origin | None]], list[Origin | None]], carry: list[Origin | None]
) -> list[Origin | None]:
    """The carried origins that a loop body hands on unchanged; the others are lost."""
    while True:
        after = step(carry)
        kept = [old if old == new else None for old, new in zip(carry, after, strict=True)]
        if kept == carry:
            return carry
        carry = kept


def _follow_array_op(eqn: core.JaxprEqn, operands: list[Origin | None]) -> list[Origin | None]:
    name = eqn.primitive.name
    lost: list[Origin | None] = [None] * len(eqn.outvars)
    if name in _SAME and len(operands) == len(eqn.outvars):
        frozen, cast = name == "stop_gradient", name == "convert_element_type"
        return [
            x and dataclasses.replace(x, frozen=x.frozen or frozen, cast=x.cast or cast)
            for x in operands
        ]
    if name == "transpose" and (x := operands[0]):
        if x.lost:
            return [x]
        axes = tuple(x.axes[i] for i in eqn.params["permutation"])
        return [dataclasses.replace(x, axes=axes)]
    if name in _REARRANGING and (x := operands[0]):
        return [dataclasses.replace(x, lost=True)]
    if name in _ELEMENTWISE:
        return [_mixed([x for x in operands if x])]
    return lost


def _mixed(origins: list[Origin]) -> Origin | None:
    """The origin of an elementwise combination: that of the one operand that is still a parameter.

    Beside it, what is frozen or lost (noise, a gradient step, a straight-through rounding)
    counts as data.
    """
    exact = {dataclasses.replace(x, mixed=True) for x in origins if not x.lost}
    found = {x for x in exact if not x.frozen} or exact or set(origins)
    return found.pop() if len(found) == 1 else None
