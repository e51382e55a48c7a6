"""What a study found, as rows: one for each problem and optimizer."""

import math

import numpy as np

from benchmarks.study.trial import interval

COLUMNS = (
    "problem optimizer best_rate train_loss held_out_loss held_out_accuracy least_held_out"
    " state_bytes seeds"
).split()


def rows(tuned, finals, results):
    """A row for each (problem, optimizer); `tuned`, `finals`: these → their trials.

    A quantity of the final trials is `[mean, standard error]`. `tuning` holds `[rate, training
    loss, held-out loss]`, means over the tuning seeds, of the setting with the lowest training
    loss; the lowest of these held-out losses is `least_held_out`. `curve` holds `[step, training
    loss]`, the mean over seeds.
    """
    for (problem, optimizer), trials in finals.items():
        records = [results[trial] for trial in trials]
        first, tuning = trials[0], _tuning(tuned[problem, optimizer], results)
        row = {
            "name": f"{problem}, {optimizer}",
            "problem": problem,
            "optimizer": optimizer,
            "steps": first.steps,
            "batch": first.batch,
            "best_rate": first.rate,
            "options": dict(first.options),
            "seeds": len(trials),
            "diverged": sum(bool(record["diverged"]) for record in records),
            "state_bytes": records[0]["state_bytes"],
            "tuning": tuning,
            "tuning_seeds": len({trial.seed for trial in tuned[problem, optimizer]}),
            "least_held_out": min((held for *_, held in tuning if held is not None), default=None),
            "curve": _mean([record["curve"] for record in records], interval(first)),
        }
        for key in ("train_loss", "held_out_loss", "held_out_accuracy"):
            row[key] = _summary([record[key] for record in records if key in record])
        if shares := [record["above_damping"] for record in records if "above_damping" in record]:
            row["above_damping"] = _mean(shares, interval(first))
        yield row


def _tuning(trials, results):
    settings = {}
    for trial in trials:
        settings.setdefault((trial.rate, trial.options), []).append(results[trial])
    best = {}
    for (rate, _), records in settings.items():
        found = [
            float(np.mean([record.get(key, math.inf) for record in records]))
            for key in ("train_loss", "held_out_loss")
        ]
        found = found if math.isfinite(found[0]) else [math.inf, math.inf]
        best[rate] = min(best.get(rate, found), found)
    return [
        [rate, *(loss if math.isfinite(loss) else None for loss in losses)]
        for rate, losses in sorted(best.items())
    ]


def _mean(curves, every):
    """The mean of curves with a value for each so many steps, `[step, value]`, as far as all go."""
    means = (np.mean(values) for values in zip(*curves, strict=False))
    return [[every * i, float(f"{value:.5g}")] for i, value in enumerate(means, 1)]


def _summary(values):
    if not values:
        return None
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return [float(np.mean(values)), error and float(error)]
