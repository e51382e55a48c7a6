"""Slices of a stack of weights (`w[2]`), and ranges of an axis (`w[:3]`), outside of loops."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import adafisher_jax as af
from tests.support.every_rule import every_rule

pytestmark = pytest.mark.usefixtures("numpy_rules", "x64")

RNG = np.random.default_rng(8)
X = RNG.normal(size=(5, 4))
PARAMS = {"b": RNG.normal(size=(3, 4)), "w": RNG.normal(size=(3, 4, 4))}


def layer(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def scanned(params, x):
    return lax.scan(lambda x, p: (layer(p, x), None), x, params)[0]


def in_turn(step):
    """All slices of the parameters, one after another."""

    def run(params, x):
        for i in range(3):
            x = step({"w": params["w"][i], "b": params["b"][i]}, x)
        return x

    return run


def unstacked(params, x):
    slices = zip(jnp.unstack(params["w"]), jnp.split(params["b"], 3), strict=True)
    for w, (b,) in slices:
        x = layer({"w": w, "b": b}, x)
    return x


def taken_inside(params, x):
    """The called function takes the slice."""

    @functools.partial(jax.jit, static_argnums=2)
    def step(params, x, i):
        return layer(jax.tree.map(lambda p: p[i], params), x)

    for i in range(3):
        x = step(params, x, i)
    return x


def in_branches(params, x):
    def step(p, x):
        return lax.cond(jnp.sum(x) < 99, layer, lambda p, x: x, p, x)

    return in_turn(step)(params, x)


def by_flax(params, x):
    def step(p, x):
        return jnp.tanh(nn.Dense(4).apply({"params": {"kernel": p["w"], "bias": p["b"]}}, x))

    return in_turn(step)(params, x)


def handed_out(params, x):
    """A function that is called returns the slice, and another uses it."""
    take = jax.jit(lambda params, i: jax.tree.map(lambda p: p[i], params), static_argnums=1)
    for i in range(3):
        x = jax.jit(layer)(take(params, i), x)
    return x


def in_a_loop(params, x):
    """A slice, of which a loop takes slices, of which it takes slices."""

    def step(x, p):
        for i in range(3):
            x = layer(jax.tree.map(lambda p, i=i: p[0, i], p), x)
        return x, None

    stacks = jax.tree.map(lambda p: p[None, None, None], params)
    return lax.scan(step, x, jax.tree.map(lambda p: p[0], stacks))[0]


def ranges_scanned(params, x):
    for part in (slice(0, 1), slice(1, 3)):
        x = scanned(jax.tree.map(lambda p, part=part: p[part], params), x)
    return x


def first_then_scanned(params, x):
    x = layer(jax.tree.map(lambda p: p[0], params), x)
    return scanned(jax.tree.map(lambda p: p[1:], params), x)


def ranges_by_flax(params, x):
    """Blocks of Flax, of which two loops take those of a range."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Dense(4)(x))

    def step(x, p):
        return Block().apply({"params": {"Dense_0": {"kernel": p["w"], "bias": p["b"]}}}, x), None

    for part in (slice(0, 2), slice(2, 3)):
        x = lax.scan(step, x, jax.tree.map(lambda p, part=part: p[part], params))[0]
    return x


RUNS = {
    "as it is": in_turn(layer),
    "jit of checkpoint": in_turn(jax.jit(jax.checkpoint(layer))),
    "vmap": in_turn(jax.vmap(layer, (None, 0))),
    "unstacked": unstacked,
    "taken inside": taken_inside,
    "in branches": in_branches,
    "handed out": handed_out,
    "by Flax": by_flax,
    "in a loop": in_a_loop,
    "ranges scanned": ranges_scanned,
    "the first, then a loop": first_then_scanned,
    "ranges by Flax": ranges_by_flax,
}


def loss_of(run):
    return lambda params, x: jnp.sum(jnp.sin(run(params, x))) / 5


def captured(loss_fn, params, x):
    layout = af.trace_layout(loss_fn, params, x)
    return layout, jax.jit(af.value_and_grad(loss_fn, layout))(params, x)


def assert_equal(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-14), found, wanted)


@pytest.mark.parametrize("how", RUNS)
def test_slices_taken_by_number_are_those_of_a_loop(how):
    layout, found = captured(loss_of(RUNS[how]), PARAMS, X)
    wanted_layout, wanted = captured(loss_of(scanned), PARAMS, X)
    assert layout == wanted_layout
    assert_equal(found, wanted)


def test_a_slice_that_is_not_used_has_no_rows():
    def loss_fn(params, x):
        y = layer({"w": params["w"][1], "b": params["b"][1]}, x)
        return jnp.mean((y + layer({"w": params["w"][-1], "b": params["b"][-1]}, 2 * y)) ** 2)

    _, (_, grads, factors) = captured(loss_fn, PARAMS, X)
    (factor,) = factors.values()
    np.testing.assert_array_equal(factor.rows, [0, 5, 5])
    np.testing.assert_array_equal(factor.h[0], 0)
    y = layer({"w": PARAMS["w"][1], "b": PARAMS["b"][1]}, X)
    np.testing.assert_allclose(
        factor.h[:, :, 0], [np.zeros(4), *(np.mean(x**2, 0) for x in (X, 2 * y))]
    )
    np.testing.assert_allclose(grads["w"][0], 0)


def test_two_slices_may_share_an_input():
    """One parameter holds the three maps of an attention."""

    def loss_fn(params, x):
        q, k, v = (x @ params["qkv"][:, i] for i in range(3))
        return jnp.mean((jax.nn.softmax(q @ k.T) @ v) ** 2)

    params = {"qkv": RNG.normal(size=(4, 3, 4))}
    layout, (_, _, factors) = captured(loss_fn, params, X)
    (one,) = layout.layers
    assert one.axes == ("in0", "stack0", "out0")
    (factor,) = factors.values()
    np.testing.assert_allclose(factor.h[:, :, 0], np.repeat(np.mean(X**2, 0)[:, None], 3, 1))


def test_a_stack_of_one_may_be_split_into_heads():
    def loss_fn(params, x):
        y = jnp.einsum("ni,ihk->nhk", x, params["w"][0].reshape(4, 2, 3))
        return jnp.mean((y + params["b"][0].reshape(2, 3)) ** 2)

    params = {"b": RNG.normal(size=(1, 6)), "w": RNG.normal(size=(1, 4, 6))}
    layout, (_, grads, factors) = captured(loss_fn, params, X)
    assert layout.covered == 1
    (factor,) = factors.values()
    np.testing.assert_allclose(factor.h[0, :, 0], np.mean(X**2, 0))
    residuals = 2 * (X @ params["w"][0] + params["b"][0]) / 30
    np.testing.assert_allclose(factor.s[0, 0], np.mean(residuals**2, 0))
    np.testing.assert_allclose(grads["w"][0], X.T @ residuals)


@pytest.mark.parametrize("number", [0, 2])
def test_the_bias_of_another_layer_is_none(number):
    def loss_fn(params, x):
        return jnp.mean((x @ params["w"][1] + params["b"][number]) ** 2)

    layout = af.trace_layout(loss_fn, PARAMS, X)
    (one,) = layout.layers
    assert one.bias is None
    assert [row.leaf.path for row in layout.uncovered] == ["b"]


@pytest.mark.parametrize("take", [lambda one: one[1], lambda one: one.reshape(6, 4)[3:]])
def test_a_slice_of_what_is_learned_is_the_input_of_a_weight(take):
    """Vectors that a weight multiplies, in a stack with a part for each layer."""

    def loss_fn(params, x):
        y = take(params["prompts"]) @ params["w"]
        return jnp.mean((x @ y.T) ** 2)

    params = {"prompts": RNG.normal(size=(2, 3, 4)), "w": RNG.normal(size=(4, 4))}
    layout, (_, _, factors) = captured(loss_fn, params, X)
    assert [layer.leaves[0].path for layer in layout.layers] == ["w"]
    np.testing.assert_allclose(factors[""].mean[:, 0], params["prompts"][1].mean(0))


def test_a_slice_that_a_gradient_inside_the_loss_hands_on():
    def loss_fn(params, x):
        energy = jax.jit(lambda x: jnp.sum(x @ params["w"][1]))
        return jnp.sum(jax.grad(energy)(x) ** 2)

    params = {"w": PARAMS["w"]}
    layout, (_, grads, factors) = captured(loss_fn, params, X)
    assert layout.covered == 1
    np.testing.assert_allclose(grads["w"][1], 10 * np.repeat(params["w"][1].sum(1)[:, None], 4, 1))
    (factor,) = factors.values()
    np.testing.assert_array_equal(factor.rows > 0, [False, True, False])


def test_what_is_learned_is_the_input_of_slices_that_data_meet_elsewhere():
    """A state that the first step of an unrolled recurrence starts from."""

    def run(params, slices, x):
        state = params["state"]
        for row in x:
            for w in slices:
                state = jnp.tanh(state @ w + row)
        return jnp.sum(jnp.sin(state)) / 5

    params = {"state": RNG.normal(size=4), "w": PARAMS["w"]}
    layout, found = captured(lambda p, x: run(p, [p["w"][i] for i in range(3)], x), params, X)
    apart = params | {"w": [*params["w"]]}
    _, wanted = captured(lambda p, x: run(p, p["w"], x), apart, X)
    assert [row.leaf.path for row in layout.uncovered] == ["state"]
    stacked = jax.tree.map(
        lambda *parts: jnp.stack(parts), *(wanted[2][f"w/{i}"] for i in range(3))
    )
    assert_equal(found[2], {"": stacked})


def test_a_row_of_a_table_is_the_input_of_another_weight():
    def loss_fn(params, ids):
        return jnp.mean((params["table"][ids] + params["table"][0] @ params["w"]) ** 2)

    params = {"table": RNG.normal(size=(6, 4)), "w": PARAMS["w"][0]}
    layout, (_, _, factors) = captured(loss_fn, params, jnp.array([1, 2, 2]))
    assert {layer.path: layer.kind for layer in layout.layers} == {
        "table": "embedding",
        "w": "dense",
    }
    np.testing.assert_allclose(factors["w"].mean[:, 0], params["table"][0])


@pytest.mark.parametrize("more", PARAMS)
def test_a_layer_with_stacks_of_two_lengths_is_listed(more):
    def loss_fn(params, x):
        return jnp.mean(by_flax({"w": params["w"], "b": params["b"]}, x) ** 2)

    params = PARAMS | {more: RNG.normal(size=(4, *PARAMS[more].shape[1:]))}
    reasons = {row.reason for row in af.trace_layout(loss_fn, params, X).uncovered}
    assert reasons == {"stacked unlike the layer's other parameter"}


@every_rule
def test_every_rule_steps_slices_as_the_slices_of_a_loop(rule):
    def after(run):
        loss_fn, params = loss_of(run), PARAMS
        layout = af.trace_layout(loss_fn, params, X)
        tx = af.adafisherw(1e-2, layout, rule=rule)
        state = tx.init(params)
        for _ in range(3):
            _, grads, factors = af.value_and_grad(loss_fn, layout)(params, X)
            updates, state = tx.update(grads, state, params, factors=factors)
            params = jax.tree.map(jnp.add, params, updates)
        return params

    assert_equal(after(in_turn(layer)), after(scanned))


# A product with a range of a weight is one with all of it, and with zeros elsewhere.


def of_outputs(w, b, x):
    parts = zip(jnp.split(w, [5, 8], 1), jnp.split(b, [5, 8]), strict=True)
    return jnp.concatenate([x @ w + b for w, b in parts], 1)


def of_outputs_without_bias(w, b, x):
    return jnp.concatenate([x @ w[:, :5], x @ w[:, 5:]], 1)


def of_inputs(w, b, x):
    return x[:, :2] @ w[:2] + x[:, 2:] @ w[2:]


def of_both(w, b, x):
    left, right = (
        x[:, :2] @ w[:2, cut] + x[:, 2:] @ w[2:, cut] for cut in (slice(4), slice(4, 12))
    )
    return jnp.concatenate([left, right], 1)


def of_the_transposed(w, b, x):
    return jnp.concatenate([x @ w.T[:5].T, x @ w.T[5:].T], 1)


def of_heads(w, b, x):
    """The parts of a weight for queries, keys and values, each of two heads."""
    parts = w.reshape(4, 3, 2, 2)
    return jnp.stack([jnp.einsum("ni,ihk->nhk", x, parts[:, i]) for i in range(3)], 1).reshape(
        5, 12
    )


def of_several_heads(w, b, x):
    parts = w.reshape(4, 3, 4)
    two = jnp.einsum("ni,ijk->njk", x, parts[:, 1:])
    return jnp.concatenate([x @ parts[:, 0], two.reshape(5, 8)], 1)


def of_ranges(w, b, x):
    right = w[:, 4:]
    return jnp.concatenate([x @ w[:, :4], x @ right[:, :2], x @ right[:, 2:]], 1)


def inside_a_loop(w, b, x):
    def step(_, row):
        return None, jnp.concatenate([row @ w[:, :5], row @ w[:, 5:]])

    return lax.scan(jax.checkpoint(step), None, x)[1]


# Of how many products the weight's is, and in how many of them an input, and an output, has a part.
RANGES = {
    of_outputs: (3, 3, 1),
    of_outputs_without_bias: (2, 2, 1),
    of_inputs: (2, 1, 2),
    of_both: (4, 2, 2),
    of_the_transposed: (2, 2, 1),
    of_heads: (3, 3, 1),
    of_several_heads: (2, 2, 1),
    of_ranges: (3, 3, 1),
    inside_a_loop: (2, 2, 1),
}


@pytest.mark.parametrize("when", [True, "traced"])
@pytest.mark.parametrize("forward", RANGES)
def test_ranges_of_a_weight_are_uses_of_the_weight(forward, when):
    params = {"w": RNG.normal(size=(4, 12)), "b": RNG.normal(size=12)}
    weights = RNG.normal(size=(5, 12))

    def found(forward):
        def loss_fn(params, x):
            return jnp.sum(jnp.tanh(forward(params["w"], params["b"], x)) * weights)

        layout = af.trace_layout(loss_fn, params, X)
        if when is True:
            return layout, jax.jit(af.value_and_grad(loss_fn, layout))(params, X)
        run = jax.jit(lambda p, x, when: af.value_and_grad(loss_fn, layout, when=when)(p, x))
        nothing = run(params, X, False)[2]
        assert not any(np.any(part) for part in jax.tree.leaves(nothing))
        return layout, run(params, X, True)

    with_bias = forward is of_outputs
    wanted_layout, wanted = found(lambda w, b, x: x @ w + b if with_bias else x @ w)
    assert (wanted_layout.layers[0].bias is not None) == with_bias
    products, of_input, of_output = RANGES[forward]
    h, s, rows, mean = wanted[2][""]
    h, mean = (part * of_input / products for part in (h, mean))
    factor = af.Factor(h, s * of_output / products, rows * products, mean)
    layout, values = found(forward)
    assert layout == wanted_layout
    assert_equal(values, (*wanted[:2], {"": factor}))


def test_inputs_of_ranges_may_differ():
    """As of the queries and of the keys of a cross-attention."""

    def loss_fn(params, x):
        keys = jnp.sum(jnp.cos(2 * x[:2] @ params["w"][:, 3:]))
        return jnp.sum(jnp.sin(x @ params["w"][:, :3])) + keys

    w = RNG.normal(size=(4, 9))
    _, (_, _, factors) = captured(loss_fn, {"w": w}, X)
    (factor,) = factors.values()
    inputs = np.concatenate([X, 2 * X[:2]])
    np.testing.assert_allclose(factor.rows, 7)
    np.testing.assert_allclose(factor.mean[:, 0], np.mean(inputs, 0))
    np.testing.assert_allclose(factor.h[:, 0], np.mean(inputs**2, 0))
    cotangents = [np.cos(X @ w[:, :3]), -np.sin(2 * X[:2] @ w[:, 3:])]
    np.testing.assert_allclose(
        factor.s[0], np.concatenate([np.sum(one**2, 0) for one in cotangents]) / 7
    )


@pytest.mark.parametrize(
    "forward",
    [
        lambda w, b, x: [x @ w[:, :4] + b[:4], x @ w[:, 4:6] + b[6:], x @ w[:, 6:] + b[4:6]],
        lambda w, b, x: [x @ w[:, :4] + b[:4], x @ w[:, 4:]],
        lambda w, b, x: [x @ w[:, :4] + b[4:], x @ w[:, 4:] + b[:4]],
        lambda w, b, x: [x[:, 1:] @ w[1:, 1:3] + b[1:4][1:3]],
    ],
)
def test_a_bias_in_other_ranges_than_its_weight_is_none(forward):
    def loss_fn(params, x):
        return jnp.sum(jnp.sin(jnp.concatenate(forward(params["w"], params["b"], x), 1)))

    layout = af.trace_layout(loss_fn, {"w": RNG.normal(size=(4, 8)), "b": RNG.normal(size=8)}, X)
    assert [row.leaf.path for row in layout.uncovered] == ["b"]


def test_a_bias_of_other_layers_of_the_stack_is_none():
    def loss_fn(params, x):
        p = {"w": params["w"][1:], "b": params["b"][:2]}
        return jnp.sum(scanned(p, x))

    assert [row.leaf.path for row in af.trace_layout(loss_fn, PARAMS, X).uncovered] == ["b"]


def test_a_penalty_on_ranges_is_no_use():
    def loss_fn(params, x):
        w = params["w"]
        y = jnp.concatenate([x @ w[:, :3], x @ w[:, 3:]], 1)
        return jnp.sum(jnp.sin(y)) + jnp.sum((w[:, :3].T @ w) ** 2 + jnp.sum(w[:, :3].T @ w[:, 3:]))

    _, (_, _, factors) = captured(loss_fn, {"w": RNG.normal(size=(4, 6))}, X)
    (factor,) = factors.values()
    np.testing.assert_allclose(factor.rows, 10)
    np.testing.assert_allclose(factor.h[:, 0], np.mean(X**2, 0))


def test_entries_that_are_in_no_range_have_no_part():
    def loss_fn(params, x):
        return jnp.sum(jnp.sin(x[:, :3] @ params["w"][:3]))

    _, (_, _, factors) = captured(loss_fn, {"w": RNG.normal(size=(4, 4))}, X)
    (factor,) = factors.values()
    np.testing.assert_allclose(factor.rows, 5)
    np.testing.assert_allclose(factor.h[:, 0], [*np.mean(X[:, :3] ** 2, 0), 0])


def test_a_range_that_is_used_twice_has_the_rows_of_both():
    def loss_fn(params, x):
        some = params["w"][:, 1:][:, :2]
        return jnp.sum(jnp.sin(x @ some)) + jnp.sum(jnp.sin(3 * x @ params["w"][:, 1:3]))

    w = RNG.normal(size=(4, 8))
    _, (_, _, factors) = captured(loss_fn, {"w": w}, X)
    (factor,) = factors.values()
    np.testing.assert_allclose(factor.rows, 10)
    np.testing.assert_allclose(factor.h[:, 0], np.mean(X**2, 0) * (1 + 9) / 2)
    cotangents = np.concatenate([np.cos(X @ w[:, 1:3]), np.cos(3 * X @ w[:, 1:3])])
    np.testing.assert_allclose(factor.s[0], [0, *np.mean(cotangents**2, 0), *[0] * 5])


def test_lookups_in_ranges_of_a_table():
    ids = np.array([0, 1, 1])

    def loss_fn(params, ids):
        table = params["table"]
        return jnp.sum(jnp.sin(table[:2][ids])) + jnp.sum(jnp.sin(table[2:][ids[:2]]))

    params = {"table": np.ones((8, 3))}
    layout = af.trace_layout(loss_fn, params, ids)
    _, _, factors = af.value_and_grad(loss_fn, layout)(params, ids)
    (factor,) = factors.values()
    np.testing.assert_allclose(factor.rows, 5)
    np.testing.assert_allclose(factor.h[:, 0], np.array([1, 2, 1, 1, 0, 0, 0, 0]) / 5)


def test_one_entry_of_a_strided_slice_is_a_slice():
    def loss_fn(params, x):
        return jnp.sum(jnp.sin(x @ params["w"][1::2][0]))

    (one,) = af.trace_layout(loss_fn, {"w": RNG.normal(size=(3, 4, 4))}, X).layers
    assert one.axes == ("stack0", "in0", "out0")


def test_a_range_has_no_whole_factors():
    loss_fn = lambda params, x: jnp.sum(jnp.sin(x @ params["w"][:, :3]))  # noqa: E731
    params = {"w": RNG.normal(size=(4, 4))}
    layout = af.trace_layout(loss_fn, params, X)
    with pytest.raises(
        ValueError, match=r"the layer '' is used in parts .*leave it out of `paths`"
    ):
        af.diagnostics.full_factors(loss_fn, layout)(params, X)
