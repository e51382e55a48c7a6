"""What the compiled programs are made of: no timings, only structure."""

import dataclasses
import gc
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import adafisher_jax as af
from adafisher_jax import alike
from adafisher_jax.rules import centered
from benchmarks.compile_time import different_loops
from tests.support.hand_made import LAYERS, layout_of, random_factors, random_tree

RULES = ["paper", "official", "centered"]
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\S+?\[[\d,]*\])\S* ([a-z-]+)\(", re.M)


def instructions(program):
    """(name, shape, operation) of what runs as a unit: fusions, not what is inside them."""
    entry = program.as_text().split("\nENTRY ")[1]
    return [found.groups() for found in INSTRUCTION.finditer(entry)]


def products_of(program, least):
    """How many matrix products and convolutions have a result of at least that many entries."""
    found = INSTRUCTION.findall(program.as_text())
    return sum(o in ("dot", "convolution") and size(shape) >= least for _, shape, o in found)


def size(shape):
    return int(np.prod([int(n) for n in re.findall(r"\d+", shape.split("[")[1])]))


class Net(nn.Module):
    """Layers of unlike sizes, so that a shape tells whose it is."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(384)(x))
        return nn.Dense(192, use_bias=False)(x)


class ConvNet(nn.Module):
    kernel: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(24, (self.kernel, self.kernel))(x))
        return nn.Conv(40, (self.kernel, self.kernel), strides=2)(x).mean((1, 2))


def problem(model, x):
    def loss_fn(params, x):
        return jnp.mean(jnp.square(model.apply({"params": params}, x)))

    params = model.init(jax.random.key(0), x)["params"]
    return loss_fn, params, af.trace_layout(loss_fn, params, x)


def no_factors(layout):
    return {layer.path: layer.zeros() for layer in layout.layers}


def compile_update(tx, params, factors):
    def update(params, state, grads, factors):
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(update, donate_argnums=(0, 1))
    return donating.lower(params, tx.init(params), params, factors).compile()


@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_is_updated_in_as_few_passes_as_its_rule_needs(rule):
    """One writes its momentum and one the parameter; "centered" keeps a step and its excess."""
    _, params, layout = problem(Net(), jnp.ones((8, 640)))
    tx = af.adafisherw(1e-3, layout, rule=rule)
    program = compile_update(tx, params, no_factors(layout))
    for layer in layout.layers:
        shape = "f32[{},{}]".format(*layer.weight.shape)
        made = [o for _, found, o in instructions(program) if found == shape and o != "parameter"]
        excess = ["dot"] if rule == "centered" else []
        fusions = 3 if rule == "centered" else 2
        assert sorted(made) == excess + ["fusion"] * fusions, (layer.path, made)
    steps = 2 * 4 * (384 + 192) * 640 if rule == "centered" else 0
    assert program.memory_analysis().temp_size_in_bytes < steps + 0.1 * 4 * 384 * 640


@pytest.mark.parametrize("rule", ["paper", "official"])
def test_a_step_between_refreshes_is_only_momentum_and_division(rule):
    """Two loops for each parameter, as momentum alone would need; the rest are single numbers."""
    _, params, layout = problem(Net(), jnp.ones((8, 640)))
    tx = af.adafisherw(1e-3, layout, rule=rule)
    program = compile_update(tx, params, None)
    loops = [shape for _, shape, o in instructions(program) if o == "fusion" and size(shape) > 2]
    assert len(loops) == 2 * len(jax.tree.leaves(params)), loops
    assert "reduce" not in program.as_text()


def test_groups_take_their_steps_one_after_another(monkeypatch):
    """What "centered" keeps meanwhile is that of two or three groups, however many there are."""
    monkeypatch.setattr(alike, "MOST", 512 * 512)  # each layer is one

    def temp(depth):
        model = nn.Sequential([nn.Dense(512) for _ in range(depth)])
        _, params, layout = problem(model, jnp.ones((8, 512)))
        tx = af.adafisherw(1e-3, layout, rule="centered")
        program = compile_update(tx, params, no_factors(layout))
        return program.memory_analysis().temp_size_in_bytes

    assert temp(8) < temp(4) + 0.5 * 4 * 512 * 512


@pytest.mark.slow
def test_a_cpu_steps_a_group_a_few_layers_at_a_time(monkeypatch):
    """Its memory is then that of these few layers, and the steps are the same."""
    model = nn.Sequential([nn.Dense(256) for _ in range(8)])
    _, params, layout = problem(model, jnp.ones((8, 256)))
    tx = af.adafisherw(1e-3, layout, rule="centered")
    grads = jax.tree.map(lambda x: x + jnp.arange(x.size).reshape(x.shape) / x.size, params)
    ones = jax.tree.map(jnp.ones_like, no_factors(layout))
    found = []
    for at_once in (2 * 256 * 256, 8 * 256 * 256):
        monkeypatch.setattr(centered, "AT_ONCE", at_once)
        jax.clear_caches()
        program = compile_update(tx, params, ones)
        temp = program.memory_analysis().temp_size_in_bytes
        own = jax.tree.map(jnp.copy, params)  # to be donated
        found.append((temp, program(own, tx.init(params), grads, ones)))
    (few, one), (all_, other) = found
    assert few < 0.6 * all_
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-9)


def test_further_parts_of_a_group_are_the_loops_of_those_before(monkeypatch):
    """XLA on a CPU compiles equal loops once."""
    monkeypatch.setattr(centered, "AT_ONCE", 2 * 64 * 64)
    loops = []
    for layers in (6, 12):
        model = nn.Sequential([nn.Dense(64) for _ in range(layers)])
        _, params, layout = problem(model, jnp.ones((8, 64)))
        tx = af.adafisherw(1e-3, layout, rule="centered")
        program = compile_update(tx, params, jax.tree.map(jnp.ones_like, no_factors(layout)))
        loops.append(different_loops(program.as_text()))
    assert loops[1] - loops[0] < 15, loops  # of three parts more


def namesake(layer, name):
    """A layer that differs from another in nothing but its path."""

    def renamed(leaf):
        return leaf and dataclasses.replace(leaf, path=f"{name}/{leaf.path}")

    leaves = map(renamed, (layer.weight, layer.bias))
    return af.Layer(f"{name}/{layer.path}", layer.kind, *leaves, layer.groups)


@pytest.mark.parametrize("kind", ["batch", "stacks"])
def test_layers_of_several_matrices_step_alike_in_parts_and_together(kind, monkeypatch):
    three = [namesake(LAYERS[kind], name) for name in "abc"]
    rng = np.random.default_rng(0)
    grads, factors = random_tree(rng, *three), random_factors(rng, *three)
    tx = af.scale_by_adafisher(layout_of(*three), rule="centered")
    found = []
    for at_once in (centered.AT_ONCE, 2 * three[0].leaves[0].size):
        monkeypatch.setattr(centered, "AT_ONCE", at_once)
        jax.clear_caches()
        update = jax.jit(lambda state: tx.update(grads, state, factors=factors))
        found.append(update(update(tx.init(grads))[1]))
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-5)


def grads_programs(model, x):
    """Gradients alone, and with factors."""
    loss_fn, params, layout = problem(model, x)
    full = af.value_and_grad(loss_fn, layout)
    return tuple(jax.jit(f).lower(params, x).compile() for f in (jax.value_and_grad(loss_fn), full))


@pytest.mark.parametrize(
    ("model", "x"),
    [(Net(), jnp.ones((960, 640))), (ConvNet(5), jnp.ones((8, 20, 20, 3)))],
    ids=["dense", "conv"],
)
def test_capture_multiplies_no_activations_anew_and_stores_none(model, x):
    """As many large products as without factors, no patches, and no further temporary memory."""
    plain, full = grads_programs(model, x)
    largest = max(size(shape) for _, shape, _ in instructions(plain))
    assert max(size(shape) for _, shape, _ in instructions(full)) <= largest
    products = [products_of(program, 10_000) for program in (plain, full)]
    assert products[0] == products[1] > 0
    temp = [program.memory_analysis().temp_size_in_bytes for program in (plain, full)]
    assert temp[1] <= temp[0] + 0.1 * 4 * largest


def test_statistics_of_a_convolution_do_not_grow_with_the_kernel_s_area():
    x = jnp.ones((8, 24, 24, 3))

    def added(kernel):
        plain, full = (p.cost_analysis()["flops"] for p in grads_programs(ConvNet(kernel), x))
        return full - plain

    assert added(7) < 2.5 * added(3)  # by area it would be 5.4 times as much


def test_a_step_stays_on_the_device():
    loss_fn, params, layout = problem(Net(), jnp.ones((8, 640)))
    tx = af.adafisher(1e-3, layout, rule="centered")

    @jax.jit
    def step(params, state, x):
        _, grads, factors = af.value_and_grad(loss_fn, layout)(params, x)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state

    program = step.lower(params, tx.init(params), jnp.ones((8, 640))).compile()
    text = program.as_text()
    leaves = r" (infeed|outfeed|send|recv|copy-start|conditional)(-start|-done)?\("
    assert not re.search(leaves, text)
    assert not re.search(r" (while|conditional)\(", text)  # none asks how to go on
    assert "callback" not in text
    assert re.search(r" (dot|fusion)\(", text)  # the pattern is how operations are written


def test_a_step_that_decides_on_factors_branches_around_statistics_only():
    """XLA on CPU has no fast convolutions within branches."""
    x = jnp.ones((8, 24, 24, 3))
    loss_fn, params, layout = problem(ConvNet(), x)
    plain = jax.jit(jax.value_and_grad(loss_fn)).trace(params, x)
    deciding = jax.jit(lambda due, *args: af.value_and_grad(loss_fn, layout, when=due)(*args))
    program = deciding.trace(True, params, x)
    conds = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "cond"]
    assert len(conds) == 2 * len(layout.layers)
    assert "conv" not in str([eqn.params["branches"] for eqn in conds])
    texts = [str(traced.jaxpr) for traced in (plain, program)]
    assert texts[0].count("conv_general_dilated[") == texts[1].count("conv_general_dilated[") == 5
    compiled = [traced.lower().compile() for traced in (plain, program)]
    temp = [one.memory_analysis().temp_size_in_bytes for one in compiled]
    assert temp[1] < 1.05 * temp[0]


class Deep(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = x + nn.Dense(64)(nn.relu(nn.LayerNorm()(x)))
        return x


def test_groups_of_the_same_layers_are_traced_once(monkeypatch):
    """The update's program calls one function for all of them."""
    monkeypatch.setattr(alike, "MOST", 64 * 64)
    _, params, layout = problem(Deep(5), jnp.ones((2, 64)))
    tx = af.scale_by_adafisher(layout.only(f"Dense_{i}" for i in range(5)), rule="centered")
    zeros = no_factors(layout)
    lowered = jax.jit(lambda g, s: tx.update(g, s, factors=zeros)).lower(params, tx.init(params))
    assert lowered.as_text().count("func.func private @step_group") == 1


@pytest.mark.parametrize(
    "rule", [pytest.param(x, marks=() if x == "centered" else pytest.mark.slow) for x in RULES]
)
def test_a_further_like_layer_adds_to_the_program_what_its_weight_needs(rule):
    """All of a vector's size, and what directions need among themselves, is one for all layers."""

    def operations(depth):
        _, params, layout = problem(Deep(depth), jnp.ones((2, 64)))
        tx = af.adafisherw(1e-3, layout, rule=rule)
        program = compile_update(tx, params, no_factors(layout))
        found = [o for _, _, o in instructions(program)]
        assert sum(o == "custom-call" for o in found) <= 2
        return sum(o in ("fusion", "dot", "custom-call") for o in found)

    added = (operations(10) - operations(6)) / 4
    # Momentum and step of four parameters; a weight's matrix products and what lies between.
    assert added <= (24 if rule == "centered" else 8.5), added


def test_updates_outside_of_jit_leave_nothing_behind():
    layer, rng = LAYERS["dense"], np.random.default_rng(0)
    tx = af.scale_by_adafisher(layout_of(layer), rule="paper")
    grads, factors = random_tree(rng, layer), random_factors(rng, layer)
    state = tx.init(grads)

    def objects_after(updates):
        for _ in range(updates):
            tx.update(grads, state, factors=factors)
        gc.collect()
        return len(gc.get_objects())

    objects_after(3)  # the first fill the caches of JAX
    before = objects_after(1)
    assert objects_after(20) - before < 20
