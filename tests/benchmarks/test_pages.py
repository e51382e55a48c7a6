"""The documentation's tables have what was stored, as a person reads it."""

import json
import re

import pytest

from benchmarks import pages, report


@pytest.mark.parametrize("path", pages.PAGES, ids=lambda path: path.name)
def test_the_tables_of_a_page_are_those_of_what_was_stored(path):
    page = path.read_text()
    assert pages.current(page) == page, "run python -m benchmarks tables"
    begun = re.findall("<!-- (?:measured|across|lowest)", page)
    assert len(begun) == page.count("<!-- end -->") == len(pages.BLOCK.findall(page))


ROWS = [
    {"problem": "a_b", "optimizer": "x:y", "loss": [0.5, 0.1]},
    {"problem": "a_b", "optimizer": "z", "loss": 2},
    {"problem": "c", "optimizer": "z", "loss": 0.4},
    {"problem": "c", "optimizer": "w", "loss": None},
]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("problem optimizer loss", "a_b|**0.500 ± 0.1**|2|–; c|–|**0.4**|–"),
        ("optimizer problem loss", "x:y|**0.500 ± 0.1**|–; z|2|**0.4**; w|–|–"),
        ("problem optimizer loss: z | w", "a_b|**2**|–; c|**0.4**|–"),
        ("problem optimizer loss: w | z", "c|–|**0.4**"),
    ],
)
def test_the_lowest_of_each_problem_is_in_bold(asked, expected):
    _, _, *lines = pages.across(asked, ROWS, bold=True).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert "; ".join(map("|".join, cells)) == expected
    assert "**" not in pages.across(asked, ROWS)


def test_numbers_come_with_their_spread():
    row = {"ratio": 1.0678, "quartiles": [0.994, 1.2], "loss": [0.2512, 0.0123]}
    assert report.cell(row, "ratio") == "1.07 (0.99–1.20)"
    assert report.cell(row | {"quartiles": [1.07, 1.07]}, "ratio") == "1.07"
    assert report.cell(row, "loss") == "0.251 ± 0.01"
    assert report.cell(row | {"loss": [0.2512, None]}, "loss") == "0.251"
    assert report.cell(row, "none") == "–"
    assert report.cell({"failed": "why"}, "ratio") == "fails"
    numbers = 161408, 1234.5, 12.345, 1.4513e-4
    assert [report.number(n) for n in numbers] == ["161,408", "1,234", "12.3", "0.000145"]


def test_a_page_tells_once_what_it_was_measured_with(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    for name, versions in {"a": {"jax": "1"}, "b": {"jax": "1", "optax": "2"}}.items():
        content = {"machine": "one", "versions": versions, "rows": [{"name": name, "ms": 3}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    page = "".join(f"<!-- measured: {n}.json: name ms -->\nold\n<!-- end -->\n" for n in "aab")
    made = pages.current(page)
    assert re.findall(r"\*Measured with (.*)\.\*", made) == ["one; jax 1", "optax 2"]
    assert "old" not in made
    assert pages.current(made) == made
