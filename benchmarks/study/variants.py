"""The recommended rule with one thing set, or done, otherwise.

`exponent` is that of the damped factors, 1/2 otherwise, and `b2` of the average of squared steps,
0.99. `without=…`: layers of a kind, or the last dense one (`head`), are stepped as if outside.
`warm_up`: its share of the steps, 0.05 otherwise; `decay`: of weights, 0 otherwise. `clipped`:
factors below the damping are raised to it, in place of its addition to all. `bound`: of the squares
of singular values, as a share of their mean, 0.01 otherwise. `whole`: all singular values are made
equal. `grafted`: each parameter's step is as long as NAdam's. `signed`: of each entry of a step its
sign is left. `share=…`: from a side of 128 on, steps are smaller by the number
of `inputs` of their weight, or by the `root` of its shorter side, or `equal`, or those of
`embeddings` are smaller too. `rows=…`: `any` number of rows is enough for steps of full size, or
`64` are in all layers, or as many as the `shorter` side, or 64 if that is less.
"""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import adafisher_jax as af
from adafisher_jax import rules, spectrum
from adafisher_jax.rules.centered import Centered
from examples.training import optimizers
from examples.training.steps import Optimizer, of_factors, of_transformation


def set_to(task, rate, weight_decay, **options):
    return optimizers.make("adafisher:centered", rate, task, weight_decay, **options)


def decayed(task, rate, _, decay):
    return set_to(task, rate, decay)


def scheduled(task, rate, weight_decay, warm_up):
    return set_to(task, dataclasses.replace(rate, warm_up=warm_up), weight_decay)


def cut(task, rate, weight_decay, directions):
    """Another number of directions; where none are kept nothing is cut."""
    patched = mock.patch.object(spectrum, "directions", lambda n: min(directions, n // 2))
    return Optimizer(*map(patched, set_to(task, rate, weight_decay)))


def bounded(task, rate, weight_decay, bound):
    """No singular value's square is cut below this share of the mean of all squares."""
    patched = mock.patch.object(spectrum, "LEAST", bound)
    return Optimizer(*map(patched, changed(task, rate, weight_decay)))


def cut_whole(task, rate, weight_decay):
    patched = mock.patch.object(spectrum, "leading_excess", _all_excess)
    return Optimizer(*map(patched, changed(task, rate, weight_decay)))


def _all_excess(layer, steps, basis, where, vector=None):
    """All but the nearest matrix with singular values of one; those near zero stay there."""
    step = jnp.concatenate([layer.to_matrices(step) for step in steps])
    found = jnp.isfinite(step).all((1, 2)) & where
    safe = jnp.where(found[:, None, None], step, 0)
    left, values, right = jnp.linalg.svd(safe, full_matrices=False)
    ones = jnp.where(values > 1e-3 * values[:, :1], 1, 0).astype(step.dtype)
    excess = step - (left * ones[:, None]) @ right
    one = jnp.eye(step.shape[2], dtype=step.dtype)
    one = jnp.broadcast_to(one, (len(step), *one.shape))
    square = jnp.where(found, jnp.sum(ones, 1), jnp.nan)
    pulled = None if vector is None else vector @ (step - excess)
    return spectrum.Cut(excess.mT, one, square, pulled), basis


class Variant(Centered):
    """The rule with any function of a factor and its damping in place of their sum."""

    damp = staticmethod(jnp.add)

    def scaled(self, layer, curvature, centers):
        h, slot, s = super().scaled(layer, curvature, centers)
        h, s = (self.damp(x, self.damping) - self.damping for x in (h, s))
        return h, slot, s


def changed(task, rate, weight_decay, **attributes):
    """A rule with other attributes, and a type of its own, for which steps are traced anew."""
    rule = type("Variant", (Variant,), attributes)
    with mock.patch.dict(rules.RULES, centered=(rule, *rules.RULES["centered"][1:])):
        return set_to(task, rate, weight_decay)


def raised(task, rate, weight_decay, exponent):
    """Divides by the damped factors to another power, through their square root."""
    damp = staticmethod(lambda x, damping: (x + damping) ** (2 * exponent))
    return changed(task, rate, weight_decay, damp=damp)


def outside(task, rate, weight_decay, without):
    """With some layers left out of the layout of the transformation."""
    layers = task.layout.layers
    if without == "head":
        (*_, last) = (one for one in layers if one.kind == "dense" and "/" not in one.path)
        left = [one for one in layers if one is not last]
    else:
        left = [one for one in layers if one.kind != without]
    layout = task.layout.only(one.path for one in left)
    tx = af.adafisherw(rate, layout, rule="centered", weight_decay=weight_decay)
    return of_transformation(tx, of_factors(task))


def grafted(task, rate, weight_decay):
    rule = af.adafisherw(rate, task.layout, rule="centered", weight_decay=weight_decay)
    nadamw = optax.with_extra_args_support(optax.nadamw(rate, b2=0.99, weight_decay=weight_decay))

    def init(params):
        return rule.init(params), nadamw.init(params)

    def update(grads, state, params, **extra):
        steps, first = rule.update(grads, state[0], params, **extra)
        lengths, second = nadamw.update(grads, state[1], params)
        return jax.tree.map(_as_long, steps, lengths), (first, second)

    tx = optax.GradientTransformationExtraArgs(init, update)
    return of_transformation(tx, of_factors(task))


def _as_long(step, other):
    norm = jnp.linalg.norm(step)
    return step * (jnp.linalg.norm(other) / jnp.where(norm > 0, norm, 1))


def signed(task, rate, weight_decay):
    """Every entry's step is as large as those of a weight are under the rule."""
    tx = optax.chain(
        af.scale_by_adafisher(task.layout, rule="centered"),
        optax.scale_by_sign(),
        optax.scale(Centered.rms),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return of_transformation(tx, of_factors(task))


SHARES = {
    "equal": lambda layer: 1.0,
    "root": lambda layer: min(1.0, (128 / min(layer.fan_in, layer.fan_out)) ** 0.5),
    "inputs": lambda layer: min(1.0, 128 / layer.fan_in),
    "embeddings": lambda layer: min(1.0, 128 / min(layer.fan_in, layer.fan_out)),
}


def shared(task, rate, weight_decay, share):
    spared = "embedding" if share != "embeddings" else None

    def how(layer):
        return 1.0 if layer.kind == spared else SHARES[share](layer)

    return changed(task, rate, weight_decay, share=staticmethod(how))


ROWS = {
    "any": lambda layer: 1e-9,
    "64": lambda layer: 64,
    "shorter": lambda layer: min(layer.fan_in, layer.fan_out, 64),
}


def of_rows(task, rate, weight_decay, rows):
    return changed(task, rate, weight_decay, enough=staticmethod(ROWS[rows]))


SETTINGS = {
    "damping": (set_to, (0.001, 0.1)),
    "curvature_ema": (set_to, (0.8, 0.99)),
    "refresh_every": (set_to, (10,)),
    "b1": (set_to, (0.8, 0.95)),
    "nesterov": (changed, (False,)),
    "b2": (changed, (0.0, 0.999)),
    "directions": (cut, (4, 8, 16, 32, 64)),
    "bound": (bounded, (1e-4, 1e-2, 1e-1)),
    "exponent": (raised, (0.25, 1.0)),
    "without": (outside, ("embedding", "norm", "head")),
    "warm_up": (scheduled, (0.0, 0.2)),
    "decay": (decayed, (0.01, 0.1)),
    "share": (shared, tuple(SHARES)),
    "rows": (of_rows, tuple(ROWS)),
}
NAMES = {
    **{
        f"{name}={value}": functools.partial(how, **{name: value})
        for name, (how, values) in SETTINGS.items()
        for value in values
    },
    "clipped": functools.partial(changed, damp=staticmethod(jnp.maximum)),
    "whole": cut_whole,
    "grafted": grafted,
    "signed": signed,
}
