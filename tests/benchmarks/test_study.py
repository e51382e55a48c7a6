"""The study runner, on a problem shortened to a few steps."""

import argparse
import dataclasses
import json
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adafisher_jax as af
from benchmarks.study import command, controls, plan, tables, trial, variants
from benchmarks.study.problems import PROBLEMS
from benchmarks.study.results import Results
from examples.training import optimizers

SHORT = dataclasses.replace(PROBLEMS["digits_mlp"], steps=6)


@pytest.fixture
def study(monkeypatch, tmp_path):
    monkeypatch.setitem(PROBLEMS, "digits_mlp", SHORT)
    trial._programs.cache_clear()

    def run(*flags):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        chosen = ["--problems", "digits_mlp", "--out", str(tmp_path), "--seeds", "2"]
        command.main(parser.parse_args([*chosen, *flags]))
        return json.loads((tmp_path / "table.json").read_text())["rows"]

    return run


@pytest.mark.slow
def test_each_optimizer_is_tuned_and_its_best_rate_run_on_all_seeds(study, tmp_path, capsys):
    found = study("--optimizers", "sgd", "adafisher:centered", "--rates", "1e-5", "1e-2")
    assert [row["optimizer"] for row in found] == ["sgd", "adafisher:centered"]
    assert [row["best_rate"] for row in found] == [1e-2, 1e-2]
    assert all(row["seeds"] == 2 and row["train_loss"][0] < 2.5 for row in found)
    assert {"curves.png", "rates.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "adafisher:centered" in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(study, tmp_path, monkeypatch):
    first = study("--optimizers", "adamw", "--rates", "1e-2", "1e-3")
    lines = (tmp_path / "runs.jsonl").read_text()
    monkeypatch.setattr(trial, "run", lambda *_: pytest.fail("it was run already"))
    assert study("--optimizers", "adamw", "--rates", "1e-2", "1e-3") == first
    assert (tmp_path / "runs.jsonl").read_text() == lines


@pytest.mark.slow
def test_settings_make_a_grid_of_their_own_and_name_the_best(study):
    flags = ["--rates", "1e-2", "--set", "damping=0.01,1000000.0", "--tuning-seeds", "1"]
    (row,) = study("--optimizers", "adafisher:centered", *flags)
    assert set(row["options"]) == {"damping"}


def test_protocols_keep_steps_epochs_or_time_equal():
    assert plan.steps("digits_mlp", 16, "steps", 1.0) == 400
    assert plan.steps("digits_mlp", 16, "epochs", 1.0) == 1600
    assert plan.steps("digits_mlp", 64, "time", 2.0) == 200


@pytest.mark.slow
def test_at_equal_time_costs_are_measured_once(study, tmp_path):
    study("--optimizers", "adamw", "sgd", "--rates", "1e-2", "--protocol", "time")
    costs = json.loads((tmp_path / "costs.json").read_text())["digits_mlp, 64"]
    assert costs["adamw"] == 1.0
    steps = {one.optimizer: one.steps for one in Results(tmp_path / "runs.jsonl").records}
    assert steps["adamw"] == SHORT.steps
    assert steps["sgd"] == max(round(SHORT.steps / costs["sgd"]), 1)


def test_the_best_setting_is_that_of_the_lowest_finite_loss():
    one = trial.Trial("digits_mlp", "sgd", 1e-2, 0, 6, 64)
    other = dataclasses.replace(one, rate=1e-1)
    assert plan.best([one, other], {one: {"train_loss": 2.0}, other: {"diverged": "yes"}}) == one
    assert plan.best([one, other], {one: {"train_loss": 2.0}, other: {"train_loss": 1.0}}) == other


def test_a_rate_is_told_by_its_best_setting_over_all_tuning_seeds():
    one = trial.Trial("digits_mlp", "adafisher:paper", 1e-2, 0, 6, 64, (("damping", 0.1),))
    other, larger = dataclasses.replace(one, options=()), dataclasses.replace(one, rate=1e-1)
    losses = {one: (1.0, 8.0), other: (2.0, 2.0), larger: (1.0, math.inf)}
    trials, results = [], {}
    for setting, found in losses.items():
        for seed, loss in enumerate(found):
            trials.append(dataclasses.replace(setting, seed=seed))
            results[trials[-1]] = {
                "train_loss": loss,
                "held_out_loss": 2 * loss,
                "diverged": None,
                "curve": [loss],
                "state_bytes": 1,
            }
    key = "digits_mlp", "adafisher:paper"
    (row,) = tables.rows({key: trials}, {key: trials[:1]}, results)
    assert row["tuning"] == [[1e-2, 2.0, 4.0], [1e-1, None, None]]
    assert row["tuning_seeds"] == 2
    assert row["least_held_out"] == 4.0


def test_a_control_takes_one_thing_away():
    factor = af.Factor(
        jnp.array([5.0, 2.0]), jnp.array([3.0, 1.0]), jnp.ones(()), jnp.array([1, 0.5])
    )

    def seen(edit):
        h, s, _, mean = edit(factor)
        return (h - mean**2).tolist(), s.tolist(), mean.tolist()

    assert seen(lambda x: x) == ([4.0, 1.75], [3.0, 1.0], [1.0, 0.5])
    assert seen(controls.no_inputs) == ([1.0, 1.0], [3.0, 1.0], [1.0, 0.5])
    assert seen(controls.no_outputs) == ([4.0, 1.75], [1.0, 1.0], [1.0, 0.5])
    assert seen(controls.no_centering) == ([5.0, 2.0], [3.0, 1.0], [0.0, 0.0])
    assert seen(controls.constant) == ([1.0, 1.0], [1.0, 1.0], [0.0, 0.0])
    variance, s, mean = seen(controls.shuffled)
    assert sorted(variance) == [1.75, 4.0]
    assert sorted(s) == [1.0, 3.0]
    assert mean == [1.0, 0.5]


@pytest.mark.parametrize(
    ("name", "flat"),
    {
        "adafisher:centered": True,
        "centered-constant": True,
        "nadamw-cut": True,
        "centered-no-cut": False,
        "centered-directions=4": True,
        "nadamw": False,
    }.items(),
)
def test_steps_are_cut_where_the_control_has_a_cut(name, flat):
    """The last of a few steps along one gradient that a single direction dominates."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(48, 32))
    cotangents = 3 * inputs[:, :1] * np.ones(24) + 0.3 * rng.normal(size=(48, 24))
    model = nn.Dense(24, use_bias=False)

    def loss(params, model_state, batch, key):
        x, s = batch
        return jnp.mean(jnp.sum(model.apply(params, x) * s, 1)), (model_state, {})

    batch = jnp.asarray(inputs, jnp.float32), jnp.asarray(cotangents, jnp.float32)
    key = jax.random.key(0)
    params = model.init(key, batch[0])
    task = types.SimpleNamespace(loss=loss, layout=af.trace_layout(loss, params, {}, batch, key))
    optimizer = controls.make(name, 1e-2, task)
    opt_state = optimizer.init(params, {}, batch, key)
    for _ in range(8):
        before = jax.tree.map(np.array, params)
        params, _, opt_state, *_ = optimizer.step(params, {}, opt_state, batch, key)
    (step,) = jax.tree.leaves(jax.tree.map(np.subtract, params, before))
    values = np.linalg.svd(step, compute_uv=False)
    assert (values[0] < 2 * values[1]) == flat


def task_of(model, *batch):
    """The mean square of a model's outputs, and its parameters."""

    def loss(params, model_state, batch, key):
        outputs = model.apply({"params": params}, *batch)
        return jnp.mean(jnp.square(outputs)), (model_state, {})

    key = jax.random.key(0)
    params = model.init(key, *batch)["params"]
    layout = af.trace_layout(loss, params, {}, batch, key)
    return types.SimpleNamespace(loss=loss, layout=layout), params


@pytest.mark.parametrize(
    ("name", "exponent"),
    {"adafisher:centered": 0.5, "centered-exponent=0.25": 0.25, "centered-exponent=1.0": 1}.items(),
)
def test_a_control_divides_by_another_power(name, exponent):
    x = jax.random.normal(jax.random.key(1), (6, 3)) * jnp.array([[1.0, 2.0, 5.0]])
    task, params = task_of(nn.Dense(1, use_bias=False), x)  # too small to have directions to cut
    optimizer = controls.make(name, 1e-2, task)
    grad = jax.grad(lambda p: task.loss(p, {}, (x,), None)[0])(params)
    before = jax.tree.map(np.array, params)
    state = optimizer.init(params, {}, (x,), None)
    after, *_ = optimizer.step(params, {}, state, (x,), None)
    (step,) = jax.tree.leaves(jax.tree.map(lambda a, b, g: (b - a) / g, before, after, grad))
    h = np.square(x).mean(0)
    expected = (h / h.mean() + 0.01) ** -exponent
    np.testing.assert_allclose(step[:, 0] / step[0, 0], expected / expected[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("without", "left"),
    {
        "embedding": ["Dense_0", "Dense_1", "LayerNorm_0"],
        "norm": ["Dense_0", "Dense_1", "Embed_0"],
        "head": ["Dense_0", "Embed_0", "LayerNorm_0"],
    }.items(),
)
def test_a_control_leaves_layers_outside(without, left):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(3)(nn.LayerNorm()(nn.Dense(4)(nn.Embed(5, 4)(tokens))))

    task, params = task_of(Model(), jnp.arange(4))
    optimizer = controls.make(f"centered-without={without}", 1e-2, task)
    state = optimizer.init(params, {}, (jnp.arange(4),), None)
    factors = optax.tree.get(state, "factors")
    assert sorted(factors) == left
    after, *_ = optimizer.step(jax.tree.map(jnp.copy, params), {}, state, (jnp.arange(4),), None)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, after)
    assert all(jax.tree.leaves(moved))


def first_step(name, model, x):
    """What a control's first step adds to the parameters, at a rate of one; and the gradient."""
    task, params = task_of(model, x)
    optimizer = controls.make(name, trial.Schedule(1.0, 100, warm_up=0.0), task)
    grad = jax.grad(lambda p: task.loss(p, {}, (x,), None)[0])(params)
    before = jax.tree.map(np.array, params)
    state = optimizer.init(params, {}, (x,), None)
    after, *_ = optimizer.step(params, {}, state, (x,), None)
    return jax.tree.map(np.subtract, after, before), grad


INPUTS = 1 + jax.random.normal(jax.random.key(1), (40, 8))


def test_damping_by_clipping_leaves_larger_factors_as_they_are():
    x = jax.random.normal(jax.random.key(1), (6, 3)) * jnp.array([[0.01, 1.0, 2.0]])
    step, grad = first_step("centered-clipped", nn.Dense(1, use_bias=False), x)
    (ratio,) = jax.tree.leaves(jax.tree.map(np.divide, step, grad))
    h = np.square(x).mean(0)
    expected = np.maximum(h / h.mean(), 0.01) ** -0.5
    np.testing.assert_allclose(ratio[:, 0] / ratio[0, 0], expected / expected[0], rtol=1e-4)


def test_a_whole_spectrum_is_made_flat():
    step, _ = first_step("centered-whole", nn.Dense(6), INPUTS)
    values = np.linalg.svd(step["kernel"], compute_uv=False)
    np.testing.assert_allclose(values, values[0], rtol=1e-3)


@pytest.mark.slow
def test_grafted_steps_are_as_long_as_those_of_nadamw():
    model = nn.Dense(6)
    (step, _), (other, _), (whole, _) = (
        first_step(name, model, INPUTS)
        for name in ("centered-grafted", "nadamw", "adafisher:centered")
    )
    for mine, nadamw, centered in zip(*map(jax.tree.leaves, (step, other, whole)), strict=True):
        np.testing.assert_allclose(np.linalg.norm(mine), np.linalg.norm(nadamw), rtol=1e-3)
        np.testing.assert_allclose(
            mine / np.linalg.norm(mine), centered / np.linalg.norm(centered), rtol=1e-3, atol=1e-5
        )


def test_signed_steps_are_all_as_large():
    step, _ = first_step("centered-signed", nn.Dense(6), INPUTS)
    whole, _ = first_step("adafisher:centered", nn.Dense(6), INPUTS)
    for mine, centered in zip(*map(jax.tree.leaves, (step, whole)), strict=True):
        np.testing.assert_allclose(mine, 0.2 * np.sign(centered), rtol=1e-4)


def test_nadamw_is_put_into_centered_coordinates():
    """Its first step there has the sign of each entry of the gradient."""
    step, grad = first_step("nadamw-centered", nn.Dense(6), INPUTS)
    mean = np.asarray(INPUTS.mean(0))
    moved = grad["kernel"] - np.outer(mean, grad["bias"])
    size = np.abs(step["kernel"]).max()
    np.testing.assert_allclose(step["kernel"], -size * np.sign(moved), rtol=1e-3)
    bias = -size * np.sign(grad["bias"]) - mean @ step["kernel"]
    np.testing.assert_allclose(step["bias"], bias, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "scale"), {"centered-warm_up=0.0": 1.0, "centered-warm_up=0.2": 0.0}.items()
)
def test_a_control_has_a_warm_up_of_its_own(name, scale):
    step, _ = first_step(name, nn.Dense(6), INPUTS)
    whole, _ = first_step("adafisher:centered", nn.Dense(6), INPUTS)
    np.testing.assert_allclose(step["kernel"], scale * whole["kernel"], rtol=1e-4)


@pytest.mark.parametrize("decay", [0.01, pytest.param(0.1, marks=pytest.mark.slow)])
def test_a_control_decays_weights(decay):
    model = nn.Dense(6)
    step, _ = first_step(f"centered-decay={decay}", model, INPUTS)
    whole, _ = first_step("adafisher:centered", model, INPUTS)
    _, params = task_of(model, INPUTS)
    expected = whole["kernel"] - decay * params["kernel"]
    np.testing.assert_allclose(step["kernel"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_control_steps_without_nesterov_or_an_average_of_sizes():
    x, third = INPUTS[:, :3], {}
    for name in ("adafisher:centered", "centered-nesterov=False", "centered-b2=0.0"):
        task, params = task_of(nn.Dense(1, use_bias=False), x)
        optimizer = controls.make(name, trial.Schedule(1.0, 100, warm_up=0.0), task)
        state = optimizer.init(params, {}, (x,), None)
        for _ in range(3):
            before = jax.tree.map(np.array, params)
            params, _, state, *_ = optimizer.step(params, {}, state, (x,), None)
        (third[name],) = jax.tree.leaves(jax.tree.map(np.subtract, params, before))
    rms = {name: np.sqrt(np.square(step).mean()) for name, step in third.items()}
    assert rms["centered-b2=0.0"] == pytest.approx(0.2, rel=1e-2)
    assert rms["adafisher:centered"] != pytest.approx(0.2, rel=1e-2)
    assert not np.allclose(third["centered-nesterov=False"], third["adafisher:centered"], rtol=0.01)


@pytest.mark.parametrize(
    ("share", "ratio"),
    [
        ("equal", 1.25),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [("root", 1.25**0.5), ("inputs", 0.8), ("embeddings", 1)]
        ),
    ],
)
def test_a_control_has_steps_of_another_share(share, ratio):
    x = jax.random.normal(jax.random.key(1), (40, 200))
    step, _ = first_step(f"centered-share={share}", nn.Dense(160), x)
    whole, _ = first_step("adafisher:centered", nn.Dense(160), x)
    np.testing.assert_allclose(step["kernel"], ratio * whole["kernel"], rtol=1e-4, atol=1e-6)


# An MLP has neither of two kinds of layer nor a wide one, and six steps have no warm-up anyway.
ELSEWHERE = [
    *("centered-without=embedding", "centered-without=norm", "centered-warm_up=0.0"),
    *("centered-directions=32", "centered-bound=0.01"),  # as the rule has there
    *(f"centered-share={share}" for share in variants.SHARES),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in controls.NAMES if name not in ELSEWHERE])
def test_controls_learn_and_differ_from_what_they_control(study, name):
    whole = name.partition("-")[0]
    whole = whole if whole in optimizers.NAMES else f"adafisher:{whole}"
    control, other = study("--optimizers", name, whole, "--rates", "1e-3")
    assert control["train_loss"][0] < 2.4
    assert control["train_loss"] != other["train_loss"]
