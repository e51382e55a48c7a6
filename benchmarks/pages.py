"""The tables of the documentation's pages, from the JSON that was stored: none of it is typed.

    python -m benchmarks tables

A table lies between two comments, and is made anew there. The first says of which file, named
from the root, and is one of

    <!-- measured: FILE: COLUMN COLUMN ... -->
    <!-- across: FILE: DOWN ALONG QUANTITY: ONE | ANOTHER | ... -->
    <!-- lowest: FILE: DOWN ALONG QUANTITY: ONE | ANOTHER | ... -->

and the second `<!-- end -->`. `measured` has a line for each row of the file; `across` a line for
each value of DOWN and a column for each of ALONG. If columns are named, lines are those that the
first has. `lowest` is `across` with the lowest of what competes in bold: optimizers on one problem,
labels of one case. Under a table stands on what it was measured, as far as the page has not said so
before.
"""

import functools
import json
import math
import pathlib
import re

from tabulate import tabulate

from benchmarks import report

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- (measured|across|lowest): (\S+): (.*?) -->\n[^<]*<!-- end -->")
COMPETE = "optimizer", "label"


def main(arguments):
    for path in PAGES:
        path.write_text(current(path.read_text()))


def current(page):
    """A page's text with its tables as the files have them."""
    return BLOCK.sub(functools.partial(_block, {}), page)


def _block(said, block):
    kind, file, asked = block.groups()
    content = json.loads((ROOT / file).read_text())
    if kind == "measured":
        text = report.table(asked.split(), content["rows"], "pipe")
    else:
        text = across(asked, content["rows"], bold=kind == "lowest")
    opening = block[0].partition("\n")[0]
    return "\n\n".join([opening, text, *_circumstances(said, content), "<!-- end -->"])


def across(asked, rows, bold=False):
    """A quantity of the rows by two others, in Markdown; `asked` as in a page's comment."""
    quantities, _, chosen = asked.partition(": ")
    down, along, quantity = quantities.split()
    columns = chosen.split(" | ") if chosen else list(dict.fromkeys(row[along] for row in rows))
    lines = {row[down] for row in rows if row[along] == columns[0] or not chosen}
    rows = [row for row in rows if row[along] in columns and row[down] in lines]
    case = along if down in COMPETE else down
    cells = {}
    for row in rows:
        text = report.cell(row, quantity)
        rivals = [_value(one, quantity) for one in rows if one[case] == row[case]]
        if bold and _value(row, quantity) == min(rivals) < math.inf:
            text = f"**{text}**"
        cells.setdefault(row[down], {})[row[along]] = text
    return tabulate(
        [[name, *(line.get(column, "–") for column in columns)] for name, line in cells.items()],
        [report.heading(down), *columns],
        "pipe",
        colalign=["left", *["right"] * len(columns)],
        disable_numparse=True,
    )


def _value(row, quantity):
    value = row.get(quantity)
    if isinstance(value, list):  # the mean and its error
        value = value[0]
    return math.inf if value is None else value


def _circumstances(said, content):
    """What differs from what was `said`, which is brought up to date."""
    found = {"": content["machine"], **content["versions"]}
    new = {name: value for name, value in found.items() if said.get(name) != value}
    said |= new
    if new:
        yield f"*Measured with {'; '.join(f'{name} {new[name]}'.strip() for name in new)}.*"
