"""A product of a parameter with data is a layer, whoever wrote it and however."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.support.plain_programs import check

pytestmark = pytest.mark.usefixtures("numpy_rules")

RNG = np.random.default_rng(7)


def real(*shape):
    return RNG.normal(size=shape)


def ids(size, *shape):
    return RNG.integers(0, size, size=shape)


def loss_of(y):
    weights = 1 + jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)
    return jnp.sum(jnp.sin(y) * weights) / y.size


def one(fun, x, w, ins, bias=None, add=lambda y, b: y + b, **how):
    """A program of one product, its parameters and its data."""

    def program(mode, params, x):
        y = mode.product(fun, x, params["w"], ins, **how)
        return loss_of(y if bias is None else add(y, mode.of(params["b"])))

    return program, {"w": w} | ({} if bias is None else {"b": bias}), x


def einsum(equation):
    return lambda x, w: jnp.einsum(equation, x, w)


def dims(contracted, batch=((), ()), swapped=False):
    numbers = (contracted, batch)
    return lambda x, w: lax.dot_general(*((w, x) if swapped else (x, w)), numbers)


DENSE = {
    "x @ w": one(lambda x, w: x @ w, real(4, 3), real(3, 5), (0,)),
    "w @ x": one(lambda x, w: w @ x, real(3, 4), real(5, 3), (1,)),
    "matmul, rows of two axes": one(jnp.matmul, real(2, 4, 3), real(3, 5), (0,)),
    "matmul, one weight each": one(jnp.matmul, real(2, 4, 3), real(2, 3, 5), (1,), batch=(0,)),
    "matmul, x is shared": one(lambda x, w: w @ x, real(3, 4), real(2, 5, 3), (2,)),
    "dot": one(jnp.dot, real(2, 4, 3), real(3, 5), (0,)),
    "tensordot": one(lambda x, w: jnp.tensordot(x, w, 2), real(2, 4, 3), real(4, 3, 5), (0, 1)),
    "tensordot of named axes": one(
        lambda x, w: jnp.tensordot(w, x, ((2, 0), (1, 2))), real(2, 4, 3), real(3, 5, 4), (0, 2)
    ),
    "query, key, value": one(einsum("btd,sdnh->sbtnh"), real(2, 4, 3), real(3, 3, 2, 5), (1,)),
    "heads merged": one(einsum("btnh,nhd->btd"), real(2, 4, 3, 2), real(3, 2, 5), (0, 1)),
    "weight first": one(
        lambda x, w: jnp.einsum("ndh,btd->bnth", w, x), real(2, 4, 3), real(5, 3, 2), (1,)
    ),
    "four axes": one(einsum("btd,dgnh->btgnh"), real(2, 4, 3), real(3, 2, 2, 3), (0,)),
    "an axis of x is summed": one(einsum("btd,do->bo"), real(2, 4, 3), real(3, 2), (0,)),
    "experts": one(einsum("bed,edo->beo"), real(2, 4, 3), real(4, 3, 2), (1,), batch=(0,)),
    "batch axes in the middle": one(
        dims(((1,), (2,)), ((2,), (0,))), real(5, 3, 4), real(4, 2, 3), (2,), batch=(0,)
    ),
    "batch axis last": one(
        dims(((0,), (2,)), ((2,), (0,)), True), real(5, 3, 4), real(4, 6, 5), (0,), batch=(2,)
    ),
    "two batch axes": one(
        dims(((3,), (1,)), ((0, 2), (3, 0))), real(2, 4, 3, 5), real(3, 5, 6, 2), (1,), batch=(0, 3)
    ),
    "preferred type": one(
        lambda x, w: lax.dot_general(
            x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float64
        ),
        real(4, 3),
        real(3, 5),
        (0,),
    ),
    "x @ vector": one(lambda x, w: x @ w, real(4, 3), real(3), (0,)),
    "vector @ w": one(lambda x, w: x @ w, real(3), real(3, 5), (0,)),
    "vector @ vector": one(lambda x, w: jnp.dot(x, w)[None], real(3), real(3), (0,)),
    "no inputs": one(einsum("b,o->bo"), real(4), real(5), ()),
    "one weight for each feature": one(einsum("bo,o->bo"), real(4, 5), real(5), (), batch=(0,)),
    "integers": one(lambda x, w: x.astype(jnp.float64) @ w, ids(5, 4, 3), real(3, 5), (0,)),
    "one input": one(lambda x, w: x @ w, real(4, 1), real(1, 5), (0,)),
    "one output": one(lambda x, w: x @ w, real(4, 3), real(3, 1), (0,)),
    "one row": one(lambda x, w: x @ w, real(1, 3), real(3, 5), (0,)),
    "square": one(lambda x, w: x @ w.T, real(5, 5), real(5, 5), (1,)),
}

MASK = np.array([[1.0, 0, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 0, 0, 1]])


def drop(w):
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, w.shape), w, 0.0) * 2


def noisy(w):
    return w + 0.1 * jax.random.normal(jax.random.key(0), w.shape, w.dtype)


CHANGED = {
    "transposed": one(lambda x, w: x @ w.T, real(4, 3), real(5, 3), (1,)),
    "GPT-2's Conv1D": one(
        lambda x, w: lax.dot_general(x, w.transpose(), (((2,), (0,)), ((), ()))),
        real(2, 4, 3),
        real(5, 3),
        (1,),
    ),
    "T5X's heads": one(
        lambda x, w: jnp.einsum("btd,dnh->btnh", x, w.reshape(3, 2, 4)),
        real(2, 4, 3),
        real(3, 8),
        (0,),
    ),
    "T5X's output": one(
        lambda x, w: jnp.einsum("btnh,nhd->btd", x, w.reshape(2, 4, 3)),
        real(2, 5, 2, 4),
        real(8, 3),
        (0,),
    ),
    "merged": one(lambda x, w: x @ w.reshape(3, 8), real(4, 3), real(3, 2, 4), (0,)),
    "inputs merged": one(lambda x, w: x @ w.reshape(6, 4), real(4, 6), real(3, 2, 4), (0, 1)),
    "split and transposed": one(
        lambda x, w: jnp.einsum("btd,ndh->bnth", x, w.reshape(2, 4, 3).transpose(0, 2, 1)),
        real(2, 4, 3),
        real(8, 3),
        (1,),
    ),
    "an axis added": one(lambda x, w: jnp.matmul(x, w[None]), real(2, 4, 3), real(3, 5), (0,)),
    "an axis of size one": one(lambda x, w: x @ w[0], real(4, 3), real(1, 3, 5), (1,)),
    "masked": one(lambda x, w: x @ w, real(4, 3), real(3, 5), (0,), by=lambda w: w * MASK),
    "DropConnect": one(lambda x, w: x @ w, real(4, 3), real(3, 5), (0,), by=drop),
    "noise": one(lambda x, w: x @ w, real(4, 3), real(3, 5), (0,), by=noisy),
    "scaled by a product": one(
        lambda x, w: x @ w,
        real(4, 3),
        real(3, 5),
        (0,),
        by=lambda w: jnp.einsum("i,io->io", jnp.arange(1.0, 4), w),
    ),
    "clipped": one(lambda x, w: x @ w, real(4, 3), real(3, 5), (0,), by=lambda w: w.clip(-1, 1)),
}

CAST = {
    "dense": one(lambda x, w: x @ w, real(4, 3), np.float32(real(3, 5)), (0,), by=jnp.float64),
    "lookup": one(lambda i, t: t[i], ids(7, 3, 5), np.float32(real(7, 4)), (0,), by=jnp.float64),
}

BIASED = {
    "x @ w + b": one(lambda x, w: x @ w, real(4, 3), real(3, 5), (0,), real(5)),
    "b + x @ w": one(lambda x, w: x @ w, real(4, 3), real(3, 5), (0,), real(5), lambda y, b: b + y),
    "one output": one(lambda x, w: x @ w, real(4, 3), real(3, 1), (0,), real(1)),
    "one row": one(lambda x, w: x @ w, real(1, 3), real(3, 5), (0,), real(5)),
    "no rows": one(lambda x, w: w @ x, real(3), real(5, 3), (1,), real(5)),
    "an axis of size one": one(lambda x, w: x @ w, real(4, 3), real(3, 5), (0,), real(1, 5)),
    "several axes": one(einsum("btd,dnh->btnh"), real(2, 4, 3), real(3, 2, 5), (0,), real(2, 5)),
    "rows last": one(
        lambda x, w: jnp.einsum("btd,dnh->bnth", x, w),
        real(2, 4, 3),
        real(3, 2, 5),
        (0,),
        real(2, 5),
        lambda y, b: y + b[:, None],
    ),
    "batch axes": one(
        einsum("bed,edo->ebo"),
        real(2, 4, 3),
        real(4, 3, 2),
        (1,),
        real(4, 2),
        lambda y, b: y + b[:, None],
        batch=(0,),
    ),
    "reshaped as the weight": one(
        lambda x, w: jnp.einsum("btd,dnh->btnh", x, w.reshape(3, 2, 4)),
        real(2, 4, 3),
        real(3, 8),
        (0,),
        real(8),
        lambda y, b: y + b.reshape(2, 4),
    ),
    "merged as the weight": one(
        lambda x, w: x @ w.reshape(3, 8),
        real(4, 3),
        real(3, 2, 4),
        (0,),
        real(2, 4),
        lambda y, b: y + b.reshape(8),
    ),
    "after a transpose": one(
        lambda x, w: x @ w,
        real(2, 4, 3),
        real(3, 8),
        (0,),
        real(8),
        lambda y, b: y.transpose(2, 0, 1) + b[:, None, None],
    ),
    "after a reshape": one(
        lambda x, w: x @ w,
        real(2, 4, 3),
        real(3, 8),
        (0,),
        real(8),
        lambda y, b: y.reshape(2, 4, 2, 4).transpose(0, 2, 1, 3) + b.reshape(2, 1, 4),
    ),
    "after a cast": one(
        lambda x, w: x @ w,
        real(4, 3),
        real(3, 5),
        (0,),
        real(5),
        lambda y, b: y.astype(jnp.float32).astype(jnp.float64) + b,
    ),
    "masked": one(lambda x, w: x @ w, real(4, 3), real(3, 5), (0,), real(5), by=lambda w: w * MASK),
    "channels first": one(
        lambda x, w: lax.conv(x, w, (1, 1), "SAME"),
        real(2, 3, 6, 5),
        real(4, 3, 3, 2),
        (1, 2, 3),
        real(4),
        lambda y, b: y + b[:, None, None],
    ),
    "channels first, reshaped": one(
        lambda x, w: lax.conv(x, w, (1, 1), "SAME"),
        real(2, 3, 6, 5),
        real(4, 3, 3, 2),
        (1, 2, 3),
        real(4),
        lambda y, b: y + b.reshape(1, 4, 1, 1),
    ),
    "channels first, kept with ones": one(
        lambda x, w: lax.conv(x[None], w, (1, 1), "SAME")[0],
        real(3, 6, 5),
        real(4, 3, 3, 2),
        (1, 2, 3),
        real(4, 1, 1),
    ),
}

UNPAIRED = {
    "each row its own": (real(4, 5), lambda y, b: y + b),
    "one for each row": (real(4, 1), lambda y, b: y + b),
    "one for all": (real(), lambda y, b: y + b),
    "one for all, in an array": (real(1), lambda y, b: y + b),
    "subtracted": (real(5), lambda y, b: y - b),
    "after a function": (real(5), lambda y, b: jnp.tanh(y) + b),
    "after a scale": (real(5), lambda y, b: 2 * y + b),
    "after a sum over rows": (real(5), lambda y, b: y.sum(0) + b),
    "after a slice": (real(5), lambda y, b: y[:2] + b),
    "in another order": (real(5), lambda y, b: y + b[::-1]),
    "beside the output as it is": (real(5), lambda y, b: jnp.tanh(y) * (y + b)),
    "added again in a loop": (
        real(5),
        lambda y, b: lax.fori_loop(0, 3, lambda _, s: s + jnp.tanh(y + b), jnp.zeros_like(y)),
    ),
    "in another split": (real(2, 3), lambda y, b: y[:, None, :] + b.reshape(6)[None, None, :5]),
    "after other data": (real(5), lambda y, b: (y + jnp.ones(5)) + b),
    "by half": (real(5), lambda y, b: lax.stop_gradient(b) + y),
    "with the other sign": (real(5), lambda y, b: y + -b),
    "scaled by a number": (real(5), lambda y, b: y + 0.1 * b),
    "scaled in each row": (real(5), lambda y, b: y + jnp.arange(4.0)[:, None] * b),
    "twice in a jit": (real(5), jax.jit(lambda y, b: jnp.tanh(y) * (y + b))),
    "twice in a checkpoint": (real(5), jax.checkpoint(lambda y, b: jnp.tanh(y) * (y + b))),
    "under a rule of its own": (real(5), lambda y, b: shifted(y, b)),
    "after a rule of its own": (real(5), lambda y, b: reversing(y) + b),
}


@jax.custom_jvp
def shifted(y, b):
    return y + b


shifted.defjvp(lambda primals, tangents: (shifted(*primals), sum(tangents)))


@jax.custom_jvp
def reversing(y):
    """Its derivative has the other sign."""
    return y * 1.0


reversing.defjvp(lambda primals, tangents: (reversing(*primals), -tangents[0]))


def conv(numbers, x, w, out, **how):
    how = {"window_strides": (1,) * (len(x) - 2), "padding": "SAME"} | how
    ins = tuple(i for i in range(len(w)) if i != out)
    return one(
        lambda x, w: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **how),
        real(*x),
        real(*w),
        ins,
        out=(out, numbers[2].index("C")),
    )


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
CONVOLUTIONS = {
    "channels first": conv(NCHW, (2, 3, 6, 5), (4, 3, 3, 2), 0),
    "channels last": conv(NHWC, (2, 6, 5, 3), (3, 2, 3, 4), 3),
    "odd axes": conv(("HNCW", "WOHI", "CWNH"), (6, 2, 3, 5), (2, 4, 3, 3), 1),
    "strides, uneven padding": conv(
        NCHW, (2, 3, 7, 6), (4, 3, 3, 2), 0, window_strides=(2, 3), padding=((1, 0), (2, 1))
    ),
    "padding below zero": conv(NHWC, (2, 8, 9, 3), (3, 2, 3, 4), 3, padding=((-1, 0), (-2, -1))),
    "dilations": conv(
        NHWC,
        (2, 4, 5, 3),
        (3, 2, 3, 4),
        3,
        lhs_dilation=(2, 3),
        rhs_dilation=(2, 1),
        padding=((2, 2), (1, 1)),
    ),
    "groups": conv(NHWC, (2, 4, 5, 6), (3, 2, 2, 9), 3, feature_group_count=3),
    "groups, channels first": conv(NCHW, (2, 6, 4, 5), (9, 2, 3, 2), 0, feature_group_count=3),
    "depthwise": conv(NHWC, (2, 4, 5, 6), (3, 2, 1, 6), 3, feature_group_count=6),
    "one dimension": conv(("NWC", "WIO", "NWC"), (2, 9, 3), (3, 3, 4), 2),
    "three dimensions": conv(("NCDHW", "OIDHW", "NCDHW"), (2, 3, 4, 3, 3), (4, 3, 2, 2, 3), 0),
    "no dimension": conv(("NC", "IO", "NC"), (2, 3), (3, 4), 1),
    "one position": conv(NCHW, (2, 3, 1, 1), (4, 3, 1, 1), 0),
    "transposed convolution": one(
        lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME"),
        real(2, 6, 5, 3),
        real(3, 2, 3, 4),
        (0, 1, 2),
    ),
    "kernel transposed": one(
        lambda x, w: lax.conv_general_dilated(
            x, w.transpose(2, 3, 1, 0), (1, 1), "SAME", dimension_numbers=NHWC
        ),
        real(2, 6, 5, 3),
        real(4, 3, 3, 2),
        (1, 2, 3),
    ),
    "kernel reshaped": one(
        lambda x, w: lax.conv_general_dilated(
            x, w.reshape(3, 2, 3, 4), (1, 1), "SAME", dimension_numbers=NHWC
        ),
        real(2, 6, 5, 3),
        real(18, 4),
        (0,),
    ),
    "kernel masked": one(
        lambda x, w: lax.conv(x, w, (1, 1), "SAME"),
        real(2, 3, 6, 5),
        real(4, 3, 3, 2),
        (1, 2, 3),
        by=lambda w: w * np.array([1.0, 0]),
    ),
    "groups kept apart": one(
        lambda x, w: lax.conv_general_dilated(
            x, w.reshape(3, 2, 9), (1,), "SAME", (1,), (1,), ("NWC", "WIO", "NWC"), 3
        ),
        real(2, 7, 6),
        real(3, 2, 3, 3),
        (0, 1),
        batch=(2,),
    ),
}

LOOKUPS = {
    "table[ids]": lambda i, t: t[i],
    "table[(ids,)]": lambda i, t: t[(i,)],
    "get": lambda i, t: t.at[i].get(),
    "clip": lambda i, t: t.at[i].get(mode="clip"),
    "fill": lambda i, t: t.at[i].get(mode="fill", fill_value=0),
    "take": lambda i, t: jnp.take(t, i, axis=0),
    "take, clip": lambda i, t: jnp.take(t, i, axis=0, mode="clip"),
    "take, fill": lambda i, t: jnp.take(t, i, axis=0, mode="fill", fill_value=0),
    "take, wrap": lambda i, t: jnp.take(t, i, axis=0, mode="wrap"),
    "sorted": lambda i, t: t.at[i].get(indices_are_sorted=True),
    "one-hot": lambda i, t: jax.nn.one_hot(i % 7, 7) @ t,
    "vmapped": lambda i, t: jax.vmap(lambda i: t[i])(i.reshape(-1)),
    "vmapped twice": lambda i, t: jax.vmap(jax.vmap(lambda i: t[i]))(i.reshape(3, -1)),
}
TABLES = {
    "two axes after": one(lambda i, t: t[i], ids(7, 3), real(7, 2, 4), (0,)),
    "numbers": one(lambda i, t: t[i], ids(7, 3), real(7), (0,)),
    "second axis": one(lambda i, t: jnp.take(t, i, axis=1), ids(7, 3), real(4, 7), (1,)),
    "columns": one(lambda i, t: t[:, i], ids(7, 3), real(4, 7), (1,)),
    "transposed": one(lambda i, t: t.T[i], ids(7, 3, 5), real(4, 7), (1,)),
    "bytes": one(lambda i, t: t[i], ids(7, 3, 5).astype(np.uint8), real(7, 4), (0,)),
    "one row": one(lambda i, t: t[i], ids(1, 3, 5), real(1, 4), (0,)),
    "promised": one(
        lambda i, t: t.at[i].get(mode="promise_in_bounds"), ids(7, 3), real(7, 4), (0,)
    ),
    "one table each": one(
        lambda i, t: jax.vmap(lambda i, t: t[i])(i, t),
        ids(7, 2, 5),
        real(2, 7, 4),
        (1,),
        batch=(0,),
    ),
    "one table each, the last axis": one(
        lambda i, t: jax.vmap(lambda i, t: t[i], (0, 2))(i, t),
        ids(7, 2, 5),
        real(7, 4, 2),
        (0,),
        batch=(2,),
    ),
    "outside of the table": one(
        lambda i, t: t.at[i].get(mode="clip"), np.array([0, 9, 3, -12]), real(7, 4), (0,)
    ),
    "outside of the table, filled": one(
        lambda i, t: t.at[i].get(mode="fill", fill_value=0),
        np.array([0, 9, 3, -12]),
        real(7, 4),
        (0,),
        out=(1, 1),
    ),
}


def named(table):
    return [pytest.param(*case, id=name) for name, case in table.items()]


@pytest.mark.parametrize(("program", "params", "x"), named(DENSE | CHANGED))
def test_a_product_is_a_layer(program, params, x):
    check(program, params, x, kinds={"w": "dense"})


@pytest.mark.parametrize(("program", "params", "x"), named(CAST))
def test_a_cast_parameter(program, params, x):
    check(program, params, x, rtol=1e-6)


@pytest.mark.parametrize(("program", "params", "x"), named(BIASED))
def test_what_is_added_along_the_outputs_is_its_bias(program, params, x):
    layout = check(program, params, x)
    (layer,) = layout.layers
    assert layer.bias.path == "b"
    factors = layer.zeros(jnp.float64)
    bias = layer.to_bias(factors.s)
    assert bias.shape[-1:] == params["b"].shape[-1:]
    assert layer.from_bias(jnp.asarray(params["b"])).shape == factors.s.shape


@pytest.mark.parametrize("name", UNPAIRED)
def test_what_is_added_elsewhere_is_no_bias(name):
    bias, add = UNPAIRED[name]
    case = one(lambda x, w: x @ w, real(4, 3), real(3, 5), (0,), bias, add)
    (layer,) = check(*case, covered=15 / (15 + bias.size)).layers
    assert layer.bias is None


@pytest.mark.parametrize(("program", "params", "x"), named(CONVOLUTIONS))
def test_a_convolution(program, params, x):
    check(program, params, x, kinds={"w": "conv"})


@pytest.mark.parametrize("offset", [0, -7])
@pytest.mark.parametrize("name", LOOKUPS)
def test_a_lookup(name, offset):
    check(*one(LOOKUPS[name], ids(7, 3, 5) + offset, real(7, 4), (0,)))


@pytest.mark.parametrize(("program", "params", "x"), named(TABLES))
def test_a_table(program, params, x):
    check(program, params, x, kinds={"w": "embedding"})


def dense(mode, p, x):
    return mode.product(lambda x, w: x @ w, x, p["w"], (0,)) + mode.of(p["b"])


def layer(n, m, *stack):
    return {"w": real(*stack, n, m) / 2, "b": real(*stack, m) / 2}


def stack_scanned(mode, p, x):
    def body(x, p, _):
        return jnp.tanh(dense(mode, p["one"], x)) + jnp.sin(dense(mode, p["two"], x))

    return loss_of(mode.scan(body, x, p))


def scan_in_scan(mode, p, x):
    def inner(x, p, _):
        return jnp.tanh(dense(mode, p, x))

    def outer(x, p, _):
        return mode.scan(inner, x, p["inner"]) + dense(mode, p["after"], x)

    return loss_of(mode.scan(outer, x, p))


def scan_of_shared(mode, p, x):
    def cell(h, _, x):
        h = jnp.tanh(dense(mode, p["in"], x) + mode.product(jnp.matmul, h, p["u"], (0,)))
        return h

    return loss_of(mode.scan(cell, jnp.zeros((4, 5)), None, x))


def two_products_one_bias(mode, p, x):
    first = mode.product(jnp.matmul, x, p["first"], (0,))
    return loss_of(
        first + mode.product(jnp.matmul, jnp.sin(x), p["second"], (0,)) + mode.of(p["b"])
    )


def vmapped_rows(mode, p, x):
    def row(p, x):
        h = jnp.tanh(dense(mode, p["one"], x))
        return mode.product(lambda x, w: w @ x, h, p["w"], (1,)) + mode.of(p["c"])

    return loss_of(mode.vmap(row, p, x, (None, 0)))


def ensemble(mode, p, x):
    return loss_of(mode.vmap(functools.partial(member, mode), p, x, (0, None)))


def member(mode, p, x):
    h = jnp.tanh(dense(mode, p["one"], x))
    return dense(mode, p["two"], h)


def ensemble_of_inputs(mode, p, x):
    return loss_of(mode.vmap(functools.partial(member, mode), p, x))


def in_jit_twice(mode, p, x):
    run = mode.jit(lambda p, x: jnp.tanh(dense(mode, p, x)))
    return loss_of(run(p, run(p, x)))


def in_jit_of_two(mode, p, x):
    run = mode.jit(lambda p, x: jnp.tanh(dense(mode, p, x)))
    return loss_of(run(p["two"], run(p["one"], x)))


def in_remat(mode, p, x):
    run = mode.remat(lambda p, x: jnp.tanh(dense(mode, p, x)))
    return loss_of(run(p["two"], run(p["one"], x)))


def bias_outside_of_jit(mode, p, x):
    run = mode.jit(lambda w, x: mode.product(jnp.matmul, x, w, (0,)))
    return loss_of(run(p["w"], x) + mode.of(p["b"]))


def in_cond(mode, p, x, index):
    def one(p, x):
        return jnp.tanh(dense(mode, p["one"], x))

    def two(p, x):
        return jnp.sin(dense(mode, p["two"], x))

    return loss_of(mode.cond(index, [one, two], p, x))


def dense_list(mode, p, x):
    for one in p:
        x = jnp.tanh(dense(mode, one, x))
    return loss_of(x)


def weights_in_a_tuple(mode, p, x):
    first, second = p
    h = jnp.tanh(mode.product(jnp.matmul, x, first, (0,)))
    return loss_of(mode.product(jnp.matmul, h, second, (0,)))


def at_the_root(mode, p, x):
    return loss_of(mode.product(jnp.matmul, x, p, (0,)))


def haiku(mode, p, x):
    h = jnp.tanh(dense(mode, p["mlp/~/linear_0"], x))
    return loss_of(dense(mode, p["mlp/~/linear_1"], h))


def used_twice(mode, p, x):
    h = jnp.tanh(mode.product(jnp.matmul, x, p["w"], (0,)))
    return loss_of(mode.product(jnp.matmul, h, p["w"], (0,)))


def tied(mode, p, i):
    h = mode.product(lambda i, t: t[i], i, p["table"], (0,))
    h = jnp.tanh(dense(mode, p["mlp"], h))
    return loss_of(h @ mode.of(p["table"]).T)


def scan_of_lookups(mode, p, i):
    def step(h, _, i):
        return jnp.tanh(h + mode.product(lambda i, t: t[i], i, p["table"], (0,)))

    return loss_of(mode.scan(step, jnp.zeros((3, 4)), None, i))


def conv_then_dense(mode, p, x):
    y = mode.product(lambda x, w: lax.conv(x, w, (1, 1), "SAME"), x, p["w"], (1, 2, 3))
    y = jnp.tanh(y + mode.of(p["b"])[:, None, None])
    return loss_of(dense(mode, p["head"], y.reshape(y.shape[0], -1)))


def convolved(mode, p, x, groups=1):
    numbers = ("NWC", "WIO", "NWC")
    return mode.product(
        lambda x, w: lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups
        ),
        x,
        p["w"],
        (0, 1),
    ) + mode.of(p["b"])


def ensemble_of_convolutions(mode, p, x):
    return loss_of(mode.vmap(functools.partial(convolved, mode), p, x))


def ensemble_of_convolutions_of_one_input(mode, p, x):
    return loss_of(mode.vmap(functools.partial(convolved, mode), p, x, (0, None)))


def ensemble_of_grouped_convolutions(mode, p, x):
    return loss_of(mode.vmap(functools.partial(convolved, mode, groups=2), p, x))


def ensemble_of_grouped_convolutions_of_one_input(mode, p, x):
    return loss_of(mode.vmap(functools.partial(convolved, mode, groups=2), p, x, (0, None)))


def scan_of_convolutions(mode, p, x):
    return loss_of(mode.scan(lambda x, p, _: jnp.tanh(convolved(mode, p, x)), x, p))


def ensemble_of_tables(mode, p, i):
    return loss_of(mode.vmap(lambda p, i: mode.product(lambda i, t: t[i], i, p, (0,)), p["t"], i))


def ensemble_in_scan(mode, p, x):
    def body(x, p, _):
        return jnp.tanh(mode.vmap(functools.partial(dense, mode), p, x))

    return loss_of(mode.scan(body, x, p))


def scan_in_ensemble(mode, p, x):
    def run(p, x):
        return mode.scan(lambda x, p, _: jnp.tanh(dense(mode, p, x)), x, p)

    return loss_of(mode.vmap(run, p, x))


def scan_in_rows(mode, p, x):
    def run(p, x):
        return mode.scan(lambda x, p, _: jnp.tanh(dense(mode, p, x)), x, p)

    return loss_of(mode.vmap(run, p, x, (None, 0)))


def remat_in_scan(mode, p, x):
    body = mode.remat(lambda x, p, _: jnp.tanh(dense(mode, p, x)))
    return loss_of(mode.scan(body, x, p))


def perceiver(mode, p, x):
    """Latents are data, a scale and a shift are no layers."""
    q = mode.product(
        jnp.matmul, jnp.sin(x) * mode.of(p["scale"]) + mode.of(p["shift"]), p["q"], (0,)
    )
    k = mode.product(jnp.matmul, x, p["k"], (0,))
    return loss_of(jax.nn.softmax(q @ k.T) @ x)


X, X1, T = real(4, 5), real(2, 7, 4), ids(7, 3, 5)
COMPOSED = {
    "scan": (stack_scanned, {"one": layer(5, 5, 3), "two": layer(5, 5, 3)}, X),
    "scan in scan": (scan_in_scan, {"inner": layer(5, 5, 2, 3), "after": layer(5, 5, 2)}, X),
    "recurrence": (scan_of_shared, {"in": layer(5, 5), "u": real(5, 5)}, real(3, 4, 5)),
    "two products, one bias": (
        two_products_one_bias,
        {"first": real(5, 3), "second": real(5, 3), "b": real(3)},
        X,
    ),
    "vmap over rows": (vmapped_rows, {"one": layer(5, 3), "w": real(2, 3), "c": real(2)}, X),
    "ensemble": (ensemble, {"one": layer(5, 3, 2), "two": layer(3, 4, 2)}, X),
    "ensemble, inputs each": (
        ensemble_of_inputs,
        {"one": layer(5, 3, 2), "two": layer(3, 4, 2)},
        real(2, 4, 5),
    ),
    "jit twice": (in_jit_twice, layer(5, 5), X),
    "jit of two": (in_jit_of_two, {"one": layer(5, 5), "two": layer(5, 5)}, X),
    "remat": (in_remat, {"one": layer(5, 5), "two": layer(5, 5)}, X),
    "bias outside of jit": (bias_outside_of_jit, layer(5, 3), X),
    "list": (dense_list, [layer(5, 3), layer(3, 4)], X),
    "tuple": (weights_in_a_tuple, (real(5, 3), real(3, 4)), X),
    "root": (at_the_root, real(5, 3), X),
    "Haiku": (haiku, {"mlp/~/linear_0": layer(5, 3), "mlp/~/linear_1": layer(3, 4)}, X),
    "used twice": (used_twice, {"w": real(5, 5)}, X),
    "tied": (tied, {"table": real(7, 4), "mlp": layer(4, 4)}, T),
    "lookups in a scan": (scan_of_lookups, {"table": real(7, 4)}, T.T),
    "convolution and dense": (
        conv_then_dense,
        {"w": real(2, 3, 2, 2), "b": real(2), "head": layer(24, 3)},
        real(2, 3, 4, 3),
    ),
    "ensemble of convolutions": (
        ensemble_of_convolutions,
        {"w": real(3, 3, 4, 2), "b": real(3, 2)},
        real(3, 2, 7, 4),
    ),
    "ensemble of convolutions with one output": (
        ensemble_of_convolutions,
        {"w": real(3, 3, 4, 1), "b": real(3, 1)},
        real(3, 2, 7, 4),
    ),
    "ensemble of convolutions, one input": (
        ensemble_of_convolutions_of_one_input,
        {"w": real(3, 3, 4, 2), "b": real(3, 2)},
        X1,
    ),
    "ensemble of grouped convolutions": (
        ensemble_of_grouped_convolutions,
        {"w": real(3, 3, 2, 6), "b": real(3, 6)},
        real(3, 2, 7, 4),
    ),
    "ensemble of grouped convolutions, one input": (
        ensemble_of_grouped_convolutions_of_one_input,
        {"w": real(3, 3, 2, 6), "b": real(3, 6)},
        X1,
    ),
    "scan of convolutions": (scan_of_convolutions, {"w": real(3, 3, 4, 4), "b": real(3, 4)}, X1),
    "ensemble of tables": (ensemble_of_tables, {"t": real(2, 7, 4)}, ids(7, 2, 5)),
    "ensemble in a scan": (ensemble_in_scan, layer(5, 5, 3, 2), real(2, 4, 5)),
    "scan in an ensemble": (scan_in_ensemble, layer(5, 5, 2, 3), real(2, 4, 5)),
    "scan under vmap": (scan_in_rows, layer(5, 5, 3), X),
    "remat in a scan": (remat_in_scan, layer(5, 5, 3), X),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_products_composed(name):
    check(*COMPOSED[name])


@pytest.mark.parametrize("index", [0, 1])
def test_a_branch(index):
    params = {"one": layer(5, 3), "two": layer(5, 3)}
    check(in_cond, params, X, index)


def test_scales_and_shifts_are_listed():
    params = {"scale": real(5), "shift": real(5), "q": real(5, 5), "k": real(5, 5)}
    for rows in (4, 1):
        layout = check(perceiver, params, real(rows, 5), covered=50 / 60)
        assert [one.path for one in layout.layers] == ["k", "q"]
