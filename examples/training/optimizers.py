"""Optimizers by name.

`weight_decay` is decoupled: each step shrinks the weights by `rate * weight_decay`. As is usual,
`sgd` and `kfac` add it to the gradient instead.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
import optax.contrib

import adafisher_jax as af
from examples.training import compatibility
from examples.training.adahessian import of_hessian, scale_by_adahessian
from examples.training.kfac import kfac
from examples.training.steps import Optimizer, of_factors, of_gradients, of_transformation
from examples.training.task import Task

Schedule = Callable[[Any], Any]


def make(
    name: str, rate: float | Schedule, task: Task, weight_decay: float = 0.0, **options: Any
) -> Optimizer:
    """The optimizer with a given name, for a task.

    Args:
      name: one of `NAMES`.
      rate: the learning rate, or a schedule.
      task: the task to train.
      weight_decay: see above.
      **options: further options of the optimizer.

    Raises:
      ValueError: if the name is unknown.
      RuntimeError: from `init` or `step`, if the optimizer fails on the model of the task.
    """
    if name not in NAMES:
        raise ValueError(f"no optimizer {name!r}; there are {', '.join(NAMES)}")
    schedule = rate if callable(rate) else optax.constant_schedule(rate)
    with _blaming(name, task):
        optimizer = NAMES[name](task, schedule, weight_decay, **options)
    return Optimizer(*map(_blaming(name, task), optimizer))


@contextlib.contextmanager
def _blaming(name: str, task: Task) -> Iterator[None]:
    """Turns any exception into one that names the optimizer and the task."""
    try:
        yield
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"the optimizer {name} fails on {task.name}: {what}") from error


def of_optax(alias: Callable[..., Any]) -> Callable[..., Optimizer]:
    """An optimizer from an alias of optax that has decoupled weight decay."""

    def optimizer(task: Task, rate: Schedule, weight_decay: float, **options: Any) -> Optimizer:
        tx = alias(rate, weight_decay=weight_decay, **options)
        return of_transformation(tx, of_gradients(task))

    return optimizer


def sgd(task: Task, rate: Schedule, weight_decay: float, momentum: float = 0.9) -> Optimizer:
    tx = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum))
    return of_transformation(tx, of_gradients(task))


def adafactor(task: Task, rate: Schedule, weight_decay: float, **options: Any) -> Optimizer:
    """Adafactor, with the weight decay multiplied by the rate, which optax does not do."""
    decay = lambda step: rate(step) * weight_decay  # noqa: E731
    tx = optax.adafactor(rate, weight_decay_rate=decay, **options)
    return of_transformation(tx, of_gradients(task))


def muon(task: Task, rate: Schedule, weight_decay: float, **options: Any) -> Optimizer:
    """Muon for the kernels of dense layers and convolutions, AdamW for the rest.

    With `consistent_rms` the steps of both have the same size, so both use one rate.
    """
    options = {"consistent_rms": 0.2, "muon_weight_dimension_numbers": _kernels(task)} | options
    decay = {"weight_decay": weight_decay, "adam_weight_decay": weight_decay}
    tx = optax.contrib.muon(rate, **decay, **options)
    return of_transformation(tx, of_gradients(task))


def _kernels(task: Task) -> Any:
    """For each parameter, the axes of inputs and outputs of its matrix, or None."""
    axes = {
        layer.weight.path: optax.contrib.MuonDimensionNumbers(
            layer.ins, tuple(i for i in layer.inner if i not in layer.ins)
        )
        for layer in task.layout.layers
        if layer.weight and layer.kind in ("dense", "conv")
    }
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: axes.get(jax.tree_util.keystr(keys, simple=True, separator="/")), params
    )


def psgd(task: Task, rate: Schedule, weight_decay: float, **options: Any) -> Optimizer:
    """PSGD with Kronecker factors (psgd-jax)."""
    tx = optax.chain(
        compatibility.psgd().scale_by_kron(**options),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )

    def init(params):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            return tx.init(params)

    quiet = optax.GradientTransformationExtraArgs(init, tx.update)
    return of_transformation(quiet, of_gradients(task))


def shampoo(task: Task, rate: Schedule, weight_decay: float, **options: Any) -> Optimizer:
    """Distributed Shampoo (optax-shampoo) in blocks of 128, with new roots at every tenth step."""
    options = {"block_size": 128, "preconditioning_compute_steps": 10} | options
    decay = {"weight_decay": weight_decay, "decoupled_weight_decay": True}
    tx = compatibility.shampoo().distributed_shampoo(rate, **decay, **options)
    return of_transformation(tx, of_gradients(task))


def adahessian(task: Task, rate: Schedule, weight_decay: float, **options: Any) -> Optimizer:
    tx = optax.chain(
        scale_by_adahessian(**options),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return of_transformation(tx, of_hessian(task))


def adafisher(
    task: Task,
    rate: Schedule,
    weight_decay: float,
    rule: str,
    refresh_every: int = 1,
    **options: Any,
) -> Optimizer:
    tx = af.adafisherw(rate, task.layout, rule=rule, weight_decay=weight_decay, **options)
    return of_transformation(tx, of_factors(task, refresh_every))


NAMES: dict[str, Callable[..., Optimizer]] = {
    "sgd": sgd,
    "adamw": of_optax(optax.adamw),
    "adamw:0.99": of_optax(functools.partial(optax.adamw, b2=0.99)),
    "nadamw": of_optax(optax.nadamw),
    "adafactor": adafactor,
    "muon": muon,
    "psgd": psgd,
    "shampoo": shampoo,
    "kfac": kfac,
    "adahessian": adahessian,
    "adafisher:paper": functools.partial(adafisher, rule="paper"),
    "adafisher:official": functools.partial(adafisher, rule="official"),
    "adafisher:centered": functools.partial(adafisher, rule="centered"),
}
