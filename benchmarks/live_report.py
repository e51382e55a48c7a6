"""Whole train steps that return `diagnostics.report` as well, against the same without it."""

from adafisher_jax import diagnostics
from benchmarks import plots, tasks
from benchmarks.measure import Contender, compiled, interleaved, timing
from benchmarks.steps import train_step

COLUMNS = "name ms ratio".split()
RULE = "centered"
LABEL = "every step"


def cases(options):
    return {name: [LABEL] for name in tasks.names(["mlp", "transformer", "conv_net"], tasks.LARGE)}


def run(case, labels, options):
    task = tasks.make(case, options.quick)
    params, batch = task.params(), task.batch()
    plain, start = train_step(task, f"adafisher:{RULE}")

    def reporting(state, *batch):
        trained = plain(state[0], *batch)
        return trained, diagnostics.report(trained[1], task.layout, rule=RULE)

    def contender(step, first):
        program = compiled(step, first, *batch)
        return Contender(lambda state: program(state, *batch), first)

    first = start(params)
    found = diagnostics.report(first[1], task.layout, rule=RULE)
    contenders = {
        "without": contender(plain, start(params)),
        "with": contender(reporting, (first, found)),
    }
    seconds = interleaved(contenders, options.rounds)
    for label in labels:
        yield label, timing(seconds["with"], seconds["without"])


def plot(figure, rows):
    plots.ratios(figure, rows, "train steps with a live report, time against those without")
