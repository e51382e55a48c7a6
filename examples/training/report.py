"""The result of a run as a table."""

from tabulate import tabulate

from examples.training.loop import Result
from examples.training.settings import Settings


def table(settings: Settings, result: Result, more: dict[str, float] | None = None) -> str:
    """A table with a row for each number of the result and of `more`."""
    rows = {
        "optimizer": f"{settings.optimizer}, rate {settings.rate:g}",
        "status": f"{result.status} {result.message}".strip(),
        "steps": f"{result.steps:,}",
        "seconds": f"{result.seconds:.1f}",
        "ms per step": f"{1e3 * result.seconds / max(result.steps, 1):.2f}",
    }
    numbers = {
        **{f"training {name}": value for name, value in result.train.items()},
        **{f"evaluation {name}": value for name, value in result.evaluation.items()},
        **(more or {}),
    }
    rows |= {name: f"{value:.4f}" for name, value in numbers.items()}
    return tabulate(rows.items(), tablefmt="plain", disable_numparse=True)
