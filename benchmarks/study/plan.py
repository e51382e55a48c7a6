"""Which runs a study makes: a grid for each optimizer, and its best setting on several seeds."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.study.problems import PROBLEMS
from benchmarks.study.results import Results
from benchmarks.study.trial import Trial

PROTOCOLS = "steps", "epochs", "time"
# Half-decades, as many for each optimizer. Steps as long as gradients want larger ones, as do
# Adafactor's, relative to a weight's size, and AdaHessian's; K-FAC's inverse lengthens steps, and
# "official" divides an average of gradients, where momentum SGD takes ten times that, by little
# but 1e-3.
RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
LARGER = [1e-2, 3e-2, 1e-1, 3e-1, 1e0]
SMALLER = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
RATES_OF = {
    "sgd": LARGER,
    "adafactor": LARGER,
    "adahessian": LARGER,
    "kfac": SMALLER,
    "adafisher:official": SMALLER,
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is tried of one optimizer on one problem; `settings`: name → values it takes."""

    problem: str
    optimizer: str
    batch: int
    steps: int
    rates: Sequence[float]
    settings: dict[str, Sequence[Any]]

    def trials(self, seed: int) -> list[Trial]:
        options = [
            tuple(zip(self.settings, values, strict=True))
            for values in itertools.product(*self.settings.values())
        ]
        return [
            Trial(self.problem, self.optimizer, rate, seed, self.steps, self.batch, option)
            for option in options
            for rate in self.rates
        ]


def rates(optimizer: str, given: Sequence[float] | None) -> Sequence[float]:
    return given or RATES_OF.get(optimizer, RATES)


def settings(texts: Iterable[str]) -> dict[str, Sequence[Any]]:
    """From `name=value,value`."""
    pairs = [text.partition("=") for text in texts]
    return {name: json.loads(f"[{values}]") for name, _, values in pairs}


def steps(problem: str, batch: int, protocol: str, cost: float) -> int:
    """How many steps a run has.

    As many in each; or as many epochs, thus more steps of a smaller batch; or as much time, thus
    fewer steps of an optimizer whose step takes `cost` times AdamW's.
    """
    standard = PROBLEMS[problem]
    equal = {
        "steps": standard.steps,
        "epochs": standard.steps * standard.batch / batch,
        "time": standard.steps / cost,
    }
    return max(round(equal[protocol]), 1)


def best(trials: Iterable[Trial], results: Results) -> Trial:
    """The setting with the lowest training loss at its end, the mean over seeds."""
    losses: dict[Trial, list[float]] = {}
    for trial in trials:
        loss = results[trial].get("train_loss", math.inf)
        setting = dataclasses.replace(trial, seed=0)
        losses.setdefault(setting, []).append(loss if math.isfinite(loss) else math.inf)
    return min(losses, key=lambda setting: sum(losses[setting]))
