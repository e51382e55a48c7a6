"""Products whose operands both come from parameters, or hold copies of one: what is the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adafisher_jax as af
from tests.support.by_definition import check_twin
from tests.support.losses import size

pytestmark = pytest.mark.usefixtures("numpy_rules")

RNG = np.random.default_rng(5)
BY_ELEMENT = "combined by element with data along axes that it does not have"
OF_PARAMETERS = "multiplied by another parameter before any data"


def real(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def listed(loss_fn, params, *data):
    return {one.leaf.path: one.reason for one in af.trace_layout(loss_fn, params, *data).uncovered}


def test_copies_with_noise_of_their_own_have_the_rows_of_all():
    params = {"w": real(3, 2)}
    x, noise = real(4, 3), real(4, 3, 2)

    def loss_fn(params, x, noise):
        noisy = jax.vmap(lambda row, noise: row @ (params["w"] + noise))(x, noise)
        return size(jnp.sin(x @ params["w"])) + size(jnp.sin(noisy))

    def twin(product):
        noisy = jnp.stack([row @ (params["w"] + one) for row, one in zip(x, noise, strict=True)])
        plain = product("", x, x @ params["w"])
        return size(jnp.sin(plain)) + size(jnp.sin(product("", x, noisy)))

    check_twin(loss_fn, params, twin, x, noise)


def test_steps_of_each_task_inside_a_loss():
    """Model-agnostic meta-learning (arXiv:1703.03400), tasks mapped."""
    params, x = {"w": real(3, 2), "b": real(2)}, real(2, 4, 3)

    def error(params, x):
        return jnp.sum(jnp.sin(x @ params["w"] + params["b"]))

    def loss_fn(params, x):
        def task(x):
            moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(error)(params, x))
            return error(moved, jnp.cos(x))

        return jnp.sum(jax.vmap(task)(x))

    layout = af.trace_layout(loss_fn, params, x)
    assert layout.covered == 1
    _, _, factors = af.value_and_grad(loss_fn, layout)(params, x)
    of_mapped = factors[""]

    def in_turn(params, x):
        return sum(loss_fn(params, one[None]) for one in x)

    _, _, factors = af.value_and_grad(in_turn, af.trace_layout(in_turn, params, x))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), of_mapped, factors[""])
    assert of_mapped.rows == 16


def masked_by_row(params, x):
    mask = jnp.arange(24.0).reshape(4, 3, 2) % 2
    return size(jax.vmap(lambda row, mask: row @ (params["w"] * mask))(x, mask))


BESIDE_DATA = {
    "a mask for each row": (masked_by_row, "w"),
    "subtracted before constants": (lambda p, x: size((x - p["v"]) @ jnp.ones((3, 2))), "v"),
    "a scale before constants": (lambda p, x: size((x * p["v"]) @ jnp.ones((3, 2))), "v"),
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", BESIDE_DATA)
def test_what_acts_by_element_is_listed_whatever_the_batch_is(name, rows):
    loss, path = BESIDE_DATA[name]
    params, x = {"v": real(3), "w": real(3, 2)}, real(4, 3)[: 4 if "each row" in name else rows]

    def loss_fn(params, x):  # another use of the weight does not make up for it
        return loss(params, x) + size(x @ params["w"]) + size(x * params["v"])

    assert listed(loss_fn, params, x)[path] == BY_ELEMENT


def test_learned_inputs_are_inputs_of_what_multiplies_data_too():
    """Prototypes pass through the encoder of the data."""
    params, x = {"first": real(3, 2), "last": real(2, 2), "points": real(5, 3)}, real(4, 3)

    def encoded(params, x, product=lambda path, x, y: y):
        hidden = jnp.tanh(product("first", x, x @ params["first"]))
        return product("last", hidden, hidden @ params["last"])

    def compared(a, b):
        return jnp.sum(jnp.sin(jnp.sum(jnp.square(a[:, None] - b), -1)))

    def loss_fn(params, x):
        return compared(encoded(params, x), encoded(params, params["points"]))

    def twin(product):
        both = (encoded(params, one, product) for one in (x, params["points"]))
        return compared(*both)

    check_twin(loss_fn, params, twin, x, uncovered=["points"])
    assert listed(loss_fn, params, x) == {"points": OF_PARAMETERS}


def test_learned_inputs_compared_by_products():
    """The weight's other products, and its bias, are those of the data."""
    params, x = {"w": real(3, 2), "b": real(2), "points": real(5, 3)}, real(4, 3)

    def loss_of(product):
        def encoded(x):
            return jnp.tanh(product("", x, x @ params["w"]) + params["b"])

        return size(jnp.sin(encoded(x) @ encoded(params["points"]).T))

    def loss_fn(params, x):
        def encoded(x):
            return jnp.tanh(x @ params["w"] + params["b"])

        return size(jnp.sin(encoded(x) @ encoded(params["points"]).T))

    check_twin(loss_fn, params, loss_of, x, uncovered=["points"])


def test_a_penalty_through_learned_inputs_of_another_form_is_no_use():
    params, x = {"w": real(3, 2), "v": real(2)}, real(4, 3)

    def loss_fn(params, x):
        return size(jnp.sin(x @ params["w"])) + size(jnp.sin(params["w"] @ params["v"]))

    assert listed(loss_fn, params, x) == {"v": OF_PARAMETERS}
    layout = af.trace_layout(loss_fn, params, x)
    assert af.value_and_grad(loss_fn, layout)(params, x)[2][""].rows == 4


def test_learned_inputs_alone_where_the_product_with_data_is_dropped():
    params, x = {"w": real(3, 2), "points": real(5, 3)}, real(4, 3)

    def loss_fn(params, x):
        _ = x @ params["w"]
        return size(jnp.sin(params["points"] @ params["w"]))

    layout = af.trace_layout(loss_fn, params, x)
    assert [layer.weight.path for layer in layout.layers] == ["w"]
    assert af.value_and_grad(loss_fn, layout)(params, x)[2][""].rows == 5


MASKS = {
    "reshaped before": lambda w, mask: jnp.squeeze(w[None] * mask, 0),
    "reshaped after": lambda w, mask: w * mask[None].squeeze(0),
    "rectified": lambda w, mask: jax.nn.relu(w) * mask,
}


@pytest.mark.parametrize("name", MASKS)
def test_a_masked_weight_keeps_its_bias(name):
    params, x = {"w": real(3, 2), "b": real(2)}, real(4, 3)
    mask = jnp.arange(6.0).reshape(3, 2) % 2

    def loss_fn(params, x):
        return size(jnp.sin(x @ MASKS[name](params["w"], mask) + params["b"]))

    assert af.trace_layout(loss_fn, params, x).covered == 1


LOW_RANK = {
    "as it is": lambda a, b: jnp.eye(3, 2) + a @ b,
    "one scaled": lambda a, b: jnp.eye(3, 2) + (2 * a) @ b,
    "one scaled by an array": lambda a, b: jnp.eye(3, 2) + (a / jnp.sqrt(jnp.float64(2))) @ b,
    "scaled after": lambda a, b: 2 * (a @ b),
}


@pytest.mark.parametrize("name", LOW_RANK)
def test_factors_of_a_weight_are_listed(name):
    params, x = {"a": real(3, 1), "b": real(1, 2)}, real(4, 3)

    def loss_fn(params, x):
        return size(jnp.sin(x @ LOW_RANK[name](**params)))

    assert listed(loss_fn, params, x) == dict.fromkeys("ab", OF_PARAMETERS)


def test_a_bias_with_another_use_is_listed_alone():
    params, x = {"w": real(3, 2), "b": real(2)}, real(4, 3)

    def loss_fn(params, x):
        shift = jnp.tanh(params["b"]) @ jnp.ones((2, 5))
        return size(jnp.sin(x @ params["w"] + params["b"])) + size(jnp.sin(shift))

    layout = af.trace_layout(loss_fn, params, x)
    assert [layer.leaves for layer in layout.layers] == [(af.Leaf("w", (3, 2), ("in0", "out0")),)]
    assert [row.leaf.path for row in layout.uncovered] == ["b"]


def test_a_bias_of_a_weight_in_other_units_is_none():
    """Its input would be one where that of the weight is multiplied by a number."""
    params, x = {"w": real(3, 2), "b": real(2)}, real(4, 3)
    layout = af.trace_layout(
        lambda params, x: size(x @ (0.1 * params["w"]) + params["b"]), params, x
    )
    assert [row.leaf.path for row in layout.uncovered] == ["b"]


def test_layers_of_one_path_are_refused():
    params, x = {"a": {"b": real(3, 2), "c": real(3, 2)}, "a/b": {"w": real(3, 2)}}, real(4, 3)

    def loss_fn(params, x):
        return sum(size(x @ w) for w in jax.tree.leaves(params))

    with pytest.raises(ValueError, match="two layers have the same path 'a/b'"):
        af.trace_layout(loss_fn, params, x)
