"""The training loop."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from examples.training import devices
from examples.training.checkpoints import Checkpoints
from examples.training.divergence import Watch
from examples.training.records import Records
from examples.training.settings import Settings
from examples.training.stepper import Stepper
from examples.training.steps import Optimizer
from examples.training.task import Task


class Result(NamedTuple):
    """How a run ended.

    Attributes:
      status: "finished" or "diverged".
      message: how the run diverged, or "".
      steps: the number of steps taken.
      seconds: the training time, without evaluation, checkpoints, and the first step after each
        start of the program, which compiles.
      train: means of the loss and the metrics over the steps since the previous record.
      evaluation: means over the held-out data, from the last evaluation.
    """

    status: str
    message: str
    steps: int
    seconds: float
    train: dict[str, float]
    evaluation: dict[str, float]


def train(task: Task, optimizer: Optimizer, settings: Settings) -> Result:
    """Trains for `settings.steps` steps, in `settings.folder`.

    Resumes from a checkpoint if there is one. The result is the same as without the interruption.
    A run that diverges stops.
    """
    folder = pathlib.Path(settings.folder)
    stepper, watch = Stepper(task, optimizer, settings.seed), Watch()
    evaluate = jax.jit(task.evaluate)
    means: dict[str, float] = {}
    held_out: dict[str, float] = {}
    with Checkpoints(folder) as checkpoints:
        if saved := checkpoints.latest(stepper.state):
            state, numbers = saved
            stepper.go_on(state, numbers["step"], numbers["seconds"])
            watch = Watch(**numbers["watch"])
        progress = tqdm(total=settings.steps, initial=stepper.step, desc=task.name, unit="step")
        with progress, Records(folder, stepper.step) as records:
            while stepper.step < settings.steps and not watch.verdict:
                before = stepper.step
                found = stepper.advance(_next_stop(before, settings))
                for step, one in enumerate(found, before + 1):
                    watch.see(step, one["loss"])
                means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
                records.write(stepper.step, stepper.seconds, "train", means)
                progress.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
                progress.update(len(found))
                if watch.verdict:
                    break
                if _is_due(stepper.step, settings.evaluate_every, settings):
                    held_out = _mean(task, evaluate, *stepper.state[:2])
                    records.write(stepper.step, stepper.seconds, "eval", held_out)
                if _is_due(stepper.step, settings.checkpoint_every, settings):
                    numbers = {"step": stepper.step, "seconds": stepper.seconds}
                    numbers["watch"] = dataclasses.asdict(watch)
                    checkpoints.save(stepper.step, stepper.state, numbers)
    status = "diverged" if watch.verdict else "finished"
    return Result(status, watch.verdict, stepper.step, stepper.seconds, means, held_out)


def _next_stop(step: int, settings: Settings) -> int:
    """The next step after which a record, an evaluation or a checkpoint is due.

    Each of them ends the range of a record's means, since a resumed run does not know the steps
    before its checkpoint.
    """
    intervals = settings.log_every, settings.evaluate_every, settings.checkpoint_every
    return min(settings.steps, *((step // every + 1) * every for every in intervals))


def _is_due(step: int, every: int, settings: Settings) -> bool:
    return step % every == 0 or step == settings.steps


def _mean(task: Task, evaluate: Any, params: Any, model_state: Any) -> dict[str, float]:
    """The means of the metrics over the examples of the held-out data."""
    sums: dict[str, float] = {}
    for batch in task.eval_batches():
        for name, value in evaluate(params, model_state, devices.put_evaluation(batch)).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    count = sums.pop("count")
    return {name: value / count for name, value in sums.items()}
