"""What a study found, as tables."""

import dataclasses
import math

import numpy as np

COLUMNS = "best_rate train_loss held_out_loss held_out_accuracy state_ratio seeds".split()


def summary(records):
    """Mean and standard error of a quantity over seeds."""

    def of(key):
        values = np.array([record[key] for record in records if key in record])
        if not len(values):
            return None
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return [float(values.mean()), float(error)]

    return of


def rows(finals, results, baseline="adamw"):
    """A row for each problem and optimizer; `finals`: (problem, optimizer) → its trials."""
    for (problem, optimizer), trials in finals.items():
        records = [results[trial] for trial in trials]
        of = summary(records)
        reference = finals.get((problem, baseline), [])
        compared = summary([results[trial] for trial in reference])
        row = {
            "name": f"{problem}, {optimizer}",
            "problem": problem,
            "optimizer": optimizer,
            "best_rate": trials[0].rate,
            "options": dict(trials[0].options),
            "seeds": len(trials),
            "diverged": sum(bool(record["diverged"]) for record in records),
            "trials": [dataclasses.asdict(trial) for trial in trials],
        }
        for key in ("train_loss", "held_out_loss", "held_out_accuracy"):
            row[key] = of(key)
        if shares := [record["above_damping"] for record in records if "above_damping" in record]:
            row["above_damping"] = np.mean(shares, 0)[:, 1].round(4).tolist()
        there, here = compared("state_bytes"), of("state_bytes")
        row["state_ratio"] = here[0] / there[0] if there and here else None
        yield row


def text(found):
    """The rows as a person reads them."""
    lines = [["problem", "optimizer", *(column.replace("_", " ") for column in COLUMNS)]]
    for row in found:
        lines.append([row["problem"], row["optimizer"], *(_cell(row[key]) for key in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    )


def _cell(value):
    if value is None:
        return "-"
    if isinstance(value, list):
        mean, error = value
        return f"{mean:.4g}" + ("" if math.isnan(error) else f" ± {error:.1g}")
    return f"{value:.3g}"
