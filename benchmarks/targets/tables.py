"""What was found: a row for each task and optimizer, and a row for each optimizer over tasks."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.plots import COLOURS
from benchmarks.targets import reach, search
from benchmarks.targets.reach import LOSSES, REFERENCE
from benchmarks.targets.rivals import CENTERED, RIVALS
from benchmarks.targets.tasks import HELD_BACK, TASKS

NEAR, MOST = 1.25, 4  # times the fewest steps
AGAINST = REFERENCE, "muon", "soap", "nadamw_cut"
IN_SECONDS = "adamw"
TITLES = {"train": "training loss", "held_out": "held-out loss"}
Row = dict[str, Any]


def rows(
    task: str, optimizers: Iterable[str], curves: reach.Curves, effort: search.Effort
) -> list[Row]:
    """One task's rows; a run that never reaches its target has None steps."""
    targets = {loss: reach.target(task, loss, curves, effort) for loss in LOSSES}
    return [_row(task, name, targets, curves, effort) for name in optimizers]


def _row(task, optimizer, targets, curves, effort):
    tried = search.trials(task, optimizer, effort)
    row = {
        "name": f"{task}, {optimizer}",
        "task": task,
        "optimizer": optimizer,
        "held_back": task in HELD_BACK,
        "budget": tried[0].steps,
    }
    for loss, target in targets.items():
        best = reach.chosen(tried, loss, curves, target, effort)
        fresh = [curves(one)[loss] for one in search.fresh(best, effort)]
        steps = [reach.steps(curve, target) for curve in fresh]
        tuning = [curves(one)[loss] for one in tried]
        found = {
            "target": target,
            "steps": statistics.median(steps),
            "steps_of_seeds": steps,
            "loss": statistics.median(map(reach.final, fresh)),
            "trial": tried.index(best),
            "settings": {"rate": best.rate} | dict(best.options),
            "tuning_steps": [reach.steps(curve, target) for curve in tuning],
            "tuning_losses": [reach.final(curve) for curve in tuning],
        }
        row |= {f"{loss}_{key}": _plain(value) for key, value in found.items()}
    return row


def _plain(value):
    """Whole numbers as such, four digits of others, None for what is infinite."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() else float(f"{value:.4g}")
    return value


def timed(found: Iterable[Row], seconds: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """The rows with the time of a step, and seconds to the targets, where they were measured."""
    with_time = []
    for row in found:
        step = seconds.get(row["task"], {}).get(row["optimizer"])
        row = row | {"step_ms": step and float(f"{1e3 * step:.4g}")}
        for loss in LOSSES:
            steps = row[f"{loss}_steps"]
            row[f"{loss}_seconds"] = float(f"{steps * step:.4g}") if step and steps else None
        with_time.append(row)
    return with_time


def summary(found: Sequence[Row]) -> list[Row]:
    """For each part of the tasks, loss and optimizer: how it does over the tasks.

    `first`: the share of tasks on which it has the fewest steps, ties included; `near`: within
    1.25 of them; `reached`: the share of its fresh runs that reach the target. `steps_to_…` are
    geometric means of its steps over the other's, `seconds_to_…` of seconds.
    """
    parts = {
        "all": found,
        "open": [row for row in found if not row["held_back"]],
        "held back": [row for row in found if row["held_back"]],
    }
    return [
        {"name": f"{part}, {loss}, {name}", "over": f"{part}, {loss}", "optimizer": name}
        | _over_tasks(mine, loss, name)
        for part, mine in parts.items()
        if mine
        for loss in LOSSES
        for name in dict.fromkeys(row["optimizer"] for row in mine)
    ]


def _over_tasks(found, loss, name):
    by_task: dict[str, dict[str, Row]] = {}
    for row in found:
        by_task.setdefault(row["task"], {})[row["optimizer"]] = row
    both = [rows for rows in by_task.values() if name in rows]
    factors = beyond_best(found, loss)[name]
    reached = [steps is not None for rows in both for steps in rows[name][f"{loss}_steps_of_seeds"]]
    row: Row = {
        "tasks": len(both),
        "first": float(np.mean(np.array(factors) == 1)),
        "near": float(np.mean(np.array(factors) <= NEAR)),
        "reached": float(np.mean(reached)),
    }
    for other in AGAINST:
        row[f"steps_to_{other}"] = _ratio(both, loss, name, other)
    row[f"seconds_to_{IN_SECONDS}"] = _ratio(both, loss, name, IN_SECONDS, "step_ms")
    return row


def _ratio(by_task, loss, name, other, cost=None):
    """The geometric mean of steps over those of another, and its standard error over the tasks.

    Never is twice the length of a run. `cost`: the key of what a step costs. None where that is not
    known, or fewer than two tasks are common.
    """
    pairs = [[rows[name], rows[other]] for rows in by_task if other in rows]
    costs = [[row.get(cost) if cost else 1 for row in pair] for pair in pairs]
    if len(pairs) < 2 or not all(map(all, costs)):
        return None
    steps = [[row[f"{loss}_steps"] or 2 * row["budget"] for row in pair] for pair in pairs]
    mine, its = np.transpose(np.multiply(steps, costs))
    logs = np.log(mine / its)
    ratio = np.exp(np.mean(logs))
    return [float(ratio), float(ratio * np.std(logs, ddof=1) / math.sqrt(len(logs)))]


def beyond_best(found: Sequence[Row], loss: str) -> dict[str, list[float]]:
    """For each optimizer and task, its steps over the fewest of any; infinite if it never does."""
    best: dict[str, float] = {}
    for row in found:
        steps = row[f"{loss}_steps"] or math.inf
        best[row["task"]] = min(best.get(row["task"], math.inf), steps)
    factors: dict[str, list[float]] = {}
    for row in found:
        steps, least = row[f"{loss}_steps"], best[row["task"]]
        factors.setdefault(row["optimizer"], []).append(steps / least if steps else math.inf)
    return factors


def profiles(figure: Any, found: Sequence[Row]) -> None:
    """For each factor, the share of tasks where an optimizer is within it of the fewest steps."""
    figure.set_size_inches(8, 3.8)
    panels = figure.subplots(1, len(LOSSES), sharey=True)
    panels[0].set_ylabel("share of the tasks")
    for axes, loss in zip(panels, LOSSES, strict=True):
        for index, (name, factors) in enumerate(beyond_best(found, loss).items()):
            reached = sorted(factor for factor in factors if math.isfinite(factor))
            shares = np.arange(len(reached) + 1) / len(factors)
            axes.step(
                [1, *reached, MOST],
                [*shares, shares[-1]],
                where="post",
                label=name,
                color=COLOURS[index % len(COLOURS)],
                ls=["-", "--", ":"][index // len(COLOURS)],
                lw=2.2 if name == CENTERED else 1.2,
            )
        axes.set(title=TITLES[loss], xlabel="steps over the fewest")
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, NEAR, 2, 4], ["1", str(NEAR), "2", "4"])
        axes.set_xlim(1, MOST)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=7)


def place(row: Row) -> tuple[int, int]:
    """In the order of tasks and optimizers."""
    return [*TASKS].index(row["task"]), [*RIVALS].index(row["optimizer"])
