"""`python -m benchmarks sizes`: whether a gain lasts as a model grows, at equal steps and time.

The model is that of the ladder "width". Each optimizer has the rate that was best for it on each
rung, as stored by `python -m benchmarks ladder`; one that was not run there is left out. At equal
time a run has as many steps as take as long as AdamW's run at equal steps. Its rate is the same.
"""

import argparse
import functools
import itertools
import math
import pathlib

import jax
from tqdm import tqdm

from benchmarks import ladder, report
from benchmarks.plots import COLOURS
from benchmarks.study import cost, trial
from benchmarks.study.ladders import LADDERS
from benchmarks.study.results import Results

OUT = pathlib.Path(__file__).with_name("results") / "sizes"
LADDER, BESIDE = "width", "nadamw"
OPTIMIZERS = [ladder.OURS, "muon", "soap", BESIDE]
COLUMNS = "name parameters cost loss to_nadamw steps_in_time loss_in_time in_time_to_nadamw".split()


def add_arguments(parser):
    add = functools.partial(parser.add_argument, metavar="")
    add("--data", type=pathlib.Path, default=pathlib.Path("data"), help="folder of the data sets")
    add("--ladder", type=pathlib.Path, default=ladder.OUT, help="folder of a ladder's runs")
    add("--out", type=pathlib.Path, default=OUT, help="folder; what is found there goes on")


def main(arguments: argparse.Namespace) -> None:
    """
    Raises:
      ValueError: if the ladder does not tell the best rates of those compared on a rung.
    """
    results = Results(arguments.out / "runs.jsonl")
    at_equal_steps = {
        (row["size"], row["optimizer"]): row
        for row in ladder.rows(Results(arguments.ladder / "runs.jsonl"))
        if row["ladder"] == LADDER and row["best_rate"] and row["best_loss"]
    }
    for size, name in itertools.product(LADDERS[LADDER], (ladder.OURS, BESIDE)):
        if (size, name) not in at_equal_steps:
            raise ValueError(
                f"{arguments.ladder}: got no best rate of {name} at width {size}. Run python -m "
                f"benchmarks ladder --ladders {LADDER} --optimizers {' '.join(OPTIMIZERS)}"
            )
    found = []
    for size, problem in tqdm(LADDERS[LADDER].items(), unit="size"):
        keys = [(size, name) for name in OPTIMIZERS]
        rows = [at_equal_steps[key] for key in keys if key in at_equal_steps]
        found += _rung(f"{LADDER} {size}", problem, rows, results, arguments)
    under = report.circumstances([], quick=False)
    report.store(arguments.out / "table.json", found, under, "python -m benchmarks sizes")
    report.draw(arguments.out / "sizes.png", plot, found, under["machine"])
    print(report.table(COLUMNS, found))


def _rung(rung, problem, rows, results, arguments):
    """The optimizers' rows for one size."""
    begin = functools.partial(trial.Trial, rung, seed=0, batch=problem.batch)
    names = [cost.BASELINE, *(row["optimizer"] for row in rows)]
    timed = {name: begin(optimizer=name, rate=0.0, steps=problem.steps) for name in names}
    costs = cost.ratios(timed, arguments.data, arguments.out / "costs.json")
    parameters = _parameters(rung, problem, arguments.data)
    found = []
    for row in rows:
        name = row["optimizer"]
        steps = max(round(problem.steps / costs[name]), 1)
        one = begin(optimizer=name, rate=row["best_rate"], steps=steps)
        if one not in results:
            results.add(one, trial.run(one, arguments.data))
        found.append(
            {
                "name": row["name"],
                "width": row["size"],
                "optimizer": name,
                "parameters": parameters,
                "rate": row["best_rate"],
                "seeds_at_equal_steps": row["seeds"],
                "cost": costs[name],
                "loss": row["best_loss"],
                "steps_in_time": steps,
                "loss_in_time": results[one].get("train_loss"),  # none if it diverged
            }
        )
    (beside,) = (row for row in found if row["optimizer"] == BESIDE)
    for row in found:
        row["to_nadamw"] = row["loss"] / beside["loss"]
        in_time = row["loss_in_time"]
        row["in_time_to_nadamw"] = in_time and in_time / beside["loss_in_time"]
    return found


def _parameters(rung, problem, folder):
    task = problem.task(rung, problem.read(folder), problem.batch, seed=0)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def plot(figure, found):
    """Losses relative to NAdamW's against the number of parameters."""
    figure.set_size_inches(8, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    axes[0].set_ylabel("training loss, relative to NAdamW's")
    for panel, key, title in zip(
        axes, ("to_nadamw", "in_time_to_nadamw"), ("equal steps", "equal time"), strict=True
    ):
        panel.set(title=title, xscale="log", xlabel="parameters")
        for name, colour in zip(OPTIMIZERS, COLOURS, strict=False):
            mine = [row for row in found if row["optimizer"] == name]
            xs, ys = ([row[of] or math.nan for row in mine] for of in ("parameters", key))
            panel.plot(xs, ys, "o-", color=colour, ms=3, lw=1.2, label=name)
    axes[0].legend(fontsize=7)
