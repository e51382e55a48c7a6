"""A complete run: settings, optimizer, folder and result."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import optax

from examples.training import optimizers
from examples.training.loop import Result, train
from examples.training.settings import DEFAULT_STEPS, Settings
from examples.training.stepper import Stepper
from examples.training.task import Task

SETTINGS, RESULT = "settings.toml", "result.json"
TRIAL_STEPS, TRIAL_SHARE = 20, 0.02


def run(task: Task, settings: Settings) -> Result:
    """Trains the task with the settings.

    Writes `settings.toml`, `metrics.jsonl`, TensorBoard's files, `checkpoints/` and, at the end,
    `result.json` into the folder of the run. If the folder has an interrupted run, resumes it. If
    the folder has a complete run, returns its result.

    Raises:
      ValueError: if the run in the folder has other settings, or the optimizer is unknown.
    """
    if not settings.folder:
        name = f"{task.name}-{settings.optimizer.replace(':', '-')}"
        settings = _but(settings, folder=f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = pathlib.Path(settings.folder)
    if (folder / SETTINGS).exists():
        settings = _as_begun(task, settings)
    else:
        settings = _but(settings, steps=_steps(task, settings), epochs=None, seconds=None)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(settings.to_toml())
    if (folder / RESULT).exists():
        return Result(**json.loads((folder / RESULT).read_text()))
    with _saying_how_to_go_on(folder):
        result = train(task, _optimizer(task, settings, schedule(settings)), settings)
    (folder / RESULT).write_text(json.dumps(result._asdict(), indent=1))
    return result


def schedule(settings: Settings) -> optax.Schedule:
    """A linear warm-up from zero to the rate, then half a cosine down to zero."""
    rising = round(settings.warmup * settings.steps)
    return optax.warmup_cosine_decay_schedule(0.0, settings.rate, rising, settings.steps)


def _steps(task: Task, settings: Settings) -> int:
    """The number of steps of the run."""
    if settings.epochs is not None:
        return settings.epochs * task.steps_per_epoch
    if settings.seconds is not None:
        return _steps_within(task, settings)
    return settings.steps or DEFAULT_STEPS


def _steps_within(task: Task, settings: Settings) -> int:
    """The number of steps that fit into `settings.seconds`, estimated from a trial.

    The number is fixed before the run starts. So the schedule ends with the run, and the run can be
    repeated.
    """
    trial = Stepper(task, _optimizer(task, settings, settings.rate), settings.seed)
    trial.advance(1)
    while trial.seconds < TRIAL_SHARE * settings.seconds or trial.step <= TRIAL_STEPS:
        trial.advance(trial.step + TRIAL_STEPS)
    steps = round(settings.seconds * (trial.step - 1) / trial.seconds)
    print(f"{1e3 * trial.seconds / (trial.step - 1):.3g} ms a step: {steps} steps take")
    return max(steps, 1)


def _optimizer(task: Task, settings: Settings, rate: Any) -> Any:
    options = settings.options
    return optimizers.make(settings.optimizer, rate, task, settings.weight_decay, **options)


def _as_begun(task: Task, settings: Settings) -> Settings:
    """The settings of the run in the folder, if they equal these."""
    begun = type(settings).from_file(pathlib.Path(settings.folder) / SETTINGS)
    if settings.seconds is not None:  # a second trial would give another number
        settings = _but(settings, steps=begun.steps, seconds=None)
    settings = _but(settings, steps=_steps(task, settings), epochs=None)
    names = [field.name for field in dataclasses.fields(settings)]
    differing = [
        f"{name} {getattr(begun, name)!r}, now {getattr(settings, name)!r}"
        for name in names
        if getattr(begun, name) != getattr(settings, name)
    ]
    if differing:
        raise ValueError(f"the run in {settings.folder} has {'; '.join(differing)}")
    return begun


def _but(settings: Settings, **changes: Any) -> Settings:
    return dataclasses.replace(settings, **changes)


@contextlib.contextmanager
def _saying_how_to_go_on(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; with --config {folder / SETTINGS} it goes on from its last checkpoint")
        raise SystemExit(130) from None
