"""Pages of the notebooks in examples/notebooks, with what their cells put out where that is known.

The build executes nothing. `python -m examples.notebooks --out build/notebooks` does, and leaves
executed notebooks in the folder where this looks for them.
"""

import itertools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ROOT / "examples" / "notebooks"
EXECUTED = ROOT / "build" / "notebooks"
MARKER = re.compile(r"^# %%(.*)\n", re.MULTILINE)


class Cell(NamedTuple):
    """A cell: prose, or code with its outputs as a notebook file has them."""

    is_prose: bool
    text: str
    outputs: list[dict[str, Any]]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs before it reads pages."""
    for source in sorted(SOURCES.glob("[!_]*.py")):
        uri = source.relative_to(ROOT).with_suffix(".md").as_posix()
        executed = EXECUTED / f"{source.stem}.ipynb"
        files.append(File.generated(config, uri, content=page(source, executed)))
    return files


def page(source: pathlib.Path, executed: pathlib.Path) -> str:
    """A notebook in Markdown."""
    name = f"`examples/notebooks/{source.name}`"
    if executed.exists():
        cells, note = of_notebook(executed.read_text()), f"This is {name}, executed."
    else:
        cells = of_source(source.read_text())
        note = f"This is {name}, not executed here: run it to see what it prints and draws."
    title, *others = map(to_markdown, cells)
    heading, _, rest = title.partition("\n")
    return "\n\n".join([heading, f"*{note}*", rest.strip(), *others])


def of_source(text: str) -> Iterator[Cell]:
    """The cells of a Python file in jupytext's percent format."""
    _, *parts = MARKER.split(text)
    for marker, body in zip(parts[::2], parts[1::2], strict=True):
        is_prose = "[markdown]" in marker
        if is_prose:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        yield Cell(is_prose, body.strip("\n"), [])


def of_notebook(text: str) -> Iterator[Cell]:
    """The cells of a notebook file."""
    for cell in json.loads(text)["cells"]:
        outputs = cell.get("outputs", [])
        yield Cell(cell["cell_type"] == "markdown", "".join(cell["source"]), outputs)


def to_markdown(cell: Cell) -> str:
    """A cell as part of a page."""
    if cell.is_prose:
        return cell.text
    return "\n\n".join([f"```python\n{cell.text}\n```", *shown(cell.outputs)])


def shown(outputs: list[dict[str, Any]]) -> Iterator[str]:
    """What a cell printed and drew."""
    for name, group in itertools.groupby(outputs, lambda output: output.get("name")):
        if name == "stdout":  # which comes in pieces
            text = "".join("".join(output["text"]) for output in group)
            yield f"```text\n{text.rstrip()}\n```"
        else:
            images = [output.get("data", {}).get("image/png", "") for output in group]
            yield from (f"![](data:image/png;base64,{''.join(i.split())})" for i in images if i)
