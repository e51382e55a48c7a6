"""What a run leaves behind: a table, a JSON file and a plot."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform

import jax
from matplotlib.figure import Figure
from tabulate import tabulate

PACKAGES = ["jax", "jaxlib", "flax", "optax"]
UNITS = {"mb": "MB", "kb": "kB", "gb": "GB"}


def circumstances(packages, quick):
    """Rows measured under the same ones may stand in one table."""
    versions = {"python": platform.python_version()}
    for package in [*PACKAGES, *packages]:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    kind = jax.devices()[0].device_kind
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {kind}"
    if kind == "cpu":
        machine += f", {processor()}"
    return {"machine": machine, "versions": versions, "quick": quick}


def processor():
    """The name of the machine's processor, where the system tells."""
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def stored(path, under):
    """Rows stored before, to be kept beside new ones.

    Raises:
      ValueError: if they were measured under other circumstances.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if changed := [key for key in under if content[key] != under[key]]:
        raise ValueError(
            f"{path} holds rows of another {', '.join(changed)}: give another folder as --out"
        )
    return content["rows"]


def store(path, rows, under, command):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = under | {"date": now(), "command": command, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


def now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def draw(path, plot, rows, machine):
    figure = Figure(layout="constrained")
    plot(figure, rows)
    figure.supxlabel(machine, fontsize=7, color="0.4")
    figure.savefig(path, dpi=150)


def table(columns, rows, style="simple"):
    """The rows as text, in a style of tabulate's: words to the left, numbers to the right."""
    of_words = {c for c in columns if any(isinstance(row.get(c), str) for row in rows)}
    return tabulate(
        [[cell(row, column) for column in columns] for row in rows],
        [heading(column) for column in columns],
        style,
        colalign=["left" if column in of_words else "right" for column in columns],
        disable_numparse=True,
    )


def heading(column):
    """A key as people read it."""
    return " ".join(UNITS.get(word, word) for word in column.split("_"))


def cell(row, column):
    """A quantity, with its quartiles or its standard error where it has one."""
    value = row.get(column)
    if value is None:
        return "fails" if "failed" in row else "–"
    if isinstance(value, list):
        mean, error = value
        return f"{mean:#.3g}".rstrip(".") + (f" ± {error:.1g}" if error else "")
    if column == "ratio":
        low, high = row["quartiles"]
        return f"{value:.2f}" + (f" ({low:.2f}–{high:.2f})" if low < high else "")
    return value if isinstance(value, str) else number(value)


def number(value):
    """Whole from 1,000 on; three digits below."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"
