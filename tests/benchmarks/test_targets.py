"""The benchmark of targets: its rule, and its rivals against literal readings of their papers."""

import argparse
import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import adafisher_jax as af
from benchmarks import matrices
from benchmarks.study.trial import Trial
from benchmarks.targets import command, reach, rivals, run, search, tables, tasks
from benchmarks.targets.search import Effort

NOWHERE = pathlib.Path("nowhere")  # these tasks read no files


@pytest.fixture
def targets(tmp_path):
    def benchmark(*flags):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        command.main(parser.parse_args(["--quick", "--out", str(tmp_path), *flags]))
        return [
            json.loads((tmp_path / f"{name}.json").read_text())["rows"]
            for name in ("table", "summary")
        ]

    return benchmark


@pytest.mark.slow
def test_a_benchmark_has_rows_profiles_and_times_and_goes_on_where_it_stopped(
    targets, tmp_path, monkeypatch
):
    chosen = ["--tasks", "returns", "--optimizers", "nadamw", "adamw", "adafisher:centered"]
    found, summary = targets(*chosen, "--time")
    assert [row["optimizer"] for row in found] == ["nadamw", "adamw", "adafisher:centered"]
    assert all(row["held_back"] and row["step_ms"] > 0 for row in found)
    assert found[0]["train_steps"] is not None
    assert {row["over"].partition(",")[0] for row in summary} == {"all", "held back"}
    assert (tmp_path / "profiles.png").stat().st_size > 0
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("it was run already"))
    assert targets(*chosen) == [found, summary]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*rivals.RIVALS])
def test_every_rival_learns(name):
    with jax.numpy_rank_promotion("allow"):  # PSGD's package promotes
        tried = search.trials("returns", name, Effort(trials=6, steps=60))
        curves = [run.run(one, NOWHERE)["train"] for one in tried]
    assert any(reach.final(curve) < 0.9 * curve[0] for curve in curves)


@pytest.mark.slow
def test_a_run_is_its_steps_in_a_loop_with_losses_of_the_fixed_examples():
    (one,) = search.trials("returns", "nadamw", Effort(trials=1, steps=10))
    problem = tasks.TASKS["returns"]
    data = problem.read(NOWHERE)
    task = problem.task("returns", data, problem.batch, seed=0)
    settings = {"rate": one.rate} | dict(one.options)
    optimizer = rivals.RIVALS[one.optimizer].make(task, settings, one.steps)
    key = jax.random.key(one.seed)
    params, model_state = task.init(key)
    order = np.random.default_rng(one.seed).permutation(len(data.train.inputs))
    opt_state = optimizer.init(params, model_state, data.train.head(problem.batch), key)
    losses = []
    for number in range(one.steps):
        batch = order[number * problem.batch : (number + 1) * problem.batch]
        batch = type(data.train)(*(values[batch] for values in data.train))
        params, _, opt_state, *_ = optimizer.step(params, model_state, opt_state, batch, key)
        if number % 5 == 4:
            splits = (split.head(problem.measured) for split in data)
            sums = [task.evaluate(params, {}, split) for split in splits]
            losses.append([one["loss"] / one["count"] for one in sums])
    curves = run.run(one, NOWHERE)
    np.testing.assert_allclose(curves["train"], [loss for loss, _ in losses], rtol=1e-4)
    np.testing.assert_allclose(curves["held_out"], [loss for _, loss in losses], rtol=1e-4)


# The rule.


def test_curves_are_smoothed_over_three_measurements():
    np.testing.assert_allclose(reach.smooth([4.0, 2.0, 3.0, 1.0]), [4, 3, 3, 2])
    assert reach.final([4.0, 2.0, 3.0, 1.0]) == 2


def test_steps_to_a_target_end_at_the_first_smoothed_loss_that_is_no_higher():
    curve = [4.0, 1.0, 1.0, 1.0, 1.0]
    assert reach.steps(curve, 2.5) == 10
    assert reach.steps(curve, 2.0) == 15
    assert reach.steps(curve, 0.9) == math.inf


@pytest.mark.parametrize("end", [math.nan, math.inf, 9.0])
def test_a_run_that_diverges_reaches_nothing(end):
    curve = [4.0, 1.0, 1.0, 1.0, end, end, end]
    assert reach.final(curve) == math.inf
    assert reach.steps(curve, 2.0) == math.inf


ENDS = {  # of the reference's settings, on the tuning seed and three fresh ones
    0: [0.3, 0.5, 0.7, 0.6],
    1: [0.2, 0.4, math.nan, 0.45],
    2: [0.9, 0.1, 0.1, 0.1],
}
SHORT = Effort(trials=3, seeds=3)


def test_a_target_is_the_median_end_of_the_best_setting_on_fresh_seeds():
    tried = search.trials("returns", reach.REFERENCE, SHORT)

    def curves(one):
        (number,) = (i for i, trial in enumerate(tried) if trial.options == one.options)
        return {"train": [1.0] * 3 + [ENDS[number][one.seed]] * 3, "held_out": [2.0] * 6}

    assert reach.target("returns", "train", curves, SHORT) == pytest.approx(0.45)
    assert reach.target("returns", "held_out", curves, SHORT) == 2.0


SOON, LATE, NEVER = [9.0, 0, 0, 0, 4, 4, 4], [9.0, 9, 9, 9, 1, 1, 1], [9.0, 8, 8, 8, 8, 8, 8]


@pytest.mark.parametrize(("fresh", "best"), [([SOON, NEVER, SOON], 0), ([NEVER, SOON, NEVER], 1)])
def test_the_better_of_the_fastest_setting_and_the_lowest_is_chosen(fresh, best):
    """On fresh seeds; the first setting is the fastest on seed 0, the second ends lowest."""
    found = {0: [SOON, *fresh], 1: [LATE] * 4, 2: [NEVER, SOON, SOON, SOON]}
    tried = search.trials("returns", "muon", SHORT)

    def curves(one):
        (number,) = (i for i, trial in enumerate(tried) if trial.options == one.options)
        return {"train": found[number][one.seed]}

    assert reach.chosen(tried, "train", curves, 3.0, SHORT) == tried[best]


def test_every_rival_has_as_many_settings_each_within_its_space():
    for name, rival in rivals.RIVALS.items():
        tried = search.trials("returns", name, Effort())
        assert len({one.rate for one in tried}) == len(tried) == 20
        for setting, draw in rival.space.items():
            values = [({"rate": one.rate} | dict(one.options))[setting] for one in tried]
            low, high = sorted([draw(0), draw(1)])
            assert low <= min(values) < max(values) <= high
    assert search.trials("returns", "muon", Effort()) == search.trials("returns", "muon", Effort())


def test_a_fresh_run_has_the_settings_on_another_seed():
    one, *_ = search.trials("returns", "muon", Effort())
    fresh = search.fresh(one, Effort(seeds=3))
    assert [trial.seed for trial in fresh] == [1, 2, 3]
    assert {(trial.rate, trial.options) for trial in fresh} == {(one.rate, one.options)}


def test_half_of_the_tasks_are_held_back():
    assert len(tasks.OPEN) == len(tasks.HELD_BACK) == 6
    assert not {*tasks.OPEN} & {*tasks.HELD_BACK}


def row(task, optimizer, steps, seeds, ms=1.0):
    losses = {f"{loss}_{key}": value for loss in reach.LOSSES for key, value in
              {"steps": steps, "steps_of_seeds": seeds}.items()}  # fmt: skip
    held_back = task in tasks.HELD_BACK
    return {"task": task, "optimizer": optimizer, "held_back": held_back, "budget": 200} | {
        "step_ms": ms,
        **losses,
    }


FOUND = [
    row("chars", "nadamw", 100, [100, 90, 110]),
    row("chars", "adamw", None, [None, None, 200]),
    row("chars", "muon", 80, [80, 80, 80], 3.0),
    row("lstm", "nadamw", 100, [100, 100, 100]),
    row("lstm", "adamw", 120, [120, 120, 120]),
    row("lstm", "muon", None, [None, None, 50], 3.0),
]


def test_a_profile_is_of_steps_over_the_fewest():
    assert tables.beyond_best(FOUND, "train") == {
        "nadamw": [1.25, 1.0],
        "adamw": [math.inf, 1.2],
        "muon": [1.0, math.inf],
    }


def test_a_summary_counts_never_as_twice_a_run():
    found = {row["name"]: row for row in tables.summary(FOUND)}
    muon = found["all, train, muon"]
    assert (muon["first"], muon["near"], muon["tasks"]) == (0.5, 0.5, 2)
    assert muon["reached"] == pytest.approx(4 / 6)
    ratio, error = muon["steps_to_nadamw"]
    assert ratio == pytest.approx(math.sqrt(80 / 100 * 400 / 100))
    assert error == pytest.approx(ratio * (math.log(4) - math.log(0.8)) / 2)  # of two tasks
    assert muon["seconds_to_adamw"][0] == pytest.approx(math.sqrt(3 * 80 / 400 * 3 * 400 / 120))
    assert muon["steps_to_soap"] is None
    assert found["open, held_out, nadamw"]["near"] == 1
    assert found["held back, train, adamw"]["steps_to_nadamw"] is None  # a single task


def test_seconds_are_steps_times_the_time_of_a_step():
    found = tables.timed(FOUND, {"chars": {"muon": 0.005}})
    assert found[2]["train_seconds"] == pytest.approx(0.4)
    assert found[0]["step_ms"] is None
    assert found[0]["train_seconds"] is None


# The rivals.


def test_the_rate_rises_and_falls_to_zero_at_the_horizon():
    at = rivals.rate({"rate": 2.0, "warm_up": 0.1, "horizon": 0.6}, 100)
    assert at(0) == pytest.approx(0.2)
    assert at(4) == pytest.approx(1.0)
    assert at(10) == pytest.approx(2.0)
    assert at(35) == pytest.approx(1.0)
    assert at(60) == at(90) == 0


@pytest.fixture
def gradients():
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 4, 4)) * np.linspace(0.5, 2, 4)[:, None]


def steps_of(tx, gradients):
    """What a transformation makes of the gradients of a single weight, one after the other."""
    params = {"w": jnp.zeros_like(gradients[0])}
    state, found = tx.init(params), []
    for gradient in gradients:
        step, state = tx.update({"w": jnp.asarray(gradient)}, state, params)
        found.append(step["w"])
    return found


def test_soap_as_in_its_paper(x64, gradients):
    """Algorithm 3, with the bases of the first gradient, which makes no step."""
    b1, b2, every = 0.9, 0.95, 3
    first, *others = gradients
    left, right = (1 - b2) * first @ first.T, (1 - b2) * first.T @ first
    bases = [np.linalg.eigh(side)[1][:, ::-1] for side in (left, right)]
    mean, square, expected = 0, 0, [np.zeros_like(first)]
    for t, g in enumerate(others, 1):
        rotated = bases[0].T @ g @ bases[1]
        mean = b1 * mean + (1 - b1) * g
        square = b2 * square + (1 - b2) * rotated**2
        in_basis = bases[0].T @ mean @ bases[1] / (1 - b1**t)
        adam = in_basis / (np.sqrt(square / (1 - b2**t)) + 1e-8)
        expected.append(bases[0] @ adam @ bases[1].T)
        left = b2 * left + (1 - b2) * g @ g.T
        right = b2 * right + (1 - b2) * g.T @ g
        if t % every == 0:
            pairs = zip((left, right), bases, strict=True)
            bases = [np.linalg.qr(side @ basis)[0] for side, basis in pairs]
    found = steps_of(matrices.scale_by_soap(b1, b2, every), gradients)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_neurons_are_normalized_as_in_the_paper_of_normuon(x64, gradients):
    """Algorithm 1: what comes after the orthogonalization, for outputs along the last axis."""
    b2, average, expected = 0.9, np.zeros(4), []
    for muon in gradients:
        for neuron in range(4):
            square = np.mean(muon[:, neuron] ** 2)
            average[neuron] = b2 * average[neuron] + (1 - b2) * square
        normalized = muon / (np.sqrt(average) + 1e-8)
        expected.append(0.2 * 4 * normalized / np.linalg.norm(normalized))
    found = steps_of(matrices.normalize_neurons(b2), gradients)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def task_of(model, x):
    def loss(params, model_state, batch, key):
        return jnp.mean(jnp.square(model.apply({"params": params}, batch))), (model_state, {})

    key = jax.random.key(0)
    params = model.init(key, x)["params"]
    layout = af.trace_layout(loss, params, {}, x, key)
    init = lambda key: (model.init(key, x)["params"], {})  # noqa: E731
    return types.SimpleNamespace(name="own", loss=loss, layout=layout, init=init), params


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        return nn.Dense(4)(nn.LayerNorm()(x.mean((1, 2))))


IMAGES = jax.random.normal(jax.random.key(1), (8, 5, 5, 3))
SETTINGS = {"rate": 0.1, "warm_up": 0.001, "horizon": 1.0, "decay": 0.01, "b1": 0.9, "b2": 0.95}


def after(optimizer, params, count):
    params, state = jax.tree.map(jnp.copy, params), optimizer.init(params, {}, IMAGES, None)
    for _ in range(count):
        params, _, state, *_ = optimizer.step(params, {}, state, IMAGES, None)
    return params, state


@pytest.mark.slow
def test_what_works_on_matrices_gets_every_kernel_once():
    """Adam does not care for their shapes."""
    task, params = task_of(Network(), IMAGES)
    grads = jax.tree.map(jnp.cos, params)
    whole = optax.adamw(0.1, weight_decay=0.1)
    kernels = [one for one in task.layout.layers if one.kind != "norm"]
    split = matrices.on_matrices(kernels, whole, whole)
    (expected, _), (found, _) = (tx.update(grads, tx.init(params), params) for tx in (whole, split))
    jax.tree.map(np.testing.assert_allclose, found, expected)


@pytest.mark.slow
def test_normuon_is_muon_but_for_the_normalization(monkeypatch):
    task, params = task_of(Network(), IMAGES)
    settings = SETTINGS | {"others": 0.3, "b2_neurons": 0.9}
    monkeypatch.setattr(
        matrices,
        "normalize_neurons",
        lambda _: optax.stateless(lambda steps, _: {path: sized(x) for path, x in steps.items()}),
    )

    def sized(step):  # as Muon with `consistent_rms`
        return 0.2 * max(step.shape[-2:]) ** 0.5 * step

    muon, normuon = (rivals.RIVALS[name].make(task, settings, 10) for name in ("muon", "normuon"))
    expected, found = (after(optimizer, params, 3)[0] for optimizer in (muon, normuon))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected
    )


@pytest.mark.slow
def test_ademamix_has_the_schedulers_of_its_paper(x64):
    """Equations of section 3: α grows linearly, and the half-life of β3 does from that of β1."""
    settings = SETTINGS | {"b3": 0.999, "alpha": 4.0, "decay": 0.0}
    task, params = task_of(nn.Dense(2), jnp.ones((1, 3)))
    optimizer = rivals.ademamix(task, settings, 10)
    w = np.array(params["kernel"], np.float64)
    params, state = jax.tree.map(jnp.copy, params), optimizer.init(params, {}, None, None)
    fast = slow = square = 0
    for t in range(5):
        g = jax.grad(lambda p: task.loss(p, {}, jnp.ones((1, 3)), None)[0])(params)["kernel"]
        log_1, log_3, share = math.log(0.9), math.log(0.999), t / 10
        b3 = math.exp(log_1 * log_3 / ((1 - share) * log_3 + share * log_1))
        fast, slow = 0.9 * fast + 0.1 * g, b3 * slow + (1 - b3) * g
        square = 0.95 * square + 0.05 * g**2
        mixed = fast / (1 - 0.9 ** (t + 1)) + 4.0 * share * slow
        step = mixed / (jnp.sqrt(square / (1 - 0.95 ** (t + 1))) + 1e-8)
        w = w - rivals.rate(settings, 10)(t) * step
        params, _, state, *_ = optimizer.step(params, {}, state, jnp.ones((1, 3)), None)
        np.testing.assert_allclose(params["kernel"], w, rtol=1e-5)


def test_the_schedule_free_rival_is_measured_at_its_average():
    """The average of the points that its base optimizer makes, here with equal weights."""
    task, params = task_of(nn.Dense(2), jnp.ones((1, 3)))
    rival = rivals.RIVALS["schedule_free"]
    optimizer = rival.make(task, SETTINGS, 10)
    own, state = jax.tree.map(jnp.copy, params), optimizer.init(params, {}, None, None)
    points = []
    for _ in range(4):
        own, _, state, *_ = optimizer.step(own, {}, state, jnp.ones((1, 3)), None)
        points.append(np.array(state.z["kernel"]))
        average = rival.measured(own, state)["kernel"]
        np.testing.assert_allclose(average, np.mean(points, 0), rtol=1e-4, atol=1e-6)


# The tasks.


def test_the_residual_of_burgers_equation_is_that_of_the_function(x64):
    """With a network that is 1 everywhere."""
    points = np.random.default_rng(0).uniform([-1, 0], [1, 1], (7, 2))
    x, t = points.T
    u = t * (1 - x**2) - np.sin(np.pi * x)
    u_x = -2 * t * x - np.pi * np.cos(np.pi * x)
    u_xx = -2 * t + np.pi**2 * np.sin(np.pi * x)
    expected = (1 - x**2) + u * u_x - tasks.VISCOSITY * u_xx
    found = tasks.Burgers(None).of(lambda points: jnp.ones((len(points), 1)), jnp.asarray(points))
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-9)


def test_costs_of_a_pendulum_are_sums_over_its_steps(x64):
    states, total, weights = np.array([[0.5, -0.2], [1.0, 0.0]]), 0, 0
    angle, velocity = states.T
    for number in range(4):
        torque = -angle
        weight = 0.9**number
        total += weight * (1 - np.cos(angle) + 0.1 * velocity**2 + 0.01 * torque**2)
        weights += weight
        velocity = velocity + 0.1 * (3 * np.sin(angle) + torque)
        angle = angle + 0.1 * velocity
    found = tasks.costs(lambda states: -states[:, 0], states, 0.1, 4)
    np.testing.assert_allclose(found, total / weights, rtol=1e-9)


def test_forces_push_like_charges_apart_and_sum_to_nothing():
    bodies, forces = tasks.forces(np.random.default_rng(0), 5)
    np.testing.assert_allclose(forces.sum(1), 0, atol=1e-5)
    where, charge = bodies[0, :2, :2], bodies[0, :2, 2]
    apart = where[0] - where[1]
    of_two = charge[0] * charge[1] * apart / (apart @ apart + 0.1) ** 1.5
    others = sum(
        charge[0] * q * (where[0] - x) / ((where[0] - x) @ (where[0] - x) + 0.1) ** 1.5
        for *x, q in bodies[0, 2:]
    )
    np.testing.assert_allclose(forces[0, 0], of_two + others, rtol=1e-4, atol=1e-6)


def test_masked_tokens_alone_are_classified():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 4))
    labels = jnp.array([[1, -1, -1], [-1, 3, 0]])
    hidden = jnp.array([True, False, False, False, True, True])
    kept = optax.softmax_cross_entropy_with_integer_labels(
        logits.reshape(6, 4)[hidden], labels.reshape(6)[hidden]
    )
    np.testing.assert_allclose(tasks.classify_masked(logits, labels), kept.mean(), rtol=1e-5)


@pytest.mark.slow
def test_sets_and_bodies_have_no_order():
    key = jax.random.key(0)
    points = jax.random.normal(key, (2, 5, 3))
    order = jnp.array([3, 0, 4, 1, 2])
    sets, pairs = tasks.DeepSets(8, 4), tasks.Interactions(8)
    params = sets.init(key, points, False)
    np.testing.assert_allclose(
        sets.apply(params, points, False), sets.apply(params, points[:, order], False), rtol=1e-4
    )
    params = pairs.init(key, points, False)
    np.testing.assert_allclose(
        pairs.apply(params, points, False)[:, order],
        pairs.apply(params, points[:, order], False),
        rtol=1e-4,
        atol=1e-5,
    )


def test_trials_are_those_of_the_study():
    """So that runs are stored as a study stores them."""
    assert isinstance(search.trials("returns", "muon", Effort())[0], Trial)
