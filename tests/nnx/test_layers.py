"""Every NNX layer's factors against the brute-force reference, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.nnx_reference import (
    attention_in_double,
    captured,
    check,
    factors_of,
    loss_of,
    random_model,
)
from tests.support.reference import F64, assert_factors, inputs_of, scalar

pytestmark = pytest.mark.usefixtures("x64")


class Of:
    """A layer of `flax.nnx` that waits for its random numbers."""

    def __init__(self, layer, *args, **options):
        self.make = functools.partial(layer, *args, param_dtype=F64, **options)

    def __call__(self, rngs):
        return self.make(rngs=rngs)


DENSE = {
    "1-D": (Of(nnx.Linear, 2, 3), (2,)),
    "2-D": (Of(nnx.Linear, 2, 3), (4, 2)),
    "3-D": (Of(nnx.Linear, 4, 3, use_bias=False), (2, 3, 4)),
    "general": (Of(nnx.LinearGeneral, 2, 3), (4, 2)),
    "several features": (Of(nnx.LinearGeneral, 2, (2, 3)), (4, 2)),
    "several axes": (Of(nnx.LinearGeneral, (3, 2), (2, 3), axis=(1, 3)), (2, 3, 4, 2)),
    "unsorted axes": (Of(nnx.LinearGeneral, (3, 2), 3, axis=(-2, -1)), (4, 3, 2)),
    "first axis": (Of(nnx.LinearGeneral, 4, 3, axis=0), (4, 2)),
    "batch axis": (Of(nnx.LinearGeneral, 4, 3, batch_axis={0: 2}), (2, 5, 4)),
    "batch axes, several axes": (
        Of(nnx.LinearGeneral, (4, 2), (2, 3), axis=(2, -1), batch_axis={0: 2, 1: 3}),
        (2, 3, 4, 5, 2),
    ),
    "batch axis without bias": (
        Of(nnx.LinearGeneral, 4, 3, batch_axis={0: 2}, use_bias=False),
        (2, 5, 4),
    ),
}

EINSUM = {
    "dense": (Of(nnx.Einsum, "bi,io->bo", (2, 3), (3,)), (4, 2)),
    "spaces": (Of(nnx.Einsum, "b i, i o -> b o", (2, 3), (3,)), (4, 2)),
    "kernel transposed": (Of(nnx.Einsum, "bi,oi->bo", (3, 2), (3,)), (4, 2)),
    "ellipsis": (Of(nnx.Einsum, "...i,io->...o", (2, 3), (3,)), (4, 5, 2)),
    "several outputs": (Of(nnx.Einsum, "bi,iop->bop", (2, 3, 4), (3, 4)), (5, 2)),
    "shared letter": (Of(nnx.Einsum, "bhi,hio->bho", (4, 2, 3), (4, 3)), (5, 4, 2)),
    "no bias": (Of(nnx.Einsum, "bij,ijo->bo", (2, 3, 4)), (5, 2, 3)),
}

CONV = {
    "1-D": (Of(nnx.Conv, 2, 3, 3), (2, 6, 2)),
    "2-D": (Of(nnx.Conv, 2, 3, (3, 2)), (2, 5, 4, 2)),
    "VALID": (Of(nnx.Conv, 2, 3, (3, 2), padding="VALID", use_bias=False), (2, 5, 4, 2)),
    "strided": (Of(nnx.Conv, 2, 3, (3, 3), strides=2), (2, 6, 5, 2)),
    "strides None": (Of(nnx.Conv, 2, 3, (3,), strides=None), (2, 6, 2)),
    "own padding": (Of(nnx.Conv, 2, 3, (3, 2), padding=((2, 0), (1, 3))), (2, 5, 4, 2)),
    "CAUSAL": (Of(nnx.Conv, 2, 3, (3,), padding="CAUSAL", kernel_dilation=2), (2, 6, 2)),
    "CIRCULAR": (Of(nnx.Conv, 2, 3, (3, 4), padding="CIRCULAR"), (2, 5, 4, 2)),
    "REFLECT": (Of(nnx.Conv, 2, 3, (3,), padding="REFLECT", strides=2), (2, 7, 2)),
    "dilations": (
        Of(nnx.Conv, 2, 3, (2,), input_dilation=3, kernel_dilation=2, strides=2, padding=1),
        (2, 5, 2),
    ),
    "groups": (Of(nnx.Conv, 4, 6, (3, 2), feature_group_count=2), (2, 4, 4, 4)),
    "depthwise": (Of(nnx.Conv, 4, 4, (3,), feature_group_count=4), (2, 5, 4)),
    "mask": (Of(nnx.Conv, 2, 3, (3,), mask=np.tril(np.ones((3, 2, 3)))), (2, 6, 2)),
    "no batch": (Of(nnx.Conv, 2, 3, (3,)), (6, 2)),
    "several batch axes": (Of(nnx.Conv, 2, 3, (3,)), (2, 3, 6, 2)),
    "transpose": (Of(nnx.ConvTranspose, 2, 3, (3,)), (2, 5, 2)),
    "transpose, strided": (Of(nnx.ConvTranspose, 2, 3, (3, 2), strides=2), (2, 4, 3, 2)),
    "transpose, VALID": (
        Of(nnx.ConvTranspose, 2, 3, (3,), strides=2, padding="VALID", kernel_dilation=2),
        (2, 4, 2),
    ),
    "transpose, CIRCULAR": (
        Of(nnx.ConvTranspose, 2, 3, (3,), strides=2, padding="CIRCULAR"),
        (2, 4, 2),
    ),
    "transposed kernel": (
        Of(nnx.ConvTranspose, 2, 3, (3,), strides=2, transpose_kernel=True),
        (2, 4, 2),
    ),
}

NORM = {
    "BatchNorm": (Of(nnx.BatchNorm, 3), (4, 5, 3)),
    "BatchNorm, axis": (Of(nnx.BatchNorm, 3, axis=1), (4, 3, 5)),
    "BatchNorm, running": (Of(nnx.BatchNorm, 3, use_running_average=True), (4, 5, 3)),
    "BatchNorm, scale only": (Of(nnx.BatchNorm, 3, use_bias=False), (4, 3)),
    "BatchNorm, bias only": (Of(nnx.BatchNorm, 3, use_scale=False), (4, 3)),
    "LayerNorm": (Of(nnx.LayerNorm, 3), (4, 5, 3)),
    "LayerNorm, 2-D": (Of(nnx.LayerNorm, 3, use_bias=False), (4, 3)),
    "RMSNorm": (Of(nnx.RMSNorm, 3), (4, 5, 3)),
    "GroupNorm": (Of(nnx.GroupNorm, 4, 2), (4, 5, 4)),
    "GroupNorm, by size": (Of(nnx.GroupNorm, 4, None, group_size=2), (4, 5, 4)),
    "InstanceNorm": (Of(nnx.InstanceNorm, 3), (4, 5, 3)),
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in {"dense": DENSE, "einsum": EINSUM, "conv": CONV, "norm": NORM}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer(case):
    make, shape = CASES[case]
    check(loss_of, random_model(make), inputs_of(shape))


# Embeddings.

TOKENS = np.array([[0, 3, 3], [5, 0, 1]])
Embed = Of(nnx.Embed, 7, 4)


def lookup(embed, tokens):
    return scalar(embed(tokens))


def attend(embed, tokens):
    return scalar(embed.attend(inputs_of((2, 3, 4))))


def tied(embed, tokens):
    return scalar(embed.attend(jnp.tanh(embed(tokens))))


@pytest.mark.parametrize(
    ("loss_fn", "kind"), [(lookup, "embedding"), (attend, "attend"), (tied, "embedding")]
)
def test_an_embedding(loss_fn, kind):
    layout, factors = check(loss_fn, random_model(Embed), TOKENS)
    assert layout.layers[0].kind == kind
    if kind == "embedding":  # how often each token is met
        np.testing.assert_allclose(factors[""].h.ravel(), np.bincount(TOKENS.ravel(), None, 7) / 6)


# Attention.


def attention(**options):
    return Of(nnx.MultiHeadAttention, 2, 4, **{"decode": False} | options)


ATTENTION = {
    "self": attention(),
    "normalized": attention(normalize_qk=True),
    "no bias": attention(use_bias=False),
    "grouped": attention(num_kv_heads=1),
    "wider": attention(qkv_features=6, out_features=3),
    "dropout": attention(dropout_rate=0.5, deterministic=False),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_self_attention(case):
    layout, _ = check(loss_of, random_model(ATTENTION[case]), inputs_of((2, 3, 4)))
    assert {"query", "key", "value", "out"} <= {layer.path for layer in layout.layers}


def test_cross_attention():
    def loss_fn(model, q, k, v, mask):
        return scalar(model(q, k, v, mask=mask))

    q, k, v = inputs_of((2, 3, 4)), inputs_of((2, 5, 4), 2), inputs_of((2, 5, 4), 3)
    check(loss_fn, random_model(attention()), q, k, v, np.tril(np.ones((2, 1, 3, 5))) > 0)


def test_attention_that_decodes():
    """One token after another; the cache is carried over as `nnx.value_and_grad` does."""
    model = random_model(attention(decode=True, attention_fn=attention_in_double))
    model.init_cache((2, 3, 4), F64)

    def loss_fn(model, x):
        return scalar([model(x[:, i : i + 1]) for i in range(2)])

    check(loss_fn, model, inputs_of((2, 2, 4)))


# Recurrence.


class Unrolled(nnx.Module):
    """A cell in a plain loop."""

    def __init__(self, cell):
        self.cell = cell

    def __call__(self, x):
        carry = self.cell.initialize_carry(x[:, 0].shape, nnx.Rngs(0))
        found = []
        for step in range(x.shape[1]):
            carry, y = self.cell(carry, x[:, step])
            found.append(y)
        return jnp.stack(found, 1)


CELLS = [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell]


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_in_a_recurrence(cell):
    """The rows of all its steps are averaged."""
    x = inputs_of((2, 4, 3))
    model = random_model(lambda rngs: nnx.RNN(Of(cell, 3, 2, dtype=F64)(rngs)))
    layout, factors = captured(loss_of, model, x)
    assert layout.covered == 1, str(layout)
    assert {float(factor.rows) for factor in factors.values()} == {8.0}
    assert_factors(factors, factors_of(loss_of, Unrolled(model.cell), x))


def test_both_directions():
    x = inputs_of((2, 4, 3))

    def both(rngs, of):
        return nnx.Dict({name: of(Of(nnx.GRUCell, 3, 2)(rngs)) for name in "ab"})

    def plain(model, x):
        return scalar(jnp.concatenate([model.a(x), model.b(x[:, ::-1])[:, ::-1]], -1))

    def loss_fn(model, x):
        return scalar(nnx.Bidirectional(model.a, model.b, rngs=nnx.Rngs(0))(x))

    model = random_model(lambda rngs: both(rngs, nnx.RNN))
    twin = nnx.Dict(a=Unrolled(model.a.cell), b=Unrolled(model.b.cell))
    layout, factors = captured(loss_fn, model, x)
    assert layout.covered == 1
    assert_factors(factors, factors_of(plain, twin, x))


# Low rank.


class TwoLayers(nnx.Module):
    """What a `LoRA` is."""

    def __init__(self, lora):
        self.lora_a, self.lora_b = (
            nnx.Linear(*param.shape, use_bias=False, rngs=nnx.Rngs(0))
            for param in (lora.lora_a, lora.lora_b)
        )
        self.lora_a.kernel, self.lora_b.kernel = lora.lora_a, lora.lora_b
        self.base_module = lora.base_module

    def __call__(self, x):
        y = self.lora_b(self.lora_a(x))
        return y + self.base_module(x) if self.base_module else y


@pytest.mark.parametrize("base", [False, True])
def test_a_low_rank_layer_is_two(base):
    def make(rngs):
        return Of(nnx.LoRA, 3, 2, 4, base_module=Of(nnx.Linear, 3, 4)(rngs) if base else None)(rngs)

    model, x = random_model(make), inputs_of((2, 5, 3))
    layout, factors = captured(loss_of, model, x)
    assert layout.covered == 1
    assert factors.keys() == {"lora_a", "lora_b"} | ({"base_module"} if base else set())
    assert_factors(factors, factors_of(loss_of, TwoLayers(model), x))


def test_a_linear_layer_with_a_low_rank_one_beside():
    make = Of(nnx.LoRALinear, 3, 4, lora_rank=2, lora_param_dtype=F64)
    model, x = random_model(make), inputs_of((5, 3))
    layout, factors = captured(loss_of, model, x)
    assert layout.covered == 1
    plain = random_model(Of(nnx.Linear, 3, 4))
    nnx.update(plain, {"kernel": model.kernel, "bias": model.bias})
    twin = nnx.Dict(lora=TwoLayers(model.lora), plain=plain)
    expected = factors_of(lambda m, x: scalar(m.plain(x) + m.lora(x)), twin, x)
    expected[""] = expected.pop("plain")
    assert_factors(factors, expected)


# What has no Fisher block.


class Wrapped(nnx.Module):
    """A layer whose kernel is computed from its parameter, and one that is covered."""

    def __init__(self, wrapper, rngs):
        self.inner = wrapper(Of(nnx.Linear, 3, 4)(rngs), rngs=rngs)
        self.plain = Of(nnx.Linear, 4, 2)(rngs)

    def __call__(self, x):
        return self.plain(self.inner(x))


def test_batch_axes_out_of_order_are_read_from_the_product():
    model, x = random_model(Of(nnx.LinearGeneral, 4, 3, batch_axis={1: 2, 0: 2})), (2, 2, 5, 4)
    layout, factors = captured(loss_of, model, inputs_of(x))
    (layer,) = layout.layers
    assert layer.axes == ("batch0", "batch1", "in0", "out0")
    squares = np.mean(inputs_of(x) ** 2, 2)
    np.testing.assert_allclose(factors[""].h[..., 0], squares, 1e-12)


def double(leaf):
    return leaf.astype(F64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_a_kernel_that_is_computed_is_uncovered(wrapper):
    graphdef, state = nnx.split(Wrapped(wrapper, nnx.Rngs(0)))
    model, x = nnx.merge(graphdef, jax.tree.map(double, state)), inputs_of((5, 3))
    layout, factors = captured(loss_of, model, x)
    assert [layer.path for layer in layout.layers] == ["plain"]
    assert all(row.reason for row in layout.uncovered)
    assert_factors(factors, {"plain": factors_of(loss_of, model, x)["plain"]})


def test_a_single_slope_is_uncovered():
    model = random_model(
        lambda rngs: nnx.Sequential(Of(nnx.Linear, 3, 4)(rngs), nnx.PReLU(param_dtype=F64))
    )
    layout, factors = captured(loss_of, model, inputs_of((5, 3)))
    assert [(row.leaf.path, bool(row.reason)) for row in layout.uncovered] == [
        ("layers/1/negative_slope", True)
    ]
    assert_factors(factors, factors_of(loss_of, model, inputs_of((5, 3))))


def test_dropout_is_seen_through():
    def make(rngs):
        return nnx.Sequential(
            Of(nnx.Linear, 3, 4)(rngs), nnx.Dropout(0.5, rngs=rngs), Of(nnx.Linear, 4, 2)(rngs)
        )

    check(loss_of, random_model(make), inputs_of((5, 3)))
