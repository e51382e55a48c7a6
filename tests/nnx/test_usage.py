"""What people do with NNX models: how they are made, passed on, trained, and left as they were."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adafisher_jax as af
from tests.support.every_rule import every_rule
from tests.support.nnx_reference import (
    Block,
    captured,
    check,
    factors_of,
    loss_of,
    random_model,
)
from tests.support.reference import F64, assert_factors, inputs_of, scalar

pytestmark = pytest.mark.usefixtures("x64")

X = (4, 3)


def linear(rngs, n_in=3, n_out=3, **options):
    return nnx.Linear(n_in, n_out, param_dtype=F64, rngs=rngs, **options)


def paths(layout):
    return [layer.path for layer in layout.layers]


# How models are made.


class Shared(nnx.Module):
    """One layer under two names, used three times."""

    def __init__(self, rngs):
        self.z = nnx.List([linear(rngs)])
        self.b, self.c = self.z[0], linear(rngs)

    def __call__(self, x):
        return self.b(jnp.tanh(self.z[0](jnp.tanh(self.c(self.b(x))))))


class SharedArray(nnx.Module):
    """Two layers with one kernel."""

    def __init__(self, rngs, use_bias=False):
        self.b, self.a = (linear(rngs, use_bias=use_bias) for _ in "ba")
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


@dataclasses.dataclass
class Data(nnx.Module):
    many: nnx.List
    named: nnx.Dict
    size: int = 3

    def __call__(self, x):
        for layer in self.many:
            x = layer(x)
        return self.named["last"](x)


class Scaled(nnx.Linear):
    """A layer of one's own, with Flax's within."""

    def __call__(self, x):
        return 2 * super().__call__(x) + 1


class TwiceScaled(Scaled):
    def __call__(self, x):
        return -super().__call__(x)


class NoTree(nnx.Module, pytree=False):
    def __init__(self, rngs):
        self.a, self.norm = linear(rngs), nnx.BatchNorm(3, param_dtype=F64, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.a(x))


MODELS = {
    "Sequential": (
        lambda rngs: nnx.Sequential(linear(rngs), jnp.tanh, linear(rngs)),
        ["layers/0", "layers/2"],
    ),
    "shared": (Shared, ["b", "c"]),
    "dataclass": (
        lambda rngs: Data(
            nnx.List([linear(rngs), jnp.tanh, linear(rngs)]), nnx.Dict(last=linear(rngs))
        ),
        ["many/0", "many/2", "named/last"],
    ),
    "subclass": (lambda rngs: Scaled(3, 2, param_dtype=F64, rngs=rngs), [""]),
    "subclass of a subclass": (lambda rngs: TwiceScaled(3, 2, param_dtype=F64, rngs=rngs), [""]),
    "no pytree": (NoTree, ["a", "norm"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_kind_of_model(kind):
    make, expected = MODELS[kind]
    layout, _ = check(loss_of, random_model(make), inputs_of(X))
    assert paths(layout) == expected


def test_layers_that_share_their_kernel():
    """Their rows are averaged, at the first of its paths."""

    class Twice(nnx.Module):
        def __init__(self, layer):
            self.a = layer

        def __call__(self, x):
            return self.a(jnp.tanh(self.a(x)))

    model, x = random_model(SharedArray), inputs_of(X)
    layout, factors = captured(loss_of, model, x)
    assert paths(layout) == ["a"]
    assert_factors(factors, factors_of(loss_of, Twice(model.a), x))


def test_of_layers_that_share_their_kernel_but_not_their_bias_the_kernel_is_covered():
    model = random_model(lambda rngs: SharedArray(rngs, use_bias=True))
    layout, _ = captured(loss_of, model, inputs_of(X))
    assert paths(layout) == ["a"]
    assert {row.leaf.path for row in layout.uncovered} == {"a/bias", "b/bias"}
    assert all("bias of several layers" in row.reason for row in layout.uncovered)


def test_arithmetic_of_ones_own_is_a_layer_of_what_it_multiplies_by():
    class Own(nnx.Linear):
        def __call__(self, x):
            return x @ self.kernel[...]

    def make(rngs):
        return nnx.Sequential(Own(3, 3, param_dtype=F64, rngs=rngs), linear(rngs))

    layout, factors = captured(loss_of, random_model(make), inputs_of(X))
    assert paths(layout) == ["layers/0", "layers/1"]
    assert [row.leaf.path for row in layout.uncovered] == ["layers/0/bias"]
    np.testing.assert_allclose(
        factors["layers/0"].h[:, 0], np.mean(inputs_of(X).reshape(-1, 3) ** 2, 0), 1e-12
    )


def test_an_abstract_model_has_the_same_layout():
    abstract = nnx.eval_shape(lambda: Shared(nnx.Rngs(0)))
    layout = af.nnx.trace_layout(loss_of, random_model(Shared), inputs_of(X))
    assert af.nnx.trace_layout(loss_of, abstract, jax.ShapeDtypeStruct(X, F64)) == layout
    assert hash(layout) == hash(af.nnx.trace_layout(loss_of, random_model(Shared), inputs_of(X)))


# What the loss does.


class Frozen(nnx.Variable):
    """A parameter that is not trained."""


def frozen_first():
    model = random_model(lambda rngs: nnx.Sequential(linear(rngs), jnp.tanh, linear(rngs)))
    first = model.layers[0]
    first.kernel, first.bias = (Frozen(param[...]) for param in (first.kernel, first.bias))
    return model


def test_frozen_variables_have_no_layer():
    layout, factors = captured(loss_of, frozen_first(), inputs_of(X))
    assert paths(layout) == ["layers/2"]
    assert not layout.uncovered
    expected = factors_of(loss_of, frozen_first(), inputs_of(X))
    assert_factors(factors, {"layers/2": expected["layers/2"]})


def test_a_loss_that_reads_the_whole_state():
    def loss_fn(model, x):
        return loss_of(model, x) + sum(jnp.sum(a**2) for a in jax.tree.leaves(nnx.state(model)))

    check(loss_fn, random_model(Shared), inputs_of(X))


def test_a_loss_that_changes_its_model():
    """New and changed variables are carried over."""

    def loss_fn(model, x):
        y = model.up(x)
        model.seen = nnx.Intermediate(y)
        return scalar(model.down(jnp.tanh(y)))

    check(loss_fn, random_model(Block), inputs_of(X))


def test_sown_values():
    class Sowing(Block):
        def __call__(self, x):
            y = self.up(x)
            self.sow(nnx.Intermediate, "up_out", y)
            return self.down(jnp.tanh(y))

    def loss_fn(model, x):
        y, seen = nnx.capture(model, nnx.Intermediate)(x)
        return scalar(y) + scalar(seen), seen

    model, x = random_model(Sowing), inputs_of(X)
    layout, factors = captured(loss_fn, model, x, has_aux=True)
    assert layout.covered == 1
    assert_factors(factors, factors_of(loss_fn, model, x))


def test_other_modules_among_the_arguments():
    """Random numbers, a metric and a teacher: they change as with `nnx.value_and_grad`."""

    def loss_fn(model, teacher, rngs, metric, x):
        y = model(x + rngs.normal(x.shape))
        metric.update(values=jnp.mean(y).astype(jnp.float32))
        return scalar(y - jax.lax.stop_gradient(teacher(x)))

    teacher = random_model(lambda rngs: Block(rngs, dropout=0.5), seed=4)
    others = (teacher, nnx.Rngs(3), nnx.metrics.Average())
    layout, _ = check(loss_fn, random_model(Block), *others, inputs_of(X))
    assert paths(layout) == ["down", "up"]


def test_an_argument_that_is_no_pytree():
    def loss_fn(model, teacher, x):
        return scalar(model(x) - jax.lax.stop_gradient(teacher(x)))

    model, teacher, x = random_model(Block), random_model(NoTree), inputs_of(X)
    layout = af.nnx.trace_layout(loss_fn, model, teacher, x)
    assert paths(layout) == ["down", "up"]
    _, _, factors = af.nnx.value_and_grad(loss_fn, layout)(model, teacher, x)

    def plain(model, x):
        return loss_fn(model, nnx.clone(teacher), x)

    assert_factors(factors, factors_of(plain, model, x))


def test_keywords_and_what_is_no_array():
    def loss_fn(model, x, *, train, scale, name=None):
        assert train is True
        assert name == "a string"
        return scale * loss_of(model, x)

    model, x = random_model(Block), inputs_of(X)
    options = {"train": True, "scale": 2.0, "name": "a string"}
    layout = af.nnx.trace_layout(loss_fn, model, x, **options)
    loss, grads, _ = af.nnx.value_and_grad(loss_fn, layout)(model, x, **options)
    expected, wanted = nnx.value_and_grad(lambda m: loss_fn(m, x, **options))(model)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), grads, wanted)


def test_auxiliary_output():
    """Arrays, what is no array, and the model itself."""

    def loss_fn(model, x):
        y = model(x)
        return scalar(y), {"y": y, "n": 3, "name": "a string", "model": model}

    model, x = random_model(Block), inputs_of(X)
    layout = af.nnx.trace_layout(loss_fn, model, x)
    (_, aux), _, _ = af.nnx.value_and_grad(loss_fn, layout, has_aux=True)(model, x)
    np.testing.assert_allclose(aux["y"], model(x), rtol=1e-12)
    assert (aux["n"], aux["name"]) == (3, "a string")
    assert aux["model"] is model


# Training.


def trained(model, tx, wrt, loss_fn, layout, *args, steps=3):
    """A model after a few jitted steps."""
    model = nnx.clone(model)
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        loss, grads, factors = af.nnx.value_and_grad(loss_fn, layout)(model, *args)
        optimizer.update(model, grads, factors=factors)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    return model, losses


def test_training_under_nnx_jit():
    model, x = random_model(Block), inputs_of(X)
    layout = af.nnx.trace_layout(loss_of, model, x)
    tx = af.adafisherw(1e-2, layout, rule="centered")
    after, losses = trained(model, tx, nnx.Param, loss_of, layout, x, steps=8)
    assert losses[-1] < losses[0]
    plain, _ = trained(model, optax.adam(1e-2), nnx.Param, loss_of, layout, x, steps=8)
    assert not np.allclose(plain.up.kernel[...], after.up.kernel[...])


def test_the_functional_style_is_the_same():
    model, x = random_model(Block), inputs_of(X)
    layout = af.nnx.trace_layout(loss_of, model, x)
    tx = af.adafisher(1e-2, layout, rule="paper")
    expected, _ = trained(model, tx, nnx.Param, loss_of, layout, x)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, opt_state, rest):
        merged = nnx.merge(graphdef, params, rest)
        _, grads, factors = af.nnx.value_and_grad(loss_of, layout)(merged, x)
        updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
        return optax.apply_updates(params, updates), opt_state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state, rest)
    wanted = nnx.state(expected, nnx.Param)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), params, wanted)


@pytest.mark.slow
def test_one_program_with_a_schedule_equals_factors_of_none():
    """The dropout's random numbers go on in either case."""
    model, x = random_model(lambda rngs: Block(rngs, dropout=0.5)), inputs_of(X)
    layout = af.nnx.trace_layout(loss_of, model, x)
    tx = af.adafisher(1e-2, layout, rule="centered")
    capture, plain = af.nnx.value_and_grad(loss_of, layout), nnx.value_and_grad(loss_of)

    @nnx.jit
    def scheduled(model, optimizer, step):
        due = (step < 2) | (step % 2 == 1)
        _, grads, factors = af.nnx.value_and_grad(loss_of, layout, when=due)(model, x)
        optimizer.update(model, grads, factors=factors)

    @nnx.jit
    def refreshing(model, optimizer):
        _, grads, factors = capture(model, x)
        optimizer.update(model, grads, factors=factors)

    @nnx.jit
    def keeping(model, optimizer):
        _, grads = plain(model, x)
        optimizer.update(model, grads, factors=None)

    one, two = (
        (copy, nnx.Optimizer(copy, tx, wrt=nnx.Param)) for copy in (model, nnx.clone(model))
    )
    for step, due in enumerate([True, True, False, True, False]):
        scheduled(*one, jnp.int32(step))
        (refreshing if due else keeping)(*two)
    ours, expected = (nnx.state(both, nnx.Not(nnx.RngState)) for both in (one, two))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), ours, expected)


@pytest.mark.parametrize("form", [nnx.state, lambda *a: nnx.as_pure(nnx.state(*a))])
def test_the_optimizer_takes_either_form_of_the_state(form):
    model, x = random_model(Block), inputs_of(X)
    layout = af.nnx.trace_layout(loss_of, model, x)
    tx = af.adafisher(1e-2, layout, rule="paper")
    _, grads, factors = af.nnx.value_and_grad(loss_of, layout)(model, x)
    params = form(model, nnx.Param)
    grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))
    updates, state = tx.update(grads, tx.init(params), params, factors=factors)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert not np.allclose(jax.tree.leaves(updates)[0], -1e-2 * jax.tree.leaves(grads)[0])
    assert optax.tree.get(state, "ScaleByAdaFisherState").factors.keys() == {"up", "down"}


def with_lora(rngs):
    def layer():
        return nnx.LoRALinear(3, 3, lora_rank=2, lora_param_dtype=F64, param_dtype=F64, rngs=rngs)

    return nnx.Sequential(layer(), jnp.tanh, layer())


FILTERS = {
    "LoRAParam": (with_lora, nnx.LoRAParam, "lora"),
    "PathContains": (Block, nnx.All(nnx.Param, nnx.PathContains("down")), "down"),
    "a function": (Block, lambda path, value: "up" in path, "up"),
}


@every_rule
@pytest.mark.parametrize("filtered", FILTERS)
def test_training_a_part(filtered, rule):
    """The layout is the whole model's, the optimizer takes its part, the rest stays."""
    make, wrt, within = FILTERS[filtered]
    model, x = random_model(make), inputs_of(X)
    layout = af.nnx.trace_layout(loss_of, model, x)
    tx = af.adafisher(1e-3, layout, rule=rule)

    def step(model, wrt):
        model = nnx.clone(model)
        _, grads, factors = af.nnx.value_and_grad(loss_of, layout)(model, x)
        nnx.Optimizer(model, tx, wrt=wrt).update(model, grads, factors=factors)
        return dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))

    before = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    whole, after = step(model, nnx.Param), step(model, wrt)
    for path, value in after.items():
        expected = whole if within in path else before
        np.testing.assert_allclose(value[...], expected[path][...], rtol=1e-9, err_msg=str(path))
    assert any(within in path for path in after)


# With Linen.


def test_a_linen_layer_within_a_model():
    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.bridge.ToNNX(nn.Dense(4, param_dtype=F64), rngs=rngs)
            self.inner.lazy_init(inputs_of(X))
            self.head = linear(rngs, 4, 2)

        def __call__(self, x):
            return self.head(jnp.tanh(self.inner(x)))

    model, x = Outer(nnx.Rngs(0)), inputs_of(X)
    layout, factors = captured(loss_of, model, x)
    twin = nnx.Dict(inner=random_model(lambda rngs: linear(rngs, 3, 4)), head=model.head)
    nnx.update(twin.inner, {"kernel": model.inner.kernel, "bias": model.inner.bias})
    expected = factors_of(lambda m, x: scalar(m.head(jnp.tanh(m.inner(x)))), twin, x)
    assert layout.covered == 1
    assert_factors(factors, expected)
