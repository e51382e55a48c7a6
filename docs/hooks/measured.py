"""Tables of what was measured, from the JSON that was stored with it: none of it is typed.

A page says where: `<!-- measured: FILE: COLUMNS -->` for a table, `<!-- across: FILE: DOWN ALONG
QUANTITY -->` for a quantity by two others, and `<!-- pictures: FOLDER -->` for the plots of a
folder. Files are named from the checkout's root.
"""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = re.compile(r"<!-- measured: (\S+): (.*?) -->")
ACROSS = re.compile(r"<!-- across: (\S+): (\S+) (\S+) (\S+) -->")
PICTURES = re.compile(r"<!-- pictures: (\S+) -->")
UNITS = {"mb": "MB", "kb": "kB", "gb": "GB"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs before it reads pages: the plots go to the site."""
    for path in sorted((ROOT / "benchmarks").rglob("*.png")):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with each page."""
    for pattern, show in {TABLE: _columns, ACROSS: across}.items():
        markdown = pattern.sub(functools.partial(_stored, show), markdown)
    return PICTURES.sub(lambda at: pictures(ROOT / at[1]), markdown)


def _stored(show: Callable[..., str], at: re.Match[str]) -> str:
    file, *asked = at.groups()
    path = ROOT / file
    if not path.exists():
        raise PluginError(f"there is no {file}, of which a page shows the rows")
    content = json.loads(path.read_text())
    return show(*asked, content["rows"]) + "\n\n" + circumstances(content)


def _columns(names: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return table(names.split(), rows)


def across(down: str, along: str, quantity: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A quantity in Markdown: a line for each value of `down`, a column for each of `along`."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        lines.setdefault(row[down], {down: row[down]})[row[along]] = row.get(quantity)
    columns = dict.fromkeys(row[along] for row in rows)
    return table([down, *columns], [*lines.values()])


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows in Markdown, numbers to the right."""
    words = [any(isinstance(row.get(column), str) for row in rows) for column in columns]
    lines = [
        [heading(column) for column in columns],
        ["---" if of_words else "---:" for of_words in words],
        *([cell(row, column) for column in columns] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def heading(column: str) -> str:
    """A key as people read it."""
    return " ".join(UNITS.get(word, word) for word in column.split("_"))


def cell(row: Mapping[str, Any], column: str) -> str:
    """A quantity with three digits, and its quartiles or its standard error where it has one."""
    value = row.get(column)
    if value is None:
        return "fails" if "failed" in row else "–"
    if column == "ratio":
        low, high = row["quartiles"]
        return f"{value:.2f} ({low:.2f}–{high:.2f})"
    if isinstance(value, list):
        mean, error = value
        return f"{number(mean)} ± {error:.1g}" if error else number(mean)
    return value if isinstance(value, str) else number(value)


def number(value: float) -> str:
    """Whole from 1,000 on; three digits below."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def circumstances(content: Mapping[str, Any]) -> str:
    """On what, with what and when."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    date = f" {content['date'][:10]}." if "date" in content else ""
    return f"*On {content['machine']}, with {versions}.{date}*"


def pictures(folder: pathlib.Path) -> str:
    """The plots of a folder; none if there are none."""
    found = (path.relative_to(ROOT).as_posix() for path in sorted(folder.glob("*.png")))
    return "\n\n".join(f"![{pathlib.PurePath(path).stem}]({path})" for path in found)
