"""The factors of NNX models, from their definition and nothing of the package's own.

As in `tests.support.reference`: an array of zeros is added to what each layer puts out, and the
loss is differentiated with respect to it. A layer's geometry is that of its Linen twin, of which it
is first seen that it computes the same. Models with transforms are compared with an unrolled twin.
"""

import contextlib
import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import adafisher_jax as af
from adafisher_jax import Factor
from tests.support.reference import (
    F64,
    NORMS,
    Call,
    assert_factors,
    linear_sums,
    norm_sums,
    random_like,
    rows_twice,
    scalar,
)

CONV = "kernel_size strides padding input_dilation kernel_dilation feature_group_count"
CONV_TRANSPOSE = "kernel_size strides padding kernel_dilation transpose_kernel"
NORM = "use_scale use_bias"
TWINS = {  # the Linen class, its attributes of the same name, and those of another
    nnx.Linear: (nn.Dense, "use_bias", {"features": "out_features"}),
    nnx.LinearGeneral: (
        nn.DenseGeneral, "axis use_bias", {"features": "out_features", "batch_dims": "batch_axis"},
    ),
    nnx.Einsum: (nn.Einsum, "einsum_str", {"shape": "kernel_shape", "use_bias": "bias_shape"}),
    nnx.Conv: (nn.Conv, f"{CONV} use_bias mask", {"features": "out_features"}),
    nnx.ConvTranspose: (
        nn.ConvTranspose, f"{CONV_TRANSPOSE} use_bias mask", {"features": "out_features"},
    ),
    nnx.Embed: (nn.Embed, "num_embeddings features", {}),
    nnx.BatchNorm: (nn.BatchNorm, f"{NORM} axis", {}),
    nnx.LayerNorm: (nn.LayerNorm, f"{NORM} feature_axes", {}),
    nnx.RMSNorm: (nn.RMSNorm, "use_scale feature_axes", {}),
    nnx.GroupNorm: (nn.GroupNorm, f"{NORM} num_groups", {}),
    nnx.InstanceNorm: (nn.InstanceNorm, f"{NORM} feature_axes", {}),
}  # fmt: skip
METHODS = [(layer, "__call__") for layer in TWINS] + [(nnx.Embed, "attend")]


def twin(module):
    """The Linen layer that is configured as an NNX layer."""
    layer, same, renamed = next(TWINS[c] for c in type(module).__mro__ if c in TWINS)
    options = {name: getattr(module, name) for name in same.split()}
    options |= {name: getattr(module, other) for name, other in renamed.items()}
    if layer is nn.Einsum:
        options["use_bias"] = options["use_bias"] is not None
    if layer is nn.DenseGeneral:
        options["batch_dims"] = tuple(options["batch_dims"])
    return layer(**options, param_dtype=F64)


def arrays_of(module):
    """The arrays of a layer's own parameters, by name."""
    held = {name: getattr(module, name, None) for name in ("kernel", "bias", "embedding", "scale")}
    return {name: param[...] for name, param in held.items() if param is not None}


def paths_of(model):
    """The path of every module within a model, by the module's identity."""
    return {id(m): "/".join(map(str, path)) for path, m in nnx.iter_graph(model)}


@contextlib.contextmanager
def exchanged(methods, exchange):
    """Exchanges methods of classes; `exchange(original)` gives the other."""
    with contextlib.ExitStack() as stack:
        for layer, name in methods:
            original = vars(layer)[name]
            method = functools.wraps(original)(exchange(original))
            stack.enter_context(mock.patch.object(layer, name, method))
        yield


def calls_of(loss_fn, model, *args):
    """Runs a loss with zeros added to each layer's output, and differentiates by the zeros."""
    seen = []

    def run(zeros):
        seen.clear()
        copy, given = nnx.clone((model, args))
        paths, inputs, twins = paths_of(copy), [], []

        def exchange(original):
            def method(module, x, *rest, **options):
                y = original(module, x, *rest, **options)
                if id(module) not in paths:
                    return y
                linen = twin(module)
                if isinstance(linen, nn.Einsum) and rest:
                    linen = linen.clone(einsum_str=rest[0])
                seen.append((paths[id(module)], linen, original.__name__, y))
                inputs.append(jnp.asarray(x))
                if not isinstance(linen, NORMS):
                    own = {"params": arrays_of(module)}
                    twins.append((y, linen.apply(own, x, method=original.__name__)))
                return y + zeros[len(seen) - 1] if zeros else y

            return method

        with exchanged(METHODS, exchange):
            value = loss_fn(copy, *given)
        return jax.tree.leaves(value)[0], (inputs, twins)

    jax.eval_shape(run, None)
    zeros = [np.zeros(y.shape, y.dtype) for *_, y in seen]
    cotangents, (inputs, twins) = jax.jit(jax.grad(run, has_aux=True))(zeros)
    for ours, theirs in twins:
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    arrays = jax.tree.map(np.asarray, (inputs, cotangents))
    return [Call(*call[:3], x, g) for call, x, g in zip(seen, *arrays, strict=True)]


def factors_of(loss_fn, model, *args):
    """The factors of every layer: means over the rows of all its calls."""
    calls = calls_of(loss_fn, model, *args)
    looked_up = {c.path for c in calls if type(c.module) is nn.Embed and c.method != "attend"}
    sums = {}
    for call in calls:
        if call.method == "attend" and call.path in looked_up:
            continue
        found = norm_sums(call) if isinstance(call.module, NORMS) else linear_sums(call)
        sums[call.path] = jax.tree.map(np.add, sums.get(call.path, Factor(0, 0, 0, 0)), found)
    return {p: Factor(f.h / f.rows, f.s / f.rows, f.rows, f.mean / f.rows) for p, f in sums.items()}


def random_model(make, seed=0):
    """The module `make(rngs)`, with normal numbers for parameters; nothing is initialized."""
    graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(seed))), nnx.Param, ...)

    def value(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(seed), leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.ones(leaf.shape, F64)  # running averages, that Flax keeps in float32
        return jnp.zeros(leaf.shape, leaf.dtype)

    rest = jax.tree.map(value, rest)
    return nnx.merge(graphdef, random_like(params, seed), rest)


def loss_of(model, *inputs):
    """A loss whose gradient differs at every entry of what the model puts out."""
    return scalar(model(*inputs))


def attention_in_double(q, k, v, *, mask=None, **_):
    """Attention as Flax's own computes it, but for its float32 softmax."""
    weights = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    if mask is not None:
        weights = jnp.where(mask, weights, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(weights), v)


def captured(loss_fn, model, *args, has_aux=False):
    """The layout and captured factors, having checked all else against `nnx.value_and_grad`."""
    layout = af.nnx.trace_layout(loss_fn, model, *args)
    assert not rows_twice(layout)
    graphdef, state = nnx.split(model)

    def both(state, args):
        found = []
        for grad_fn in (
            af.nnx.value_and_grad(loss_fn, layout, has_aux),
            nnx.value_and_grad(loss_fn, has_aux=has_aux),
        ):
            copy, given = nnx.merge(graphdef, state, copy=True), nnx.clone(args)
            result = grad_fn(copy, *given)
            found.append((result[:2], nnx.state(copy), given, result[2:]))
        return found

    (*ours, (factors,)), (*expected, _) = jax.jit(both)(state, args)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    assert type(ours[0][1]) is type(expected[0][1])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    jax.tree.map(lambda a, b: close(*map(_numbers, (a, b))), ours, expected)
    assert factors.keys() == {layer.path for layer in layout.layers}
    return layout, factors


def _numbers(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def check(loss_fn, model, *args):
    """Everything in a model must be covered and have the factors of the definition."""
    layout, factors = captured(loss_fn, model, *args)
    assert layout.covered == 1, str(layout)
    assert_factors(factors, factors_of(loss_fn, model, *args))
    return layout, factors


class Block(nnx.Module):
    """Two layers with an activation, in and out of three features."""

    def __init__(self, rngs, dropout=0.0):
        self.up = nnx.Linear(3, 4, param_dtype=F64, rngs=rngs)
        self.down = nnx.Linear(4, 3, param_dtype=F64, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(jnp.tanh(self.up(x))))
