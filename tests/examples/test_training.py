"""`examples/training`: a tiny classifier, trained in every way there is."""

import dataclasses
import importlib.util
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from examples.training import adahessian, losses, optimizers, records, run
from examples.training.checkpoints import Checkpoints
from examples.training.divergence import FACTOR, PATIENCE, Watch
from examples.training.settings import Settings, setting
from examples.training.stepper import Stepper
from examples.training.task import Task


@pytest.fixture(autouse=True)
def quick():
    """Compiles without optimizing: compiling takes most of the time of these tests."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


class Net(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(8)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(3)(x)


def examples(seed, count=32):
    x = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    return x, x[:, :3].argmax(-1)


def make_task(dropout=0.0, batch_of=examples, name="tiny"):
    model = Net(dropout)

    def loss(params, model_state, batch, key):
        x, labels = batch
        logits = model.apply({"params": params}, x, train=True, rngs={"dropout": key})
        hits = (logits.argmax(-1) == labels).mean()
        return losses.cross_entropy(logits, labels), (model_state, {"accuracy": hits})

    def evaluate(params, model_state, batch):
        x, labels = batch
        logits = model.apply({"params": params}, x, train=False)
        count = len(labels)
        return {"loss": count * losses.cross_entropy(logits, labels), "count": jnp.array(count)}

    return Task(
        name=name,
        init=lambda key: (model.init(key, jnp.zeros((1, 4)), train=False)["params"], {}),
        loss=loss,
        evaluate=evaluate,
        train_batches=lambda start: map(batch_of, itertools.count(start)),
        eval_batches=lambda: iter([examples(-1 % 1000, 32), examples(-2 % 1000, 8)]),
        steps_per_epoch=5,
    )


TASK = make_task()
ONE_BATCH = make_task(batch_of=lambda step: examples(0))
SETTINGS = Settings(
    optimizer="adamw", steps=10, log_every=2, evaluate_every=5, checkpoint_every=4, batch=32
)


def settings(tmp_path, **changes):
    return dataclasses.replace(SETTINGS, folder=str(tmp_path / "run"), **changes)


# Optimizers.

PACKAGES = {"kfac": "kfac_jax", "psgd": "psgd_jax", "shampoo": "optax_shampoo"}
SLOW = *PACKAGES, "muon"  # to compile
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in optimizers.NAMES
]
RATES = {"sgd": 0.1, "adafactor": 0.1, "kfac": 0.1, "adafisher:official": 1e-3}


@pytest.fixture
def any_name(request):
    """An optimizer's name; that packages of others promote ranks is let pass."""
    package = PACKAGES.get(request.param)
    if package and not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    with jax.numpy_rank_promotion("allow"):
        yield request.param


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # Shampoo's
@pytest.mark.parametrize("any_name", NAMES, indirect=True)
def test_every_optimizer_lowers_the_loss(any_name):
    rate = RATES.get(any_name, 1e-2)
    optimizer = optimizers.make(any_name, rate, ONE_BATCH, weight_decay=1e-4)
    stepper = Stepper(ONE_BATCH, optimizer, seed=0)
    found = stepper.advance(1)
    places = [(leaf.aval, leaf.sharding) for leaf in jax.tree.leaves(stepper.state)]
    found += stepper.advance(4)
    assert found[0]["loss"] == pytest.approx(math.log(3), abs=0.7)
    assert found[-1]["loss"] < found[1]["loss"] < found[0]["loss"]
    # No step is compiled twice.
    assert places == [(leaf.aval, leaf.sharding) for leaf in jax.tree.leaves(stepper.state)]


def test_an_unknown_optimizer_is_told_the_names():
    with pytest.raises(ValueError, match="no optimizer 'adam'; there are sgd, adamw, "):
        optimizers.make("adam", 1e-2, TASK)


def test_a_failure_names_optimizer_and_model():
    with pytest.raises(RuntimeError, match=r"adamw fails on tiny: TypeError: .*momentum"):
        optimizers.make("adamw", 1e-2, TASK, momentum=0.9)
    stepper = Stepper(TASK, optimizers.make("adamw", 1e-2, TASK), seed=0)
    stepper.state[0].popitem()
    with pytest.raises(RuntimeError, match="adamw fails on tiny: "):
        stepper.advance(1)


def test_adahessian_is_adam_with_the_hessians_diagonal():
    """Where the Hessian is diagonal the estimate is exact; then equation by equation."""
    curvature, rate, b1, b2, eps = np.array([4.0, 0.5]), 0.1, 0.9, 0.999, 1e-4
    params = {"w": jnp.array([1.0, -2.0])}
    task = dataclasses.replace(
        TASK,
        loss=lambda p, state, batch, key: (jnp.sum(curvature * p["w"] ** 2) / 2, (state, {})),
    )
    find, tx = adahessian.of_hessian(task), adahessian.scale_by_adahessian()
    state, w, m = tx.init(params), np.array([1.0, -2.0]), 0.0
    for step in range(1, 4):
        _, grads, extra = find(params, {}, state, None, jax.random.key(step))
        np.testing.assert_allclose(extra["hessian"]["w"], curvature, rtol=1e-6)
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates))
        m = b1 * m + (1 - b1) * curvature * w
        v = (1 - b2**step) * curvature**2
        w = w - rate * (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)


def test_curvature_is_refreshed_every_so_many_steps():
    tx = optimizers.make("adafisher:centered", 1e-2, TASK, refresh_every=3)
    stepper, seen = Stepper(TASK, tx, seed=0), []
    for step in range(1, 8):
        stepper.advance(step)
        seen.append(float(stepper.state[2][0].factors["Dense_1"].s.sum()))
    changed = [step for step, (a, b) in enumerate(itertools.pairwise([0.0, *seen])) if a != b]
    assert changed == [0, 3, 6]


def test_the_loss_is_reported_with_the_weight_of_a_label():
    reports = []

    def report(logits, labels, weight):
        reports.append(weight)

    with losses.reported_to({losses.cross_entropy: report}):
        losses.cross_entropy(jnp.zeros((2, 5, 3)), jnp.zeros((2, 5), int))
    losses.cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2, int))
    assert reports == [1 / 5]


# Runs.


def stopping(task, at):
    """The task, interrupted before a step."""

    def batch_of(step):
        if step == at:
            raise KeyboardInterrupt
        return examples(step)

    return dataclasses.replace(
        task, train_batches=lambda start: map(batch_of, itertools.count(start))
    )


def without_times(folder):
    return [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in records.read(folder)
    ]


@pytest.mark.parametrize(
    "optimizer", ["adamw", pytest.param("adafisher:centered", marks=pytest.mark.slow)]
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(optimizer, tmp_path, capsys):
    task = make_task(dropout=0.5)
    options = ("refresh_every=3",) if ":" in optimizer else ()
    whole, parts = (settings(tmp_path / name, optimizer=optimizer, option=options) for name in "ab")
    expected = run.run(task, whole)
    with pytest.raises(SystemExit):
        run.run(stopping(task, 7), parts)
    assert f"with --config {parts.folder}/settings.toml it goes on" in capsys.readouterr().out
    assert records.read(tmp_path / "b" / "run")[-1]["step"] == 6
    result = run.run(task, parts)
    assert result._replace(seconds=0) == expected._replace(seconds=0)
    assert without_times(tmp_path / "a" / "run") == without_times(tmp_path / "b" / "run")
    states = []
    for folder in (whole.folder, parts.folder):
        tx = optimizers.make(optimizer, 1e-2, task)
        like = Stepper(task, tx, seed=0).state
        with Checkpoints(tmp_path / folder) as checkpoints:
            states.append(checkpoints.latest(like)[0])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_run_records_what_it_did(tmp_path):
    given = settings(tmp_path)
    result = run.run(TASK, given)
    folder = tmp_path / "run"
    lines = records.read(folder)
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 5, 6, 8, 10]
    assert [line["step"] for line in lines if "eval/loss" in line] == [5, 10]
    assert lines[-1]["eval/loss"] == result.evaluation["loss"]
    assert result.status == "finished"
    assert result.steps == 10
    assert json.loads((folder / "result.json").read_text()) == result._asdict()
    assert Settings.from_file(folder / "settings.toml") == given
    assert list(folder.glob("events.out.tfevents.*"))
    # Asked again, it tells what it found.
    assert run.run(stopping(TASK, 0), given) == result
    with pytest.raises(ValueError, match=r"has rate 0.03, now 0.1; steps 10, now 20"):
        run.run(TASK, dataclasses.replace(given, rate=0.1, steps=20))


def test_evaluation_is_a_mean_over_examples(tmp_path):
    """Not over batches, of which the last is smaller."""
    result = run.run(TASK, settings(tmp_path))
    tx = optimizers.make("adamw", 1e-2, TASK)
    like = Stepper(TASK, tx, seed=0).state
    with Checkpoints(tmp_path / "run") as checkpoints:
        (params, _, _), _ = checkpoints.latest(like)
    x, labels = (np.concatenate(parts) for parts in zip(*TASK.eval_batches(), strict=True))
    logits = Net().apply({"params": params}, x, train=False)
    assert result.evaluation["loss"] == pytest.approx(losses.cross_entropy(logits, labels))


def test_epochs_and_seconds_become_steps(tmp_path):
    given = settings(tmp_path, steps=None, epochs=2)
    assert run.run(TASK, given).steps == 10
    seldom = {"log_every": 100, "evaluate_every": 1000, "checkpoint_every": 1000}
    given = settings(tmp_path / "timed", steps=None, seconds=0.05, **seldom)
    result = run.run(TASK, given)
    assert result.status == "finished"
    stored = Settings.from_file(tmp_path / "timed" / "run" / "settings.toml")
    assert (stored.steps, stored.seconds) == (result.steps, None)
    assert run.run(TASK, given) == result  # without another trial


def test_the_schedule_rises_and_falls():
    rate = run.schedule(dataclasses.replace(SETTINGS, rate=0.5, warmup=0.25, steps=100))
    assert [float(rate(step)) for step in (0, 25, 100)] == pytest.approx([0, 0.5, 0])


def test_a_batch_that_does_not_divide_among_the_devices_is_refused(monkeypatch):
    from examples.training import devices

    three = type("Mesh", (), {"size": 3})()
    monkeypatch.setattr(devices, "_mesh", lambda: three)
    with pytest.raises(ValueError, match="32 examples does not divide among 3 devices"):
        devices.put_training(examples(0))


# Divergence.


def test_a_run_that_diverges_stops_and_says_so(tmp_path):
    given = settings(tmp_path, optimizer="sgd", rate=1e30, warmup=0.0, steps=1000)
    result = run.run(TASK, given)
    assert result.status == "diverged"
    assert result.message.startswith("the loss is nan at step ")
    assert result.steps < 20
    assert run.run(TASK, given)._replace(train=None) == result._replace(train=None)


def test_a_loss_far_above_its_start_for_a_while_is_divergence():
    watch = Watch()
    for step, loss in enumerate([1.0] + [FACTOR + 0.1] * (PATIENCE - 1) + [1.0]):
        watch.see(step, loss)
    for step in range(PATIENCE - 1):
        watch.see(step, FACTOR + 0.1)
    assert not watch.verdict
    watch.see(321, FACTOR + 0.1)
    assert "at step 321, the loss is above 2 times its start 1: 2.1" in watch.verdict


# Settings.


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoreSettings(Settings):
    kind: str = setting("a", "which", ("a", "b"))
    fast: bool = setting(False, "whether")


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('rate = 1\nsteps = 7\nkind = "b"\noption = ["damping=0.1", "b1=high"]\n')
    found = MoreSettings.from_flags(["--config", str(path), "--epochs", "3", "--fast"])
    assert found == MoreSettings(
        rate=1.0, epochs=3, kind="b", fast=True, option=("damping=0.1", "b1=high")
    )
    assert found.options == {"damping": 0.1, "b1": "high"}
    path.write_text(found.to_toml())
    assert MoreSettings.from_file(path) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed = 1", "no setting 'speed'; there are optimizer, rate, "),
        ('rate = "high"', "rate wants a float, got 'high'"),
        ("steps = true", "steps wants a int, got True"),
        ("steps = 3\nepochs = 1", "a run has one end, got steps and epochs"),
        ('optimizer = "adam"', "optimizer is one of sgd, adamw, "),
        ("log_every = 0", "log_every must be positive, got 0"),
        ('option = ["damping"]', "an option is given as name=value, got 'damping'"),
    ],
)
def test_a_wrong_setting_is_refused(text, message, tmp_path, capsys):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        Settings.from_flags(["--config", str(path)])
    assert message in capsys.readouterr().err
