"""Programs in plain JAX, run twice: as JAX runs them, and unrolled with zeros at each product.

A program is a function of a `Mode`, parameters and data, and says of each product of a parameter
which it is, in `mode.product`. `Running` is JAX and nothing else. `Unrolled` replaces loops and
maps by Python's own, adds an array of zeros to each product's output, and reads the inputs of a
product `y = W h̄` off the Jacobian of `y` with respect to `W`. So nothing that follows a parameter
through a traced program has a part in the factors that a captured loss is compared with.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import adafisher_jax as af
from adafisher_jax import Factor


class Held(NamedTuple):
    """A parameter, or a slice of one, in an unrolled program.

    Attributes:
      value: the array.
      path: of the parameter.
      taken: the axes and indices of the slices, in order.
    """

    value: Any
    path: str
    taken: tuple[tuple[int, int], ...] = ()

    def slice(self, axis, i):
        value = jnp.take(self.value, i, axis=axis)
        return Held(value, self.path, (*self.taken, (axis, i)))


def _is_held(leaf):
    return isinstance(leaf, Held)


class Running:
    """A program as it is."""

    def product(self, fun, x, w, ins, batch=(), by=lambda w: w, out=None):
        """`fun(x, by(w))`, linear in the weight, of which `ins` and `batch` are axes.

        Where some rows reach no input, as in a padded convolution, `out` are the weight's only
        axis of outputs and the axis of the output that it is.
        """
        return fun(x, by(w))

    def of(self, held):
        """The array that is held."""
        return held

    def jit(self, fun):
        return jax.jit(fun)

    def remat(self, fun):
        return jax.checkpoint(fun)

    def scan(self, fun, carry, stacks, data=None):
        """The last of `carry = fun(carry, slice of stacks, slice of data)`."""
        return jax.lax.scan(lambda c, xs: (fun(c, *xs), None), carry, (stacks, data))[0]

    def slice(self, stacks, axis, i):
        """One slice of each parameter."""
        return jax.tree.map(lambda p: p[(slice(None),) * axis + (i,)], stacks)

    def vmap(self, fun, stacks, data, in_axes=(0, 0)):
        """`fun` of slices of parameters and of data; None for an argument that all share."""
        return jax.vmap(fun, in_axes)(stacks, data)

    def cond(self, index, branches, *args):
        return jax.lax.switch(index, branches, *args)


class Call(NamedTuple):
    """One product: its weight, its Jacobian and a like one that is not zero by chance."""

    held: Held
    ins: tuple[int, ...]
    batch: tuple[int, ...]
    out: tuple[int, int] | None
    jacobian: Any
    touches: Any


class Unrolled:
    """A program without loops, with zeros at its products, which it notes if there are none."""

    def __init__(self, zeros=None):
        self.zeros = zeros
        self.calls: list[Call] = []
        self.outputs: list[Any] = []

    def product(self, fun, x, w, ins, batch=(), by=lambda w: w, out=None):
        x = jnp.asarray(x)
        y = fun(x, by(jnp.asarray(w.value)))
        self.outputs.append(y)
        if self.zeros is not None:
            return y + self.zeros[len(self.outputs) - 1].astype(y.dtype)
        plain = jnp.asarray(w.value, jnp.float64)
        integers = jnp.issubdtype(x.dtype, jnp.integer)
        other = x if integers else 1.0 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)
        found = [jax.jacobian(functools.partial(fun, x))(plain) for x in (x, other)]
        self.calls.append(Call(w, ins, batch, out, *found))
        return y

    def of(self, held):
        return held.value

    def jit(self, fun):
        return fun

    remat = jit

    def slice(self, stacks, axis, i):
        return jax.tree.map(lambda h: h.slice(axis, i), stacks, is_leaf=_is_held)

    def scan(self, fun, carry, stacks, data=None):
        held = jax.tree.leaves(stacks, is_leaf=_is_held)
        first = held[0].value if held else jax.tree.leaves(data)[0]
        for i in range(len(first)):
            carry = fun(carry, self.slice(stacks, 0, i), jax.tree.map(lambda d: d[i], data))
        return carry

    def vmap(self, fun, stacks, data, in_axes=(0, 0)):
        if in_axes[1] is not None:
            size = jax.tree.leaves(data)[0].shape[in_axes[1]]
        else:
            size = jax.tree.leaves(stacks, is_leaf=_is_held)[0].value.shape[in_axes[0]]
        outs = []
        for i in range(size):
            own = stacks if in_axes[0] is None else self.slice(stacks, in_axes[0], i)
            row = (
                data
                if in_axes[1] is None
                else jax.tree.map(lambda d: jnp.take(d, i, axis=in_axes[1]), data)
            )
            outs.append(fun(own, row))
        return jax.tree.map(lambda *of: jnp.stack(of), *outs)

    def cond(self, index, branches, *args):
        return branches[int(index)](*args)


def _hold(params):
    def held(keys, leaf):
        return Held(leaf, jax.tree_util.keystr(keys, simple=True, separator="/"))

    return jax.tree_util.tree_map_with_path(held, params)


def factors_of(program, params, *data):
    """The factors of every weight that is multiplied, by its path."""
    calls: list[Call] = []

    def found():
        first = Unrolled()
        program(first, _hold(params), *data)
        calls[:] = first.calls
        zeros = [jnp.zeros(y.shape) for y in first.outputs]
        cotangents = jax.grad(lambda zeros: program(Unrolled(zeros), _hold(params), *data))(zeros)
        return [(call.jacobian, call.touches) for call in first.calls], cotangents

    jacobians, cotangents = jax.tree.map(np.asarray, jax.jit(found)())
    leaves = dict(_paths(params))
    sums: dict[str, Any] = {}
    for call, (jacobian, touches), g in zip(calls, jacobians, cotangents, strict=True):
        call = call._replace(jacobian=jacobian, touches=touches)
        totals, _ = sums.setdefault(
            call.held.path, ([np.zeros(leaves[call.held.path].shape) for _ in range(4)], call)
        )
        for total, part in zip(totals, _sums(call, g), strict=True):
            for axis, i in call.held.taken:
                total = np.moveaxis(total, axis, 0)[i, ...]
            total += part
    return {path: _factor(*found) for path, found in sums.items()}


def _paths(params):
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield jax.tree_util.keystr(keys, simple=True, separator="/"), leaf


def _sums(call, g):
    """The sums over rows of `h̄²`, `s²`, 1 and `h̄`, all of the weight's shape."""
    weight = call.held.value.shape
    rank = len(weight)
    jacobian = call.jacobian.reshape(-1, *weight)
    outs = tuple(i for i in range(rank) if i not in (*call.ins, *call.batch))
    blocks = math.prod(weight[i] for i in (*outs, *call.batch))
    if call.out:  # an axis of the weight, and the output's that it is
        w, y = call.out
        touched = np.eye(weight[w])[np.indices(g.shape)[y].reshape(-1)]
        touched = touched.reshape(-1, *(n if i == w else 1 for i, n in enumerate(weight)))
    else:
        own = tuple(1 + i for i in call.ins)
        touched = (call.touches.reshape(-1, *weight) != 0).any(own, keepdims=True)
    s = (touched * g.reshape(-1, *(1,) * rank) ** 2).sum(0)
    h, mean = ((jacobian**p).sum(0).mean(outs, keepdims=True) for p in (2, 1))
    return h, s, len(jacobian) / max(blocks, 1), mean


def _factor(totals, call):
    h, s, rows, mean = totals
    n = np.where(rows == 0, 1, rows)
    return Factor(h / n, s / n, rows, mean / n)


def plain_loss(program):
    return functools.partial(program, Running())


def check(program, params, *data, covered=1.0, rtol=1e-9, kinds=None):
    """Compares a program's captured gradients and factors with those of its unrolled twin.

    Args:
      program: of a mode, parameters and data; returns a loss.
      covered: the share of parameters under a Fisher block; None to leave it open.
      kinds: of the layers, by path of weight, if given.
      also: what is beside the loss: paths that the layout may lack.

    Returns:
      The layout.
    """
    loss_fn = plain_loss(program)
    params = jax.tree.map(jnp.asarray, params)
    layout = af.trace_layout(loss_fn, params, *data)
    assert layout == af.trace_layout(loss_fn, params, *data)
    both = jax.jit(
        lambda *args: (
            af.value_and_grad(loss_fn, layout)(*args),
            jax.value_and_grad(loss_fn)(*args),
        )
    )
    (value, grads, factors), (wanted, wanted_grads) = both(params, *data)
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), grads, wanted_grads
    )
    if covered is not None:
        assert layout.covered == covered, str(layout)
    expected = factors_of(program, params, *data)
    weights = {layer.weight.path: layer for layer in layout.layers}
    if kinds is not None:
        assert {path: layer.kind for path, layer in weights.items()} == kinds
    for path, layer in weights.items():
        found, want = factors[layer.path], expected.get(path)
        if want is None:  # in a branch not taken
            assert not any(jnp.any(part) for part in found), f"{path} has factors\n{layout}"
            continue
        for name in ("h", "s", "mean"):
            a, b = getattr(found, name), getattr(want, name)
            assert a.shape == layer.factor_shapes[Factor._fields.index(name)]
            scale = max(np.abs(b).max(initial=0), 1e-30)
            np.testing.assert_allclose(
                np.broadcast_to(a, b.shape),
                b,
                rtol=rtol,
                atol=rtol * scale,
                err_msg=f"{path} {name}\n{layout}",
            )
        rows = np.broadcast_to(np.reshape(found.rows, layer.stack_shape), want.rows.shape)
        np.testing.assert_array_equal(rows, want.rows, err_msg=f"{path} rows")
    return layout
