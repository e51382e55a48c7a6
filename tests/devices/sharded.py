"""Under `jax.jit` on eight devices: training equals one device, whatever is sharded.

Run by `tests/devices/test_processes.py`, in a process that has eight devices.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, auto_axes
from jax.sharding import PartitionSpec as P

import adafisher_jax as af
from adafisher_jax.paths import by_path
from benchmarks.communication import COLLECTIVES, INSTRUCTION, shape_bytes
from tests.devices.tasks import (
    Perceptron,
    Run,
    assert_close,
    make_step,
    make_task,
    on_one_device,
)
from tests.support.hand_made import layout_of, make_layer, random_factors, random_tree


def whole(path, leaf):
    return P()


def first_axis(path, leaf):
    """Fully sharded: each parameter along its first axis that eight devices can share."""
    found = [i for i, size in enumerate(leaf.shape) if size % 8 == 0]
    return P(*[None] * found[0], "data") if found else P()


def columns_then_rows(path, leaf):
    """Tensor parallel: column-parallel layers feed row-parallel ones."""
    columns = any(name in path for name in ("up", "head", "query", "key", "value", "conv"))
    if "attention" in path:  # kernels are (features, heads, head features), heads are two
        return P(None, None, "model") if columns else P(None, "model")
    if columns:
        return P(*[None] * (leaf.ndim - 1), "model")
    return P("model") if "down" in path and leaf.ndim > 1 else P()


class Plan(NamedTuple):
    """Who has what: a mesh, and a parameter's place on it. Batches lie along `data`."""

    mesh: dict
    spec: Callable


PLANS = {
    "data parallel": Plan({"data": 8}, whole),
    "fully sharded": Plan({"data": 8}, first_axis),
    "tensor parallel": Plan({"data": 2, "model": 4}, columns_then_rows),
}
any_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
any_task = pytest.mark.parametrize("name", ["transformer", "convnet"])


def make_mesh(plan, kind=AxisType.Auto):
    return jax.make_mesh(tuple(plan.mesh.values()), tuple(plan.mesh), (kind,) * len(plan.mesh))


def place(plan, mesh, params):
    def put(keys, leaf):
        spec = plan.spec(jax.tree_util.keystr(keys), leaf)
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, params)


def on(mesh, x):
    """A batch along `data`, of which each process brings its part."""
    rows = len(x) // jax.process_count()
    own = x[jax.process_index() * rows :][:rows]
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), own)


def replicate_rest(mesh, state):
    """Puts on the mesh what `init` did not put there with the parameters."""

    def put(leaf):
        placed = isinstance(leaf.sharding, NamedSharding)
        return leaf if placed else jax.device_put(leaf, NamedSharding(mesh, P()))

    return jax.tree.map(put, state)


def equivalent(a, b):
    """Whether two trees of arrays lie alike: `P("x")` and `P("x", None)` do."""
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), a, b)
    return all(jax.tree.leaves(same))


def padded(array):
    spec = tuple(array.sharding.spec)
    return (*spec, *[None] * (array.ndim - len(spec)))


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def train(task, rule, mesh, params, every=1):
    """The steps with shardings left to the compiler; it is to settle after the first."""
    tx, train_step = make_step(task, rule)
    start = params, tx.init(params)
    assert equivalent(start[1][0].mu, params)
    (params, state), losses, before = start, [], None
    for step, x in enumerate(task.batches):
        params, state, loss = train_step(params, state, on(mesh, x), refresh=step % every == 0)
        losses.append(loss)
        assert types((params, state)) == types(start)
        assert equivalent(state[0].mu, params)
        assert before is None or equivalent((params, state), before)
        before = params, state
    assert train_step._cache_size() == 2  # from where `init` has put the factors, and settled
    return Run(params, state, losses)


def train_pinned(task, rule, mesh, params, every=1):
    """The steps with the shardings of the first state given for all the others."""
    replicated = NamedSharding(mesh, P())
    tx, _ = make_step(task, rule)
    state = replicate_rest(mesh, tx.init(params))
    pins = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    _, train_step = make_step(task, rule, out_shardings=(*pins, replicated))
    start, losses = (params, state), []
    for step, x in enumerate(task.batches):
        params, state, loss = train_step(params, state, on(mesh, x), refresh=step % every == 0)
        losses.append(loss)
    assert types((params, state)) == types(start)
    assert equivalent((params, state), start)
    assert equivalent(state[0].mu, params)
    assert train_step._cache_size() == min(every, 2)  # with factors, without
    return Run(params, state, losses)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(PLANS[name], id=name, marks=[pytest.mark.slow] * (name != "tensor parallel"))
        for name in PLANS
    ],
)
def test_training_equals_one_device(plan, x64):
    task, mesh = make_task("transformer"), make_mesh(plan)
    run = train(task, "centered", mesh, place(plan, mesh, task.params))
    assert_close(run, on_one_device("transformer", "float64", "centered"), 1e-9)
    of_up, of_down = (run.state[0].factors[f"block/{name}"] for name in ("up", "down"))
    model = "model" if "model" in mesh.shape else None
    if plan is not PLANS["fully sharded"]:  # where the compiler is free to choose
        assert padded(of_up.h) == padded(of_down.s) == (None, None, None)
        assert padded(of_up.s) == (None, None, model)
        assert padded(of_down.h) == padded(of_down.mean) == (None, model, None)


@any_plan
def test_with_shardings_given_each_kind_of_step_is_compiled_once(plan, x64):
    """Every other step reuses the factors."""
    task, mesh = make_task("convnet"), make_mesh(plan)
    run = train_pinned(task, "paper", mesh, place(plan, mesh, task.params), every=2)
    assert_close(run, on_one_device("convnet", "float64", "paper", every=2), 1e-9)


@pytest.mark.slow
@any_plan
@pytest.mark.parametrize("name", ["transformer", "convnet"])
@pytest.mark.parametrize("rule", ["paper", "official", "centered"])
@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-9), ("float32", 1e-3)])
def test_every_rule_and_type_equals_one_device(plan, name, rule, dtype, rtol):
    """Pooled features hardly vary: to center them costs three digits, of either type."""
    with jax.enable_x64(dtype == "float64"):
        task, mesh = make_task(name, dtype), make_mesh(plan)
        run = train_pinned(task, rule, mesh, place(plan, mesh, task.params), every=2)
        assert_close(run, on_one_device(name, dtype, rule, every=2), rtol)


# Explicit axes: shardings are part of the types, also of the cotangents that carry factors.


@pytest.mark.parametrize(
    ("name", "plan", "model"),
    [
        ("convnet", "data parallel", None),
        ("perceptron", "data parallel", None),
        ("perceptron", "tensor parallel", Perceptron(out=P("data"))),
    ],
)
def test_on_explicit_axes_it_equals_one_device(name, plan, model, x64):
    task, mesh = make_task(name, model=model), make_mesh(PLANS[plan], AxisType.Explicit)
    expected = on_one_device(name, "float64", "centered")
    with jax.set_mesh(mesh):
        params = place(PLANS[plan], mesh, task.params)
        run = train_pinned(task, "centered", mesh, params)
    assert_close(run, expected, 1e-9)


class Stack(nn.Module):
    """Four layers in one array."""

    @nn.compact
    def __call__(self, x):
        step = nn.scan(
            lambda layer, x, _: (jnp.tanh(layer(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=4,
        )
        return step(nn.Dense(32), x, None)[0]


@pytest.mark.parametrize("spec", [("data",), (None, "data"), (None, None, "data")])
def test_parameters_on_an_explicit_axis_step_as_on_one_device(spec, x64):
    x, model = jax.random.normal(jax.random.key(0), (16, 32)), Stack()
    params = jax.tree.map(jnp.float64, model.init(jax.random.key(1), x))
    loss_fn = lambda params, x: jnp.mean(model.apply(params, x) ** 2)  # noqa: E731
    layout = af.trace_layout(loss_fn, params, x)
    tx = af.adafisher(3e-2, layout, rule="centered")
    _, grads, factors = jax.jit(af.value_and_grad(loss_fn, layout))(params, x)

    def steps(params, grads):
        state = tx.init(params)
        for _ in range(3):
            updates, state = jax.jit(tx.update)(grads, state, params, factors=factors)
        return updates

    expected = steps(params, grads)
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        put = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P(*spec[: leaf.ndim])))  # noqa: E731
        found = steps(*jax.tree.map(put, (params, grads)))
    assert_close(found, expected, 1e-9)


@pytest.mark.parametrize(
    ("shape", "axes", "specs"),
    [
        ((64, 32), "in0 out0", [P("x", "y"), P("x", "y")]),
        ((64, 32), "in0 out0", [P("x", "y"), P("y", "x")]),
        ((32, 64), "in0 out0", [P("x"), P("x")]),
        ((32, 64), "in0 out0", [P(None, ("x", "y"))]),
        ((8, 16, 32), "in0 in1 out0", [P("x", None, "y")]),
        ((8, 16, 32), "in0 in1 out0", [P("x", "y"), P("x", "y")]),
        ((8, 16, 32), "in0 in1 out0", [P(None, "x", "y")]),
        ((32, 8, 16), "in0 out0 out1", [P("x", "y"), P("x", "y")]),
        ((4, 32, 64), "stack0 in0 out0", [P("x", "y"), P("x", "y")]),
    ],
)
def test_weights_on_explicit_axes_step_as_on_one_device(shape, axes, specs, x64):
    """Alike or not, along either side or both."""
    bias = " ".join(axis for axis in axes.split() if not axis.startswith("in"))
    layers = [make_layer(str(i), "dense", shape, axes, bias) for i in range(len(specs))]
    places = {layer.weight.path: spec for layer, spec in zip(layers, specs, strict=True)}
    rng = np.random.default_rng(0)
    grads, factors = random_tree(rng, *layers), random_factors(rng, *layers)
    tx = af.scale_by_adafisher(layout_of(*layers), rule="centered")

    def steps(grads):
        state = tx.init(grads)
        for _ in range(3):
            updates, state = jax.jit(tx.update)(grads, state, factors=factors)
        return updates, state

    expected = steps(grads)
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        leaves, treedef = by_path(grads)
        found = steps(
            treedef.unflatten(
                jax.device_put(leaf, NamedSharding(mesh, places.get(path, P())))
                for path, leaf in leaves.items()
            )
        )
    assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("plan", ["fully sharded", "tensor parallel"])
def test_a_model_for_automatic_axes_gets_its_factors_on_explicit_ones(plan, x64):
    """Within `auto_axes` the compiler chooses."""
    task, mesh = make_task("convnet"), make_mesh(PLANS[plan], AxisType.Explicit)
    grad_fn = af.value_and_grad(task.loss_fn, task.layout)
    expected = jax.jit(grad_fn)(task.params, task.batches[0])
    with jax.set_mesh(mesh):
        params = place(PLANS[plan], mesh, task.params)
        automatic = auto_axes(grad_fn, out_sharding=P())
        found = jax.jit(automatic)(params, on(mesh, task.batches[0]))
    assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_an_update_gathers_no_weight(kind):
    """Devices exchange vectors: along each side of a weight 32 directions and a mean, once."""
    weights = {
        make_layer("a", "dense", (512, 256), "in0 out0", "out0"): P("data", "model"),
        make_layer("b", "dense", (512, 256), "in0 out0", "out0"): P("data", "model"),
        make_layer("wide", "dense", (256, 512), "in0 out0"): P("model", "data"),
        make_layer("heads", "dense", (256, 4, 64), "in0 out0 out1"): P("data", "model"),
        make_layer("conv", "conv", (3, 3, 64, 128), "in0 in1 in2 out0"): P(0, 0, "data", "model"),
    }
    weights = {x: P(*(axis or None for axis in spec)) for x, spec in weights.items()}
    places = {layer.weight.path: spec for layer, spec in weights.items()}
    mesh = jax.make_mesh((4, 2), ("data", "model"), (kind,) * 2)

    def on_mesh(leaf, spec=None):
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec or P())
        )

    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        leaves, treedef = by_path(random_tree(rng, *weights))
        params = treedef.unflatten(
            on_mesh(leaf, places.get(path, P())) for path, leaf in leaves.items()
        )
        factors = jax.tree.map(on_mesh, random_factors(rng, *weights))
        tx = af.scale_by_adafisher(layout_of(*weights), rule="centered")
        state = jax.tree.map(on_mesh, jax.eval_shape(tx.init, params))._replace(mu=params)
        pins = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
        update = jax.jit(lambda g, s, f: tx.update(g, s, factors=f), out_shardings=pins)
        program = update.lower(params, state, factors).compile().as_text()
    exchanged = [
        shape_bytes(array) / 4
        for _, shape, operation, _ in INSTRUCTION.findall(program)
        if operation.removesuffix("-start") in COLLECTIVES
        for array in re.findall(r"\w+\[[\d,]*\]", shape)
    ]
    smallest = min(layer.weight.size for layer in weights)
    assert 0 < max(exchanged) <= smallest / 2
    assert sum(exchanged) <= sum(33 * (layer.fan_in + layer.fan_out) for layer in weights)


# Metadata.


def test_boxed_parameters_train_as_plain_ones(x64):
    """`nn.with_partitioning` boxes each parameter with its place on the mesh."""
    task, mesh = make_task("perceptron"), make_mesh(PLANS["tensor parallel"])
    names = {"up": {"kernel": (None, "model")}, "down": {"kernel": ("model", None)}}
    boxed = {
        layer: {
            name: nn.Partitioned(leaf, names[layer].get(name, (None,) * leaf.ndim))
            for name, leaf in leaves.items()
        }
        for layer, leaves in task.params.items()
    }
    shardings = nn.get_sharding(boxed, mesh)
    params = jax.device_put(boxed, shardings)
    task = task._replace(params=params)
    run = train_pinned(task, "centered", mesh, params)
    assert nn.unbox(run.params)["up"]["kernel"].sharding.spec == P(None, "model")
    expected = on_one_device("perceptron", "float64", "centered")
    assert_close(nn.unbox(run.params), expected.params, 1e-9)
    assert_close(run.losses, expected.losses, 1e-9)
