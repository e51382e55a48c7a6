"""`python -m benchmarks targets`: how soon optimizers reach targets that tuned NAdamW sets."""

import argparse
import functools
import json
import pathlib

import numpy as np
from tqdm import tqdm

from benchmarks import report
from benchmarks.measure import interleaved
from benchmarks.study.results import Results
from benchmarks.targets import run, search, tables
from benchmarks.targets.rivals import RIVALS
from benchmarks.targets.tasks import HELD_BACK, OPEN, TASKS

OUT = pathlib.Path(__file__).parents[1] / "results" / "targets"
PARTS = {"open": [*OPEN], "held_back": [*HELD_BACK], "all": [*TASKS]}
QUICK = search.Effort(trials=3, steps=20)
ROUNDS = 10
COLUMNS = ["name", "train_steps", "train_seconds", "held_out_steps", "held_out_seconds", "step_ms"]
OVER_TASKS = [
    *("name", "tasks", "first", "near", "reached"),
    *(f"steps_to_{other}" for other in tables.AGAINST),
    f"seconds_to_{tables.IN_SECONDS}",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = functools.partial(parser.add_argument, metavar="")
    add("--data", type=pathlib.Path, default=pathlib.Path("data"), help="folder of the data sets")
    add("--tasks", nargs="+", default=["open"], help=f"of {' '.join([*PARTS, *TASKS])}")
    add("--optimizers", nargs="+", default=[*RIVALS], help=f"of {' '.join(RIVALS)}")
    parser.add_argument("--time", action="store_true", help="time steps too, in turn")
    parser.add_argument("--quick", action="store_true", help="a few short runs, to try it")
    add("--out", type=pathlib.Path, default=OUT, help="folder; what is found there goes on")


def main(arguments: argparse.Namespace) -> None:
    effort = QUICK if arguments.quick else search.Effort()
    results = Results(arguments.out / "runs.jsonl")
    tasks = [task for part in arguments.tasks for task in PARTS.get(part, [part])]
    with tqdm(unit="run") as progress:

        def curves(trial):
            if trial not in results:
                progress.set_postfix_str(f"{trial.problem}, {trial.optimizer}")
                results.add(trial, run.run(trial, arguments.data))
                progress.update()
            return results[trial]

        for task in tasks:
            if arguments.time:
                _time(task, arguments)
            _tell(tables.rows(task, arguments.optimizers, curves, effort), arguments)
    rows = json.loads((arguments.out / "summary.json").read_text())["rows"]
    print(report.table(OVER_TASKS, rows))


def _time(task, arguments):
    """Seconds of a step of each optimizer, all in turn, kept in a file."""
    path = arguments.out / "seconds.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    known = stored.setdefault(task, {})
    if set(arguments.optimizers) - set(known):
        contenders = {
            name: run.contender(
                search.trials(task, name, search.Effort(trials=1))[0], arguments.data
            )
            for name in arguments.optimizers
        }
        found = interleaved(contenders, ROUNDS)
        known |= {name: float(np.median(each)) / run.TIMED for name, each in found.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(stored, indent=1) + "\n")


def _tell(new, arguments):
    """Stores and draws new rows beside those of other tasks and optimizers."""
    out = arguments.out
    under = report.circumstances(["psgd-jax"], arguments.quick)
    rows = {row["name"]: row for row in [*report.stored(out / "table.json", under), *new]}
    path = out / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    found = tables.timed(sorted(rows.values(), key=tables.place), seconds)
    content = under | {"date": report.now(), "rows": found}
    (out / "table.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    command = "python -m benchmarks targets"
    report.store(out / "summary.json", tables.summary(found), under, command)
    report.draw(out / "profiles.png", tables.profiles, found, under["machine"])
    names = {row["name"] for row in new}
    print(report.table(COLUMNS, [row for row in found if row["name"] in names]))
