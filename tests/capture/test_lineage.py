"""Where marked arrays come from, through every way JAX has of handing an array on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import adafisher_jax as af
from adafisher_jax import statistics
from adafisher_jax.capture import lineage
from adafisher_jax.capture.found import Mark
from adafisher_jax.capture.origins import Origin, Slice
from adafisher_jax.capture.pieces import Piece, reshape
from adafisher_jax.capture.places import bodies
from adafisher_jax.tap import mark

W = jax.ShapeDtypeStruct((4, 3, 2), jnp.float32)  # the source 0: three axes to tell apart
X = jax.ShapeDtypeStruct((5,), jnp.float32)  # the source 1
DENSE = statistics.dense(2)
COMPUTED = "no layer of a known kind uses it as it is"
REARRANGED = "only a part or a rearrangement of it reaches its layer"
TRANSFORMED = "transformed before its layer uses it"


def used(*parameters, use="use"):
    """A scalar that a marked use of some arrays takes part in."""
    y = sum(jnp.sum(w) for w in parameters).reshape(1, 1)
    return jnp.sum(mark(DENSE, jnp.ones((1, 1)), y, parameters, use))


def marks_in(program, sources):
    return [one for one in lineage.find_uses(program, sources) if isinstance(one, Mark)]


def find_marks(fun, *sources):
    return marks_in(jax.make_jaxpr(fun)(*sources), len(sources))


def marks(fun):
    return find_marks(fun, W, X)


def origins(fun):
    """The origin of every marked array, in program order."""
    return [found.origins[0] for found in marks(fun)]


def axes(*of, shape=(4, 3, 2)):
    """The axes of an array, each a whole one of its source; "copies" for five along a new one."""
    copies = (Piece(None, 1, 5),)
    return tuple(copies if i == "copies" else (Piece(i, 1, shape[i]),) for i in of)


def whole(**changes):
    return Origin(0, axes(0, 1, 2), **changes)


def reshaped(*shape, **changes):
    return Origin(0, reshape(axes(0, 1, 2), shape), **changes)


def lost(why, behind=frozenset({0}), **changes):
    return Origin(0, (), lost=why, behind=behind, **changes)


def sliced(*gone, by=()):
    """What is left of the source after slices along some of its axes."""
    kept = tuple(axis for axis in range(3) if axis not in gone)
    return Origin(0, axes(*kept), tuple(Slice(axis, by, 1, 1) for axis in gone))


def cut(axis, entries):
    """A range of the source along one of its axes."""
    own = tuple(Piece(i, 1, len(entries) if i == axis else n) for i, n in enumerate((4, 3, 2)))
    return Origin(0, tuple((one,) for one in own), (Slice(axis, entries, 1, len(entries)),))


def without_places(origin):
    """The origin, but for where its slices were taken."""

    def without(one):
        return one._replace(by=()) if isinstance(one.by, tuple) else one

    return dataclasses.replace(origin, sliced=tuple(map(without, origin.sliced)))


@jax.custom_vjp
def custom(w):
    return used(w)


custom.defvjp(lambda w: (used(w), w), lambda w, g: (g * w,))

MESH = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def sharded(spec, body):
    return lambda w, x: jax.shard_map(
        lambda w: body(w)[None], mesh=MESH, in_specs=spec, out_specs=PartitionSpec("d")
    )(w).sum()


MASKED = whole(mixed=True, multiplied=True)
HANDED_ON = {
    "as it is": (lambda w, x: used(w), whole()),
    "jit": (lambda w, x: jax.jit(used)(w), whole()),
    "jit of jit": (lambda w, x: jax.jit(jax.jit(used))(w), whole()),
    "checkpoint": (lambda w, x: jax.checkpoint(used)(w), whole()),
    "grad": (lambda w, x: jax.grad(used)(w), whole()),
    "vjp": (lambda w, x: jax.vjp(used, w)[1](1.0), whole()),
    "linearize": (lambda w, x: jax.linearize(used, w)[1](w), whole()),
    "jit, out again": (lambda w, x: used(jax.jit(lambda w: w * 1.0)(w)), whole(multiplied=True)),
    "container": (lambda w, x: used(jax.tree.map(lambda a: a, {"a": [w]})["a"][0]), whole()),
    "cast": (lambda w, x: used(w.astype(jnp.bfloat16)), whole()),
    "stop_gradient": (lambda w, x: used(lax.stop_gradient(w)), whole(frozen=True)),
    "cast and frozen": (
        lambda w, x: used(lax.stop_gradient(w.astype(jnp.bfloat16))),
        whole(frozen=True),
    ),
    "shared by devices": (sharded(PartitionSpec(), used), whole()),
    "transpose": (lambda w, x: used(w.transpose(2, 0, 1)), Origin(0, axes(2, 0, 1))),
    "transposed back": (lambda w, x: used(w.transpose(2, 0, 1).transpose(1, 2, 0)), whole()),
    "barrier": (lambda w, x: used(lax.optimization_barrier((x, w))[1]), whole()),
    "put elsewhere": (lambda w, x: used(jax.device_put(w)), whole()),
    "second input": (lambda w, x: used(x), Origin(1, axes(0, shape=(5,)))),
    # Combined with other arrays, element by element.
    "mask": (lambda w, x: used(w * (jnp.arange(24.0).reshape(4, 3, 2) % 2)), MASKED),
    "its own mask": (lambda w, x: used(w * (w > 0)), MASKED),
    "scaled": (lambda w, x: used(2 * w), whole(multiplied=True)),
    "scaled by an array of one number": (
        lambda w, x: used(w / jnp.sqrt(2.0) * jnp.ones((4, 3, 2))),
        whole(multiplied=True),
    ),
    "where": (lambda w, x: used(jnp.where(jnp.ones((4, 3, 2), bool), w, 0)), MASKED),
    "beside its frozen self": (lambda w, x: used(w * lax.stop_gradient(w)), MASKED),
    "straight-through rounding": (
        lambda w, x: used(w + lax.stop_gradient(jnp.round(w) - w)),
        whole(mixed=True),
    ),
    "frozen and frozen": (
        lambda w, x: used(lax.stop_gradient(w) - 0.1 * lax.stop_gradient(w)),
        whole(frozen=True, mixed=True, multiplied=True),
    ),
    "a gradient step": (
        lambda w, x: used(w - 0.1 * jax.grad(lambda w: jnp.sum(w**3))(w)),
        whole(mixed=True),
    ),
    "added: what it was computed from": (
        lambda w, x: used(w + w.reshape(24).reshape(4, 3, 2)),
        MASKED,
    ),
    "added: another's": (lambda w, x: used(w + jnp.sum(x)), whole(mixed=True)),
    "over its norm": (lambda w, x: used(w / jnp.linalg.norm(w)), lost(TRANSFORMED)),
    "over its frozen norm": (
        lambda w, x: used(w / lax.stop_gradient(jnp.linalg.norm(w))),
        MASKED,
    ),
    # Copies of it along further axes.
    "repeated": (
        lambda w, x: used(jnp.broadcast_to(w, (5, 4, 3, 2))),
        Origin(0, axes("copies", 0, 1, 2)),
    ),
    "repeated, mapped": (
        lambda w, x: jax.vmap(used)(jnp.broadcast_to(w, (5, 4, 3, 2))),
        whole(),
    ),
    "repeated, scanned": (
        lambda w, x: lax.map(used, jnp.broadcast_to(w, (5, 4, 3, 2))).sum(),
        whole(),
    ),
    "noise for each of a vmap": (
        lambda w, x: jax.vmap(lambda noise: used(w + noise))(jnp.arange(5.0)),
        whole(mixed=True, varied=True),
    ),
    # Split and merged axes.
    "reshape": (lambda w, x: used(w.reshape(12, 2)), reshaped(12, 2)),
    "split in two": (lambda w, x: used(w.reshape(2, 2, 6)), reshaped(2, 2, 6)),
    "reshaped back": (
        lambda w, x: used(w.reshape(12, 2).reshape(2, 6, 2).reshape(4, 3, 2)),
        whole(),
    ),
    "reshape and frozen": (
        lambda w, x: used(lax.stop_gradient(w.reshape(12, 2))),
        reshaped(12, 2, frozen=True),
    ),
    "reshape and transpose": (
        lambda w, x: used(w.reshape(4, 3, 2, 1).transpose(3, 0, 1, 2)),
        Origin(0, ((), *axes(0, 1, 2))),
    ),
    "an axis of size one more": (
        lambda w, x: used(w[:, None]),
        Origin(0, ((Piece(0, 1, 4),), (), *axes(1, 2))),
    ),
    # One slice alone.
    "slice": (lambda w, x: used(w[1]), sliced(0, by=1)),
    "slice from the end": (lambda w, x: used(w[:, -1]), sliced(1, by=2)),
    "slice with its axis": (
        lambda w, x: used(w[:, 1:2]),
        dataclasses.replace(sliced(1, by=1), axes=((Piece(0, 1, 4),), (), (Piece(2, 1, 2),))),
    ),
    "slice of a slice": (lambda w, x: used(w[1, :, 1]), sliced(0, 2, by=1)),
    "split": (lambda w, x: used(jnp.split(w, 4)[1].reshape(3, 2)), sliced(0, by=1)),
    "unstack": (lambda w, x: used(jnp.unstack(w, axis=1)[2]), sliced(1, by=2)),
    "slice of a part of an axis": (
        lambda w, x: used(w.reshape(2, 2, 3, 2)[:, 1]),
        Origin(0, ((Piece(0, 2, 2),), *axes(1, 2)), (Slice(0, 1, 1, 2),)),
    ),
    "all of it": (lambda w, x: used(lax.slice(w, (0, 0, 0), (4, 3, 2))), whole()),
    # A range.
    "several entries": (lambda w, x: used(w[1:3]), cut(0, range(1, 3))),
    "in halves": (lambda w, x: used(jnp.split(w, 2)[0]), cut(0, range(2))),
    "a slice of the first part of an axis": (
        lambda w, x: used(w.reshape(2, 2, 3, 2)[1]),
        cut(0, range(2, 4)),
    ),
    "several entries of a range": (
        lambda w, x: used(w[1:][1:]),
        Origin(
            0,
            ((Piece(0, 1, 2),), *axes(1, 2)),
            (Slice(0, range(1, 4), 1, 3), Slice(0, range(1, 3), 1, 2)),
        ),
    ),
    "a slice of a range": (
        lambda w, x: used(w[1:, 0]),
        Origin(0, ((Piece(0, 1, 3),), *axes(2)), (Slice(0, range(1, 4), 1, 3), Slice(1, 0, 1, 1))),
    ),
    "several copies": (
        lambda w, x: used(jnp.broadcast_to(w, (7, 4, 3, 2))[:5]),
        Origin(0, axes("copies", 0, 1, 2)),
    ),
    # What is neither.
    "every other entry": (lambda w, x: used(w[::2]), lost(REARRANGED)),
    "no entry": (lambda w, x: used(w[:0]), lost(REARRANGED)),
    "a slice of merged axes": (lambda w, x: used(w.reshape(12, 2)[3]), lost(REARRANGED)),
    "a range of merged axes": (lambda w, x: used(w.reshape(12, 2)[3:5]), lost(REARRANGED)),
    "a range of the last part of an axis": (
        lambda w, x: used(w.transpose(1, 0, 2).reshape(3, 2, 2, 2).reshape(3, 2, 4)[:, :, :3]),
        lost(REARRANGED),
    ),
    "a slice of copies": (
        lambda w, x: used(jnp.broadcast_to(w, (5, 4, 3, 2))[1]),
        whole(),
    ),
    "scan over a reshape": (
        lambda w, x: lax.scan(lambda c, w: (c + used(w), None), 0.0, w.reshape(12, 2))[0],
        lost(REARRANGED),
    ),
    "concatenation": (lambda w, x: used(jnp.concatenate([w, w])), lost(COMPUTED)),
    "a device's part": (
        sharded(PartitionSpec("d"), used),
        lost("only a device's part of it reaches its layer"),
    ),
    # Loops and branches.
    "scan over it": (lambda w, x: lax.scan(lambda c, w: (c, used(w)), 0.0, w)[1].sum(), sliced(0)),
    "scan around it": (
        lambda w, x: lax.scan(lambda c, x: (c + used(w), None), 0.0, x)[0],
        whole(),
    ),
    "scan in a scan": (
        lambda w, x: lax.scan(
            lambda c, w: (lax.scan(lambda c, w: (c + used(w), None), c, w)[0], None), 0.0, w
        )[0],
        sliced(0, 1),
    ),
    "carried unchanged": (lambda w, x: lax.scan(lambda w, x: (w, used(w)), w, x)[1].sum(), whole()),
    "carried out of a scan": (
        lambda w, x: used(lax.scan(lambda w, x: (w, None), w, x)[0]),
        whole(),
    ),
    "carry that changes": (
        lambda w, x: lax.scan(lambda w, x: (2 * w, used(w)), w, x)[1].sum(),
        lost(COMPUTED),
    ),
    "carries that swap": (
        lambda w, x: lax.fori_loop(0, 3, lambda i, c: (c[1], c[0], used(c[0])), (w, 2 * w, 0.0))[2],
        lost(COMPUTED),
    ),
    "stacked by a scan": (
        lambda w, x: used(lax.scan(lambda c, w: (c, w.T), 0.0, w)[1]),
        lost(COMPUTED),
    ),
    "while around it": (
        lambda w, x: lax.while_loop(lambda c: c < 9, lambda c: c + 1 + used(w), 0.0),
        whole(),
    ),
    "carried by a while": (
        lambda w, x: lax.while_loop(
            lambda c: c[1] < 9, lambda c: (c[0], c[1] + used(c[0])), (w, 0.0)
        ),
        whole(),
    ),
    "fori": (lambda w, x: lax.fori_loop(0, 3, lambda i, c: c + used(w), 0.0), whole()),
    "map": (lambda w, x: lax.map(used, w).sum(), sliced(0)),
    "through a cond": (
        lambda w, x: used(lax.cond(x[0] > 0, lambda w: w, lambda w: w.astype(w.dtype), w)),
        whole(),
    ),
    "two branches that differ": (
        lambda w, x: used(lax.cond(x[0] > 0, lambda w: w, lambda w: 2 * w, w)),
        lost(COMPUTED),
    ),
    # Batching.
    "vmap": (lambda w, x: jax.vmap(used)(w), sliced(0)),
    "vmap, another axis": (lambda w, x: jax.vmap(used, 2)(w), sliced(2)),
    "vmap around it": (lambda w, x: jax.vmap(lambda x: used(w) * x)(x), whole()),
    "vmap in a vmap": (lambda w, x: jax.vmap(jax.vmap(used, 1), 1)(w), sliced(1, 2)),
    "scan in a vmap": (  # JAX makes it a scan whose body is batched
        lambda w, x: jax.vmap(lambda w: lax.map(used, w).sum(), 2)(w),
        sliced(0, 2),
    ),
}


@pytest.mark.parametrize("how", HANDED_ON)
def test_an_origin_is_followed(how):
    fun, expected = HANDED_ON[how]
    found = origins(fun)
    assert found
    assert {without_places(one) for one in found} == {expected}


NOBODYS = {
    "a constant": lambda w, x: used(jnp.ones((4, 3, 2))),
    "a random number": lambda w, x: used(jax.random.normal(jax.random.key(0), (3,))),
    "which entries are positive": lambda w, x: used((w > 0).astype(w.dtype)),
}


@pytest.mark.parametrize("how", NOBODYS)
def test_what_is_computed_from_no_source_has_no_origin(how):
    assert origins(NOBODYS[how]) == [None]


def test_what_several_sources_are_behind_has_an_origin_without_one():
    (found,) = origins(lambda w, x: used(w.transpose(0, 2, 1)[0, 0, ::2] + x[::3]))
    assert found == Origin(None, (), lost=REARRANGED, behind=frozenset({0, 1}))


def test_a_sum_of_two_orders_of_its_axes_is_neither():
    square = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    (found,) = find_marks(lambda w: used(w + w.T), square)
    assert found.origins == (lost(TRANSFORMED),)


def test_a_loop_that_hands_a_carry_on_late_is_followed_to_its_fixed_point():
    """`a` becomes `b` and `b` becomes `c`: only the third round shows that `a` is lost."""

    def fun(w, x):
        def step(carry, _):
            a, b, c = carry
            return (b, c, 2 * c), used(a)

        return lax.scan(step, (w, w, w), x)[1].sum()

    assert origins(fun) == [lost(COMPUTED)]


def test_a_mark_in_a_loop_is_reported_once_and_a_function_called_twice_is_reported_twice():
    twice = jax.jit(used)
    assert len(marks(lambda w, x: lax.map(used, w).sum())) == 1
    assert len(marks(lambda w, x: twice(w) + twice(2 * w))) == 2
    assert len(marks(lambda w, x: lax.cond(x[0] > 0, used, used, w))) == 2


def test_a_use_inside_a_derivative_rule_is_told_apart():
    inside, outside = marks(lambda w, x: custom(w) + used(w))
    assert inside.inside[0].startswith("custom_vjp")
    assert outside.inside == ()


@jax.jit
def nested(w, x):
    return lax.scan(lambda c, w: (c + jax.checkpoint(used)(w), None), 0.0, w)[0]


def test_a_mark_tells_what_it_lies_within():
    (found,) = marks(nested)
    assert found.inside == ("jit", "scan", "remat2")


def test_places_lead_to_the_marks_and_to_the_loops_that_slice():
    """Index by index, through the equations' bodies, from the program's own equations."""
    program = jax.make_jaxpr(lambda w, x: nested(w, x) + lax.cond(x[0] > 0, used, used, w))(W, X)

    def equation(place):
        body = program.jaxpr
        for index, which in place[:-1]:
            body = list(bodies(body.eqns[index]))[which]
        return body.eqns[place[-1][0]]

    found = marks_in(program, 2)
    assert [equation(one.place).primitive.name for one in found] == ["adafisher_tap"] * 3
    assert len({one.place for one in found}) == 3
    (taken,) = found[0].origins[0].sliced
    assert equation(taken.by).primitive.name == "scan"


def test_a_slice_of_a_vmap_is_taken_at_the_mark_itself():
    """Which of several vmaps it is tells stacks of equal sizes apart."""
    (found,) = marks(lambda w, x: jax.vmap(jax.vmap(used), 1)(w))
    outer, inner = found.origins[0].sliced
    assert (outer.axis, inner.axis) == (1, 0)
    assert all(taken.by[: len(found.place)] == found.place for taken in (outer, inner))
    assert outer.by != inner.by
    assert found.axes == (axes(0, 1, 2),)


def test_a_mark_has_the_axes_that_its_program_shows():
    (found,) = marks(lambda w, x: lax.map(lambda w: jax.vmap(used, 1)(w.T).sum(), w).sum())
    assert found.axes == (axes(2, 1),)  # axis 0 is gone in the loop, the other two were transposed
    assert [s.axis for s in found.origins[0].sliced] == [0, 1]


def test_other_arguments_are_no_sources():
    program = jax.make_jaxpr(lambda w, mask: used(w * mask) + used(mask))(W, W)
    found = marks_in(program, 1)
    assert [one.origins for one in found] == [(MASKED,), (None,)]


def test_several_parameters_of_a_use_keep_their_order():
    (found,) = marks(lambda w, x: used(x, w, x + x))
    assert found.origins == (
        Origin(1, axes(0, shape=(5,))),
        whole(),
        Origin(1, axes(0, shape=(5,)), mixed=True, multiplied=True),
    )


def test_uses_are_what_the_adapter_called_them():
    found = marks(lambda w, x: used(w, use="one") + used(w, use=("two", 2)))
    assert [one.use for one in found] == ["one", ("two", 2)]


def test_taps_that_have_a_probe_are_no_marks():
    """A model tapped by hand inside a loss is left to its owner."""
    probe = af.Factor(*(jnp.zeros(shape) for shape in ((2, 1), (1, 2), (), (2, 1))))
    assert not marks(lambda w, x: af.tap(DENSE, w[0, :, :2], w[1, :, :2], probe))


def test_marks_compute_nothing_and_change_no_gradient():
    w = jnp.arange(24.0).reshape(4, 3, 2)
    plain = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(w)))
    marked = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(mark(DENSE, w, w, [w], "use"))))
    jax.tree.map(np.testing.assert_array_equal, marked(w), plain(w))
    assert "adafisher" not in jax.jit(marked).lower(w).as_text()


def test_dropped_axes_are_named_as_the_source_has_them():
    found = whole().drop(1, ((7, 0),)).drop(1, ((8, 0),))
    assert found == Origin(0, axes(0), (Slice(1, ((7, 0),), 1, 1), Slice(2, ((8, 0),), 1, 1)))
    assert lost(COMPUTED).drop(0, ()) == lost(COMPUTED)
