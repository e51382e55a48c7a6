"""AdaFisher with one thing taken away, spoiled or set otherwise, to see what it earns.

`centered-…`: without the input or the output factor, or either (`no-factors`); without centering;
without the cut of the leading singular values (`no-cut`). Any rule: with factors that are constant,
or each shuffled within itself (`…-constant`, `…-shuffled`), as a placebo. `nadamw-cut`: NAdam's
steps through the rule with constant factors, of which its cut and the size of its steps are left.
`centered-…=…`: one setting changed; `exponent`, of the damped factors, is 1/2 otherwise.
`centered-without=…`: layers of a kind, or the last dense one (`head`), stepped as if outside.
"""

import functools
from unittest import mock

import jax.numpy as jnp
import numpy as np
import optax

import adafisher_jax as af
from adafisher_jax import rules, spectrum
from adafisher_jax.rules.centered import Centered
from examples.training import optimizers
from examples.training.steps import Optimizer, of_factors, of_transformation


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
    find = of_factors(task, refresh_every=1)

    def find_edited(*args):
        value, grads, extra = find(*args)
        factors = {
            path: factor if kinds[path] == "norm" else edit(factor)
            for path, factor in extra["factors"].items()
        }
        return value, grads, {"factors": factors}

    return of_transformation(tx, find_edited)


def cut(task, rate, weight_decay, directions, **options):
    """`"centered"` with another number of directions; where none are kept nothing is cut."""
    whole = set_to(task, rate, weight_decay, **options)
    patched = mock.patch.object(spectrum, "DIRECTIONS", directions)
    return Optimizer(*map(patched, whole))


def set_to(task, rate, weight_decay, **options):
    return optimizers.make("adafisher:centered", rate, task, weight_decay, **options)


class Raised(Centered):
    """Divides by the damped factors to the power of `power`, through their square root."""

    power = 0.5

    def scaled(self, layer, curvature, centers):
        h, slot, s = super().scaled(layer, curvature, centers)
        return self._squared(h), slot, self._squared(s)

    def _squared(self, x):
        return (x + self.damping) ** (2 * self.power) - self.damping


def raised(task, rate, weight_decay, exponent, **options):
    rule = type("Raised", (Raised,), {"power": exponent})
    rules.register(rule)
    with mock.patch.dict(rules.RULES, centered=(rule, *rules.RULES["centered"][1:])):
        return set_to(task, rate, weight_decay, **options)


def outside(task, rate, weight_decay, without, **options):
    """With some layers left out of the layout of the transformation."""
    layers = task.layout.layers
    if without == "head":
        (*_, last) = (one for one in layers if one.kind == "dense" and "/" not in one.path)
        left = [one for one in layers if one is not last]
    else:
        left = [one for one in layers if one.kind != without]
    tx = af.adafisherw(
        rate, af.Layout(tuple(left)), rule="centered", weight_decay=weight_decay, **options
    )
    return of_transformation(tx, of_factors(task, refresh_every=1))


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
SETTINGS = {
    "damping": (0.001, 0.1),
    "curvature_ema": (0.8, 0.99),
    "refresh_every": (10,),
    "b1": (0.8, 0.95),
    "directions": (4, 8, 32),
    "exponent": (0.25, 1.0),
    "without": ("embedding", "norm", "head"),
}
HOW = {"directions": cut, "exponent": raised, "without": outside}
NAMES = {
    "centered-no-cut": functools.partial(cut, directions=0),
    "nadamw-cut": functools.partial(edited, rule="centered", edit=constant, before=NADAM, b1=0.0),
    **{
        name: functools.partial(edited, rule=rule, edit=edit)
        for name, (rule, edit) in EDITS.items()
    },
    **{
        f"centered-{name}={value}": functools.partial(HOW.get(name, set_to), **{name: value})
        for name, values in SETTINGS.items()
        for value in values
    },
}


def make(name, rate, task, weight_decay=0.0, **options):
    """The control of that name, or else the optimizer."""
    if name in NAMES:
        return NAMES[name](task, rate, weight_decay, **options)
    return optimizers.make(name, rate, task, weight_decay, **options)
