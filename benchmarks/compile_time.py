"""How long JAX takes to trace, lower and compile a train step, against AdamW's.

XLA on a CPU compiles equal loops once: `loops` counts the different ones of a step.
"""

import re
import time

import jax
import numpy as np

from benchmarks import optimizers, plots, tasks
from benchmarks.measure import timing
from benchmarks.steps import train_step

COLUMNS = "name ms ratio to_reach trace_ms lower_ms compile_ms loops".split()
TASKS = ["mlp", "transformer", "transformer24", "conv_net", "resnet18"]
BASELINE, MOST = "adamw", 5  # rounds
COMPUTATION = re.compile(r"^%([\w.-]+) [^\n]*\{$(.*?)^\}$", re.M | re.S)


def cases(options):
    return {name: [*optimizers.RULES, BASELINE] for name in tasks.names(TASKS, tasks.LARGE)}


def run(case, labels, options):
    task = tasks.make(case, options.quick)
    params, batch = task.shapes(), jax.eval_shape(task.batch)
    _ = task.layout
    names = list(dict.fromkeys([BASELINE, *labels]))
    phases, loops = {name: [] for name in names}, {}
    for turn in range(min(options.rounds, MOST) + 1):
        for name in names[:: 1 if turn % 2 else -1]:
            times, program = cold(task, name, params, batch)
            phases[name].append(times)
            loops[name] = different_loops(program.as_text())
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
                "loops": loops[name],
            },
        )


def cold(task, name, params, batch):
    """Seconds to trace, lower and compile a step that JAX has not seen; and the program."""
    step, start = train_step(task, name)
    state = jax.eval_shape(start, params)
    jax.clear_caches()
    times = [time.perf_counter()]
    stage = jax.jit(step, donate_argnums=0).trace(state, *batch)
    times.append(time.perf_counter())
    stage = stage.lower()
    times.append(time.perf_counter())
    program = stage.compile()
    times.append(time.perf_counter())
    return np.diff(times), program


def different_loops(program):
    """How many fusions in the text of a compiled program differ in more than names."""
    texts = dict(COMPUTATION.findall(program))

    def nameless(computation):
        text = re.sub(
            r", (?:metadata|backend_config)=\{.*?\}+(?=,|$)", "", texts[computation], flags=re.M
        )
        text = re.sub(r"(?:calls|to_apply)=%([\w.-]+)", lambda one: nameless(one[1]), text)
        names = {}
        return re.sub(r"%[\w.-]+", lambda one: names.setdefault(one[0], str(len(names))), text)

    return len({nameless(one) for one in re.findall(r" fusion\(.*?calls=%([\w.-]+)", program)})


def plot(figure, rows):
    plots.ratios(figure, rows, "cold trace, lowering and compilation, time against AdamW's")
