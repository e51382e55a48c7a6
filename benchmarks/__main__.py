"""Measures, and stores what was measured.

    python -m benchmarks update --only "paper"
    python -m benchmarks all

A suite is a module of this package: `cases(options)` tells its tables' parts and their rows'
labels, `run(case, labels, options)` measures some, `plot(figure, rows)` draws them. The columns
`to_reach` and `at_least` are what this project aims at.
"""

import argparse
import dataclasses
import importlib
import pathlib
import shlex
import sys

from tqdm import tqdm

from benchmarks import ladder, pages, report, sizes
from benchmarks.study import command as study_command
from benchmarks.targets import command as targets_command

SUITES = {
    "update": "the optimizer's part of a step, against AdamW's",
    "capture": "gradients with factors, against gradients alone",
    "train_step": "whole train steps, against AdamW's",
    "peers": "train steps of other optimizers",
    "growth": "time, memory and statistics against sizes",
    "compile_time": "trace, lowering and compilation, against AdamW's",
    "live_report": "train steps with diagnostics.report, against those without",
    "gpu_program": "kernels and bytes as compiled for a GPU (none needed, not in `all`)",
    "communication": "bytes that eight devices exchange (CPU, not in `all`)",
}
APART = ("gpu_program", "communication")  # they set up JAX in their own way
ALL = [name for name in SUITES if name not in APART]
EPILOG = (
    'In tables, "to reach" is the largest ratio this project aims at, "at least" the smallest; '
    "quartiles are those of the ratio over rounds."
)
RESULTS = pathlib.Path(__file__).with_name("results")


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure: rounds, and whether with tiny sizes."""

    rounds: int
    quick: bool


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="suite", required=True, metavar="suite")
    for name, text in {**SUITES, "all": ", ".join(ALL)}.items():
        command = commands.add_parser(name, help=text, description=text, epilog=EPILOG)
        command.add_argument("--only", default="", help="rows whose name contains this")
        command.add_argument("--rounds", type=int, help="default 20; with --quick 3")
        command.add_argument("--quick", action="store_true", help="tiny sizes, to try it")
        command.add_argument("--out", type=pathlib.Path, help=f"default {RESULTS.name}/ here")
    text = "optimizers on real tasks, each at its own best learning rate"
    study = commands.add_parser("study", help=text, description=text)
    study_command.add_arguments(study)
    text = "the best learning rate of a model in several sizes"
    ladder.add_arguments(commands.add_parser("ladder", help=text, description=text))
    text = "whether a gain lasts as a model grows, at equal steps and at equal time"
    sizes.add_arguments(commands.add_parser("sizes", help=text, description=text))
    text = "how soon optimizers reach targets that a tuned NAdamW sets"
    targets_command.add_arguments(commands.add_parser("targets", help=text, description=text))
    text = "writes the tables of the documentation's pages, from what is stored"
    commands.add_parser("tables", help=text, description=text)
    arguments = parser.parse_args()
    apart = {
        "study": study_command.main,
        "ladder": ladder.main,
        "sizes": sizes.main,
        "targets": targets_command.main,
        "tables": pages.main,
    }
    if arguments.suite in apart:
        apart[arguments.suite](arguments)
        return
    quick = arguments.quick
    options = Options(arguments.rounds or (3 if quick else 20), quick)
    out = arguments.out or (RESULTS / "quick" if quick else RESULTS)
    suites = ALL if arguments.suite == "all" else [arguments.suite]
    if not sum(measure(name, arguments.only, options, out) for name in suites):
        sys.exit("nothing was measured")


def measure(name, only, options, out):
    """Runs a suite's wanted rows, stores and prints them; returns how many they are."""
    suite = importlib.import_module(f"benchmarks.{name}")
    cases = suite.cases(options)
    order = [f"{case}, {label}" for case, labels in cases.items() for label in labels]
    wanted = {
        case: [label for label in labels if only in f"{case}, {label}"]
        for case, labels in cases.items()
    }
    total = sum(map(len, wanted.values()))
    if not total:
        print(f"{name}: no row's name contains {only!r}: {'; '.join(order)}")
        return 0
    under = report.circumstances(getattr(suite, "PACKAGES", []), options.quick)
    anywhere = argparse.ArgumentParser(add_help=False)
    anywhere.add_argument("--out")  # says nothing of what was measured
    _, words = anywhere.parse_known_args()
    command = shlex.join(["python", "-m", "benchmarks", *words])
    path = out / f"{name}.json"
    try:
        rows = {row["name"]: row for row in (report.stored(path, under) if only else [])}
    except ValueError as error:
        sys.exit(str(error))
    new = []
    with tqdm(total=total, desc=name, unit="row") as progress:
        for case, labels in wanted.items():
            if not labels:
                continue
            progress.set_postfix_str(case)
            for label, found in suite.run(case, labels, options):
                row = {"name": f"{case}, {label}", "case": case, "label": label, **found}
                rows[row["name"]] = row | {"date": report.now()}
                new.append(row)
                found = [rows[row] for row in order if row in rows]
                report.store(path, found, under, command)  # at once, should a later one fail
                progress.update()
            report.draw(path.with_suffix(".png"), suite.plot, found, under["machine"])
    print(report.table(suite.COLUMNS, new))
    return total


if __name__ == "__main__":
    main()
