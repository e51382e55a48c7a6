"""The optimizers, each of settings drawn from a space of its own.

A setting is a number, traced, so that a task has one program for each optimizer. Rates are those
at the top of one schedule for all but the schedule-free one: a linear warm-up, then half a cosine
down to 0 at the `horizon`, a share of the run, after which nothing moves. Decays are decoupled but
for SGD's.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
import optax.contrib

from benchmarks import matrices
from benchmarks.study import controls
from examples.training import optimizers
from examples.training.steps import Optimizer, of_gradients, of_transformation
from examples.training.task import Task

Settings = Mapping[str, Any]
Space = Mapping[str, Callable[[float], float]]  # of a number from 0 to 1 a setting


@dataclasses.dataclass(frozen=True)
class Rival:
    """An optimizer.

    Attributes:
      make: of a task, settings and how many steps a run has: the optimizer.
      space: what its settings are drawn from.
      measured: of parameters and the optimizer's state: the parameters to measure losses of.
    """

    make: Callable[[Task, Settings, int], Optimizer]
    space: Space
    measured: Callable[[Any, Any], Any] = lambda params, opt_state: params


def rate(settings: Settings, steps: int) -> Callable[[Any], Any]:
    """The schedule."""
    rising = settings["warm_up"] * steps
    falling = (settings["horizon"] - settings["warm_up"]) * steps

    def at(step):
        passed = jnp.clip((step - rising) / falling, 0, 1)
        return _risen(settings, steps)(step) * 0.5 * (1 + jnp.cos(math.pi * passed))

    return at


def _risen(settings, steps):
    return lambda step: (
        settings["rate"] * jnp.minimum(1, (step + 1) / (settings["warm_up"] * steps))
    )


def known(name: str, **renamed: str) -> Callable[[Task, Settings, int], Optimizer]:
    """One of `examples.training.optimizers`; `renamed`: its keyword → the setting."""

    def make(task, settings, steps):
        options = {keyword: settings[setting] for keyword, setting in renamed.items()}
        schedule = rate(settings, steps)
        return optimizers.make(name, schedule, task, settings["decay"], **options)

    return make


def ademamix(task, settings, steps):
    """With the paper's schedulers of `alpha` and `b3`, over the whole run (arXiv:2409.03137)."""
    start, end = (jnp.log(settings[name]) for name in ("b1", "b3"))

    def b3(step):
        share = jnp.minimum(step / steps, 1)
        return jnp.minimum(
            jnp.exp(start * end / ((1 - share) * end + share * start)), settings["b3"]
        )

    tx = optax.contrib.ademamix(
        rate(settings, steps),
        settings["b1"],
        settings["b2"],
        b3,
        lambda step: settings["alpha"] * jnp.minimum(step / steps, 1),
        weight_decay=settings["decay"],
    )
    return of_transformation(tx, of_gradients(task))


def schedule_free(task, settings, steps):
    """AdamW; its rate is constant after the warm-up."""
    tx = optax.contrib.schedule_free_adamw(
        _risen(settings, steps),
        b1=settings["b1"],
        b2=settings["b2"],
        weight_decay=settings["decay"],
    )
    return of_transformation(tx, of_gradients(task))


def muon(task, settings, steps):
    """NAdam steps what is no kernel, at a rate `others` times as large."""
    return optimizers.make(
        "muon",
        rate(settings, steps),
        task,
        settings["decay"],
        beta=settings["b1"],
        adam_b2=settings["b2"],
        adam_learning_rate=_of_others(settings, steps),
    )


def _of_others(settings, steps):
    return lambda step: settings["others"] * rate(settings, steps)(step)


def normuon(task, settings, steps):
    """As optax's Muon, each output's steps divided by their running root mean square."""
    axes = optax.contrib.MuonDimensionNumbers(-2, -1)
    kernels = optax.chain(
        optax.contrib.scale_by_muon(
            beta=settings["b1"], weight_dimension_numbers=lambda steps: dict.fromkeys(steps, axes)
        ),
        matrices.normalize_neurons(settings["b2_neurons"]),
        optax.add_decayed_weights(settings["decay"]),
        optax.scale_by_learning_rate(rate(settings, steps)),
    )
    others = optax.nadamw(
        _of_others(settings, steps), b2=settings["b2"], weight_decay=settings["decay"]
    )
    layers = matrices.of_kinds(task.layout.layers, "dense", "conv")
    tx = matrices.on_matrices(layers, kernels, others)
    return of_transformation(tx, of_gradients(task))


def soap(task, settings, steps):
    """Adam with the same decays steps what is no matrix."""
    given = rate(settings, steps), settings["decay"], settings["b1"], settings["b2"]
    return of_transformation(matrices.soap(task.layout.layers, *given), of_gradients(task))


def nadamw_cut(task, settings, steps):
    """NAdamW whose steps are cut as those of `"centered"`: what is left of that without factors."""
    nadam = optax.scale_by_adam(settings["b1"], settings["b2"], nesterov=True)
    return controls.edited(
        task,
        rate(settings, steps),
        settings["decay"],
        rule="centered",
        edit=controls.constant,
        before=nadam,
        b1=0.0,
    )


def log(low: float, high: float) -> Callable[[float], float]:
    return lambda share: low * (high / low) ** share


def beside_one(most: float, least: float) -> Callable[[float], float]:
    """Decays of averages, whose distances from one are drawn."""
    return lambda share: 1 - log(most, least)(share)


def linear(low: float, high: float) -> Callable[[float], float]:
    return lambda share: low + (high - low) * share


WARM_UP, HORIZON = linear(0.01, 0.2), linear(0.5, 1.0)
COMMON = {"warm_up": WARM_UP, "horizon": HORIZON, "decay": log(1e-3, 0.3)}
B1, B2 = beside_one(0.3, 0.02), beside_one(0.1, 0.001)
MOMENTS = {"b1": B1, "b2": B2}
OF_OTHERS = {"others": log(0.2, 5.0)}


def space(rates: Callable[[float], float], *parts: Space, **further: Any) -> Space:
    return functools.reduce(lambda found, part: found | part, parts, {"rate": rates}) | further


ADAM = space(log(1e-3, 1e-1), COMMON, MOMENTS)
FREE = {name: draw for name, draw in ADAM.items() if name != "horizon"}
MUON = space(log(2e-3, 2e-1), COMMON, MOMENTS, OF_OTHERS)
WIDE = {"warm_up": WARM_UP, "horizon": HORIZON, "b1": B1}
DECAYS = {"b1": "b1", "b2": "b2"}
CENTERED = "adafisher:centered"

RIVALS = {
    "nadamw": Rival(known("nadamw", **DECAYS), ADAM),
    "adamw": Rival(known("adamw", **DECAYS), ADAM),
    "ademamix": Rival(ademamix, ADAM | {"b3": beside_one(0.03, 0.001), "alpha": log(1.0, 10.0)}),
    "schedule_free": Rival(
        schedule_free,
        FREE,
        lambda params, state: optax.contrib.schedule_free_eval_params(state, params),
    ),
    "sgd": Rival(known("sgd", momentum="b1"), space(log(1e-2, 3.0), WIDE, decay=log(1e-5, 1e-2))),
    "muon": Rival(muon, MUON),
    "normuon": Rival(normuon, MUON | {"b2_neurons": beside_one(0.1, 0.01)}),
    "soap": Rival(soap, ADAM),
    "psgd": Rival(
        known("psgd", preconditioner_lr="preconditioner_lr"),
        space(log(3e-4, 3e-2), COMMON, preconditioner_lr=log(0.02, 0.5)),
    ),
    "adafisher:paper": Rival(
        known("adafisher:paper", b1="b1", damping="damping"),
        space(log(3e-4, 1e-1), COMMON, b1=B1, damping=log(1e-3, 1e-1)),
    ),
    "adafisher:official": Rival(
        known("adafisher:official", b1="b1"), space(log(1e-4, 3e-2), COMMON, b1=B1)
    ),
    "nadamw_cut": Rival(nadamw_cut, space(log(3e-3, 3e-1), COMMON, MOMENTS)),
    CENTERED: Rival(
        known(CENTERED, b1="b1", damping="damping"),
        space(log(3e-3, 3e-1), COMMON, b1=B1, damping=log(1e-3, 1e-1)),
    ),
}
