"""`python -m benchmarks ladder`: which rate is best for a model in several sizes, and how good."""

import argparse
import dataclasses
import functools
import math
import pathlib

from tqdm import tqdm

from benchmarks import report
from benchmarks.plots import COLOURS
from benchmarks.study import plan, trial
from benchmarks.study.ladders import LADDERS, RUNGS
from benchmarks.study.results import Results

OUT = pathlib.Path(__file__).with_name("results") / "ladder"
RECOMMENDED = 3e-2
OURS = "adafisher:centered"
DEFAULT = ["adamw:0.99", "muon", OURS]
DRAWN = [OURS, "muon", "soap", "nadamw", "adamw:0.99", "adafisher:paper"]  # as far as run
COLUMNS = "name best_rate best_loss at_recommended lost held_out_loss seeds".split()


def add_arguments(parser):
    add = functools.partial(parser.add_argument, metavar="")
    add("--data", type=pathlib.Path, default=pathlib.Path("data"), help="folder of the data sets")
    add("--ladders", nargs="+", default=[*LADDERS], help=f"of {' '.join(LADDERS)}")
    add("--sizes", nargs="+", type=int, help="of these ladders; default: all")
    add("--optimizers", nargs="+", default=DEFAULT, help="as for a study")
    add("--rates", nargs="+", type=float, help="learning rates; default: half-decades")
    add("--seeds", type=int, default=1, help="runs of every rate")
    add("--out", type=pathlib.Path, default=OUT, help="folder; a ladder found there goes on")


def main(arguments: argparse.Namespace) -> None:
    results = Results(arguments.out / "runs.jsonl")
    wanted = [
        dataclasses.replace(one, seed=seed)
        for what in arguments.ladders
        for size in LADDERS[what]
        if not arguments.sizes or size in arguments.sizes
        for name in arguments.optimizers
        for one in _trials(f"{what} {size}", name, arguments.rates)
        for seed in range(arguments.seeds)
    ]
    with tqdm(wanted, unit="run") as progress:
        for one in progress:
            progress.set_postfix_str(f"{one.problem}, {one.optimizer}, rate {one.rate:g}")
            if one not in results:
                results.add(one, trial.run(one, arguments.data))
    _tell(arguments.out, results)


def _trials(rung, optimizer, rates):
    problem, rates = RUNGS[rung], plan.rates(optimizer, rates)
    return plan.Grid(rung, optimizer, problem.batch, problem.steps, rates, {}).trials(0)


def _tell(out, results):
    """Stores, draws and prints all that was run so far."""
    found = rows(results)
    under = report.circumstances([], quick=False)
    report.store(out / "table.json", found, under, "python -m benchmarks ladder")
    report.draw(out / "ladder.png", plot, found, under["machine"])
    print(report.table(COLUMNS, found))


def rows(results):
    """A row for each rung and optimizer, from every run.

    `losses` holds `[rate, training loss]`, means over seeds, None where one diverged. None of a
    single rate is best. `lost` is by how much, relative to the best, the loss at the recommended
    rate is higher.
    """
    runs = {}
    for one in sorted(results.records, key=lambda one: (_place(one), one.rate, one.seed)):
        runs.setdefault((one.problem, one.optimizer), {}).setdefault(one.rate, []).append(one)
    return [_row(*key, by_rate, results) for key, by_rate in runs.items()]


def _place(one):
    return [*RUNGS].index(one.problem), one.optimizer


def _row(rung, optimizer, by_rate, results):
    what, _, size = rung.rpartition(" ")
    losses = {rate: _mean("train_loss", ones, results) for rate, ones in by_rate.items()}
    best = min(losses, key=lambda rate: losses[rate])
    at = losses.get(RECOMMENDED)
    row = {
        "name": f"{rung}, {optimizer}",
        "ladder": what,
        "size": int(size),
        "rung": rung,
        "optimizer": optimizer,
        "steps": by_rate[best][0].steps,
        "seeds": len(by_rate[best]),
        "best_rate": best if len(losses) > 1 else None,
        "best_loss": losses[best],
        "at_recommended": at,
        "lost": at / losses[best] - 1 if at is not None and len(losses) > 1 else None,
        "held_out_loss": _mean("held_out_loss", by_rate[best], results),
    }
    numbers = {key: _finite(value) for key, value in row.items()}
    return numbers | {"losses": [[rate, _finite(loss)] for rate, loss in losses.items()]}


def _mean(key, ones, results):
    found = [results[one].get(key, math.inf) for one in ones]
    return sum(found) / len(found) if all(map(math.isfinite, found)) else math.inf


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(figure, found):
    """The best rate, and the loss there and at the recommended rate, against each ladder's size."""
    ladders = list(dict.fromkeys(row["ladder"] for row in found))
    figure.set_size_inches(2.8 * len(ladders) + 0.6, 5.2)
    rates, losses = figure.subplots(2, len(ladders), squeeze=False)
    rates[0].set_ylabel("best learning rate")
    losses[0].set_ylabel("training loss")
    for what, above, below in zip(ladders, rates, losses, strict=True):
        above.set(title=what, yscale="log")
        above.sharey(rates[0])
        sizes = sorted({row["size"] for row in found if row["ladder"] == what})
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, sizes)
            axes.tick_params(which="both", labelsize=7)
        for name, colour in zip(DRAWN, COLOURS, strict=True):
            mine = [row for row in found if (row["ladder"], row["optimizer"]) == (what, name)]
            if not mine:
                continue
            line = functools.partial(_line, mine, color=colour, ms=3, lw=1.2)
            line(above, "best_rate", "o-", label=name)
            line(below, "best_loss", "o-")
            if name == OURS:
                line(below, "at_recommended", "o:", label=f"{name}, at {RECOMMENDED:g}")
    shown = {}
    for axes in figure.axes:
        shown |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown, loc="outside upper center", ncols=4, fontsize=7)


def _line(found, axes, key, style, **options):
    values = [math.nan if row[key] is None else row[key] for row in found]
    axes.plot([row["size"] for row in found], values, style, **options)
