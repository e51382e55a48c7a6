"""The comparison over sizes, of a problem shortened to a few steps."""

import argparse
import dataclasses
import functools
import json

import numpy as np
import pytest

from benchmarks import ladder, sizes
from benchmarks.study import cost, trial
from benchmarks.study.ladders import LADDERS, RUNGS
from benchmarks.study.models import MLP
from benchmarks.study.problems import PROBLEMS

OPTIMIZERS = [ladder.OURS, "nadamw"]
COSTS = {"nadamw": 1.0, ladder.OURS: 3.0}


def arguments(add, *flags):
    parser = argparse.ArgumentParser()
    add(parser)
    return parser.parse_args([*map(str, flags)])


@pytest.fixture
def compare(monkeypatch, tmp_path):
    problem = dataclasses.replace(PROBLEMS["digits_mlp"], model=MLP((8,), 10), steps=6, measured=50)
    monkeypatch.setitem(LADDERS, "width", {8: problem})
    monkeypatch.setitem(RUNGS, "width 8", problem)
    monkeypatch.setattr(sizes, "OPTIMIZERS", [*OPTIMIZERS, "soap"])  # SOAP is not run
    monkeypatch.setattr(cost, "ratios", lambda *_: COSTS)

    def run():
        there = tmp_path / "ladder"
        sizes.main(arguments(sizes.add_arguments, "--ladder", there, "--out", tmp_path / "sizes"))
        return json.loads((tmp_path / "sizes" / "table.json").read_text())["rows"]

    return run


@pytest.mark.slow
def test_runs_at_equal_time_are_shorter_where_a_step_costs_more(compare, tmp_path):
    flags = ["--ladders", "width", "--rates", 1e-2, 3e-2, "--out", tmp_path / "ladder"]
    ladder.main(arguments(ladder.add_arguments, *flags, "--optimizers", *OPTIMIZERS))
    centered, nadamw = compare()
    assert (nadamw["steps_in_time"], centered["steps_in_time"]) == (6, 2)
    assert nadamw["to_nadamw"] == nadamw["in_time_to_nadamw"] == 1
    assert nadamw["loss_in_time"] == pytest.approx(nadamw["loss"])  # the same run
    assert centered["loss_in_time"] > centered["loss"]
    assert centered["to_nadamw"] == centered["loss"] / nadamw["loss"]
    assert nadamw["parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    assert (tmp_path / "sizes" / "sizes.png").stat().st_size > 0


def test_a_rung_without_a_run_is_named(compare):
    with pytest.raises(ValueError, match="got no best rate of adafisher:centered at width 8"):
        compare()


def test_what_a_step_costs_is_measured_over_whole_cycles(monkeypatch, tmp_path):
    measured = {}

    def interleaved(contenders, rounds):
        measured.update({name: one.cycle for name, one in contenders.items()})
        return {name: np.ones(rounds) for name in contenders}

    monkeypatch.setattr(cost, "interleaved", interleaved)
    begin = functools.partial(trial.Trial, "digits_mlp", rate=0.0, seed=0, steps=1, batch=8)
    timed = {name: begin(optimizer=name) for name in ("adamw", "soap")}
    assert cost.ratios(timed, tmp_path, tmp_path / "costs.json") == {"adamw": 1, "soap": 1}
    assert measured == {"adamw": 1, "soap": 10}  # in every tenth step SOAP renews its bases


def test_costs_that_were_measured_stay(monkeypatch, tmp_path):
    """Runs of equal time were planned by them."""
    begin = functools.partial(trial.Trial, "digits_mlp", rate=0.0, seed=0, steps=1, batch=8)

    def ratios(*names, seconds):
        def interleaved(contenders, rounds):
            return {name: np.full(rounds, seconds[name]) for name in contenders}

        monkeypatch.setattr(cost, "interleaved", interleaved)
        trials = {name: begin(optimizer=name) for name in ("adamw", *names)}
        return cost.ratios(trials, tmp_path, tmp_path / "costs.json")

    assert ratios("sgd", seconds={"adamw": 2.0, "sgd": 1.0}) == {"adamw": 1, "sgd": 0.5}
    later = ratios("sgd", "nadamw", seconds={"adamw": 2.0, "sgd": 3.0, "nadamw": 4.0})
    assert later == {"adamw": 1, "sgd": 0.5, "nadamw": 2}
