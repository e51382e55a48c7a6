"""The layout as a value and as a page: printed, compared, hashed, copied and stored."""

import copy
import functools
import pickle
import re
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import adafisher_jax as af


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(x.shape[-1], name="dense")(x)), None


class Everything(nn.Module):
    """One of each: stacked, batched, convolved, normed, looked up, and not covered."""

    width: int = 4

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(9, self.width, name="embed")(tokens)
        x = nn.Conv(self.width, (3,), feature_group_count=2, name="conv")(x)
        block = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
        x, _ = block(name="blocks")(nn.LayerNorm(name="norm")(x), None)
        shift = self.param("shift", nn.initializers.ones, (self.width,))
        alpha = self.param("alpha", nn.initializers.ones, ())
        x = nn.Einsum((self.width, 2, 3), "btd,dhk->bthk", use_bias=False, name="heads")(x)
        return x.sum((-1, -2)) * alpha + jnp.mean(shift)


TOKENS = jnp.zeros((2, 6), int)
PARAMS = Everything().init(jax.random.key(0), TOKENS)["params"]


def loss_fn(params, tokens, width=4):
    return jnp.mean(Everything(width).apply({"params": params}, tokens))


@functools.cache
def layout():
    return af.trace_layout(loss_fn, PARAMS, TOKENS)


TABLE = """\
parameter            layer      in   out  stacked  covered
-------------------  ---------  ---  ---  -------  -------
alpha                -          -    1    -        no: no layer of a known kind uses it as it is
blocks/dense/bias    dense      -    4    5        yes
blocks/dense/kernel  dense      4    4    5        yes
conv/bias            conv       -    4    -        yes
conv/kernel          conv       3×2  4    -        yes
embed/embedding      embedding  9    4    -        yes
heads/kernel         dense      4    2×3  -        yes
norm/bias            norm       -    4    -        yes
norm/scale           norm       -    4    -        yes
shift                -          -    4    -        no: no layer of a known kind uses it as it is
97.5% of 201 parameters under a Fisher block, others get momentum ("centered": over an RMS)"""


def test_it_prints_as_a_table():
    assert str(layout()) == TABLE
    assert f"{layout()}" == str(layout())


def test_the_table_is_aligned_and_sorted_whatever_the_paths():
    params = {"a": {"b": PARAMS}, "z": {"kernel": jnp.ones((4, 1)), "bias": jnp.ones(1)}}

    def loss(params, tokens):
        head = nn.Dense(1).apply({"params": params["z"]}, jnp.ones((2, 4)))
        return loss_fn(params["a"]["b"], tokens) + jnp.mean(head)

    header, rule, *rows, total = str(af.trace_layout(loss, params, TOKENS)).splitlines()
    starts = [0, *(match.end() for match in re.finditer("  +", rule))]
    assert [
        header[i:].split()[0] for i in starts
    ] == "parameter layer in out stacked covered".split()
    assert all(row[i - 1] == " " != row[i] for row in (header, *rows) for i in starts[1:])
    assert [row.split()[0] for row in rows] == sorted(row.split()[0] for row in rows)
    assert len(rows) == len(jax.tree.leaves(params))
    assert all(line == line.rstrip() for line in (header, *rows))
    assert total.startswith("97.6% of 206")


def test_a_bare_model_has_a_table_too():
    """Its one layer's path is empty: the parameters are the first argument itself."""
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    loss = lambda p, x: jnp.mean(nn.Dense(2).apply({"params": p}, x))  # noqa: E731
    bare = af.trace_layout(loss, params, jnp.ones((4, 3)))
    assert [layer.path for layer in bare.layers] == [""]
    assert [line.split()[0] for line in str(bare).splitlines()[2:4]] == ["bias", "kernel"]
    assert str(af.Layout(())).splitlines()[-1] == "0.0% of 0 parameters under a Fisher block"


def test_the_covered_share_counts_parameters():
    outside = PARAMS["alpha"].size + PARAMS["shift"].size
    total = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    assert layout().covered == pytest.approx(1 - outside / total)
    assert sorted(row.leaf.path for row in layout().uncovered) == ["alpha", "shift"]
    assert all(row.reason for row in layout().uncovered)


def test_two_traces_of_one_model_are_equal():
    again = af.trace_layout(lambda p, t: 3 * loss_fn(p, t) + 1, PARAMS, TOKENS[:, :3])
    assert again == layout()
    assert hash(again) == hash(layout())
    assert str(again) == str(layout())
    assert len({again, layout()}) == 1


def test_layers_may_be_left_out():
    """Their parameters are known, and uncovered."""
    some = layout().only(["conv", "norm"])
    assert [layer.path for layer in some.layers] == ["conv", "norm"]
    assert {leaf.path for leaf in some.leaves} == {leaf.path for leaf in layout().leaves}
    (row,) = (line for line in str(some).splitlines() if line.startswith("embed/embedding"))
    assert row.split() == ["embed/embedding", "-", "-", "9×4", "-", "no:", "left", "out"]
    assert af.adafisher(3e-2, some, rule="centered").init(PARAMS)
    assert layout().only(layer.path for layer in layout().layers) == layout()


def without_the_first_layer(full, reason):
    first, *others = full.layers
    rows = (af.Uncovered(af.Leaf(leaf.path, leaf.shape), reason) for leaf in first.leaves)
    return af.Layout(tuple(others), (*full.uncovered, *rows))


def test_another_model_has_another_layout():
    wider = jax.eval_shape(Everything(6).init, jax.random.key(0), TOKENS)["params"]
    part = lambda p, t: jnp.mean(nn.Embed(9, 4).apply({"params": p["embed"]}, t))  # noqa: E731
    others = [
        af.trace_layout(lambda p, t: loss_fn(p, t, width=6), wider, TOKENS),
        af.trace_layout(part, PARAMS, TOKENS),
        af.trace_layout(lambda p, t: loss_fn(p["x"], t), {"x": PARAMS}, TOKENS),
        without_the_first_layer(layout(), "for a test"),
    ]
    assert len({layout(), *others}) == 1 + len(others)
    assert "for a test" in str(others[-1])
    assert others[-1].covered < layout().covered


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_is_equal(copied):
    assert copied(layout()) == layout()
    assert hash(copied(layout())) == hash(layout())


def test_a_layout_is_a_static_argument():
    """And an equal one compiles nothing anew."""
    traces = []

    @functools.partial(jax.jit, static_argnames="layout")
    def covered(x, layout):
        traces.append(layout)
        return x * layout.covered

    one = covered(1.0, layout=layout())
    two = covered(1.0, layout=af.trace_layout(loss_fn, PARAMS, TOKENS))
    assert len(traces) == 1
    assert one == two == jnp.float32(layout().covered)


def test_a_layout_holds_no_arrays():
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(layout()))
    shapes = jax.eval_shape(Everything().init, jax.random.key(0), TOKENS)["params"]
    assert af.trace_layout(loss_fn, shapes, jax.ShapeDtypeStruct((2, 6), jnp.int32)) == layout()


def test_its_parts_say_where_and_what():
    layers = {layer.path: layer for layer in layout().layers}
    assert list(layers) == sorted(layers)
    assert {path: layer.kind for path, layer in layers.items()} == {
        "blocks/dense": "dense",
        "conv": "conv",
        "embed": "embedding",
        "heads": "dense",
        "norm": "norm",
    }
    assert layers["conv"].groups == 2
    assert layers["heads"].bias is None
    assert layers["blocks/dense"].weight == af.Leaf(
        "blocks/dense/kernel", (5, 4, 4), ("stack0", "in0", "out0")
    )
    assert layers["blocks/dense"].bias.axes == ("stack0", "out0")


class Reshaped(nn.Module):
    """A model that rearranges a parameter itself."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (12,)).reshape(3, 4)
        return nn.Dense(4, use_bias=False).apply({"params": {"kernel": w}}, x)


class Custom(nn.Module):
    @nn.compact
    def __call__(self, x):
        def run(module, x):
            return module(x)

        def forward(module, x):
            return nn.vjp(run, module, x)

        backward = lambda vjp, g: vjp(g)  # noqa: E731
        dense = nn.Dense(4)
        return nn.custom_vjp(run, forward, backward)(dense, x)


def test_uncovered_parameters_say_why():
    x = jnp.ones((2, 3))
    table = {"w": jnp.ones((5, 4)), "b": jnp.ones(4), "spare": jnp.ones(2)}

    def sliced(p, x):
        return jnp.mean(nn.Dense(4).apply({"params": {"kernel": p["w"][:3], "bias": p["b"]}}, x))

    reasons = {row.leaf.path: row.reason for row in af.trace_layout(sliced, table, x).uncovered}
    assert "part or a rearrangement" in reasons["w"]
    assert reasons["b"] == reasons["w"]  # a layer is covered as a whole
    assert "no layer" in reasons["spare"]

    frozen = lambda p, x: jnp.mean(  # noqa: E731
        nn.Dense(4).apply({"params": {"kernel": jnp.ones((3, 4)), "bias": p}}, x)
    )
    (alone,) = af.trace_layout(frozen, jnp.ones(4), x).uncovered
    assert alone.reason == "the weight of its layer is no parameter as it is"

    for model, word in ((Reshaped(), "rearrangement"), (Custom(), "derivative rule")):
        params = model.init(jax.random.key(0), x)["params"]
        loss = lambda p, x, model=model: jnp.mean(model.apply({"params": p}, x))  # noqa: E731
        found = af.trace_layout(loss, params, x)
        assert found.layers == ()
        assert all(word in row.reason for row in found.uncovered)
        assert len(found.uncovered) == len(jax.tree.leaves(params))


@flax.struct.dataclass
class Heads:
    policy: Any
    value: Any


def test_a_field_called_value_is_a_part_of_its_path():
    """As the attribute of a variable of Flax's, which holds an array, it is none."""
    dense, x = nn.Dense(2), jnp.ones((4, 3))
    variables = dense.init(jax.random.key(0), x)

    def marked(heads, x):
        return jnp.sum(dense.apply(heads.policy, x) * dense.apply(heads.value, x))

    def plain(heads, x):
        return jnp.sum((x @ heads.policy["w"]) * (x @ heads.value["w"]))

    def paths(loss, leaf):
        return [layer.path for layer in af.trace_layout(loss, Heads(leaf, leaf), x).layers]

    assert paths(marked, variables) == ["policy/params", "value/params"]
    assert paths(plain, {"w": jnp.ones((3, 2))}) == ["policy", "value"]


def test_a_layer_whose_parameters_are_missing_has_no_rows():
    params = {"a": {"w": jnp.ones((3, 2))}, "b": {"w": jnp.ones((3, 2))}}
    x = jnp.ones((4, 3))

    def loss(params, x):
        return sum(jnp.sum(x @ layer["w"]) for layer in params.values())

    layout = af.trace_layout(loss, params, x)
    _, _, factors = af.value_and_grad(loss, layout)({"a": params["a"]}, x)
    assert {path: factor.rows.item() for path, factor in factors.items()} == {"a": 4, "b": 0}
