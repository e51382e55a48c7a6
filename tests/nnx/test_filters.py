"""A layout for a part of an NNX model: parameters, gradients and steps of one filter alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adafisher_jax as af
from tests.support.every_rule import every_rule
from tests.support.nnx_reference import Block, loss_of, random_model
from tests.support.reference import F64, assert_factors, inputs_of, scalar

pytestmark = pytest.mark.usefixtures("x64")

X = (4, 3)


class Adapter(nnx.Param):
    """The parameters of a small layer beside a large one."""


class Trained(nnx.Variable):
    """Parameters that are no `nnx.Param`."""


class Adapted(nnx.Module):
    """A layer, a LoRA beside it, one's own adapter after it, and a head."""

    def __init__(self, rngs, kind=Adapter):
        lora = {"lora_rank": 2, "lora_param_dtype": F64}
        self.base = nnx.LoRALinear(3, 3, param_dtype=F64, rngs=rngs, **lora)
        self.norm = nnx.LayerNorm(3, param_dtype=F64, rngs=rngs)
        self.adapter = Block(rngs)
        self.head = nnx.Linear(3, 2, param_dtype=F64, rngs=rngs)
        for layer in (self.adapter.up, self.adapter.down):
            layer.kernel, layer.bias = kind(layer.kernel[...]), kind(layer.bias[...])

    def __call__(self, x):
        x = jnp.tanh(self.norm(self.base(x)))
        return self.head(jnp.tanh(x + self.adapter(x)))


FILTERS = {  # and the layers it takes
    "nnx.LoRAParam": (nnx.LoRAParam, ["base/lora/lora_a", "base/lora/lora_b"]),
    "a class of one's own": (Adapter, ["adapter/down", "adapter/up"]),
    "a path": (nnx.PathContains("head"), ["head"]),
    "a function": (lambda path, _: path[0] in ("norm", "head"), ["head", "norm"]),
    "several": (
        (nnx.LoRAParam, nnx.PathContains("head")),
        ["base/lora/lora_a", "base/lora/lora_b", "head"],
    ),
    "nnx.Param": (
        nnx.Param,
        "adapter/down adapter/up base base/lora/lora_a base/lora/lora_b head norm".split(),
    ),
}


def paths(state):
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def listed(layout):
    covered = {leaf.path for layer in layout.layers for leaf in layer.leaves}
    return covered | {row.leaf.path for row in layout.uncovered}


def checked_gradients(model, x, layout, wrt):
    """Ours, checked against Flax's, with their factors, checked against the whole model's."""
    whole = af.nnx.trace_layout(loss_of, model, x)
    graphdef, state = nnx.split(model)

    def all_three(state):
        def run(grad_fn):
            return grad_fn(nnx.merge(graphdef, state, copy=True), x)

        by_flax = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, wrt))
        of_part, of_whole = (af.nnx.value_and_grad(loss_of, part) for part in (layout, whole))
        return run(of_part), run(by_flax), run(of_whole)

    ours, expected, (*_, all_factors) = jax.jit(all_three)(state)
    assert jax.tree.structure(ours[:2]) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    jax.tree.map(close, ours[:2], expected)
    _, grads, factors = ours
    assert paths(grads) == listed(layout)
    if all_factors.keys() >= factors.keys():
        assert_factors(factors, {path: all_factors[path] for path in factors})
    return grads, factors


@pytest.mark.parametrize("name", FILTERS)
def test_what_is_filtered_is_what_the_layout_lists(name):
    """And what has gradients; the factors are those of the whole model's layers."""
    wrt, layers = FILTERS[name]
    model, x = random_model(Adapted), inputs_of(X)
    layout = af.nnx.trace_layout(loss_of, model, x, wrt=wrt)
    assert [layer.path for layer in layout.layers] == layers
    assert listed(layout) == paths(nnx.state(model, wrt))
    assert layout.covered == 1
    _, factors = checked_gradients(model, x, layout, wrt)
    assert sorted(factors) == layers


@every_rule
def test_an_optimizer_of_a_filter(rule):
    """A step moves what the layout lists, as with the whole model's layout, and nothing else."""
    start, x = random_model(Adapted), inputs_of(X)
    after = []
    for wrt in (nnx.LoRAParam, nnx.Param):
        model = nnx.clone(start)
        layout = af.nnx.trace_layout(loss_of, model, x, wrt=wrt)
        tx = af.adafisherw(1e-3, layout, rule=rule)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

        @nnx.jit
        def step(model, optimizer, layout=layout):
            _, grads, factors = af.nnx.value_and_grad(loss_of, layout)(model, x)
            optimizer.update(model, grads, factors=factors)

        step(model, optimizer)
        after.append(nnx.as_pure(nnx.state(model, nnx.Param)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), *after)
    before = nnx.as_pure(nnx.state(start, nnx.Param))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after[0])
    flat, _ = jax.tree_util.tree_flatten_with_path(moved)
    assert {jax.tree_util.keystr(p, simple=True, separator="/") for p, m in flat if m} == {
        "base/lora/lora_a", "base/lora/lora_b",
    }  # fmt: skip


def test_variables_that_are_no_parameters_of_flax():
    model, x = random_model(functools.partial(Adapted, kind=Trained)), inputs_of(X)
    assert listed(af.nnx.trace_layout(loss_of, model, x)) == paths(nnx.state(model, nnx.Param))
    layout = af.nnx.trace_layout(loss_of, model, x, wrt=Trained)
    assert [layer.path for layer in layout.layers] == ["adapter/down", "adapter/up"]
    grads, factors = checked_gradients(model, x, layout, Trained)
    tx = af.adafisher(1e-3, layout, rule="centered")
    nnx.Optimizer(model, tx, wrt=Trained).update(model, grads, factors=factors)


def test_a_part_of_a_layer():
    """A kernel without its bias is a layer without one; a bias alone has no Fisher block."""
    model, x = random_model(Block), inputs_of(X)
    wrt = lambda path, _: path in (("up", "kernel"), ("down", "bias"))  # noqa: E731
    layout = af.nnx.trace_layout(loss_of, model, x, wrt=wrt)
    (layer,) = layout.layers
    assert (layer.path, layer.weight.path, layer.bias) == ("up", "up/kernel", None)
    assert [row.leaf.path for row in layout.uncovered] == ["down/bias"]
    grads, factors = checked_gradients(model, x, layout, wrt)
    tx = af.adafisher(1e-3, layout, rule="centered")
    nnx.Optimizer(model, tx, wrt=wrt).update(model, grads, factors=factors)


def test_what_is_outside_the_filter_may_be_of_any_type():
    """As a base of small integers is, whose adapters are trained."""

    class Quantized(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Param(jnp.ones((3, 3), jnp.int8))
            self.lora = nnx.LoRA(3, 2, 3, param_dtype=F64, rngs=rngs)

        def __call__(self, x):
            return self.lora(x) + x @ self.table[...].astype(x.dtype)

    model, x = Quantized(nnx.Rngs(0)), inputs_of(X)
    with pytest.raises(TypeError, match="'table' is of type int8"):
        af.nnx.trace_layout(loss_of, model, x)
    layout = af.nnx.trace_layout(loss_of, model, x, wrt=nnx.LoRAParam)
    assert [layer.path for layer in layout.layers] == ["lora/lora_a", "lora/lora_b"]
    _, grads, _ = af.nnx.value_and_grad(loss_of, layout)(model, x)
    assert paths(grads) == listed(layout)


def test_micro_batches_of_a_filter():
    model, x = random_model(Adapted), inputs_of((3, *X))
    layout = af.nnx.trace_layout(loss_of, model, x[0], wrt=nnx.LoRAParam)
    grad_fn = af.nnx.value_and_grad(loss_of, layout)
    loss, grads, factors = af.nnx.accumulate(grad_fn, layout)(model, x)
    total = None
    for part in x:
        total = af.add_micro_batch(total, grad_fn(model, part), 1 / 3, layout)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), (loss, grads), total[:2]
    )
    assert_factors(factors, total[2], 1e-10)


def test_the_filter_is_no_argument_of_the_loss():
    def loss_fn(model, x, *, scale):
        return scale * scalar(model(x))

    layout = af.nnx.trace_layout(
        loss_fn, random_model(Block), inputs_of(X), wrt=nnx.PathContains("up"), scale=2.0
    )
    assert listed(layout) == {"up/kernel", "up/bias"}


def test_a_filter_that_takes_nothing():
    with pytest.raises(ValueError, match=r"wrt: .*LoRAParam.* selects none of the model's variab"):
        af.nnx.trace_layout(loss_of, random_model(Block), inputs_of(X), wrt=nnx.LoRAParam)


@pytest.mark.parametrize("wrt", [nnx.Param, nnx.LoRAParam])
def test_a_model_that_grew_is_refused(wrt):
    model = random_model(Adapted)
    layout = af.nnx.trace_layout(loss_of, model, inputs_of(X), wrt=wrt)
    model.more = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"does not know the parameters 'more/bias'.*Trace it"):
        af.nnx.value_and_grad(loss_of, layout)(model, inputs_of(X))


def test_diagnostics_take_the_module_whatever_the_filter():
    model, x = random_model(Adapted), inputs_of(X)
    layout = af.nnx.trace_layout(loss_of, model, x, wrt=nnx.LoRAParam)
    paths = ["base/lora/lora_a", "base/lora/lora_b"]
    assert [*af.diagnostics.full_factors(loss_of, layout)(model, x)] == paths
    tx = af.adafisherw(1e-3, layout, rule="centered")
    params = nnx.state(model, nnx.LoRAParam)
    _, grads, factors = af.nnx.value_and_grad(loss_of, layout)(model, x)
    updates, state = tx.update(grads, tx.init(params), params, factors=factors)
    report = functools.partial(
        af.diagnostics.report, state, layout, rule="centered", updates=updates
    )
    of_module, of_params = report(params=model), report(params=params)
    assert [*of_module] == paths
    jax.tree.map(np.testing.assert_array_equal, of_module, of_params)
