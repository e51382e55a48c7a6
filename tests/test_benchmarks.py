"""The benchmarks' command line, at a tiny size; what they measure is not asserted."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def names(path):
    return [row["name"] for row in json.loads(path.read_text())["rows"]]


@pytest.mark.slow
def test_a_suite_stores_its_rows_and_keeps_those_not_run_again(tmp_path):
    for rule in ("paper", "official"):
        label = f"wide_mlp, adafisher:{rule}"
        done = run("update", "--quick", "--rounds", "1", "--only", label, "--out", str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert label in done.stdout
    assert names(tmp_path / "update.json") == [
        "wide_mlp, adafisher:paper",
        "wide_mlp, adafisher:official",
    ]
    assert (tmp_path / "update.png").stat().st_size > 0


def test_a_row_that_is_not_there_is_told(tmp_path):
    done = run("capture", "--quick", "--only", "no such row", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "no row's name contains 'no such row'" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "suite", ["update", "capture", "train_step", "compile_time", "peers", "live_report"]
)
def test_the_page_about_speed_shows_what_was_stored(suite):
    page = (ROOT / "docs" / "speed.md").read_text()
    stored = json.loads((ROOT / "benchmarks" / "results" / f"{suite}.json").read_text())
    shown = 0
    for row in stored["rows"]:
        if "ratio" in row and row["ratio"] != 1:
            low, high = row["quartiles"]
            assert f"{row['ratio']:.2f} ({low:.2f}–{high:.2f})" in page, row["name"]
            shown += 1
    assert shown
