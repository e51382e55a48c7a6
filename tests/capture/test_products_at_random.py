"""Random programs of products, nested in random transforms, against their unrolled twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.support.plain_programs import check

SIZES = (1, 2, 3, 4)


class Maker:
    """Makes blocks: parameters, and a function of a mode, parameters and an array (…, time, size).

    A block's parameters have the axes of `stack` in front, of which the loops around it take one
    at a time.
    """

    around = ("scan", "ensemble", "rows", "jit", "remat", "twice", "two", "beside")

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def array(self, *shape):
        return self.rng.normal(size=shape) / max(shape[-2:][0], 1) ** 0.5

    def size(self):
        return int(self.rng.choice(SIZES))

    def block(self, n, m, stack, depth):
        """A block from features of size `n` to `m`."""
        kinds = ["plain", "transposed", "heads", "reshaped", "merged", "lookups"]
        if n != 1 or m != 1:
            kinds.append("convolution")
        if depth:
            kinds += [*self.around, *self.around]
        return getattr(self, self.rng.choice(kinds))(n, m, stack, depth)

    def biased(self, shape, weight, product, stack, add=lambda y, b: y + b):
        """A product with or without a bias of some shape, and a function behind it."""
        function = (jnp.tanh, jnp.sin, lambda y: y)[self.rng.integers(3)]
        if self.rng.random() < 0.3:
            return {"w": weight}, lambda mode, p, x: function(product(mode, p, x))

        def run(mode, p, x):
            return function(add(product(mode, p, x), mode.of(p["b"])))

        return {"w": weight, "b": self.array(*stack, *shape)}, run

    def plain(self, n, m, stack, _):
        def product(mode, p, x):
            return mode.product(lambda x, w: x @ w, x, p["w"], (0,))

        return self.biased((m,), self.array(*stack, n, m), product, stack)

    def transposed(self, n, m, stack, _):
        def product(mode, p, x):
            return mode.product(lambda x, w: jnp.einsum("...i,oi->...o", x, w), x, p["w"], (1,))

        return self.biased((m,), self.array(*stack, m, n), product, stack)

    def heads(self, n, m, stack, _):
        """To heads and back, each with a kernel of three axes."""
        heads, size = self.size(), self.size()

        def to(mode, p, x):
            return mode.product(lambda x, w: jnp.einsum("...i,inh->...nh", x, w), x, p["w"], (0,))

        def back(mode, p, x):
            return mode.product(lambda x, w: jnp.einsum("...nh,nho->...o", x, w), x, p["w"], (0, 1))

        first, run = self.biased((heads, size), self.array(*stack, n, heads, size), to, stack)
        second, rerun = self.biased((m,), self.array(*stack, heads, size, m), back, stack)
        return {"to": first, "back": second}, lambda mode, p, x: rerun(
            mode, p["back"], run(mode, p["to"], x)
        )

    def reshaped(self, n, m, stack, _):
        """A flat kernel, seen with heads; the output seen flat again."""
        heads = self.size()
        m_of_head = self.size()

        def product(mode, p, x):
            return mode.product(
                lambda x, w: jnp.einsum("...i,inh->...nh", x, w.reshape(n, heads, m_of_head)),
                x,
                p["w"],
                (0,),
            )

        def add(y, b):
            return y + b.reshape(heads, m_of_head)

        size = heads * m_of_head
        first, run = self.biased((size,), self.array(*stack, n, size), product, stack, add)
        second, rerun = self.plain(size, m, stack, 0)

        def both(mode, p, x):
            y = run(mode, p["to"], x)
            return rerun(mode, p["back"], y.reshape(*y.shape[:-2], size))

        return {"to": first, "back": second}, both

    def merged(self, n, m, stack, _):
        """A kernel of three axes, seen flat."""
        heads, size = self.size(), self.size()

        def product(mode, p, x):
            return mode.product(lambda x, w: x @ w.reshape(n, heads * size), x, p["w"], (0,))

        def add(y, b):
            return y + b.reshape(heads * size)

        weight = self.array(*stack, n, heads, size)
        first, run = self.biased((heads, size), weight, product, stack, add)
        second, rerun = self.plain(heads * size, m, stack, 0)
        return {"to": first, "back": second}, lambda mode, p, x: rerun(
            mode, p["back"], run(mode, p["to"], x)
        )

    def lookups(self, n, m, stack, _):
        """Rows of a table, by a sign of the input, added to a product."""
        rows = 1 + self.size()
        params, run = self.plain(n, m, stack, 0)

        def both(mode, p, x):
            ids = (jnp.abs(lax.stop_gradient(x[..., 0])) * 3).astype(jnp.int32) % rows
            return run(mode, p["plain"], x) + mode.product(
                lambda i, t: t[i], ids, p["table"], (0,), out=(1, ids.ndim)
            )

        return {"plain": params, "table": self.array(*stack, rows, m)}, both

    def convolution(self, n, m, stack, _):
        window, stride = self.rng.integers(1, 4), self.rng.integers(1, 3)
        first = self.rng.random() < 0.5
        groups = 2 if n % 2 == m % 2 == 0 and self.rng.random() < 0.5 else 1
        dilation = self.rng.integers(1, 3)
        numbers = ("NCW", "OIW", "NCW") if first else ("NWC", "WIO", "NWC")

        def convolved(x, w):
            rows = x.reshape(-1, *x.shape[-2:])
            rows = rows.swapaxes(1, 2) if first else rows
            return lax.conv_general_dilated(
                rows,
                w,
                (int(stride),),
                "SAME",
                rhs_dilation=(int(dilation),),
                dimension_numbers=numbers,
                feature_group_count=groups,
            )

        def product(mode, p, x):
            ins, out = ((1, 2), (0, 1)) if first else ((0, 1), (2, 2))
            return mode.product(convolved, x, p["w"], ins, out=out)

        shape = (m, n // groups, window) if first else (window, n // groups, m)
        params, run = self.biased(
            (m,),
            self.array(*stack, *shape),
            product,
            stack,
            lambda y, b: y + (b[:, None] if first else b),
        )

        def back(mode, p, x):
            y = run(mode, p, x)
            y = y.swapaxes(1, 2) if first else y
            return y.reshape(*x.shape[:-2], *y.shape[1:])

        return params, back

    def scan(self, n, m, stack, depth):
        length = self.size()
        inner, run = self.block(n, n, (*stack, length), depth - 1)
        last, rerun = self.block(n, m, stack, depth - 1)
        keep = self.rng.random() < 0.5

        def body(mode, x, p, _):
            y = run(mode, p, x)
            return x + jnp.tanh(y) if keep and y.shape == x.shape else _like(y, x)

        def both(mode, p, x):
            y = mode.scan(functools.partial(body, mode), x, p["inner"])
            return rerun(mode, p["last"], y)

        return {"inner": inner, "last": last}, both

    def ensemble(self, n, m, stack, depth):
        inner, run = self.block(n, m, (*stack, self.size()), depth - 1)
        if self.rng.random() < 0.5:
            return inner, lambda mode, p, x: mode.vmap(
                functools.partial(run, mode), p, x, (0, None)
            ).mean(0)
        members = jax.tree.leaves(inner)[0].shape[len(stack)]

        def each(mode, p, x):
            own = jnp.stack([x * (i + 1) for i in range(members)])
            return mode.vmap(functools.partial(run, mode), p, own).mean(0)

        return inner, each

    def rows(self, n, m, stack, depth):
        inner, run = self.block(n, m, stack, depth - 1)

        def mapped(mode, p, x):
            if x.ndim < 3:
                return run(mode, p, x)
            return mode.vmap(functools.partial(run, mode), p, x, (None, 0))

        return inner, mapped

    def jit(self, n, m, stack, depth):
        inner, run = self.block(n, m, stack, depth - 1)
        return inner, lambda mode, p, x: mode.jit(functools.partial(run, mode))(p, x)

    def remat(self, n, m, stack, depth):
        inner, run = self.block(n, m, stack, depth - 1)
        return inner, lambda mode, p, x: mode.remat(functools.partial(run, mode))(p, x)

    def twice(self, n, m, stack, depth):
        first, run = self.block(n, n, stack, depth - 1)
        last, rerun = self.block(n, m, stack, depth - 1)

        def both(mode, p, x):
            called = (
                mode.jit(functools.partial(run, mode))
                if depth % 2
                else functools.partial(run, mode)
            )
            y = _like(called(p["first"], x), x)
            return rerun(mode, p["last"], _like(called(p["first"], y), x))

        return {"first": first, "last": last}, both

    def two(self, n, m, stack, depth):
        k = self.size()
        first, run = self.block(n, k, stack, depth - 1)
        second, rerun = self.block(k, m, stack, depth - 1)
        return [first, second], lambda mode, p, x: rerun(mode, p[1], run(mode, p[0], x))

    def beside(self, n, m, stack, depth):
        first, run = self.block(n, m, stack, depth - 1)
        second, rerun = self.block(n, m, stack, depth - 1)

        def both(mode, p, x):
            y, z = run(mode, p[0], x), rerun(mode, p[1], x)
            return jnp.tanh(y) * jnp.sin(_like(z, y))

        return (first, second), both


class Unrolling(Maker):
    """Makes loops of Python's too."""

    around = (*Maker.around, "unrolled", "unrolled")

    def convolution(self, n, m, stack, depth):
        """With several outputs in each group.

        One in each, in an ensemble with shared inputs, is as well a stack along the groups.
        """
        return super().convolution(n, m, stack, depth) if m > 2 else self.plain(n, m, stack, depth)

    def unrolled(self, n, m, stack, depth):
        """A loop of Python's over some of the layers, in any order."""
        order = self.rng.integers(0, length := self.size(), self.size())
        inner, run = self.block(n, m, (*stack, length), depth - 1)

        def both(mode, p, x):
            outs = [run(mode, mode.slice(p, 0, int(i)), x * (1 + i)) for i in order]
            return functools.reduce(jnp.add, outs)

        return inner, both


def _like(y, x):
    """`y` with as many positions as `x`."""
    if y.shape[-2] == x.shape[-2]:
        return y
    return jnp.broadcast_to(y.mean(-2, keepdims=True), (*y.shape[:-2], x.shape[-2], y.shape[-1]))


def check_program(maker):
    n, m = maker.size(), maker.size()
    params, run = maker.block(n, m, (), depth=int(maker.rng.integers(1, 4)))
    x = maker.array(int(maker.rng.integers(1, 4)), int(maker.rng.integers(1, 5)), n)

    def program(mode, params, x):
        y = run(mode, params, x)
        return jnp.sum(jnp.sin(y + 0.1 * jnp.arange(y.size).reshape(y.shape))) / y.shape[0]

    with jax.numpy_rank_promotion("allow"):
        check(program, params, x)


@pytest.mark.parametrize("maker", [Maker, Unrolling])
@pytest.mark.parametrize("seed", range(12))
def test_a_program(seed, maker, x64):
    check_program(maker(seed))


@pytest.mark.slow
@pytest.mark.parametrize("maker", [Maker, Unrolling])
@pytest.mark.parametrize("seed", range(12, 400))
def test_more_programs(seed, maker, x64):
    check_program(maker(seed))
