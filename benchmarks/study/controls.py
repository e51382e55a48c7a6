"""AdaFisher with one thing taken away, spoiled or set otherwise, to see what it earns.

`centered-…`: without the input or the output factor, or either (`no-factors`); without centering;
without the cut of the leading singular values (`no-cut`). Any rule: with factors that are constant,
or each shuffled within itself (`…-constant`, `…-shuffled`), as a placebo. `nadamw-cut`: NAdam's
steps through the rule with constant factors, of which its cut and the size of its steps are left;
`nadamw-centered`: NAdam in the coordinates of the rule. `centered-…=…`, `centered-clipped` and so
on: the rule in other ways (`benchmarks/study/variants.py`).
"""

import functools

import jax.numpy as jnp
import numpy as np
import optax

import adafisher_jax as af
from benchmarks import matrices
from benchmarks.study import variants
from benchmarks.study.coordinates import of_centered_inputs
from examples.training import optimizers
from examples.training.steps import of_factors, of_gradients, of_transformation


def no_inputs(factor):
    """The variance of each input is one, within a batch."""
    return factor._replace(h=1 + jnp.square(factor.mean))


def no_outputs(factor):
    return factor._replace(s=jnp.ones_like(factor.s))


def no_factors(factor):
    return no_inputs(no_outputs(factor))


def no_centering(factor):
    return factor._replace(mean=jnp.zeros_like(factor.mean))


def constant(factor):
    return no_factors(no_centering(factor))


def shuffled(factor):
    """The same numbers elsewhere, in every step alike."""
    variance = factor.h - jnp.square(factor.mean)
    return factor._replace(h=_permuted(variance) + jnp.square(factor.mean), s=_permuted(factor.s))


def _permuted(values):
    order = np.random.default_rng(0).permutation(values.size)
    return values.ravel()[order].reshape(values.shape)


def edited(task, rate, weight_decay, rule, edit, before=None, **options):
    """AdaFisher whose captured factors are edited, but for those of normalization layers.

    `before`: what is done to gradients first.
    """
    tx = af.adafisherw(rate, task.layout, rule=rule, weight_decay=weight_decay, **options)
    if before is not None:
        tx = optax.chain(before, tx)
    kinds = {layer.path: layer.kind for layer in task.layout.layers}
    find = of_factors(task)

    def find_edited(*args):
        value, grads, extra = find(*args)
        factors = {
            path: factor if kinds[path] == "norm" else edit(factor)
            for path, factor in extra["factors"].items()
        }
        return value, grads, {"factors": factors}

    return of_transformation(tx, find_edited)


def centered_nadamw(task, rate, weight_decay):
    nadamw = optax.nadamw(rate, b2=0.99, weight_decay=weight_decay)
    return of_transformation(of_centered_inputs(task.layout, nadamw), of_factors(task))


EDITS = {
    "centered-no-inputs": ("centered", no_inputs),
    "centered-no-outputs": ("centered", no_outputs),
    "centered-no-factors": ("centered", no_factors),
    "centered-no-centering": ("centered", no_centering),
    "centered-constant": ("centered", constant),
    "centered-shuffled": ("centered", shuffled),
    "paper-constant": ("paper", constant),
    "paper-shuffled": ("paper", shuffled),
    "official-constant": ("official", constant),
    "official-shuffled": ("official", shuffled),
}
NADAM = optax.scale_by_adam(b2=0.99, nesterov=True)
NAMES = {
    "centered-no-cut": functools.partial(variants.cut, directions=0),
    "nadamw-cut": functools.partial(edited, rule="centered", edit=constant, before=NADAM, b1=0.0),
    "nadamw-centered": centered_nadamw,
    **{
        name: functools.partial(edited, rule=rule, edit=edit)
        for name, (rule, edit) in EDITS.items()
    },
    **{f"centered-{name}": variant for name, variant in variants.NAMES.items()},
}


def soap(task, rate, weight_decay):
    tx = matrices.soap(task.layout.layers, rate, weight_decay)
    return of_transformation(tx, of_gradients(task))


ALL = NAMES | {"soap": soap}  # which is no control: sizes are compared beside it


def make(name, rate, task, weight_decay=0.0, **options):
    """The control of that name, or else the optimizer."""
    if name in ALL:
        return ALL[name](task, rate, weight_decay, **options)
    return optimizers.make(name, rate, task, weight_decay, **options)
