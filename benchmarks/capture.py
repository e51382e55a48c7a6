"""Gradients with factors, `af.value_and_grad`, against `jax.value_and_grad`.

"every 10th": one program, which has factors `when` the step's number says so.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import adafisher_jax as af
from benchmarks import plots, tasks
from benchmarks.measure import Contender, interleaved, timing
from benchmarks.models import NNXMLP

COLUMNS = "name ms ratio to_reach".split()
NNX = "mlp in nnx"
TASKS = ["mlp", "transformer", "conv_net", "resnet18", NNX]
PLAIN, EVERY, TENTH = "plain", "every step", "every 10th"
CONVOLUTIONS = ["conv_net", "resnet18", "resnet50"]


def cases(options):
    return {name: [EVERY, TENTH] for name in tasks.names(TASKS, [*tasks.LARGE, NNX])}


def run(case, labels, options):
    make = in_nnx if case == NNX else in_linen
    seconds = interleaved(make(case, options), options.rounds)
    bars = {EVERY: 1.06 if case in CONVOLUTIONS else 1.03, TENTH: 1.01}
    for label in labels:
        yield label, timing(seconds[label], seconds[PLAIN]) | {"to_reach": bars[label]}


def in_linen(case, options):
    task = tasks.make(case, options.quick)
    given = task.params(), *task.batch()
    return contenders(jax, af, jax.jit, task.loss, task.layout, given)


def in_nnx(case, options):
    task = tasks.make("mlp", options.quick)
    inputs, labels = task.batch()
    sizes = task.shape[-1], task.model.width, task.model.depth, task.classes
    model = NNXMLP(*sizes, rngs=nnx.Rngs(0))

    def loss(model, inputs, labels):
        return tasks.cross_entropy(model(inputs), labels)

    layout = af.nnx.trace_layout(loss, model, inputs, labels)
    return contenders(nnx, af.nnx, nnx.jit, loss, layout, (model, inputs, labels))


def contenders(framework, ours, jit, loss, layout, given):
    plain = jit(framework.value_and_grad(loss))
    every = jit(ours.value_and_grad(loss, layout))
    tenth = jit(lambda due, *args: ours.value_and_grad(loss, layout, when=due)(*args))
    is_due = [jnp.bool(step == 0) for step in range(10)]

    def next_of_ten(state):
        step, _ = state
        return (step + 1) % 10, tenth(is_due[step], *given)

    return {
        PLAIN: Contender(lambda _: plain(*given)),
        EVERY: Contender(lambda _: every(*given)),
        TENTH: Contender(next_of_ten, (0, None), cycle=10),
    }


def plot(figure, rows):
    plots.ratios(figure, rows, "gradients with factors, time against gradients alone")
