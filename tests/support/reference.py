"""Captured factors by brute force, from their definition and nothing of the package's own.

Every call of a layer gets an explicit array of zeros added to its output; the loss's gradient
with respect to those arrays are the output cotangents. The inputs `h̄` of a linear layer
`y = W h̄` are what each output multiplies `W` with, so they are read off the Jacobian of `y`
with respect to `W`, whatever the layer's geometry. It works on models without lifted
transforms; the factors of the others are compared with an unrolled twin's (`stack`).
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import adafisher_jax as af
from adafisher_jax import Factor

F64 = jnp.float64
Dense = functools.partial(nn.Dense, param_dtype=F64)

NORMS = (nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)
DENSE = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Embed)
CONVS = (nn.Conv, nn.ConvLocal, nn.ConvTranspose)


class Call(NamedTuple):
    """One call of one layer: its input, and the loss's gradient with respect to its output."""

    path: str
    module: nn.Module
    method: str
    x: np.ndarray
    g: np.ndarray


def calls_of(loss_fn, params, *args) -> list[Call]:
    """Runs a loss with zeros added to each layer's output, and differentiates by the zeros."""
    seen: list[tuple[str, nn.Module, str, Any]] = []

    def run(zeros):
        seen.clear()
        inputs = []

        def add_zeros(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            module, method = context.module, context.method_name
            if type(module) not in DENSE + CONVS + NORMS or method not in ("__call__", "attend"):
                return y
            path = "/".join(module.scope.path)
            seen.append((path, module.clone(parent=None, name=None), method, y))
            inputs.append(jnp.asarray(args[0]))
            return y + zeros[len(seen) - 1] if zeros else y

        with nn.intercept_methods(add_zeros):
            return loss_fn(params, *args), inputs

    jax.eval_shape(run, None)
    zeros = [np.zeros(y.shape, y.dtype) for *_, y in seen]
    cotangents, inputs = jax.jit(jax.grad(run, has_aux=True))(zeros)
    arrays = jax.tree.map(np.asarray, (inputs, cotangents))
    return [Call(*call[:3], x, g) for call, x, g in zip(seen, *arrays, strict=True)]


def factors_of(loss_fn, params, *args) -> dict[str, Factor]:
    """The factors of every layer: means over the rows of all its calls."""
    calls = calls_of(loss_fn, params, *args)
    looked_up = {c.path for c in calls if type(c.module) is nn.Embed and c.method != "attend"}
    sums: dict[str, Factor] = {}
    for call in calls:
        if call.method == "attend" and call.path in looked_up:
            continue
        found = norm_sums(call) if isinstance(call.module, NORMS) else linear_sums(call)
        sums[call.path] = jax.tree.map(np.add, sums.get(call.path, Factor(0, 0, 0, 0)), found)
    return {p: Factor(f.h / f.rows, f.s / f.rows, f.rows, f.mean / f.rows) for p, f in sums.items()}


def linear_sums(call: Call) -> Factor:
    """The sums over rows of `h̄²`, `s²`, 1 and `h̄`, for any layer linear in its kernel."""
    module, g = call.module, call.g
    if getattr(module, "mask", None) is not None:  # a mask is on the kernel, not on its inputs
        module = module.clone(mask=None)
    jacobian = np.asarray(jacobian_of(module, call.method, call.x), g.dtype)

    # A lower-case letter for each axis of y, an upper-case one for each of the kernel's alone.
    shape = jacobian.shape[g.ndim :]
    outs, batches = matched_axes(call, len(shape))
    y = "abcdefghij"[: g.ndim]
    kernel = [
        y[(outs | batches)[i]] if i in outs | batches else "ABCDEFGHIJ"[i]
        for i in range(len(shape))
    ]
    weight, ins = "".join(kernel), "".join(c for c in kernel if c.isupper())
    inputs = np.einsum(f"{y}{weight}->{y}{ins}", jacobian)

    h_axes = "".join(c for i, c in enumerate(kernel) if i not in outs)
    s_axes = "".join(c for c in kernel if c not in ins)
    h_shape = [1 if i in outs else n for i, n in enumerate(shape)]
    s_shape = [1 if c in ins else n for n, c in zip(shape, kernel, strict=True)]
    # Every output of a row has the same inputs, or (in groups) they are averaged over.
    same = math.prod(shape[i] for i in outs)
    return Factor(
        np.einsum(f"{y}{ins}->{h_axes}", inputs**2).reshape(h_shape) / same,
        np.einsum(f"{y}->{s_axes}", g**2).reshape(s_shape),
        np.asarray(math.prod(n for n, c in zip(g.shape, y, strict=True) if c not in weight)),
        np.einsum(f"{y}{ins}->{h_axes}", inputs).reshape(h_shape) / same,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def jacobian_of(module, method, x):
    """The derivative of a layer's output with respect to its kernel, at any kernel."""
    name = "embedding" if isinstance(module, nn.Embed) else "kernel"
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, method=method))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["params"])

    def output(kernel):
        return module.apply({"params": {**params, name: kernel}}, x, method=method)

    return jax.jacfwd(output)(params[name])


def matched_axes(call: Call, rank: int) -> tuple[dict[int, int], dict[int, int]]:
    """Which axis of the output each out axis and each batch axis of the kernel is."""
    module, last = call.module, call.g.ndim - 1
    match module:
        case nn.Embed():
            return {0 if call.method == "attend" else 1: last}, {}
        case nn.ConvTranspose(transpose_kernel=True):
            return {rank - 2: last}, {}
        case nn.ConvLocal():
            return {rank - 1: last}, {i: last - (rank - 2) + i for i in range(rank - 2)}
        case nn.DenseGeneral():
            outs = {rank - 1 - i: last - i for i in range(np.size(module.features))}
            return outs, {i: i for i in range(np.size(module.batch_dims))}
        case nn.Einsum():
            x, kernel, y = einsum_letters(call)
            outs = {i: y.index(c) for i, c in enumerate(kernel) if c in y and c not in x}
            return outs, {i: y.index(c) for i, c in enumerate(kernel) if c in y and c in x}
    return {rank - 1: last}, {}


def einsum_letters(call: Call) -> list[str]:
    """The operands and result of an einsum, with letters for its ellipsis."""
    text = call.module.einsum_str.replace(" ", "")
    x, kernel, y = text.replace("->", ",").split(",")
    missing = call.x.ndim - len(x.replace("...", ""))
    return [part.replace("...", "UVWXYZ"[:missing]) for part in (x, kernel, y)]


def norm_sums(call: Call) -> Factor:
    """As docs/algorithm.md has normalization layers, weighted by the number of positions."""
    module, x, g = call.module, call.x, call.g
    axes = module.axis if isinstance(module, nn.BatchNorm) else getattr(module, "feature_axes", -1)
    channels = tuple(sorted(a % x.ndim for a in np.atleast_1d(axes)))
    kept = (1,) if isinstance(module, nn.LayerNorm | nn.RMSNorm) else channels
    batch = x.shape[0]
    n = math.prod(size for axis, size in enumerate(x.shape) if axis not in (0, *kept))
    v = x.sum(tuple(a for a in range(x.ndim) if a not in kept)) / n**2
    h = np.stack([np.sum(v**2), v.size]) / batch**2
    others = tuple(a for a in range(g.ndim) if a not in channels)
    s = np.square(g.sum(others)) / batch
    rows = math.prod(g.shape[a] for a in others)
    h = h.reshape((2,) + (1,) * (len(channels) - 1))
    return Factor(rows * h, rows * s, np.asarray(rows), 0 * h)


def captured(loss_fn, params, *args, has_aux=False, exact=True):
    """The layout and captured factors, having checked loss and gradients against JAX's own."""
    layout = af.trace_layout(loss_fn, params, *args)
    assert not rows_twice(layout)
    both = (
        af.value_and_grad(loss_fn, layout, has_aux),
        jax.value_and_grad(loss_fn, has_aux=has_aux),
    )
    (value, grads, factors), expected = jax.jit(lambda *xs: [f(*xs) for f in both])(params, *args)
    assert jax.tree.structure((value, grads)) == jax.tree.structure(expected)
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-12, "atol": 1e-14}
    close = functools.partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(close, (value, grads), expected)
    assert factors.keys() == {layer.path for layer in layout.layers}
    return layout, factors


def same_as_plain(loss_fn, plain, params, x):
    """Two losses, one plain enough for the reference, must have the same factors."""
    layout, factors = captured(loss_fn, params, x)
    assert layout.covered == 1, str(layout)
    assert_factors(factors, factors_of(plain, params, x))


def rows_twice(layout) -> set[str]:
    """The parameters that are in two rows of the printed table."""
    paths = [leaf.path for layer in layout.layers for leaf in layer.leaves]
    paths += [row.leaf.path for row in layout.uncovered]
    return {path for path in paths if paths.count(path) > 1}


def assert_factors(found, expected, rtol=1e-9, atol=1e-13):
    """Compares dicts of factors: paths, shapes and values."""
    assert found.keys() == expected.keys()
    for path, factor in expected.items():
        for field, want, got in zip(Factor._fields, factor, found[path], strict=True):
            assert got.shape == np.shape(want), (path, field)
            np.testing.assert_allclose(got, want, rtol, atol, err_msg=f"{path}: {field}")


def stack(factors: list[Factor], axis: int = 0, rows_axis: int = 0) -> Factor:
    """The factor of layers stacked along an axis of their weight."""
    h, s, rows, mean = (list(column) for column in zip(*factors, strict=True))
    return Factor(
        np.stack(h, axis), np.stack(s, axis), np.stack(rows, rows_axis), np.stack(mean, axis)
    )


def slices(tree, axis: int = 0) -> list[Any]:
    """The trees that lie stacked along an axis of each leaf."""
    size = jax.tree.leaves(tree)[0].shape[axis]
    return [
        jax.tree.map(lambda leaf, i=i: np.asarray(leaf).take(i, axis), tree) for i in range(size)
    ]


class Block(nn.Module):
    """Two layers with an activation, in and out of three features."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4, param_dtype=jnp.float64, name="up")(x))
        return nn.Dense(3, param_dtype=jnp.float64, name="down")(x)


def twin_factors(run, trees, x):
    """The factors of a list of plain blocks, a dict for each."""

    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x):
            return run([Block(name=f"{i}") for i in range(len(trees))], x)

    params = {f"{i}": tree for i, tree in enumerate(trees)}
    found = factors_of(loss_of(Twin()), params, x)
    return [
        {p.removeprefix(f"{i}/"): f for p, f in found.items() if p.startswith(f"{i}/")}
        for i in range(len(trees))
    ]


def in_turn(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def stacked(factors, *axes):
    """Stacks the factors of equal layers, path by path."""
    return {path: stack([f[path] for f in factors], *axes) for path in factors[0]}


def under(prefix, factors):
    return {f"{prefix}/{path}": factor for path, factor in factors.items()}


def random_like(tree, seed=0):
    """A tree of normal numbers, shaped and typed as one of arrays or of their shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def inputs_of(shape, seed=1):
    """Normal numbers in double precision."""
    return random_like(jax.ShapeDtypeStruct(shape, jnp.float64), seed)


def random_params(model, *inputs, method=None):
    """Parameters without running an initializer."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, method=method))
    return random_like(variables["params"])


def scalar(tree):
    """A loss whose gradient differs at every entry of every array."""
    leaves = [y for y in jax.tree.leaves(tree) if jnp.issubdtype(y.dtype, jnp.inexact)]
    return sum(jnp.mean(jnp.sin(y + random_like(y))) for y in leaves)


def loss_of(model, **options):
    """The loss `scalar(model(*inputs))` as a function of the parameters and inputs."""

    def loss_fn(params, *inputs):
        return scalar(model.apply({"params": params}, *inputs, **options))

    return loss_fn
