"""Gradients with factors, `af.value_and_grad`, against `jax.value_and_grad`.

"every 10th": nine steps of ten are `jax.value_and_grad`'s, a mean of the two times measured.
"""

import jax
from flax import nnx

import adafisher_jax as af
from benchmarks import plots, tasks
from benchmarks.measure import Contender, interleaved, timing
from benchmarks.models import NNXMLP
from benchmarks.steps import gradient

COLUMNS = "ms ratio quartiles to_reach".split()
NNX = "mlp in nnx"
TASKS = ["mlp", "transformer", "conv_net", "resnet18", NNX]
EVERY, TENTH = "every step", "every 10th"
CONVOLUTIONS = ["conv_net", "resnet18", "resnet50"]


def cases(options):
    return {name: [EVERY, TENTH] for name in tasks.names(TASKS, [*tasks.LARGE, NNX])}


def run(case, labels, options):
    make = in_nnx if case == NNX else in_linen
    seconds = interleaved(make(case, options), options.rounds)
    plain, full = seconds["plain"], seconds["full"]
    found = {EVERY: full, TENTH: 0.1 * full + 0.9 * plain}
    bars = {EVERY: 1.06 if case in CONVOLUTIONS else 1.03, TENTH: 1.01}
    for label in labels:
        yield label, timing(found[label], plain) | {"to_reach": bars[label]}


def in_linen(case, options):
    task = tasks.make(case, options.quick)
    given = task.params(), *task.batch()
    find = {"plain": gradient(task, False), "full": gradient(task, True)}
    return {name: repeat(jax.jit(function), given) for name, function in find.items()}


def in_nnx(case, options):
    task = tasks.make("mlp", options.quick)
    inputs, labels = task.batch()
    sizes = task.shape[-1], task.model.width, task.model.depth, task.classes
    model = NNXMLP(*sizes, rngs=nnx.Rngs(0))

    def loss(model, inputs, labels):
        return tasks.cross_entropy(model(inputs), labels)

    layout = af.nnx.trace_layout(loss, model, inputs, labels)
    find = {"plain": nnx.value_and_grad(loss), "full": af.nnx.value_and_grad(loss, layout)}
    given = model, inputs, labels
    return {name: repeat(nnx.jit(function), given) for name, function in find.items()}


def repeat(function, given):
    return Contender(lambda _: function(*given))


def plot(figure, rows):
    plots.ratios(figure, rows, "gradients with factors, time against gradients alone")
