"""Train steps of other optimizers, against AdaFisher's with the rule "centered".

Each has its package's defaults but for what `optimizers` and `steps.kfac` say. kfac-jax: curvature
in each step, inverses in every fifth. PSGD (`kron`): preconditioners updated in 3 steps of 100,
where its schedule ends, or "updating" in each, as it begins. Shampoo: roots taken in every tenth
step, or "updating" in each, its default.
"""

from benchmarks import optimizers, plots, tasks
from benchmarks.measure import contender, interleaved, timing
from benchmarks.steps import kfac, train_step

COLUMNS = "name ms ratio at_least".split()
PACKAGES = ["kfac-jax", "psgd-jax", "optax-shampoo"]
BASELINE = "adafisher:centered"
MIXED = {  # name: how often each of two kinds of step is taken
    "psgd": {"psgd, updating": 0.03, "psgd, keeping": 0.97},
    "shampoo": {"shampoo, updating": 0.1, "shampoo, keeping": 0.9},
}
UPDATING = ["psgd, updating", "shampoo, updating"]
FIRST_ORDER = ["sgd", "adamw", "adafactor", "muon"]
LABELS = [*FIRST_ORDER, *optimizers.RULES, "psgd", "shampoo", *UPDATING, "kfac"]
AT_LEAST = {"kfac": 5.0} | dict.fromkeys(["adamw", "adafactor", "muon", *MIXED], 1.0)


def cases(options):
    names = tasks.names(["mlp", "transformer", "conv_net"], tasks.LARGE)
    return dict.fromkeys(names, LABELS)


def run(case, labels, options):
    task = tasks.make(case, options.quick)
    params, batch = task.params(), task.batch()

    def enter(name):
        if name == "kfac":
            return kfac(task, params, batch)
        step, start = train_step(task, name)
        return contender(step, start(params), *batch)

    wanted = [part for label in labels for part in MIXED.get(label, [label])]
    contenders, failed = {}, {}
    for name in dict.fromkeys([BASELINE, *wanted]):
        try:
            contenders[name] = enter(name)
            contenders[name].run(1)
        except Exception as error:  # a peer's own: the row says which
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            contenders.pop(name, None)
    if BASELINE in failed:
        raise RuntimeError(failed[BASELINE])
    seconds = interleaved(contenders, options.rounds)
    for label in labels:
        parts = MIXED.get(label, {label: 1.0})
        errors = [failed[part] for part in parts if part in failed]
        if errors:
            yield label, {"failed": errors[0]}
        else:
            mean = sum(share * seconds[part] for part, share in parts.items())
            found = timing(mean, seconds[BASELINE])
            yield label, found | {"at_least": AT_LEAST.get(label)}


def plot(figure, rows):
    title = 'train step, time against AdaFisher\'s, "centered"'
    plots.ratios(figure, rows, title, bar="at_least", log=True)
