"""The optimizers compared, by name, as optax transformations with their own defaults."""

import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any

import optax
import optax.contrib

import adafisher_jax as af
from examples.training import compatibility

RATE, DECAY = 1e-3, 1e-4  # the decay is that of `optax.adamw`
NEVER = 10**6  # steps


def sgd() -> Any:
    return optax.sgd(RATE, momentum=0.9)


def adamw() -> Any:
    return optax.adamw(RATE, weight_decay=DECAY)


def adafactor() -> Any:
    return optax.adafactor(RATE)


def muon() -> Any:
    return optax.contrib.muon(RATE)


def psgd(probability: float) -> Any:
    """PSGD's `kron`, with the probability that a step updates the preconditioners."""
    return _quiet(compatibility.psgd().kron(RATE, preconditioner_update_probability=probability))


def shampoo(every: int) -> Any:
    """Distributed Shampoo in blocks of 128, with its roots taken anew every so many steps."""
    make = compatibility.shampoo().distributed_shampoo
    return make(RATE, block_size=128, preconditioning_compute_steps=every)


def _quiet(tx: Any) -> Any:
    """Without what `init` prints."""

    def init(params):
        with contextlib.redirect_stdout(io.StringIO()):
            return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)


KEPT = ", kept"  # steps without factors, between two refreshes
RULES = ["adafisher:paper", "adafisher:official", "adafisher:centered"]
OTHERS: dict[str, Callable[[], Any]] = {
    "sgd": sgd,
    "adamw": adamw,
    "adafactor": adafactor,
    "muon": muon,
    "psgd, updating": functools.partial(psgd, 1.0),
    "psgd, keeping": functools.partial(psgd, 1 / NEVER),
    "shampoo, updating": functools.partial(shampoo, 1),
    "shampoo, keeping": functools.partial(shampoo, NEVER),
}


def make(name: str, layout: af.Layout) -> optax.GradientTransformationExtraArgs:
    if name in OTHERS:
        return optax.with_extra_args_support(OTHERS[name]())
    return af.adafisherw(RATE, layout, rule=name.removeprefix("adafisher:"), weight_decay=DECAY)
