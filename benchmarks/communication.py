"""How many bytes devices exchange, read off compiled programs that are never run.

A transformer on eight virtual CPU devices. Its whole train step with the rule "centered", with
weights on every device and batches sharded, with factors and without; and the optimizer's part
alone with weights, gradients and momentum sharded, each weight along its first axis. A collective
has the bytes of its operands or of its result, whichever are more, on each device.
"""

import contextlib
import re

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adafisher_jax as af
from adafisher_jax.paths import by_path
from benchmarks import optimizers
from benchmarks.measure import nbytes

DEVICES, BATCH, LENGTH, VOCABULARY, LAYERS = 8, 32, 64, 4096, 4
COLUMNS = "name exchanged_bytes of_parameters largest_bytes".split()
WIDTHS = {f"train step, width {width}": width for width in (256, 512)}
KINDS = {
    "update, automatic axes": AxisType.Auto,
    "update, explicit axes": AxisType.Explicit,
}
WITHOUT, WITH, ADDED = "without factors", "with factors", "added by factors"
OPTIMIZERS = ["adamw", "muon", "adafisher:centered"]

COLLECTIVES = "all-reduce all-gather reduce-scatter all-to-all collective-permute".split()
INSTRUCTION = re.compile(r"%?([\w.-]+) = (\(.*?\)|\S+) ([a-z-]+)\((.*?)\)")


class Transformer(nn.Module):
    layers: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, self.width)(tokens)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x += nn.SelfAttention(self.width // 64)(nn.LayerNorm()(x), mask)
            x += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


class Task:
    """The transformer, its loss and the shapes of its parameters and batches."""

    def __init__(self, layers, width):
        self.model = Transformer(layers, width)
        self.tokens = jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32)
        init = lambda: self.model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))  # noqa: E731
        self.params = jax.eval_shape(init)["params"]
        self.layout = af.trace_layout(self.loss, self.params, self.tokens)

    def loss(self, params, tokens):
        logits = self.model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def cases(options):
    use_virtual_devices()
    return {case: [WITHOUT, WITH, ADDED] for case in WIDTHS} | dict.fromkeys(KINDS, OPTIMIZERS)


def use_virtual_devices():
    """To be called before JAX looks for devices."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)


def run(case, labels, options):
    layers = 1 if options.quick else LAYERS
    task = Task(layers, WIDTHS.get(case, max(WIDTHS.values())))
    found = train_steps(task) if case in WIDTHS else updates(task, KINDS[case], labels)
    for label in labels:
        yield label, found[label]


def train_steps(task):
    without, with_factors = (sum(exchanged(train_step(task, refresh))) for refresh in (False, True))
    found = {WITHOUT: without, WITH: with_factors, ADDED: with_factors - without}
    return {label: relative(total, task) for label, total in found.items()}


def relative(total, task):
    return {"exchanged_bytes": total, "of_parameters": total / nbytes(task.params)}


def train_step(task, with_factors):
    """Compiled with each device's share of the batch, and everything else on each."""
    tx = af.adafisherw(1e-3, task.layout, rule="centered")
    capture = af.value_and_grad(task.loss, task.layout)

    def step(params, opt_state, tokens):
        if with_factors:
            loss, grads, factors = capture(params, tokens)
        else:
            loss, grads = jax.value_and_grad(task.loss)(params, tokens)
            factors = None
        updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
        return optax.apply_updates(params, updates), opt_state, loss

    mesh = jax.make_mesh((DEVICES,), ("data",), (AxisType.Auto,))
    everywhere, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    step = jax.jit(step, in_shardings=(everywhere, everywhere, by_rows), out_shardings=everywhere)
    opt_state = jax.eval_shape(tx.init, task.params)
    return step.lower(task.params, opt_state, task.tokens).compile().as_text()


def updates(task, kind, labels):
    found = {}
    for label in labels:
        try:
            sizes = exchanged(update(task, label, kind))
        except Exception as error:  # a peer's own: the row says which
            found[label] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        else:
            found[label] = relative(sum(sizes), task) | {"largest_bytes": max(sizes, default=0)}
    return found


def update(task, name, kind):
    """Compiled with weights and momentum along their first axis, and the rest on each device."""
    mesh = jax.make_mesh((DEVICES,), ("data",), (kind,))
    tx = optimizers.make(name, task.layout)
    weights = {layer.weight.path for layer in task.layout.layers if layer.kind != "norm"}

    def place(path, leaf):
        spec = P("data") if path in weights and leaf.shape[0] % DEVICES == 0 else P()
        return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), NamedSharding(mesh, spec))

    def replicate(leaf):
        placed = isinstance(leaf.sharding, NamedSharding)
        return leaf if placed else jax.device_put(leaf, NamedSharding(mesh, P()))

    def step(params, opt_state, grads, factors):
        updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
        return optax.apply_updates(params, updates), opt_state

    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        leaves, treedef = by_path(task.params)
        params = treedef.unflatten(place(*leaf) for leaf in leaves.items())
        opt_state = jax.tree.map(replicate, tx.init(params))
        factors = {layer.path: layer.zeros() for layer in task.layout.layers}
        factors = jax.tree.map(replicate, factors) if name in optimizers.RULES else None
        pins = jax.tree.map(lambda leaf: leaf.sharding, (params, opt_state))
        program = jax.jit(step, out_shardings=pins).lower(params, opt_state, params, factors)
        return program.compile().as_text()


def exchanged(program):
    """Bytes of each collective of a compiled program's text."""
    instructions = [match.groups() for match in INSTRUCTION.finditer(program)]
    size = {name: shape_bytes(shape) for name, shape, *_ in instructions}
    return [
        max(size[name], sum(size[one] for one in re.findall(r"%([\w.-]+)", operands)))
        for name, _, operation, operands in instructions
        if operation.removesuffix("-start") in COLLECTIVES
    ]


def shape_bytes(shape):
    """Of a shape as the compiler prints it: `f32[256,4]{1,0}`, or a tuple of such."""
    total = 0
    for kind, sizes in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape):
        size = int(re.sub(r"\D", "", kind) or 8) // 8
        for n in sizes.split(",") if sizes else ():
            size *= int(n)
        total += size
    return total


def plot(figure, rows):
    rows = [row for row in rows if "failed" not in row]
    figure.set_size_inches(7, 0.6 + 0.3 * len(rows))
    axes = figure.add_subplot()
    bars = axes.barh([row["name"] for row in rows], [row["of_parameters"] for row in rows])
    axes.bar_label(bars, fmt="%.3g", fontsize=8)
    axes.set(xscale="log", title="bytes exchanged, relative to those of the parameters")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
