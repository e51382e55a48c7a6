"""What a run leaves behind: a table, a JSON file and a plot."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform

import jax
from matplotlib.figure import Figure

PACKAGES = ["jax", "jaxlib", "flax", "optax"]


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


def table(columns, rows):
    """The rows as text."""
    cells = [["", *(column.replace("_", " ") for column in columns)]]
    for row in rows:
        texts = [cell(row.get(column)) for column in columns]
        cells.append([row["name"], *([row["failed"]] if "failed" in row else texts)])
    widths = [
        max(len(line[i]) for line in cells if i < len(line) and (i == 0 or len(line) > 2))
        for i in range(len(columns) + 1)
    ]
    return "\n".join(
        "  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=False)) for line in cells)
    )


def cell(value):
    if value is None:
        return "-"
    if isinstance(value, list):
        return "–".join(map(cell, value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")
