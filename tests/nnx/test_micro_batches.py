"""Micro-batches of an NNX model: the result, and the model after it, are those of a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adafisher_jax as af
from tests.support.nnx_reference import Block, loss_of, random_model
from tests.support.reference import F64, assert_factors, scalar

pytestmark = pytest.mark.usefixtures("x64")

K = 4
X = np.random.default_rng(1).normal(size=(K, 2, 3))
SCALES = np.arange(1.0, K + 1)


class Noisy(nnx.Module):
    """Random numbers and running statistics between two layers."""

    def __init__(self, rngs):
        self.up = nnx.Linear(3, 4, param_dtype=F64, rngs=rngs)
        self.norm = nnx.BatchNorm(4, param_dtype=F64, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(4, 3, param_dtype=F64, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(jnp.tanh(self.norm(self.up(x)))))


def noisy_loss(model, x, scale, rngs, metric, train, *, teacher):
    """Changes its model and two other modules."""
    assert train is True
    y = model(x + rngs.normal(x.shape, F64)) - jax.lax.stop_gradient(teacher(x))
    metric.update(values=jnp.mean(y).astype(jnp.float32))
    return scale * scalar(y), {"y": y, "count": model.dropout.rngs.count[...]}


def modules():
    """The model, random numbers, a metric and a teacher."""
    return random_model(Noisy), nnx.Rngs(3), nnx.metrics.Average(), random_model(Noisy, 5)


def looped(grad_fn, layout, weights, model, rngs, metric, teacher):
    total, stack = None, []
    for x, scale, weight in zip(X, SCALES, weights, strict=True):
        (loss, aux), *rest = grad_fn(model, x, scale, rngs, metric, True, teacher=teacher)
        total = af.add_micro_batch(total, (loss, *rest), weight, layout)
        stack.append(aux)
    return total, jax.tree.map(lambda *parts: jnp.stack(parts), *stack)


def accumulated(grad_fn, layout, weights, model, rngs, metric, teacher):
    summed = af.nnx.accumulate(grad_fn, layout, weights)
    (loss, aux), *rest = summed(model, X, SCALES, rngs, metric, True, teacher=teacher)
    return (loss, *rest), aux


def numbers(tree):
    return jax.tree.map(
        lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a,
        nnx.as_pure(tree),
    )


@pytest.mark.parametrize(
    ("jitted", "weights"),
    [
        pytest.param(False, None, marks=pytest.mark.slow, id="eager"),
        pytest.param(True, [0.4, 0.1, 0.2, 0.3], id="nnx.jit"),
    ],
)
def test_all_that_the_loss_changes_is_as_a_loop_leaves_it(jitted, weights):
    model, rngs, metric, teacher = modules()
    layout = af.nnx.trace_layout(
        noisy_loss, model, X[0], SCALES[0], rngs, metric, True, teacher=teacher
    )
    grad_fn = af.nnx.value_and_grad(noisy_loss, layout, has_aux=True)
    found = []
    for run, each in ((accumulated, weights), (looped, weights or K * [1 / K])):
        given = modules()
        step = functools.partial(run, grad_fn, layout, each and np.array(each))
        result, aux = (nnx.jit(step) if jitted else step)(*given)
        found.append((result, aux, nnx.state(given)))
    ours, expected = found
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    assert_factors(ours[0][2], expected[0][2], 1e-10)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13)
    jax.tree.map(close, *map(numbers, (ours, expected)))
    before, after = (numbers(nnx.state(m)) for m in (modules(), given))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert sum(jax.tree.leaves(changed)) == 2 * 3 + 1 + 2  # of the models, `rngs` and the metric


def test_no_two_micro_batches_have_the_same_masks():
    """Nor do two steps."""
    model = random_model(Noisy)
    given = jnp.ones((K, 5, 3), F64)

    def masks_of(model, x):
        return scalar(model(x)), model.dropout(jnp.ones((5, 20)))

    layout = af.nnx.trace_layout(masks_of, model, given[0])
    grad_fn = af.nnx.value_and_grad(masks_of, layout, has_aux=True)
    step = nnx.jit(af.nnx.accumulate(grad_fn, layout))
    masks = [*step(model, given)[0][1], *step(model, given)[0][1]]
    assert len({mask.tobytes() for mask in map(np.asarray, masks)}) == 2 * K
    assert model.dropout.rngs.count[...] == 2 * 2 * K


def test_training_under_nnx_jit():
    model = random_model(Noisy)
    layout = af.nnx.trace_layout(loss_of, model, X[0])
    optimizer = nnx.Optimizer(model, af.adafisher(1e-3, layout, rule="centered"), wrt=nnx.Param)
    grad_fn = af.nnx.value_and_grad(loss_of, layout)

    @nnx.jit
    def train_step(model, optimizer):
        loss, grads, factors = af.nnx.accumulate(grad_fn, layout)(model, X)
        optimizer.update(model, grads, factors=factors)
        return loss

    before = nnx.as_pure(nnx.state(model, nnx.Param))
    train_step(model, optimizer)
    train_step(model, optimizer)
    moved = jax.tree.map(
        lambda a, b: float(np.max(np.abs(a - b))), nnx.as_pure(nnx.state(model, nnx.Param)), before
    )
    assert min(jax.tree.leaves(moved)) > 0
    assert model.dropout.rngs.count[...] == 2 * K


# What is refused.


CHANGES = {
    "a new variable": (lambda m, x: setattr(m, "seen", nnx.Intermediate(x)), "'seen'"),
    "another type": (
        lambda m, x: m.norm.var.set_value(jnp.ones(4, jnp.float32)), "'norm/var'",
    ),
    "an attribute": (lambda m, x: setattr(m, "calls", getattr(m, "calls", 0) + 1), "an attribute"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_no_scan_can_carry(change):
    make, name = CHANGES[change]

    def changing(model, x):
        loss = loss_of(model, x)
        make(model, x)
        return loss

    model = random_model(Noisy)
    layout = af.nnx.trace_layout(changing, model, X[0])
    grad_fn = af.nnx.value_and_grad(changing, layout)
    with pytest.raises(ValueError, match=f"changes {name} .*af.*add_micro_batch"):
        af.nnx.accumulate(grad_fn, layout)(model, X)
    assert not hasattr(model, "seen")


def test_a_module_to_the_other_function():
    model = random_model(Block)
    layout = af.nnx.trace_layout(loss_of, model, X[0])
    grad_fn = af.nnx.value_and_grad(loss_of, layout)
    with pytest.raises(TypeError, match=r"nnx.Module.*adafisher_jax.nnx.accumulate"):
        af.accumulate(grad_fn, layout)(model, X)
    with pytest.raises(TypeError, match=r"model: got dict, wanted an nnx.Module"):
        af.nnx.accumulate(grad_fn, layout)({}, X)


def arrays_of(model):
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    return graphdef, *map(nnx.as_pure, states)


def merged_outside(graphdef, rest, layout):
    """A module that the gradient function makes."""
    grad_fn = af.nnx.value_and_grad(loss_of, layout)
    return lambda params, x: grad_fn(nnx.merge(graphdef, params, rest), x)


def merged_inside(graphdef, rest, layout, run=loss_of):
    """A module that the loss makes."""
    return af.value_and_grad(lambda params, x: run(nnx.merge(graphdef, params, rest), x), layout)


@nnx.remat
def remade(model, x):
    return loss_of(model, x)


def in_a_loop(model, x):
    """The streams go through a loop with data that differ."""

    def body(_, carry):
        model, y = carry
        return model, model.dropout(y)

    model, x = nnx.fori_loop(0, 2, body, (model, x))
    return loss_of(model, x)


def in_a_branch(model, x):
    return nnx.cond(jnp.sum(x) > 0, loss_of, lambda model, x: 2 * loss_of(model, x), model, x)


WAYS = {
    "gradient function": merged_outside,
    "loss": merged_inside,
    "nnx.remat": functools.partial(merged_inside, run=remade),
    "nnx.fori_loop": functools.partial(merged_inside, run=in_a_loop),
    "nnx.cond": functools.partial(merged_inside, run=in_a_branch),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("way", WAYS)
def test_random_counts_that_would_be_dropped(way, jitted):
    """Every micro-batch would have the same masks, and so would every step."""
    model = random_model(Noisy)
    graphdef, params, rest = arrays_of(model)
    layout = af.nnx.trace_layout(loss_of, model, X[0])

    def run(params, rest):
        return af.accumulate(WAYS[way](graphdef, rest, layout), layout)(params, X)

    with pytest.raises(ValueError, match=r"same random numbers.*af.*nnx.accumulate.*split"):
        (jax.jit(run) if jitted else run)(params, rest)


def seeded(model, x, key):
    nnx.reseed(model, default=key)
    return loss_of(model, x)


def counted(model, x, count):
    model.dropout.rngs.count[...] = count
    return loss_of(model, x)


def fixed(model, x, _):
    """The loss's own choice."""
    return loss_of(model, x + nnx.Rngs(3).normal(x.shape, F64))


NOT_DROPPED = {
    "a key for each": (seeded, lambda: jax.random.split(jax.random.key(0), K)),
    "a count for each": (counted, lambda: jnp.arange(K, dtype=jnp.uint32)),
    "numbers that the loss fixes": (fixed, lambda: jnp.zeros(K)),
}


@pytest.mark.parametrize("how", NOT_DROPPED)
def test_random_numbers_that_are_meant(how):
    run, make = NOT_DROPPED[how]
    model = random_model(functools.partial(Block, dropout=0.0 if run is fixed else 0.5))
    graphdef, params, rest = arrays_of(model)
    layout = af.nnx.trace_layout(loss_of, model, X[0])
    grad_fn = af.value_and_grad(
        lambda params, x, own: run(nnx.merge(graphdef, params, rest), x, own), layout
    )
    loss, *_ = jax.jit(af.accumulate(grad_fn, layout))(params, X, make())
    parts = [run(nnx.merge(graphdef, params, rest), *one) for one in zip(X, make(), strict=True)]
    np.testing.assert_allclose(loss, np.mean(parts), rtol=1e-12)
