"""Which uses of a parameter count as products of it, and which are listed with their reason."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import linear_call
from jax.sharding import AxisType, PartitionSpec

import adafisher_jax as af
from tests.support.every_rule import every_rule

pytestmark = pytest.mark.usefixtures("numpy_rules")

RNG = np.random.default_rng(3)
REARRANGED = "only a part or a rearrangement of it reaches its layer"
SPLIT = "an axis of it is split between inputs, outputs and loops"
COMPUTED = "no layer of a known kind uses it as it is"
TRANSFORMED = "transformed before its layer uses it"
SEVERAL = "used by several layers that differ in their axes"
OWN_RULE = "used inside a function with its own derivative rule"
OF_PARAMETERS = "multiplied by another parameter before any data"
COMPLEX = "complex, for which the factors are not defined"


def real(*shape):
    return RNG.normal(size=shape)


def loss_of(y):
    return jnp.sum(jnp.sin(y) * (1 + jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))) / len(y)


def cotangents(y):
    return jax.grad(loss_of)(y)


def listed(loss_fn, params, *args):
    return {one.leaf.path: one.reason for one in af.trace_layout(loss_fn, params, *args).uncovered}


def captured(loss_fn, params, *args):
    """The layout and factors of a loss, whose gradient is JAX's own."""
    params, args = jax.tree.map(jnp.asarray, (params, args))
    layout = af.trace_layout(loss_fn, params, *args)

    def both(*args):
        return af.value_and_grad(loss_fn, layout)(*args), jax.grad(loss_fn)(*args)

    (_, grads, factors), wanted = jax.jit(both)(params, *args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), grads, wanted
    )
    return layout, factors


def assert_rows(factor, inputs, outputs):
    """Whether a dense factor is that of some rows of inputs and of output cotangents."""
    inputs, outputs = (
        jnp.concatenate([v.reshape(-1, v.shape[-1]) for v in of]) for of in (inputs, outputs)
    )
    assert factor.rows == len(inputs) == len(outputs)
    for found, wanted in (
        (factor.h, inputs**2),
        (factor.s, outputs**2),
        (factor.mean, inputs),
    ):
        np.testing.assert_allclose(found.reshape(-1), wanted.mean(0), rtol=1e-9, atol=1e-12)


X = real(4, 5)
SQUARE = {"w": real(5, 5)}
MAP = {"w": real(5, 3)}


@jax.custom_vjp
def own_vjp(x, w):
    return x @ w


own_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@jax.custom_jvp
def own_jvp(x, w):
    return x @ w


own_jvp.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))

V = jnp.ones(5)
HALF = {
    "a function of it": (lambda w, x: x @ jnp.tanh(w), COMPUTED),
    "every other row": (lambda w, x: x[:, ::2] @ w[::2], REARRANGED),
    "back to front": (lambda w, x: x @ w[::-1], REARRANGED),
    "divided by its norm": (lambda w, x: x @ (w / jnp.linalg.norm(w)), TRANSFORMED),
    "divided by what it makes of data": (
        lambda w, x: x @ (w / jnp.linalg.norm(V @ w)),
        TRANSFORMED,
    ),
    "divided by its largest singular value": (lambda w, x: x @ (w / (V @ w @ V)), TRANSFORMED),
    "transposed": (lambda w, x: x @ w.T, SEVERAL),
    "copies of it": (
        lambda w, x: jnp.matmul(x[None], jnp.broadcast_to(w, (2, *w.shape))),
        "repeated before its layer uses it",
    ),
    "beside another": (lambda w, x: x @ jnp.concatenate([w, w]).reshape(2, 5, 5)[0], COMPUTED),
    "own reverse rule": (lambda w, x: own_vjp(x, w), OWN_RULE),
    "own forward rule": (lambda w, x: own_jvp(x, w), OWN_RULE),
    "complex": (lambda w, x: jnp.abs((x + 1j * x) @ w), COMPLEX),
    "batch groups": (
        lambda w, x: lax.conv_general_dilated(
            jnp.ones((10, 3, 5)),
            w[None],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            batch_group_count=5,
        ),
        "the kernel of a convolution in batch groups",
    ),
}


ALONE = [(name, False) for name, (_, why) in HALF.items() if why != SEVERAL]


@pytest.mark.parametrize(("name", "beside"), [*ALONE, *((name, True) for name in HALF)])
def test_a_use_that_cannot_be_captured_is_never_left_out(name, beside):
    use, why = HALF[name]

    def loss_fn(params, x):
        plain = loss_of(x @ params["w"]) if beside else 0.0
        return plain + loss_of(use(params["w"], x)) + loss_of(x @ params["v"])

    assert listed(loss_fn, SQUARE | {"v": real(5, 2)}, X) == {"w": why}


def by_number(w, x):
    return lax.fori_loop(1, 3, lambda i, h: jnp.tanh(h @ w[i]), jnp.tanh(x @ w[0]))


def by_stride(w, x):
    def step(h, w):
        return jnp.tanh(h @ w), None

    return lax.scan(step, jnp.tanh(x @ w[0]), w[::2])[0]


def over_its_norm(w, x):
    def step(h, _):
        return jnp.tanh(h @ (w[0] / jnp.linalg.norm(w[0]))), None

    return lax.scan(step, jnp.tanh(x @ w[0]), None, 3)[0]


@pytest.mark.parametrize(
    ("run", "why"),
    [(by_number, REARRANGED), (by_stride, REARRANGED), (over_its_norm, TRANSFORMED)],
)
def test_a_use_of_what_the_same_weight_made_is_never_left_out(run, why):
    """A loop carries the output of a product with the weight alone."""
    loss_fn = lambda params, x: loss_of(run(params["w"], x)) + loss_of(x @ params["v"])  # noqa: E731
    assert listed(loss_fn, {"v": real(5, 2), "w": real(3, 5, 5)}, X) == {"w": why}


def test_uses_on_one_line_count_with_a_bias_and_without():
    def states(params, x, zeros):
        h = None
        for i in range(3):
            y = (1 + i) * x @ params["w"] + zeros[i]
            y = y if h is None else y + h / 2
            h = jnp.sin(y + params["b"])
            yield h

    params, zeros = MAP | {"b": real(3)}, jnp.zeros((3, 4, 3))
    total = lambda *args: sum(map(loss_of, states(*args)))  # noqa: E731
    layout, factors = captured(lambda params, x: total(params, x, (0, 0, 0)), params, X)
    assert layout.layers[0].bias is None  # it is added to other sums too
    found = jax.grad(total, 2)(params, X, zeros)
    (factor,) = factors.values()
    assert_rows(factor, [X, 2 * X, 3 * X], [*found])


def test_uses_in_a_function_that_is_traced_once_count_with_a_bias_and_without():
    multiply = jax.jit(lambda x, w: x @ w)

    def loss_fn(params, x):
        first = multiply(x, params["w"]) + params["b"]
        return loss_of(first) + loss_of(jnp.sin(multiply(2 * x, params["w"])))

    params = MAP | {"b": real(3)}
    _, factors = captured(loss_fn, params, X)
    y = 2 * X @ params["w"]
    found = cotangents(X @ params["w"] + params["b"]), cotangents(jnp.sin(y)) * jnp.cos(y)
    (factor,) = factors.values()
    assert_rows(factor, [X, 2 * X], found)


def test_a_layer_that_is_computed_again_for_a_gradient_inside_the_loss_is_listed():
    """Whatever other uses it has, its rows would be incomplete."""

    def loss_fn(params, x):
        layer = jax.checkpoint(lambda x: jnp.tanh(x @ params["w"]))
        slope = jax.grad(lambda x: jnp.sum(layer(x)))(x)
        return loss_of(slope) + loss_of(layer(2 * x)) + loss_of(x @ params["v"])

    reason = "computed again by jax.checkpoint for a gradient inside the loss"
    assert listed(loss_fn, SQUARE | {"v": real(5, 2)}, X) == {"w": reason}


REGULAR = {
    "squares": lambda w: jnp.sum(w**2),
    "orthogonality": lambda w: jnp.sum((w.T @ w - jnp.eye(5)) ** 2),
    "of a function": lambda w: jnp.sum((jnp.tanh(w).T @ jnp.tanh(w)) ** 2),
    "singular values": lambda w: jnp.sum(jnp.linalg.svd(w, compute_uv=False)),
    "a determinant": lambda w: jnp.linalg.slogdet(w)[1],
    "a diagonal": lambda w: jnp.sum(jnp.diagonal(w) ** 2),
    "the diagonal of a product": lambda w: jnp.sum(jnp.diagonal(w @ w.T)),
    "norms of some columns": lambda w: jnp.sum(jnp.linalg.norm(w, axis=0)[jnp.array([0, 2])]),
}


@pytest.mark.parametrize("name", REGULAR)
def test_a_penalty_on_a_weight_is_no_use_of_it(name):
    def loss_fn(params, x):
        return loss_of(x @ params["w"]) + REGULAR[name](params["w"])

    layout, factors = captured(loss_fn, SQUARE, X)
    assert layout.covered == 1
    assert_rows(factors[""], [X], [cotangents(X @ SQUARE["w"])])


def test_products_of_parameters_alone_are_listed():
    params = {"a": real(5, 2), "b": real(2, 3), "v": real(5, 2)}

    def loss_fn(params, x):
        return loss_of(x @ (params["a"] @ params["b"])) + loss_of(x @ params["v"])

    assert listed(loss_fn, params, X).keys() == {"a", "b"}

    def two_layers(params, x):
        return loss_of((x @ params["a"]) @ params["b"]) + loss_of(x @ params["v"])

    layout, factors = captured(two_layers, params, X)
    assert layout.covered == 1
    g = cotangents(X @ params["a"] @ params["b"])
    assert_rows(factors["b"], [X @ params["a"]], [g])
    assert_rows(factors["a"], [X], [g @ params["b"].T])


def test_an_axis_of_inputs_and_outputs_is_listed():
    params = {"w": real(15), "v": real(5, 2)}

    def loss_fn(params, x):
        return loss_of(x @ params["w"].reshape(5, 3)) + loss_of(x @ params["v"])

    assert listed(loss_fn, params, X) == {
        "w": "an axis of it is split between inputs, outputs and loops"
    }


def test_weights_made_one_are_listed():
    params = {"q": real(5, 2), "k": real(5, 2)}

    def loss_fn(params, x):
        return loss_of(x @ jnp.concatenate([params["q"], params["k"]], 1))

    assert listed(loss_fn, params, X) == {"q": COMPUTED, "k": COMPUTED}


@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_added_to_data_is_data_whatever_the_batch_is(batch):
    params = {"positions": real(1, 4, 5), "scale": real(5), "w": real(5, 3)}
    x = real(batch, 4, 5)

    def inputs(params, x):
        return (x + params["positions"]) * params["scale"]

    def loss_fn(params, x):
        return loss_of(inputs(params, x) @ params["w"])

    layout, factors = captured(loss_fn, params, x)
    assert [layer.leaves[0].path for layer in layout.layers] == ["w"]
    rows = inputs(params, x)
    assert_rows(factors[""], [rows], [cotangents(rows @ params["w"])])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_masked_kernel_is_a_weight_whatever_the_batch_is(batch):
    mask = np.arange(9).reshape(3, 3)[..., None, None] % 2

    def loss_fn(params, x):
        kernel, numbers = params["kernel"] * mask, ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x + params["positions"], kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
        return loss_of(y)

    params = {"kernel": real(3, 3, 2, 3), "positions": real(4, 4, 2)}
    assert listed(loss_fn, params, real(batch, 4, 4, 2)) == {"positions": COMPUTED}


def test_several_uses_add_their_rows():
    params = MAP | {"b": real(3)}

    def loss_fn(params, x):
        return loss_of(x @ params["w"] + params["b"]) + loss_of(jnp.cos(x) @ params["w"])

    layout, factors = captured(loss_fn, params, X)
    assert layout.covered == 1
    rows = [X, jnp.cos(X)]
    found = [cotangents(X @ params["w"] + params["b"]), cotangents(jnp.cos(X) @ params["w"])]
    assert_rows(factors[""], rows, found)


def test_a_product_by_hand_beside_a_flax_layer_is_one_more_use():
    dense = nn.Dense(3, param_dtype=jnp.float64)
    params = dense.init(jax.random.key(0), X)["params"]

    def loss_fn(params, x):
        y = dense.apply({"params": params}, x)
        return loss_of(y) + loss_of(jnp.cos(x) @ params["kernel"] + params["bias"])

    layout, factors = captured(loss_fn, params, X)
    assert layout.covered == 1
    rows = [X, jnp.cos(X)]
    assert_rows(
        factors[""], rows, [cotangents(v @ params["kernel"] + params["bias"]) for v in rows]
    )

    def the_other_way(params, x):
        y = dense.apply({"params": params}, x)
        return loss_of(y) + loss_of(y @ params["kernel"].T) + loss_of(x @ jnp.ones((5, 2)))

    assert listed(the_other_way, params, X) == {"kernel": SEVERAL, "bias": SEVERAL}


def test_what_a_norm_scales_is_data_for_what_multiplies_it():
    norm = nn.LayerNorm(param_dtype=jnp.float64)
    params = {"norm": norm.init(jax.random.key(0), X)["params"], "w": real(5, 3)}
    x = real(1, 4, 5)

    def loss_fn(params, x):
        y = norm.apply({"params": params["norm"]}, x)
        scores = jnp.einsum("bti,bsi->bts", y.reshape(1, 4, 5) * 2, jnp.tanh(y))
        return loss_of(scores) + loss_of(y @ params["w"]) + loss_of(y[:1, :1] @ jnp.ones((5, 2)))

    layout, _ = captured(loss_fn, params, x)
    assert layout.covered == 1


def test_a_table_that_is_looked_up_and_multiplied_by_the_other_way():
    table, ids = jnp.asarray(real(7, 3)), jnp.array([[1, 2], [6, 2]])

    def loss_fn(params, ids, sign):
        h = jnp.tanh(params["table"][ids])
        logits = loss_of(h @ params["table"].T)
        return logits + sign * loss_of(jnp.ones((2, 7)) @ params["table"])

    assert listed(lambda p, i: loss_fn(p, i, 1.0), {"table": table}, ids) == {"table": SEVERAL}


def test_a_gradient_inside_the_loss():
    def network(w, x):
        return jnp.sum(jnp.sin(x @ w))

    def loss_fn(params, x):
        slope = jax.vmap(jax.grad(network, 1), (None, 0))(params["w"], x)
        return jnp.sum(slope**2) + loss_of(x @ params["w"])

    layout, factors = captured(loss_fn, MAP, X)
    assert layout.covered == 1

    def of_outputs(y, z):
        slope = jnp.cos(y) @ MAP["w"].T
        return jnp.sum(slope**2) + loss_of(z)

    y = X @ MAP["w"]
    assert_rows(factors[""], [X, X], list(jax.grad(of_outputs, (0, 1))(y, y)))


def test_a_step_inside_the_loss():
    """The inner and the outer product are rows of one weight."""

    def loss_fn(params, x):
        inner = jax.grad(lambda p: loss_of(x @ p["w"]))(params)
        outer = jax.tree.map(lambda p, g: p - 0.1 * g, params, inner)
        return loss_of(jnp.cos(x) @ outer["w"])

    layout, factors = captured(loss_fn, MAP, X)
    assert layout.covered == 1

    def of_outputs(y, z):
        step = MAP["w"] - 0.1 * X.T @ cotangents(X @ MAP["w"] + y)
        return loss_of(jnp.cos(X) @ step + z)

    zeros = jnp.zeros((4, 3))
    assert_rows(factors[""], [X, jnp.cos(X)], list(jax.grad(of_outputs, (0, 1))(zeros, zeros)))


def test_directional_derivatives_are_rows():
    direction = real(4, 5)

    def loss_fn(params, x):
        y, dy = jax.jvp(lambda x: jnp.sin(x @ params["w"]), (x,), (direction,))
        return loss_of(y) + loss_of(dy)

    _, factors = captured(loss_fn, MAP, X)

    def of_outputs(y, dy):
        return loss_of(jnp.sin(y)) + loss_of(jnp.cos(y) * dy)

    found = jax.grad(of_outputs, (0, 1))(X @ MAP["w"], direction @ MAP["w"])
    assert_rows(factors[""], [X, direction], list(found))


def test_tangents_are_no_rows_of_a_layer_with_a_bias():
    """They have none, so their inputs have no part in the mean by which inputs are centered."""
    direction, params = real(4, 5), MAP | {"b": real(3)}

    def loss_fn(params, x):
        y, dy = jax.jvp(lambda x: jnp.sin(x @ params["w"] + params["b"]), (x,), (direction,))
        return loss_of(y) + loss_of(dy)

    layout, factors = captured(loss_fn, params, X)
    assert layout.covered == 1

    def of_output(y):
        return loss_of(jnp.sin(y)) + loss_of(jnp.cos(y) * (direction @ params["w"]))

    found = jax.grad(of_output)(X @ params["w"] + params["b"])
    assert_rows(factors[""], [X], [found])


def test_a_derivative_around_products_takes_none_of_their_rows():
    """The second product has no bias, and is no tangent."""
    params = SQUARE | {"b": real(5)}

    def loss_of_two(params, x):
        hidden = jnp.tanh(x @ params["w"] + params["b"])
        return loss_of(hidden @ params["w"])

    def derived(params, x):
        return jax.value_and_grad(loss_of_two)(params, x)[0]

    for loss_fn in (loss_of_two, derived):
        layout, factors = captured(loss_fn, params, X)
        assert layout.covered == 1
        assert factors[""].rows == 8


def test_what_is_frozen_counts_only_where_nothing_is_live():
    def frozen(params, x):
        return loss_of(jnp.cos(x) @ lax.stop_gradient(params["w"]) + x @ params["v"])

    params = MAP | {"v": real(5, 3)}
    layout, factors = captured(frozen, params, X)
    assert layout.covered == 1
    assert factors["w"].rows == 4

    def teacher(params, x):
        return loss_of(jnp.cos(x) @ lax.stop_gradient(params["w"]) + x @ params["w"])

    _, factors = captured(teacher, MAP, X)
    assert_rows(factors[""], [X], [cotangents(jnp.cos(X) @ MAP["w"] + X @ MAP["w"])])


def test_what_has_no_part_in_the_loss_is_listed():
    def loss_fn(params, x):
        return loss_of(x @ params["w"]), x @ params["v"]

    layout = af.trace_layout(loss_fn, MAP | {"v": real(5, 2)}, X, has_aux=True)
    assert [one.leaf.path for one in layout.uncovered] == ["v"]


def test_a_loop_without_end_takes_no_part():
    params = {"w": real(5, 5), "v": real(5, 3)}

    def loss_fn(params, x):
        w = lax.stop_gradient(params["w"])

        def step(c):
            return (c[0] + 1, jnp.tanh(c[1] @ w))

        return loss_of(lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1] @ params["v"])

    _, factors = captured(loss_fn, params, X)
    assert factors[""].rows == 4


@jax.custom_vjp
def with_loss_beside(y, aux):
    """Hands `y` on, and gives a loss that is not added a gradient."""
    return y


with_loss_beside.defvjp(lambda y, aux: (y, None), lambda _, g: (g, jnp.ones(())))


@jax.custom_vjp
def through_integers(w):
    return (w * 8).astype(jnp.int8).astype(w.dtype) / 8


through_integers.defvjp(lambda w: (through_integers(w), None), lambda _, g: (g,))


def test_a_rule_of_its_own_may_hand_a_gradient_anywhere():
    def beside(params, x):
        aux = loss_of(jnp.cos(x) @ params["w"])
        return loss_of(with_loss_beside(jnp.tanh(x @ params["w"]), aux))

    layout, factors = captured(beside, MAP, X)
    assert layout.covered == 1
    assert factors[""].rows == 8

    def rounded(params, x):
        y = linear_call(lambda _, v: jnp.round(v), lambda _, c: c, (), x @ params["w"])
        return loss_of(x[:, :3] * y)

    _, factors = captured(rounded, MAP, X)
    assert factors[""].rows == 4


def test_a_weight_that_is_quantized_by_a_rule_of_its_own_is_listed():
    def loss_fn(params, x):
        both = loss_of(x @ through_integers(params["w"])) + loss_of(x @ params["w"])
        return both + loss_of(x @ params["v"])

    assert listed(loss_fn, MAP | {"v": real(5, 3)}, X) == {"w": COMPUTED}


def test_a_bias_that_is_also_a_weight_is_a_layer_of_its_own():
    params = {"w": real(5, 5), "b": real(5)}

    def loss_fn(params, x):
        return loss_of(jnp.tanh(x @ params["w"] + params["b"])) + loss_of(x @ params["b"])

    layout, factors = captured(loss_fn, params, X)
    assert {layer.path: layer.bias for layer in layout.layers} == {"w": None, "b": None}
    tx = af.scale_by_adafisher(layout, rule="centered")
    params = jax.tree.map(jnp.asarray, params)
    tx.update(params, tx.init(params), factors=factors)


BIASES = {
    "of two weights": lambda p, x: loss_of(x @ p["w"] + p["b"]) + loss_of(x @ p["v"] + p["b"]),
    "of one use of two": lambda p, x: (
        loss_of(x @ p["w"] + p["b"]) + loss_of(jnp.cos(x) @ p["w"] + p["c"]) + loss_of(x @ p["v"])
    ),
}


@pytest.mark.parametrize("case", BIASES)
def test_a_bias_that_is_not_of_one_weight_alone_is_listed(case):
    """The weights are layers without one."""
    params = {"w": real(5, 3), "v": real(5, 3), "b": real(3), "c": real(3)}
    layout, factors = captured(BIASES[case], params, X)
    assert {layer.path: layer.bias for layer in layout.layers} == {"w": None, "v": None}
    assert factors["v"].rows == 4
    assert factors["w"].rows == (4 if case == "of two weights" else 8)
    assert "bias of several layers" in {row.leaf.path: row.reason for row in layout.uncovered}["b"]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_in_a_shard_map(kind):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(kind,))
    params = MAP | {"b": real(3)}
    rows = PartitionSpec("d")

    def loss_fn(params, x):
        x = (
            jax.reshard(x, jax.sharding.NamedSharding(mesh, rows))
            if kind is AxisType.Explicit
            else x
        )
        run = functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows
        )
        return loss_of(run(lambda p, x: x @ p["w"] + p["b"])(params, x))

    with jax.set_mesh(mesh):
        layout, factors = captured(loss_fn, params, X)
    assert layout.covered == 1
    assert_rows(factors[""], [X], [cotangents(X @ params["w"] + params["b"])])


def test_a_part_of_a_parameter_on_each_device_is_listed():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    whole = PartitionSpec()

    def loss_fn(params, x):
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(PartitionSpec("d"), whole),
            out_specs=PartitionSpec("d"),
        )
        def run(w, x):
            return w @ x

        return loss_of(run(params["w"], x.T)) + loss_of(x @ params["v"])

    found = listed(loss_fn, {"w": real(3, 5), "v": real(5, 2)}, X)
    assert found == {"w": "only a device's part of it reaches its layer"}


def test_on_an_explicit_mesh():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))
    params = {"w": real(5, 2, 4), "u": real(8, 3), "t": real(7, 5)}

    def loss_fn(params, i):
        x = params["t"].at[i].get(out_sharding=PartitionSpec("d"))
        x = jnp.tanh(jnp.einsum("bi,inh->bnh", x, params["w"])).reshape(4, 8)
        return loss_of(x @ params["u"].reshape(8, 3))

    with jax.set_mesh(mesh):
        ids = jax.device_put(jnp.array([1, 2, 2, 6]), jax.NamedSharding(mesh, PartitionSpec("d")))
        layout, _ = captured(loss_fn, params, ids)
    assert layout.covered == 1


def convolved(x, w):
    return lax.conv_general_dilated(
        x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0]


def half(p, x):
    return (x.astype(jnp.bfloat16) @ p["half"]).astype(x.dtype) + x @ p["w"]


EDGES = {
    "no inputs": ("no_in", lambda p, x: x[:, :0] @ p["no_in"] + x @ p["w"]),
    "no outputs": ("no_out", lambda p, x: jnp.concatenate([x @ p["no_out"], x @ p["w"]], 1)),
    "no rows": ("", lambda p, x: jnp.concatenate([x[:0] @ p["w"], x @ p["w"]])),
    "a vector": ("vector", lambda p, x: (x @ p["vector"])[:, None] + x @ p["w"]),
    "outputs alone": ("outs", lambda p, x: jnp.einsum("b,o->bo", x[:, 0], p["outs"]) + x @ p["w"]),
    "one weight for each": (
        "vector",
        lambda p, x: jnp.sin(jnp.einsum("bi,i->bi", x, p["vector"])) @ p["w"],
    ),
    "numbers of a table": (
        "vector",
        lambda p, x: p["vector"][jnp.array([1, 2, 2, 0])][:, None] + x @ p["w"],
    ),
    "bias kept with ones": ("bias", lambda p, x: x @ p["w"] + p["bias"]),
    "an axis of size one": ("one", lambda p, x: x @ p["one"][0] + x @ p["w"]),
    "half precision": ("half", half),
    "several kernels": (
        "kernels",
        lambda p, x: jax.vmap(convolved, (None, 0))(x, p["kernels"]).sum(0) + x @ p["w"],
    ),
    "several kernels, inputs each": (
        "kernels",
        lambda p, x: jax.vmap(convolved)(jnp.stack([x, 2 * x]), p["kernels"]).sum(0) + x @ p["w"],
    ),
}
PARAMETERS = {
    "no_in": real(0, 3),
    "no_out": real(5, 0),
    "vector": real(5),
    "outs": real(3),
    "bias": real(1, 3),
    "one": real(1, 5, 3),
    "half": real(5, 3).astype(jnp.bfloat16),
    "kernels": real(2, 3, 5, 3),
    "w": real(5, 3),
}


@every_rule
@pytest.mark.parametrize("name", EDGES)
def test_every_rule_steps_every_form(name, rule):
    uses, forward = EDGES[name]

    def loss_fn(params, x):
        return loss_of(forward(params, x))

    params = {path: jnp.asarray(PARAMETERS[path]) for path in (*uses.split(), "w")}
    layout, factors = captured(loss_fn, params, X)
    assert layout.covered == 1
    grads = jax.grad(loss_fn)(params, X)
    tx = af.adafisher(1e-2, layout, rule=rule)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params, factors=factors)
    for path, update in updates.items():
        assert update.shape == params[path].shape
        assert jnp.all(jnp.isfinite(update))
        assert jnp.any(update != 0) or not update.size


def test_statistics_that_are_not_due_and_micro_batches():
    params = {"w": real(5, 2, 4), "b": real(2, 4), "u": real(8, 3), "k": real(3, 2, 3)}

    def loss_fn(params, x):
        y = jnp.tanh(x @ params["w"].reshape(5, 8) + params["b"].reshape(8)) @ params["u"]
        return loss_of(
            lax.conv_general_dilated(
                y[None], params["k"], (1,), "SAME", dimension_numbers=("NWC", "WOI", "NWC")
            )[0]
        )

    layout, factors = captured(loss_fn, params, X)
    assert layout.covered == 1

    @jax.jit
    def found(due):
        return af.value_and_grad(loss_fn, layout, when=due)(params, X)[2]

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found(True), factors)
    assert not any(jnp.any(part) for part in jax.tree.leaves(found(False)))
    _, _, alike = af.accumulate(af.value_and_grad(loss_fn, layout), layout)(
        params, jnp.stack([X, X])
    )
    for path, factor in alike.items():
        np.testing.assert_allclose(factor.h, factors[path].h, rtol=1e-10)
        np.testing.assert_allclose(factor.s, factors[path].s / 4, rtol=1e-10)
        assert factor.rows == 2 * factors[path].rows


WHOLE = {
    "merged": lambda p, x: x @ p["w"].reshape(5, 8),
    "transposed": lambda p, x: jnp.einsum("bi,inh->bnh", x, p["w"]).reshape(len(x), 8),
}
NOT_WHOLE = {
    "split": lambda p, x: jnp.einsum("bi,inh->bnh", x, p["flat"].reshape(5, 2, 4)),
    "stack of kernels": lambda p, x: jax.vmap(convolved)(jnp.stack([x, x]), p["kernels"]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_factors_have_the_diagonals(name):
    params = {"w": jnp.asarray(real(5, 2, 4))}

    def loss_fn(params, x):
        return loss_of(WHOLE[name](params, x))

    layout, factors = captured(loss_fn, params, X)
    found = jax.jit(af.diagnostics.full_factors(loss_fn, layout))(params, X)[""]
    np.testing.assert_allclose(jnp.diagonal(found.h), factors[""].h.reshape(-1), rtol=1e-10)
    np.testing.assert_allclose(jnp.diagonal(found.s), factors[""].s.reshape(-1), rtol=1e-10)


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_whole_factors_that_are_not_defined_are_refused(name):
    params = {"flat": jnp.asarray(real(5, 8)), "kernels": jnp.asarray(real(2, 3, 5, 3))}
    params = {k: v for k, v in params.items() if (k == "flat") == (name == "split")}

    def loss_fn(params, x):
        return loss_of(NOT_WHOLE[name](params, x))

    layout, _ = captured(loss_fn, params, X)
    assert layout.covered == 1
    with pytest.raises(ValueError, match="leave its layer out of `paths`"):
        af.diagnostics.full_factors(loss_fn, layout)(params, X)


def spectral(w, x):
    frozen = lax.stop_gradient(w)
    return x @ (w / jnp.linalg.norm(jnp.ones(5) @ frozen @ frozen.T))


NO_GRADIENT = {
    "by a frozen transpose": lambda w, x: x @ lax.stop_gradient(w).T,
    "a frozen output": lambda w, x: lax.stop_gradient(x @ w.T),
    "a part, frozen after": lambda w, x: lax.stop_gradient(x @ w[:, :2]),
    "the largest of a part": lambda w, x: jnp.argmax(x @ w[:, :2], -1),
    "how many of a part are positive": lambda w, x: (x @ w[:, :2] > 0).sum(-1),
    "looked up without end": lambda w, x: lax.while_loop(
        lambda i: i < 3, lambda i: i + 1 + jnp.argmax(w[i % 2] @ w.T), 0
    ),
    "looked up, frozen after": lambda w, x: lax.stop_gradient(w[jnp.array([1, 3])]),
    "looked up, frozen before": lambda w, x: lax.stop_gradient(w)[jnp.array([1, 3])],
}


@pytest.mark.parametrize("case", NO_GRADIENT)
def test_a_use_without_gradient_does_not_count(case):
    def loss_fn(params, x):
        beside = NO_GRADIENT[case](params["w"], x)
        return loss_of(x @ params["w"]) + 1e-9 * jnp.sum(beside)

    layout, factors = captured(loss_fn, SQUARE, X)
    assert layout.covered == 1
    assert_rows(factors[""], [X], [cotangents(X @ SQUARE["w"])])


def test_a_weight_over_its_frozen_norm():
    layout, factors = captured(lambda p, x: loss_of(spectral(p["w"], x)), SQUARE, X)
    assert layout.covered == 1
    assert_rows(factors[""], [X], [cotangents(spectral(SQUARE["w"], X))])


def test_a_gradient_alone_is_described_by_its_own_product():
    """The derivative of a rectifier depends on its input by a comparison."""
    v = real(5, 3)

    def loss_fn(params, x):
        def energy(x):
            return jnp.sum(jnp.maximum(x @ params["w"], 0) @ jnp.ones(3))

        return loss_of(jax.grad(energy)(x))

    params = {"w": v}
    layout, factors = captured(loss_fn, params, X)
    assert layout.covered == 1
    gate = (X @ v > 0).astype(float)
    found, outputs = factors[""], cotangents(gate @ v.T)
    assert found.rows == 4
    np.testing.assert_allclose(found.h.ravel(), (gate**2).mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.s.ravel(), (outputs**2).mean(0), rtol=1e-9)


LOOKED_UP = {
    "a layer by its number": lambda w, x: lax.scan(
        lambda c, i: (jnp.tanh(c @ jnp.take(w, i, axis=0)), None), x, jnp.arange(2)
    )[0],
    "an expert for each row": lambda w, x: jax.vmap(lambda x, i: x @ w[i])(
        x, jnp.arange(len(x)) % 2
    ),
    "the same, as one product": lambda w, x: jnp.einsum("bi,bio->bo", x, w[jnp.arange(4) % 2]),
}


@pytest.mark.parametrize("case", LOOKED_UP)
def test_matrices_that_are_looked_up_are_no_embedding(case):
    def loss_fn(params, x):
        return loss_of(LOOKED_UP[case](params["w"], x)) + loss_of(x @ params["v"])

    assert listed(loss_fn, {"w": real(2, 5, 5)} | {"v": real(5, 2)}, X) == {"w": REARRANGED}


OF_ROWS = {
    "alone": lambda p, rows: jnp.sin(rows),
    "inputs of a layer": lambda p, rows: rows.reshape(4, 6) @ p["w"],
}


@pytest.mark.parametrize("case", OF_ROWS)
def test_a_table_of_matrices_whose_rows_are_data_is_an_embedding(case):
    params, ids = {"t": real(7, 3, 2), "w": real(6, 2)}, jnp.array([1, 2, 6, 2])
    layout, factors = captured(lambda p, ids: loss_of(OF_ROWS[case](p, p["t"][ids])), params, ids)
    kinds = {layer.weight.path: layer.kind for layer in layout.layers}
    assert kinds["t"] == "embedding"
    factor = factors["t"] if "w" in kinds else factors[""]
    np.testing.assert_allclose(factor.h.ravel(), np.bincount(ids, minlength=7) / 4)


@pytest.mark.parametrize("narrow", ["float8_e4m3fn", "int4", "bool"])
def test_data_of_a_narrow_type(narrow):
    x = jnp.asarray(X > 0, narrow)

    def loss_fn(params, x):
        y = lax.dot_general(x, params["w"], (((1,), (0,)), ((), ())), preferred_element_type=float)
        return loss_of(y)

    params = {"w": jnp.asarray(MAP["w"])}
    layout = af.trace_layout(loss_fn, params, x)
    _, _, factors = af.value_and_grad(loss_fn, layout)(params, x)
    np.testing.assert_allclose(factors[""].h.ravel(), np.mean(X > 0, 0), rtol=1e-6)


@pytest.mark.parametrize("how", [lambda gate, b: jnp.where(gate, b, 0.0), lambda gate, b: gate * b])
def test_what_is_added_to_some_rows_is_no_bias(how):
    params = MAP | {"b": real(3)}
    reasons = listed(lambda p, x: loss_of(x @ p["w"] + how(x[:, :1] > 0, p["b"])), params, X)
    assert reasons.keys() == {"b"}
