"""Whole train steps, curvature refreshed in each, against AdamW's: time, state, memory."""

from benchmarks import optimizers, plots, tasks
from benchmarks.measure import Contender, compiled, interleaved, nbytes, temp_bytes, timing
from benchmarks.steps import train_step

COLUMNS = "name ms ratio to_reach state_ratio temp_ratio temp_mb".split()
TASKS = ["wide_mlp", "transformer", "conv_net", "resnet18"]
BASELINE = "adamw"


def cases(options):
    return {
        name: [*optimizers.RULES, BASELINE]
        for name in tasks.names(TASKS, ["wide_mlp", *tasks.LARGE])
    }


def run(case, labels, options):
    task = tasks.make(case, options.quick)
    params, batch = task.params(), task.batch()
    contenders, temp, state = {}, {}, {}
    for name in dict.fromkeys([BASELINE, *labels]):
        step, start = train_step(task, name)
        first = start(params)
        program = compiled(step, first, *batch)
        contenders[name] = Contender(stepped(program, batch), first)
        temp[name], state[name] = temp_bytes(program), nbytes(first[1])
    seconds = interleaved(contenders, options.rounds)
    for name in labels:
        bar = 1.0 if case == "wide_mlp" else 1.03
        yield (
            name,
            timing(seconds[name], seconds[BASELINE])
            | {
                "to_reach": bar if name in optimizers.RULES else None,
                "state_ratio": state[name] / state[BASELINE],
                "temp_ratio": temp[name] / max(temp[BASELINE], 1),
                "temp_mb": temp[name] / 1e6,
            },
        )


def stepped(program, batch):
    return lambda state: program(state, *batch)


def plot(figure, rows):
    beside = {"state_ratio": ("optimizer's state", 0.505), "temp_ratio": ("temp memory", 1.01)}
    plots.ratios(figure, rows, "whole train step against AdamW's: time", beside=beside)
