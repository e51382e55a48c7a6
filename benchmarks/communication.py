"""How many bytes devices exchange for the factors, read off the compiled train step.

    python -m benchmarks communication
    python benchmarks/communication.py [--layers 4] [--widths 256 512] [--json communication.json]

A transformer trains data-parallel on eight virtual CPU devices. Its train step is compiled with
factors and without, never run; the operands of all its collectives are added up.
"""

import argparse
import json
import os
import pathlib
import platform
import re

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adafisher_jax as af

DEVICES, BATCH, LENGTH, VOCABULARY = 8, 32, 64, 4096
LAYERS, WIDTHS = 4, [256, 512]
COLUMNS = "layers width gradient_bytes added_bytes added_percent".split()

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


def compile_step(model, with_factors):
    """The compiled train step, and the bytes of its parameters."""

    def loss_fn(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    mesh = jax.make_mesh((DEVICES,), ("data",), (jax.sharding.AxisType.Auto,))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    params = params["params"]
    layout = af.trace_layout(loss_fn, params, tokens)
    tx = af.adafisherw(1e-3, layout, rule="centered")
    capture = af.value_and_grad(loss_fn, layout)

    def train_step(params, opt_state, tokens):
        if with_factors:
            loss, grads, factors = capture(params, tokens)
        else:
            loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
            factors = None
        updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
        return optax.apply_updates(params, updates), opt_state, loss

    everywhere, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    placed = (everywhere, everywhere, by_rows)
    step = jax.jit(train_step, in_shardings=placed, out_shardings=everywhere)
    opt_state = jax.eval_shape(tx.init, params)
    return step.lower(params, opt_state, tokens).compile(), nbytes(params)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def shape_bytes(shape):
    """Of a shape as the compiler prints it: `f32[256,4]{1,0}`, or a tuple of such."""
    total = 0
    for kind, sizes in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape):
        size = int(re.sub(r"\D", "", kind) or 8) // 8
        for n in sizes.split(",") if sizes else ():
            size *= int(n)
        total += size
    return total


def communicated(text):
    """Kind of collective → bytes of its operands on each device, in a compiled program."""
    instructions = [match.groups() for match in INSTRUCTION.finditer(text)]
    size = {name: shape_bytes(shape) for name, shape, *_ in instructions}
    found = dict.fromkeys(COLLECTIVES, 0)
    for _, _, operation, operands in instructions:
        kind = operation.removesuffix("-start")
        if kind in found:
            found[kind] += sum(size[name] for name in re.findall(r"%([\w.-]+)", operands))
    return found


def measure(layers, width):
    model = Transformer(layers, width)
    plain, gradients = compile_step(model, with_factors=False)
    full, _ = compile_step(model, with_factors=True)
    without, with_factors = communicated(plain.as_text()), communicated(full.as_text())
    added = sum(with_factors.values()) - sum(without.values())
    return {
        "layers": layers,
        "width": width,
        "gradient_bytes": gradients,
        "without_factors": without,
        "with_factors": with_factors,
        "added_bytes": added,
        "added_percent": round(100 * added / gradients, 3),
    }


def print_table(rows):
    print("layers  width  gradients, bytes  without factors   with factors       added")
    for row in rows:
        sums = [sum(row[name].values()) for name in ("without_factors", "with_factors")]
        print(
            f"{row['layers']:6}  {row['width']:5}  {row['gradient_bytes']:16,}"
            f"  {sums[0]:15,}  {sums[1]:13,}  {row['added_bytes']:9,} = {row['added_percent']} %"
        )


def use_virtual_devices():
    """To be called before JAX looks for devices."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)


def cases(options):
    use_virtual_devices()
    return {"transformer": [f"width {width}" for width in WIDTHS]}


def run(case, labels, options):
    for label in labels:
        yield label, measure(1 if options.quick else LAYERS, int(label.split()[1]))


def plot(figure, rows):
    figure.set_size_inches(5, 3)
    axes = figure.add_subplot()
    bars = axes.bar([row["label"] for row in rows], [row["added_percent"] for row in rows])
    axes.bar_label(bars, fmt="%.2f %%")
    axes.set_ylabel("added by factors,\n% of the gradients' bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = pathlib.Path(__file__).with_suffix(".json")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--json", default=default, help="where to write the table, with versions")
    arguments = parser.parse_args()

    use_virtual_devices()
    rows = [measure(arguments.layers, width) for width in arguments.widths]
    print_table(rows)
    versions = {package.__name__: package.__version__ for package in (jax, flax, optax)}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}"
    with open(arguments.json, "w") as file:
        json.dump({"machine": machine, "versions": versions, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
