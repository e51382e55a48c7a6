"""Which settings of an optimizer are run on a task: the same share of every space, once for all."""

import dataclasses

from scipy.stats import qmc

from benchmarks.study.trial import Trial
from benchmarks.targets.rivals import RIVALS
from benchmarks.targets.tasks import TASKS

SEED = 0  # of the runs that settings are chosen by; fresh ones follow it


@dataclasses.dataclass(frozen=True)
class Effort:
    """How many settings of each optimizer are tried, on how many fresh seeds the best is run.

    `steps`: of a run, where not the task's own.
    """

    trials: int = 20
    seeds: int = 3
    steps: int | None = None


def trials(task: str, optimizer: str, effort: Effort) -> list[Trial]:
    """A scrambled Halton sequence, through the optimizer's space."""
    problem, space = TASKS[task], RIVALS[optimizer].space
    found = []
    for shares in qmc.Halton(len(space), rng=0).random(effort.trials):
        settings = {
            name: float(f"{draw(share):.4g}")
            for (name, draw), share in zip(space.items(), shares, strict=True)
        }
        peak = settings.pop("rate")
        steps = effort.steps or problem.steps
        options = tuple(settings.items())
        found.append(Trial(task, optimizer, peak, SEED, steps, problem.batch, options))
    return found


def fresh(trial: Trial, effort: Effort) -> list[Trial]:
    """The same settings on other seeds."""
    seeds = range(SEED + 1, SEED + 1 + effort.seeds)
    return [dataclasses.replace(trial, seed=seed) for seed in seeds]
