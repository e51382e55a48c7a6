"""`python -m benchmarks study`: tune each optimizer, run its best on several seeds, and tell."""

import dataclasses
import functools
import json
import pathlib

from tqdm import tqdm

from benchmarks import report
from benchmarks.study import controls, cost, figures, plan, tables, trial
from benchmarks.study.problems import PROBLEMS
from benchmarks.study.results import Results
from examples.training import optimizers

OUT = pathlib.Path(__file__).parents[1] / "results" / "study"
NAMES = [*optimizers.NAMES, *controls.NAMES]
DEFAULT = ["sgd", "adamw", "adamw:0.99", "nadamw", "adafactor", "muon", "adafisher:centered"]


def add_arguments(parser):
    add = functools.partial(parser.add_argument, metavar="")
    add("--data", type=pathlib.Path, default=pathlib.Path("data"), help="folder of the data sets")
    add("--problems", nargs="+", default=[*PROBLEMS], help=f"of {' '.join(PROBLEMS)}")
    add(
        "--optimizers",
        nargs="+",
        default=DEFAULT,
        help=f"of {' '.join([*optimizers.NAMES, *controls.NAMES])}",
    )
    add("--rates", nargs="+", type=float, help="learning rates; default: half-decades")
    add("--set", nargs="+", default=[], help="further settings to try: damping=0.01,0.1 b1=0.9")
    add("--batches", nargs="+", type=int, help="their sizes; default: each problem's own")
    add("--protocol", default="steps", help=f"what is equal: {', '.join(plan.PROTOCOLS)}")
    add("--tuning-seeds", type=int, default=1, help="runs of every setting")
    add("--seeds", type=int, default=5, help="runs of the best setting")
    add("--out", type=pathlib.Path, default=OUT, help="folder; a study found there goes on")


def main(arguments):
    results = Results(arguments.out / "runs.jsonl")
    tuned, finals = {}, {}
    grids = _grids(arguments)
    each = [
        len(grid.trials(0)) * arguments.tuning_seeds + arguments.seeds for grid in grids.values()
    ]
    with tqdm(total=sum(each), unit="run") as progress:

        def run(one):
            progress.set_postfix_str(f"{one.problem}, {one.optimizer}, rate {one.rate:g}")
            if one not in results:
                results.add(one, trial.run(one, arguments.data))
            progress.update()
            return one

        for key, grid in grids.items():
            tuning = range(arguments.tuning_seeds)
            tuned[key] = [run(one) for seed in tuning for one in grid.trials(seed)]
            best = plan.best(tuned[key], results)
            seeds = range(arguments.seeds)
            finals[key] = [run(dataclasses.replace(best, seed=seed)) for seed in seeds]
    _tell(arguments, tuned, finals, results)


def _grids(arguments):
    """(problem and batch, optimizer) → what is tried."""
    grids = {}
    settings = plan.settings(arguments.set)
    for problem in arguments.problems:
        for batch in arguments.batches or [PROBLEMS[problem].batch]:
            label = f"{problem}, {batch}" if arguments.batches else problem
            costs = _costs(arguments, problem, batch)
            for name in arguments.optimizers:
                rates = plan.rates(name, arguments.rates)
                steps = plan.steps(problem, batch, arguments.protocol, costs[name])
                of_this = settings if name.startswith(("adafisher", "kfac")) else {}
                grids[label, name] = plan.Grid(problem, name, batch, steps, rates, of_this)
    return grids


def _costs(arguments, problem, batch):
    if arguments.protocol != "time":
        return dict.fromkeys(arguments.optimizers, 1.0)
    trials = {
        name: trial.Trial(problem, name, 0.0, 0, PROBLEMS[problem].steps, batch)
        for name in {cost.BASELINE, *arguments.optimizers}
    }
    return cost.ratios(trials, arguments.data, arguments.out / "costs.json")


def _tell(arguments, tuned, finals, results):
    """Stores and draws what was found, beside what is stored of other problems and optimizers."""
    path = arguments.out / "table.json"
    new = list(tables.rows(tuned, finals, results))
    under = report.circumstances(["kfac-jax", "psgd-jax", "optax-shampoo"], quick=False)
    rows = {row["name"]: row for row in [*report.stored(path, under), *new]}
    rows = sorted(rows.values(), key=_place)
    content = under | {"date": report.now(), "rows": rows}
    path.write_text(json.dumps(content) + "\n")
    for name, draw in {"curves": figures.curves, "rates": figures.robustness}.items():
        report.draw(arguments.out / f"{name}.png", draw, rows, under["machine"])
    print(report.table(tables.COLUMNS, rows))


def _place(row):
    """Problems and optimizers in the order of their lists, whenever they were run."""
    problem = row["problem"].partition(",")[0]
    return [*PROBLEMS].index(problem), row["batch"], NAMES.index(row["optimizer"])
