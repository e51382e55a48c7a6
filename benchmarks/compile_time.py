"""How long JAX takes to trace, lower and compile a train step, against AdamW's."""

import time

import jax
import numpy as np

from benchmarks import optimizers, plots, tasks
from benchmarks.measure import timing
from benchmarks.steps import train_step

COLUMNS = "ms ratio quartiles to_reach trace_ms lower_ms compile_ms".split()
TASKS = ["mlp", "transformer", "conv_net", "resnet18"]
BASELINE, MOST = "adamw", 5  # rounds


def cases(options):
    return {name: [*optimizers.RULES, BASELINE] for name in tasks.names(TASKS, tasks.LARGE)}


def run(case, labels, options):
    task = tasks.make(case, options.quick)
    params, batch = task.shapes(), jax.eval_shape(task.batch)
    _ = task.layout
    names = list(dict.fromkeys([BASELINE, *labels]))
    phases = {name: [] for name in names}
    for turn in range(min(options.rounds, MOST) + 1):
        for name in names[:: 1 if turn % 2 else -1]:
            phases[name].append(cold(task, name, params, batch))
    found = {name: np.array(measured[1:]) for name, measured in phases.items()}
    for name in labels:
        trace, lower, compile_ = 1e3 * np.median(found[name], 0)
        total, baseline = found[name].sum(1), found[BASELINE].sum(1)
        yield (
            name,
            timing(total, baseline)
            | {
                "to_reach": 1.2 if name in optimizers.RULES else None,
                "trace_ms": float(trace),
                "lower_ms": float(lower),
                "compile_ms": float(compile_),
            },
        )


def cold(task, name, params, batch):
    """Seconds to trace, lower and compile a step that JAX has not seen."""
    step, start = train_step(task, name)
    state = jax.eval_shape(start, params)
    jax.clear_caches()
    times = [time.perf_counter()]
    stage = jax.jit(step, donate_argnums=0).trace(state, *batch)
    times.append(time.perf_counter())
    stage = stage.lower()
    times.append(time.perf_counter())
    stage.compile()
    times.append(time.perf_counter())
    return np.diff(times)


def plot(figure, rows):
    plots.ratios(figure, rows, "cold trace, lowering and compilation, time against AdamW's")
