"""The ladder of sizes, of a problem shortened to a few steps."""

import argparse
import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from benchmarks import ladder
from benchmarks.study import plan, trial
from benchmarks.study.ladders import LADDERS, RUNGS
from benchmarks.study.models import MLP
from benchmarks.study.problems import PROBLEMS

SIZES = {n: dataclasses.replace(PROBLEMS["digits_mlp"], model=MLP((n,), 10)) for n in (4, 8)}


def problem(size):
    return dataclasses.replace(SIZES[size], steps=6, measured=100)


@pytest.fixture
def climb(monkeypatch, tmp_path):
    monkeypatch.setitem(LADDERS, "hidden", {size: problem(size) for size in SIZES})
    for size in SIZES:
        monkeypatch.setitem(RUNGS, f"hidden {size}", problem(size))

    def run(*flags):
        parser = argparse.ArgumentParser()
        ladder.add_arguments(parser)
        chosen = ["--ladders", "hidden", "--out", str(tmp_path), "--rates", "1e-4", "3e-2"]
        ladder.main(parser.parse_args([*chosen, *flags]))
        return json.loads((tmp_path / "table.json").read_text())["rows"]

    return run


@pytest.mark.slow
def test_each_size_has_its_best_rate_and_goes_on_where_it_stopped(climb, tmp_path, monkeypatch):
    found = climb("--optimizers", "adafisher:centered", "--sizes", "8")
    assert [row["rung"] for row in found] == ["hidden 8"]
    found = climb("--optimizers", "adafisher:centered")
    assert [row["size"] for row in found] == [4, 8]
    assert all(row["best_rate"] == 3e-2 and row["lost"] == 0 for row in found)
    assert all(row["best_loss"] < math.log(10) for row in found)
    assert (tmp_path / "ladder.png").stat().st_size > 0
    monkeypatch.setattr(trial, "run", lambda *_: pytest.fail("it was run already"))
    assert climb("--optimizers", "adafisher:centered") == found


def test_rows_hold_means_over_seeds_and_what_the_recommended_rate_loses():
    name, rung = "adafisher:centered", "mlp 256"
    problem = RUNGS[rung]
    losses = {1e-2: (1.0, 2.0), 3e-2: (3.0, 3.0), 1e-1: (0.5, math.inf)}
    records = {}
    grid = plan.Grid(rung, name, problem.batch, problem.steps, list(losses), {})
    for seed in (0, 1):
        for one in grid.trials(seed):
            loss = losses[one.rate][seed]
            records[one] = {"train_loss": loss, "held_out_loss": 2 * loss}
    del records[grid.trials(1)[2]]["train_loss"]  # diverged

    (row,) = ladder.rows(Found(records))
    assert row["losses"] == [[1e-2, 1.5], [3e-2, 3.0], [1e-1, None]]
    assert (row["best_rate"], row["best_loss"], row["held_out_loss"]) == (1e-2, 1.5, 3.0)
    assert (row["at_recommended"], row["lost"], row["seeds"]) == (3.0, 1.0, 2)
    assert (row["ladder"], row["size"]) == ("mlp", 256)


def test_the_mlp_in_nnx_computes_what_that_in_linen_does():
    linen, in_nnx = (RUNGS[f"{name} 64"].model for name in ("mlp", "nnx"))
    key, x = jax.random.key(0), np.linspace(-1, 1, 2 * 768, dtype=np.float32).reshape(2, 768)
    variables = linen.init(key, x, False)
    params = jax.tree.unflatten(
        jax.tree.structure(in_nnx.init(key, x, False)["params"]), jax.tree.leaves(variables)
    )
    outputs, changed = in_nnx.apply({"params": params}, x, False, mutable=[])
    np.testing.assert_allclose(outputs, linen.apply(variables, x, False), rtol=1e-6)
    assert changed == {}


class Found(dict):
    """Results that were not read from a file."""

    @property
    def records(self):
        return self
