"""The benchmarks' command line, at a tiny size; what they measure is not asserted."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import compile_time, gpu_program, pages, report

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def names(path):
    return [row["name"] for row in json.loads(path.read_text())["rows"]]


@pytest.mark.slow
def test_a_suite_stores_its_rows_and_keeps_those_not_run_again(tmp_path):
    for rule in ("paper", "official"):
        label = f"wide_mlp, adafisher:{rule}, kept"
        done = run("update", "--quick", "--rounds", "1", "--only", label, "--out", str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert label in done.stdout
    assert names(tmp_path / "update.json") == [
        "wide_mlp, adafisher:paper, kept",
        "wide_mlp, adafisher:official, kept",
    ]
    assert (tmp_path / "update.png").stat().st_size > 0


def test_a_row_that_is_not_there_is_told(tmp_path):
    done = run("capture", "--quick", "--only", "no such row", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "no row's name contains 'no such row'" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_compiled_program_s_cost_has_its_loops_as_often_as_they_run():
    program = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %sum = f32[8]{0} fusion(%x, %x), kind=kLoop, calls=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %sum)
}

ENTRY %main (a: f32[8]) -> (s32[], f32[8]) {
  %a = f32[8]{0} parameter(0)
  %product = (f32[4]{0}, s8[100]{0}) custom-call(%a), custom_call_target="gemm"
  ROOT %w = (s32[], f32[8]{0}) while(%start), body=%body, c={"known_trip_count":{"n":"3"}}
}
"""
    assert gpu_program.cost(program) == (1 + 3, 4 * (8 + 4) + 3 * 4 * (8 + 8))


def test_loops_that_differ_in_names_only_are_one():
    def program(*functions):
        fused = "".join(
            f"%fused.{i} (p.{i}: f32[8]) -> f32[8] {{\n  %p.{i} = f32[8]{{0}} parameter(0)\n"
            f'  ROOT %y.{i} = f32[8]{{0}} {name}(%p.{i}), metadata={{op_name="{i}"}}\n}}\n\n'
            for i, name in enumerate(functions)
        )
        return fused + "".join(
            f"  %z.{i} = f32[8]{{0}} fusion(%a), kind=kLoop, calls=%fused.{i}\n"
            for i, _ in enumerate(functions)
        )

    assert compile_time.different_loops(program("exponential", "exponential")) == 1
    assert compile_time.different_loops(program("exponential", "negate")) == 2


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
        ("problem optimizer loss: w | z", "a_b|–|**2**; c|–|**0.4**"),
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
