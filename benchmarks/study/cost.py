"""What a step of an optimizer costs, for comparisons at equal time."""

import json
import pathlib

import jax
import numpy as np

from benchmarks import matrices
from benchmarks.measure import Contender, interleaved
from benchmarks.study.trial import Trial, begin

BASELINE, ROUNDS = "adamw", 10
CYCLES = {"soap": matrices.EVERY}  # after how many steps their cost repeats, where not after one


def ratios(trials: dict[str, Trial], folder: pathlib.Path, path: pathlib.Path) -> dict[str, float]:
    """For each optimizer's trial the time of a step over AdamW's, in whole cycles and in turn.

    They are kept in a file, for a study that goes on must plan the runs that it planned before.
    """
    stored = json.loads(path.read_text()) if path.exists() else {}
    where = "{0.problem}, {0.batch}".format(next(iter(trials.values())))
    known = stored.setdefault(where, {})
    if set(trials) - set(known):
        contenders = {name: _contender(trial, folder) for name, trial in trials.items()}
        seconds = interleaved(contenders, ROUNDS)
        found = {name: float(np.median(seconds[name] / seconds[BASELINE])) for name in trials}
        known = stored[where] = found | known
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(stored, indent=1) + "\n")
    return known


def _contender(trial, folder):
    _, state, step, batches, key = begin(trial, folder)
    batch = next(batches)

    def again(state):
        return step(trial.rate, *state, batch, key)[:3]

    return Contender(again, jax.block_until_ready(state), CYCLES.get(trial.optimizer, 1))
