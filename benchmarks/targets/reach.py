"""When a run reaches a target, and what the targets are."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks.study.trial import Trial
from benchmarks.targets import search
from benchmarks.targets.run import EVERY

SMOOTHED = 3  # measurements
REFERENCE = "nadamw"
LOSSES = "train", "held_out"
Curves = Callable[[Trial], dict[str, Sequence[float]]]


def smooth(curve: Sequence[float]) -> np.ndarray:
    """The mean of each measurement and the two before it, of as many as there are."""
    parts = (curve[max(stop - SMOOTHED, 0) : stop] for stop in range(1, len(curve) + 1))
    return np.array([np.mean(part) for part in parts])


def final(curve: Sequence[float]) -> float:
    """The loss at the end of a run, infinite if it diverged: ended above where it began."""
    losses = smooth(curve)
    return float(losses[-1]) if losses[-1] <= losses[0] else math.inf


def steps(curve: Sequence[float], target: float) -> float:
    """After how many steps it is first no higher than the target; infinite if it diverged."""
    (found,) = np.nonzero(smooth(curve) <= target)
    reached = len(found) and math.isfinite(final(curve))
    return float(EVERY * (found[0] + 1)) if reached else math.inf


def target(task: str, loss: str, curves: Curves, effort: search.Effort) -> float:
    """The median loss at the end of the fresh runs of the reference's best setting."""
    tried = search.trials(task, REFERENCE, effort)
    best = min(tried, key=lambda one: final(curves(one)[loss]))
    return statistics.median(final(curves(seed)[loss]) for seed in search.fresh(best, effort))


def chosen(
    tried: Iterable[Trial], loss: str, curves: Curves, target: float, effort: search.Effort
) -> Trial:
    """Of the setting that reaches the target first and that of the lowest end, the better one.

    They are compared by the medians of their fresh runs, first those of steps to the target.
    """

    def ends(*trials):
        found = [curves(one)[loss] for one in trials]
        to_target = statistics.median(steps(curve, target) for curve in found)
        return to_target, statistics.median(map(final, found))

    candidates = {min(tried, key=ends), min(tried, key=lambda one: final(curves(one)[loss]))}
    return min(candidates, key=lambda one: ends(*search.fresh(one, effort)))
