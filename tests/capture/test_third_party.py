"""Models nobody here wrote, unchanged: what is covered, and that it is right and trains.

They need `pip install -e '.[third-party]'`; a test whose package is not there is skipped.
"""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adafisher_jax as af
from benchmarks.third_party import MODELS, uncovered
from tests.support.losses import assert_factors, dense_factors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("around"),
    pytest.mark.filterwarnings("ignore"),  # of packages behind their dependencies
]
PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "third_party.md"

# What each model adds or multiplies by element, outside any layer: no product has it.
NORM_OF_ITS_OWN = {"BatchNorm_*/bias", "BatchNorm_*/scale"}
BEFORE_AND_AFTER = {"*/input_layernorm/w", "*/post_attention_layernorm/w", "final_norm/w"}
BY_HAND = {
    "BERT, masked LM": {"cls/predictions/bias"},  # of a product with a table that is looked up
    "Llama": {"*/input_layernorm/weight", "*/post_attention_layernorm/weight", "model/norm/weight"},
    "T5": {"*/layer_norm/weight", *(f"{n}coder/final_layer_norm/weight" for n in ("en", "de"))},
    "ViT": {"vit/embeddings/cls_token", "vit/embeddings/position_embeddings"},
    "ResNet-18": NORM_OF_ITS_OWN | {f"BasicBlock_*/{name}" for name in NORM_OF_ITS_OWN},
    "ViT, NNX": {
        f"encoder/{n}" for n in ("cls_token", "position_embeddings", "vision_position_ids")
    },
    "Llama 3.2, NNX": BEFORE_AND_AFTER,
    "Gemma 2, NNX": {"final_norm/scale"}
    | {f"*/{at}_norm/scale" for at in "pre_attention post_attn pre_ffw post_ffw".split()},
    "Gemma 3, NNX": {"final_norm/scale", "attn/_key_norm/scale", "attn/_query_norm/scale"}
    | {f"*/{at}_norm/scale" for at in "pre_attention post_attention pre_ffw post_ffw".split()},
    "Qwen 2.5, NNX": BEFORE_AND_AFTER | {f"*/attn/{n}_bias" for n in "qkv"},  # over merged heads
    "Qwen 3, NNX": BEFORE_AND_AFTER | {"attn/k_norm/w", "attn/q_norm/w"},
    "ViT, Equinox": {"global_pos_embed/weight", "cls_token"}
    | {f"{norm}/{n}" for norm in ("*/prenorm", "*/norm", "norm") for n in ("weight", "bias")},
    "ResNet-50, Haiku": {
        f"~/{at}batchnorm{number}/{n}"
        for at, number in (("", "_*"), ("initial_", ""), ("shortcut_", ""))
        for n in ("scale", "offset")
    },
}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def around(name):
    """What a model needs: its package, its context, and JAX's own defaults."""
    model = MODELS[name]
    pytest.importorskip(model.module, reason=f"needs {model.package}, of the extra third-party")
    with jax.numpy_rank_promotion("allow"), model.around():
        yield


@functools.cache
def tiny(name):
    """A tiny model's loss and arguments, with its layout."""
    problem = MODELS[name].build(False)
    if MODELS[name].is_nnx:
        nnx.update(problem.params, without_zeros(nnx.state(problem.params, nnx.Param)))
    else:
        problem = problem._replace(params=without_zeros(problem.params))
    return problem, MODELS[name].trace_layout(problem)


def without_zeros(params):
    """Arrays that begin as zeros, as some layers' last weights, hide the layers before them."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        small = 0.1 * rng.normal(size=leaf.shape)
        return leaf if np.any(leaf) else jnp.asarray(small, leaf.dtype)

    return jax.tree.map(fill, params)


def jit_of(name):
    return nnx.jit if MODELS[name].is_nnx else jax.jit


@functools.cache
def grad_fn_of(name):
    problem, layout = tiny(name)
    value_and_grad = af.nnx.value_and_grad if MODELS[name].is_nnx else af.value_and_grad
    return jit_of(name)(value_and_grad(problem.loss, layout))


@functools.cache
def captured(name):
    problem, _ = tiny(name)
    return grad_fn_of(name)(problem.params, *problem.args)


@every_model
def test_at_its_own_size_as_much_is_covered_as_the_documentation_says(name):
    layout = MODELS[name].trace_layout(MODELS[name].build(True))
    rows = [[cell.strip() for cell in row.split("|")] for row in PAGE.read_text().splitlines()]
    [[parameters, covered]] = [row[3:5] for row in rows if row[2:3] == [name]]
    assert parameters == f"{sum(leaf.size for leaf in layout.leaves):,}"
    assert covered == f"{layout.covered:.2%}"
    assert layout.covered >= 0.99


@every_model
def test_only_what_is_computed_by_hand_is_not_covered(name):
    assert {leaf for leaf, _ in uncovered(tiny(name)[1])} == BY_HAND.get(name, set())


@every_model
def test_the_loss_and_its_gradient_are_those_of_jax(name):
    problem, _ = tiny(name)
    plain = jax.value_and_grad(problem.loss)
    if MODELS[name].is_nnx:
        plain = nnx.value_and_grad(problem.loss, argnums=nnx.DiffState(0, MODELS[name].wrt))
    loss, grads = jit_of(name)(plain)(problem.params, *problem.args)
    found_loss, found, _ = captured(name)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(grads))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5 * largest)
    jax.tree.map(close, found, grads)


@every_model
def test_every_layer_of_the_layout_takes_part(name):
    factors = captured(name)[2]
    assert factors.keys() == {layer.path for layer in tiny(name)[1].layers}
    for path, factor in factors.items():
        assert all(np.all(np.isfinite(part)) for part in factor), path
        assert np.all(factor.rows > 0), path
        assert np.max(factor.h) > 0, path
        assert np.max(factor.s) > 0, path


@pytest.mark.parametrize("name", ["BERT, masked LM", "ViT"])
def test_factors_of_dense_layers_are_those_of_perturbed_outputs(name):
    problem, layout = tiny(name)
    calls = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            calls.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        problem.loss(problem.params, *problem.args)
    known = {layer.path for layer in layout.layers}
    names = [path if path in known else None for path in calls]
    expected = dense_factors(problem.loss, names, problem.params, *problem.args)
    assert len(expected) >= 12
    assert_factors(captured(name)[2], expected, 1e-3)


@every_model
@pytest.mark.parametrize("rule", ["paper", "official", "centered"])
def test_every_rule_takes_a_step(name, rule):
    problem, layout = tiny(name)
    _, grads, factors = captured(name)
    params = problem.params
    if MODELS[name].is_nnx:
        params = nnx.state(params, MODELS[name].wrt)
    tx = af.adafisher(1e-3, layout, rule=rule)
    updates, _ = jax.jit(lambda g, p, f: tx.update(g, tx.init(p), p, factors=f))(
        grads, params, factors
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(updates))


@every_model
def test_a_few_steps_lower_the_loss(name):
    (_, params, args), layout = tiny(name)
    grad_fn, losses = grad_fn_of(name), []
    tx = af.adafisherw(1e-2, layout, rule="centered")
    if MODELS[name].is_nnx:
        model = nnx.clone(params)
        optimizer = nnx.Optimizer(model, tx, wrt=MODELS[name].wrt)
        for _ in range(8):
            loss, grads, factors = grad_fn(model, *args)
            optimizer.update(model, grads, factors=factors)
            losses.append(loss)
    else:
        state, update = tx.init(params), jax.jit(lambda g, s, p, f: tx.update(g, s, p, factors=f))
        for _ in range(8):
            loss, grads, factors = grad_fn(params, *args)
            updates, state = update(grads, state, params, factors)
            params = optax.apply_updates(params, updates)
            losses.append(loss)
    low_rank = MODELS[name].wrt is nnx.LoRAParam  # updates of few ranks learn less in few steps
    assert losses[-1] < (0.96 if low_rank else 0.9) * losses[0]
