"""Models nobody here wrote, unchanged: what is covered, and that it is right and trains.

They need `pip install -e '.[third-party]'`; a test whose package is not there is skipped.
"""

import functools
import importlib

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import adafisher_jax as af
from benchmarks.third_party import MODELS, uncovered
from tests.losses import assert_factors, dense_factors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("around")]

# What each model computes by hand, outside any layer of Flax's own.
NORM_OF_ITS_OWN = {"BatchNorm_*/bias", "BatchNorm_*/scale"}
BY_HAND = {
    "BERT, masked LM": {"cls/predictions/bias"},
    "GPT-2": {f"attn/{name}/{leaf}" for name in ("c_attn", "c_proj") for leaf in ("kernel", "bias")}
    | {f"mlp/{name}/{leaf}" for name in ("c_fc", "c_proj") for leaf in ("kernel", "bias")},
    "Llama": {"*/input_layernorm/weight", "*/post_attention_layernorm/weight", "model/norm/weight"},
    "ViT": {"vit/embeddings/cls_token", "vit/embeddings/position_embeddings"},
    "ResNet-18": NORM_OF_ITS_OWN | {f"BasicBlock_*/{name}" for name in NORM_OF_ITS_OWN},
    "ViT, NNX": {
        f"encoder/{n}" for n in ("cls_token", "position_embeddings", "vision_position_ids")
    },
}
BELOW = {"GPT-2": "its layers multiply by hand"}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def around(name, monkeypatch):
    """What a model needs: its package, its context, and JAX's own defaults."""
    model = MODELS[name]
    pytest.importorskip(model.module)
    pytest.importorskip(model.adapter)
    with jax.numpy_rank_promotion("allow"), model.around():
        yield


@functools.cache
def tiny(name):
    """A tiny model's loss and arguments, with its layout."""
    problem = MODELS[name].build(False)
    adapter = importlib.import_module(MODELS[name].adapter)
    return problem, adapter, adapter.trace_layout(problem.loss, problem.params, *problem.args)


def jit_of(name):
    return nnx.jit if name.endswith("NNX") else jax.jit


@functools.cache
def grad_fn_of(name):
    problem, adapter, layout = tiny(name)
    return jit_of(name)(adapter.value_and_grad(problem.loss, layout))


@functools.cache
def captured(name):
    problem, *_ = tiny(name)
    return grad_fn_of(name)(problem.params, *problem.args)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.xfail(reason=BELOW[n]) if n in BELOW else ())
        for n in MODELS
    ],
)
def test_99_per_cent_of_the_parameters_are_covered(name):
    assert tiny(name)[2].covered >= 0.99


@every_model
def test_only_what_is_computed_by_hand_is_not_covered(name):
    assert {leaf for leaf, _ in uncovered(tiny(name)[2])} == BY_HAND.get(name, set())


@every_model
def test_the_loss_and_its_gradient_are_those_of_jax(name):
    problem, *_ = tiny(name)
    plain = nnx.value_and_grad if name.endswith("NNX") else jax.value_and_grad
    loss, grads = jit_of(name)(plain(problem.loss))(problem.params, *problem.args)
    found_loss, found, _ = captured(name)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(grads))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5 * largest)
    jax.tree.map(close, found, grads)


@every_model
def test_every_layer_of_the_layout_takes_part(name):
    factors = captured(name)[2]
    assert factors.keys() == {layer.path for layer in tiny(name)[2].layers}
    for path, factor in factors.items():
        assert all(np.all(np.isfinite(part)) for part in factor), path
        assert np.all(factor.rows > 0), path
        assert np.max(factor.h) > 0, path
        assert np.max(factor.s) > 0, path


@pytest.mark.parametrize("name", ["BERT, masked LM", "ViT"])
def test_factors_of_dense_layers_are_those_of_perturbed_outputs(name):
    problem, _, layout = tiny(name)
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
def test_a_few_steps_lower_the_loss(name):
    (_, params, args), _, layout = tiny(name)
    grad_fn, losses = grad_fn_of(name), []
    tx = af.adafisherw(1e-3, layout, rule="centered")
    if name.endswith("NNX"):
        model = nnx.clone(params)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
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
    assert losses[-1] < 0.9 * losses[0]
