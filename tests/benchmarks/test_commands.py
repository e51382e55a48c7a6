"""The benchmarks' command line, at a tiny size; what they measure is not asserted."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import compile_time, gpu_program

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
    command = json.loads((tmp_path / "update.json").read_text())["command"]
    last = "'wide_mlp, adafisher:official, kept'"
    assert command == f"python -m benchmarks update --quick --rounds 1 --only {last}"


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
