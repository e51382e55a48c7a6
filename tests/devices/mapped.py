"""Under `jax.shard_map` and `jax.pmap`: what each device averages, and what is then summed.

Run by `tests/devices/test_processes.py`, in a process that has eight devices.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import adafisher_jax as af
from tests.devices.tasks import (
    RATES,
    ConvNet,
    Run,
    assert_close,
    make_loss,
    make_task,
    on_one_device,
)

N = 8
pmean, psum = (functools.partial(f, axis_name="data") for f in (jax.lax.pmean, jax.lax.psum))


def shard_map(check_vma=True, **options):
    """A decorator for functions of replicated trees and, last, a batch."""

    def decorate(f):
        def mapped(*args):
            specs = (*[P()] * (len(args) - 1), P("data"))
            return jax.shard_map(
                f,
                mesh=jax.make_mesh((N,), ("data",), (jax.sharding.AxisType.Auto,)),
                in_specs=specs,
                out_specs=P(),
                check_vma=check_vma,
            )(*args)

        return mapped

    return decorate


# A batch norm that normalizes over all devices. What is captured of the norm itself is no sum
# over rows: devices average theirs, which is not the whole batch's.
TASK = functools.partial(make_task, "convnet")
local = make_loss(ConvNet(axis_name="data"))


@functools.cache
def on_the_whole_batch():
    task = TASK()
    return jax.jit(af.value_and_grad(task.loss_fn, task.layout))(task.params, task.batches[0])


def assert_equal(found, expected):
    """Loss, gradients and the factors of all but the norm."""
    *found, factors = found
    *expected, wanted = expected
    assert_close(found, expected, 1e-9)
    assert factors.keys() == wanted.keys()
    for path in wanted.keys() - {"norm"}:
        assert_close(factors[path], wanted[path], 1e-9)


def change(factors, **by):
    """Factors with some fields multiplied."""
    return {
        path: f._replace(**{name: getattr(f, name) * n for name, n in by.items()})
        for path, f in factors.items()
    }


def test_a_mean_inside_the_loss_gives_what_one_device_does(x64):
    """The gradient of what is the same on all devices is their sum: nothing is left to do."""
    task = TASK()

    @shard_map()
    def mapped(params, x):
        return af.value_and_grad(lambda p, x: pmean(local(p, x)), task.layout)(params, x)

    assert_equal(jax.jit(mapped)(task.params, task.batches[0]), on_the_whole_batch())


def test_devices_may_differ_in_whether_they_have_factors(x64):
    """Then each has its own, checked by JAX or not."""
    task, due = TASK(), jnp.arange(N) % 3 == 0

    def found(check_vma):
        def one(due, params, x):
            loss = lambda p, x: pmean(local(p, x))  # noqa: E731
            *_, factors = af.value_and_grad(loss, task.layout, when=due[0])(params, x)
            return jax.tree.map(lambda a: a[None], factors)

        mapped = jax.shard_map(
            one,
            mesh=jax.make_mesh((N,), ("data",), (jax.sharding.AxisType.Auto,)),
            in_specs=(P("data"), P(), P("data")),
            out_specs=P("data"),
            check_vma=check_vma,
        )
        return jax.jit(mapped)(due, task.params, task.batches[0])

    checked, unchecked = found(True), found(False)  # whose cotangents are N times as large
    for factor in checked.values():
        for part in factor[:3]:
            some = (part != 0).reshape(N, -1).any(1)
            assert some.tolist() == due.tolist()
    assert_close(change(checked, s=N**2), unchecked, 1e-9)


def averaged(grad_fn):
    """What each device finds for itself, averaged."""
    return lambda params, x: pmean(grad_fn(params, x))


def by_shard_map(f, params, x):
    return jax.jit(shard_map(check_vma=False)(f))(params, x)


def by_pmap(f, params, x):
    mapped = jax.pmap(f, axis_name="data", in_axes=(None, 0))
    return jax.tree.map(lambda v: v[0], mapped(params, x.reshape(N, -1, *x.shape[1:])))


by_each = pytest.mark.parametrize("run", [by_shard_map, by_pmap])


@by_each
@pytest.mark.parametrize("inside", [lambda loss: loss, pmean], ids=["local", "pmean inside"])
def test_averaged_over_devices_s_is_larger_by_their_number_squared(run, inside, x64):
    """A mean inside the loss does not change that where devices differentiate by themselves."""
    task = TASK()
    grad_fn = af.value_and_grad(lambda p, x: inside(local(p, x)), task.layout)
    found = run(averaged(grad_fn), task.params, task.batches[0])
    loss, grads, factors = on_the_whole_batch()
    assert_equal(found, (loss, grads, change(factors, s=N**2, rows=1 / N)))


@by_each
def test_a_loss_divided_by_the_number_of_devices_gives_what_one_device_does(run, x64):
    """The remedy: gradients are then sums, factors still means."""
    task = TASK()
    grad_fn = af.value_and_grad(lambda p, x: local(p, x) / N, task.layout)

    def device_step(params, x):
        loss, grads, factors = grad_fn(params, x)
        return *psum((loss, grads)), pmean(factors)

    loss, grads, factors = on_the_whole_batch()
    found = run(device_step, task.params, task.batches[0])
    assert_equal(found, (loss, grads, change(factors, rows=1 / N)))


@pytest.mark.parametrize("remedy", [True, False], ids=["remedy", "none"])
@pytest.mark.parametrize(
    "rule",
    ["centered", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("paper", "official"))],
)
def test_training_equals_one_device(rule, remedy, x64):
    """`s` up to its scale is all that two of the rules use."""
    task = make_task("perceptron")
    tx = af.adafisherw(RATES[rule], task.layout, rule=rule)
    inside = pmean if remedy else lambda loss: loss

    @jax.jit
    @shard_map()
    def train_step(params, state, x):
        grad_fn = af.value_and_grad(lambda p, x: inside(task.loss_fn(p, x)), task.layout)
        loss, grads, factors = grad_fn(params, x)
        if not remedy:
            grads = jax.tree.map(lambda g: g / N, grads)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, pmean(loss)

    params, state, losses = task.params, tx.init(task.params), []
    for x in task.batches:
        params, state, loss = train_step(params, state, x)
        losses.append(loss)
    expected = on_one_device("perceptron", "float64", rule)
    if remedy:
        assert_close(Run(params, state, losses), expected, 1e-9)
    else:
        assert_close((params, losses), (expected.params, expected.losses), RTOL[rule])


# The released code adds 1e-6 to the spread of `s`, which is then no longer to scale.
RTOL = {"paper": 1e-9, "centered": 1e-9, "official": 1e-5}
