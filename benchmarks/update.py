"""The optimizer's part of a step, `tx.update` and `apply_updates`, against AdamW's.

Gradients and factors are fixed; `kept` are steps without factors, between two refreshes. `gb_per_s`
counts the bytes that must move: parameters, gradients and momentum in, parameters and momentum out,
and one more array in and out for AdamW; `of_copy` is its share of what a pass `x + 1` over as many
bytes as SGD moves reaches, timed in the same rounds. Each row is measured beside that pass,
AdamW and SGD, whichever rows are asked for.
"""

import jax
import jax.numpy as jnp
import numpy as np

import adafisher_jax as af
from benchmarks import optimizers, plots, tasks
from benchmarks.measure import contender, interleaved, nbytes, timing
from benchmarks.steps import own, update_step

COLUMNS = "name ms ratio to_reach must_move_mb gb_per_s of_copy".split()
TASKS = ["wide_mlp", "resnet50", "transformer24"]
COPY, BASELINE = "copy", "adamw"
PLAIN = (BASELINE, "sgd")
PASSES = {BASELINE: 7}  # over the parameters; 5 for the others


def cases(options):
    names = tasks.names(TASKS, [*TASKS, "vit_b", "gpt2_small"])
    kept = [rule + optimizers.KEPT for rule in optimizers.RULES]
    return {name: [*optimizers.RULES, *kept, *PLAIN] for name in names}


def run(case, labels, options):
    task = tasks.make(case, options.quick)
    params, grads = (random(task.shapes(), seed, 0.1) for seed in range(2))
    wanted = {layer.path: jax.eval_shape(layer.zeros) for layer in task.layout.layers}
    factors = {
        path: af.Factor(h=f.h**2 + f.mean**2, s=f.s**2, rows=f.rows**2 + 1, mean=f.mean)
        for path, f in random(wanted, 2, 1.0).items()
    }

    def enter(name):
        tx = optimizers.make(name.removesuffix(optimizers.KEPT), task.layout)
        state = own((params, jax.jit(tx.init)(params)))
        given = factors if name in optimizers.RULES else None
        return contender(update_step(tx), state, grads, given)

    size = nbytes(params)
    for name in labels:
        contenders = {one: enter(one) for one in dict.fromkeys([*PLAIN, name])}
        contenders[COPY] = contender(lambda x: x + 1, jnp.zeros(5 * size // 8, jnp.float32))
        seconds = interleaved(contenders, options.rounds)
        moved = PASSES.get(name, 5) * size
        row = timing(seconds[name], seconds[BASELINE])
        yield (
            name,
            row
            | {
                "to_reach": None if name in PLAIN else to_reach(case),
                "must_move_mb": moved / 1e6,
                "gb_per_s": moved / (1e6 * row["ms"]),
                "of_copy": 1e3 * moved / row["ms"] / (5 * size / np.median(seconds[COPY])),
            },
        )


def random(tree, seed, scale):
    """Numbers in the shapes of a tree."""
    rng = np.random.default_rng(seed)

    def make(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * np.float32(scale))

    return jax.tree.map(make, tree)


def to_reach(case):
    if case == "wide_mlp":
        return tasks.names([0.75], [0.72])[0]
    return 0.85


def plot(figure, rows):
    plots.ratios(figure, rows, "update and apply, time against AdamW's")
