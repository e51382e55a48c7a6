"""When a run reaches a target, and what the targets are."""

import math
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
    """The loss at which the worst of the fresh runs of the reference's best setting ends.

    Settings of which a fresh run diverges are passed over.
    """
    tried = search.trials(task, REFERENCE, effort)
    for one in sorted(tried, key=lambda one: final(curves(one)[loss])):
        worst = max(final(curves(seed)[loss]) for seed in search.fresh(one, effort))
        if math.isfinite(worst):
            return worst
    raise ValueError(f"{task}: every setting of {REFERENCE} diverges")


def chosen(tried: Iterable[Trial], loss: str, curves: Curves, target: float) -> Trial:
    """The setting that reaches the target first; of several or none, that with the lowest end."""

    def key(one):
        curve = curves(one)[loss]
        return steps(curve, target), final(curve)

    return min(tried, key=key)
