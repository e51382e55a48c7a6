"""Where marked arrays come from, through every way JAX has of handing an array on."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from adafisher_jax.lineage import Mark, Origin, find_marks, mark, mark_root

W = jax.ShapeDtypeStruct((4, 3, 2), jnp.float32)  # the source 0: three axes to tell apart
X = jax.ShapeDtypeStruct((5,), jnp.float32)  # the source 1


def used(w, label="use"):
    """A scalar that a marked use of `w` takes part in."""
    (y,) = mark([jnp.sum(w)], [w], label)
    return y


def marks(fun):
    return find_marks(lambda sources: fun(*sources), (W, X))


def origins(fun):
    """The origin of every marked array, in program order."""
    return [mark.origins[0] for mark in marks(fun)]


def whole(**changes):
    return Origin(0, (0, 1, 2), **changes)


def sliced(axis):
    return whole().drop(axis)


def double(w):
    return w + w


@jax.custom_vjp
def custom(w):
    return used(w)


custom.defvjp(lambda w: (used(w), w), lambda w, g: (g * w,))


HANDED_ON = {
    "as it is": (lambda w, x: used(w), whole()),
    "jit": (lambda w, x: jax.jit(used)(w), whole()),
    "jit of jit": (lambda w, x: jax.jit(jax.jit(used))(w), whole()),
    "checkpoint": (lambda w, x: jax.checkpoint(used)(w), whole()),
    "grad": (lambda w, x: jax.grad(used)(w), whole()),
    "jit, out again": (lambda w, x: used(jax.jit(lambda w: w * 1.0)(w)), whole(mixed=True)),
    "container": (lambda w, x: used(jax.tree.map(lambda a: a, {"a": [w]})["a"][0]), whole()),
    "cast": (lambda w, x: used(w.astype(jnp.bfloat16)), whole(cast=True)),
    "cast to its own type": (lambda w, x: used(w.astype(jnp.float32)), whole()),
    "stop_gradient": (lambda w, x: used(lax.stop_gradient(w)), whole(frozen=True)),
    "cast and frozen": (
        lambda w, x: used(lax.stop_gradient(w.astype(jnp.bfloat16))),
        whole(cast=True, frozen=True),
    ),
    "mask": (lambda w, x: used(w * jnp.ones((4, 3, 2))), whole(mixed=True)),
    "scaled": (lambda w, x: used(2 * w), whole(mixed=True)),
    "where": (lambda w, x: used(jnp.where(jnp.ones((4, 3, 2), bool), w, 0)), whole(mixed=True)),
    "beside its frozen self": (lambda w, x: used(w * lax.stop_gradient(w)), whole(mixed=True)),
    "straight-through rounding": (
        lambda w, x: used(w + lax.stop_gradient(jnp.round(w) - w)),
        whole(mixed=True),
    ),
    "noise of a rearranged self": (
        lambda w, x: used(w + w.reshape(24).reshape(4, 3, 2)),
        whole(mixed=True),
    ),
    "frozen and frozen": (
        lambda w, x: used(lax.stop_gradient(w) - 0.1 * lax.stop_gradient(w)),
        whole(frozen=True, mixed=True),
    ),
    "transpose": (lambda w, x: used(w.transpose(2, 0, 1)), Origin(0, (2, 0, 1))),
    "transposed back": (lambda w, x: used(w.transpose(2, 0, 1).transpose(1, 2, 0)), whole()),
    "barrier": (lambda w, x: used(lax.optimization_barrier((x, w))[1]), whole()),
    "second input": (lambda w, x: used(x), Origin(1, (0,))),
    "slice": (lambda w, x: used(w[1]), whole(lost=True)),
    "reshape": (lambda w, x: used(w.reshape(12, 2)), whole(lost=True)),
    "reshape and transpose": (
        lambda w, x: used(w.reshape(4, 3, 2, 1).transpose(3, 0, 1, 2)),
        whole(lost=True),
    ),
    "scan over a reshape": (
        lambda w, x: lax.scan(lambda c, w: (c + used(w), None), 0.0, w.reshape(12, 2))[0],
        whole(lost=True),
    ),
    "cast and reshape": (
        lambda w, x: used(w.astype(jnp.bfloat16).reshape(12, 2)),
        whole(cast=True, lost=True),
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
        sliced(0).drop(0),
    ),
    "carried unchanged": (
        lambda w, x: lax.scan(lambda w, x: (w, used(w)), w, x)[1].sum(),
        whole(),
    ),
    "carried out of a scan": (
        lambda w, x: used(lax.scan(lambda w, x: (w, None), w, x)[0]),
        whole(),
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
        lambda w, x: used(
            lax.cond(x[0] > 0, lambda w: w, lambda w: lax.optimization_barrier(w), w)
        ),
        whole(),
    ),
    # Batching.
    "vmap": (lambda w, x: jax.vmap(used)(w), sliced(0)),
    "vmap, another axis": (lambda w, x: jax.vmap(used, 2)(w), sliced(2)),
    "vmap around it": (lambda w, x: jax.vmap(lambda x: used(w) * x)(x), whole()),
    "vmap in a vmap": (lambda w, x: jax.vmap(jax.vmap(used, 1), 1)(w), sliced(1).drop(1)),
    "scan in a vmap": (  # JAX makes it a scan whose body is batched
        lambda w, x: jax.vmap(lambda w: lax.map(used, w).sum(), 2)(w),
        sliced(0).drop(1),
    ),
}


@pytest.mark.parametrize("how", HANDED_ON)
def test_an_origin_is_followed(how):
    fun, expected = HANDED_ON[how]
    found = origins(fun)
    assert found
    assert set(map(repr, found)) == {repr(expected)}


LOST = {
    "concatenation": lambda w, x: used(jnp.concatenate([w, w])),
    "a product of two origins": lambda w, x: used(w * w.astype(jnp.bfloat16).astype(jnp.float32)),
    "a sum of two sources": lambda w, x: used(w.transpose(0, 2, 1)[0, 0] + x[:3]),
    "a constant": lambda w, x: used(jnp.ones((4, 3, 2))),
    "a random number": lambda w, x: used(jax.random.normal(jax.random.key(0), (3,))),
    "carry that changes": lambda w, x: lax.scan(lambda w, x: (2 * w, used(w)), w, x)[1].sum(),
    "carries that swap": lambda w, x: lax.fori_loop(
        0, 3, lambda i, c: (c[1], c[0], used(c[0])), (w, 2 * w, 0.0)
    )[2],
    "stacked by a scan": lambda w, x: used(lax.scan(lambda c, w: (c, w.T), 0.0, w)[1]),
    "two branches that differ": lambda w, x: used(
        lax.cond(x[0] > 0, lambda w: w, lambda w: 2 * w, w)
    ),
}


@pytest.mark.parametrize("how", LOST)
def test_what_has_no_single_source_is_nothing(how):
    found = origins(LOST[how])
    assert found
    assert set(found) == {None}


def test_a_loop_that_hands_a_carry_on_late_is_followed_to_its_fixed_point():
    """`a` becomes `b` and `b` becomes `c`: only the third round shows that `a` is lost."""

    def fun(w, x):
        def step(carry, _):
            a, b, c = carry
            return (b, c, 2 * c), used(a)

        return lax.scan(step, (w, w, w), x)[1].sum()

    assert origins(fun) == [None]


def test_a_mark_in_a_loop_is_reported_once_and_a_function_called_twice_is_reported_twice():
    twice = jax.jit(used)
    assert len(marks(lambda w, x: lax.map(used, w).sum())) == 1
    assert len(marks(lambda w, x: twice(w) + twice(2 * w))) == 2
    assert len(marks(lambda w, x: lax.cond(x[0] > 0, used, used, w))) == 2


def test_a_use_inside_a_derivative_rule_is_told_apart():
    inside, outside = marks(lambda w, x: custom(w) + used(w))
    assert inside.inside[0].startswith("custom_vjp")
    assert outside.inside == ()


def test_a_mark_tells_what_it_lies_within():
    @jax.jit
    def fun(w, x):
        return lax.scan(lambda c, w: (c + jax.checkpoint(used)(w), None), 0.0, w)[0]

    (found,) = marks(fun)
    assert found.inside == ("jit", "scan", "remat2")


ORDERS = {
    0: lambda w, x: used(w),
    1: lambda w, x: jax.grad(used)(w),
    2: lambda w, x: jax.grad(lambda w: jnp.sum(jax.grad(used)(w)))(w),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_mark_counts_the_derivatives_of_its_parameters(order):
    assert {m.order for m in marks(ORDERS[order])} == {order}
    around = lambda w, x: jax.grad(lambda x: used(w) * x[0])(x)  # noqa: E731
    assert {m.order for m in marks(around)} == {0}  # the derivative is by something else


def test_other_arguments_are_no_sources():
    fun = lambda w, mask: used(w * mask) + used(mask)  # noqa: E731
    assert [m.origins for m in find_marks(fun, W, W)] == [(whole(mixed=True),), (None,)]


def test_a_root_mark_is_a_source_of_its_own():
    def fun(w, x):
        root = mark_root(w.astype(jnp.bfloat16), "root")
        return used(root.transpose(1, 0, 2))

    root, use = marks(fun)
    assert root == Mark("root", (whole(cast=True),), (), 0)
    assert use == Mark("use", (Origin("root", (1, 0, 2)),), (), 0)


def test_a_vmap_drops_the_mark_of_a_root_it_maps_but_keeps_others():
    mapped = marks(lambda w, x: jax.vmap(lambda w: used(mark_root(w, "root")))(w))
    assert mapped == [Mark("use", (sliced(0),), (), 0)]
    around = marks(lambda w, x: jax.vmap(lambda x: used(mark_root(w, "root")) * x)(x))
    assert [m.label for m in around] == ["root", "use"]


def test_several_parameters_of_a_use_keep_their_order():
    def fun(w, x):
        (y,) = mark([jnp.sum(x)], [x, w, double(x)], "use")
        return y

    (found,) = marks(fun)
    assert found.origins == (Origin(1, (0,)), whole(), Origin(1, (0,), mixed=True))


def test_marks_compute_nothing_and_change_no_gradient():
    w = jnp.arange(24.0).reshape(4, 3, 2)
    plain = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(w)))

    def marked(w):
        w = mark_root(w, "root")
        (w,) = mark([w], [w], "use")
        return jnp.sum(jnp.sin(w))

    assert jax.tree.all(jax.tree.map(jnp.array_equal, jax.value_and_grad(marked)(w), plain(w)))


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (whole(), (True, True)),
        (sliced(1), (False, True)),
        (Origin(0, (1, 0)), (False, False)),
        (whole(cast=True), (True, False)),
        (whole(lost=True), (False, False)),
    ],
)
def test_whole_means_every_axis_in_its_place_and_untouched_that_nothing_else_happened(
    origin, expected
):
    assert (origin.whole, origin.untouched) == expected


@pytest.mark.parametrize(
    ("first", "later", "both"),
    [
        (whole(cast=True), Origin("r", (2, 0, 1)), Origin(0, (2, 0, 1), cast=True)),
        (sliced(0), Origin("r", (1,), (0,), frozen=True), Origin(0, (2,), (0, 1), frozen=True)),
        (whole(lost=True), Origin("r", (0,)), whole(lost=True)),
        (whole(), Origin("r", (0, 1), lost=True), whole(lost=True)),
    ],
)
def test_one_origin_after_another(first, later, both):
    assert first.then(later) == both


def test_dropped_axes_are_named_as_the_source_has_them():
    assert whole().drop(1).drop(1) == Origin(0, (0,), sliced=(1, 2))
