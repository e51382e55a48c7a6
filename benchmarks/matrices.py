"""Rivals that step weights as matrices: SOAP, and the part of NorMuon that is not Muon."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adafisher_jax.layout import Layer
from adafisher_jax.paths import by_path

EPSILON = 1e-8
EVERY = 10  # steps, between two renewals of SOAP's bases


def on_matrices(layers: Sequence[Layer], inner: Any, others: Any) -> Any:
    """`inner` for the weights of some layers, as `(blocks, ins, outs)`; `others` for the rest.

    `inner` has their paths as keys.
    """

    def split(tree):
        rest, treedef = by_path(tree)
        found = {one.weight.path: one.to_matrices(rest.pop(one.weight.path)) for one in layers}
        return found, rest, treedef

    def init(params):
        matrices, rest, _ = split(params)
        return inner.init(matrices), others.init(rest)

    def update(grads, state, params):
        matrices, rest, treedef = split(grads)
        of_matrices, of_rest, _ = split(params)
        steps, inner_state = inner.update(matrices, state[0], of_matrices)
        found, others_state = others.update(rest, state[1], of_rest)
        found |= {one.weight.path: one.from_matrices(steps[one.weight.path]) for one in layers}
        in_order = [found[path] for path in by_path(grads)[0]]
        return treedef.unflatten(in_order), (inner_state, others_state)

    return optax.GradientTransformation(init, update)


def soap(layers: Sequence[Layer], rate: Any, decay: Any, b1: Any = 0.95, b2: Any = 0.95) -> Any:
    """SOAP for the weights of dense layers, convolutions and embeddings, AdamW for the rest.

    `b1` and `b2` are the paper's if nothing else is said.
    """
    weights = optax.chain(
        scale_by_soap(b1, b2),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(rate),
    )
    others = optax.adamw(rate, b1, b2, weight_decay=decay)
    return on_matrices(of_kinds(layers, "dense", "conv", "embedding"), weights, others)


def of_kinds(layers: Sequence[Layer], *kinds: str) -> list[Layer]:
    """The layers of these kinds that have a weight."""
    return [one for one in layers if one.weight and one.kind in kinds]


def normalize_neurons(b2: Any) -> optax.GradientTransformation:
    r"""NorMuon's normalization of Muon's steps `O`, one number for each output (arXiv:2510.05491).

    .. math::

        v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, \mathrm{mean}_{in}(O_t^2), \qquad
        \hat O_t = O_t / (\sqrt{v_t} + \epsilon), \qquad
        0.2 \sqrt{m n}\, \hat O_t / |\hat O_t|_F
    """

    def init(params):
        return jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], 1, x.shape[-1]), x.dtype), params)

    def update(steps, averages, params=None):
        def average(before, step):
            return b2 * before + (1 - b2) * jnp.mean(jnp.square(step), -2, keepdims=True)

        def normalized(step, average):
            step = step / (jnp.sqrt(average) + EPSILON)
            return 0.2 * step / jnp.sqrt(jnp.mean(jnp.square(step), (-2, -1), keepdims=True))

        averages = jax.tree.map(average, averages, steps)
        return jax.tree.map(normalized, steps, averages), averages

    return optax.GradientTransformation(init, update)


class Sides(NamedTuple):
    """What SOAP keeps of a matrix's rows or columns: their second moment and its eigenvectors."""

    moment: Any
    basis: Any


class ScaleBySoapState(NamedTuple):
    count: Any
    mu: Any
    nu: Any
    left: Any
    right: Any


def scale_by_soap(b1: Any, b2: Any, every: int = EVERY) -> optax.GradientTransformation:
    r"""Adam in the eigenbasis of Shampoo's factors (Vyas et al., arXiv:2409.11321).

    With :math:`G' = Q_L^T G Q_R` and bias corrections as in Adam,

    .. math::

        M_t &= \beta_1 M_{t-1} + (1 - \beta_1) G_t, \qquad
        V_t = \beta_2 V_{t-1} + (1 - \beta_2) {G'_t}^2 \\
        N_t &= Q_L \frac{Q_L^T M_t Q_R}{\sqrt{V_t} + \epsilon} Q_R^T, \qquad
        L_t = \beta_2 L_{t-1} + (1 - \beta_2) G_t G_t^T

    and `R` likewise of :math:`G^T G`. In each `every`-th step :math:`Q_L = \mathrm{qr}(L Q_L)`.
    The first step is none: its gradient makes `L`, `R` and, by their eigenvectors, the bases.
    """

    def init(params):
        def side(axis):
            shape = lambda x: (*x.shape[:-2], x.shape[axis], x.shape[axis])  # noqa: E731
            zeros = jax.tree.map(lambda x: jnp.zeros(shape(x), x.dtype), params)
            return Sides(zeros, zeros)

        zeros = jax.tree.map(jnp.zeros_like, params)
        return ScaleBySoapState(jnp.zeros((), jnp.int32), zeros, zeros, side(-2), side(-1))

    def update(grads, state, params=None):
        first = state.count == 0
        after = state.count > 0  # the first step's gradient has no part in Adam's moments

        def rotated(matrices):
            return jax.tree.map(
                lambda x, left, right: left.mT @ x @ right,
                matrices,
                state.left.basis,
                state.right.basis,
            )

        def averaged(decay, before, new):
            return jax.tree.map(
                lambda x, y: jnp.where(after, decay * x + (1 - decay) * y, 0), before, new
            )

        mu = averaged(b1, state.mu, grads)
        nu = averaged(b2, state.nu, jax.tree.map(jnp.square, rotated(grads)))
        weight_1, weight_2 = (1 - b**state.count for b in (b1, b2))

        def step(mean, square, left, right):
            scaled = (mean / weight_1) / (jnp.sqrt(square / weight_2) + EPSILON)
            return jnp.where(after, left @ scaled @ right.mT, 0)

        bases = state.left.basis, state.right.basis
        steps = jax.tree.map(step, rotated(mu), nu, *bases)

        def side(sides, product):
            moment = jax.tree.map(lambda x, g: b2 * x + (1 - b2) * product(g), sides.moment, grads)
            due = (state.count % every == 0).astype(jnp.int32) + first
            basis = jax.lax.switch(due, [_keep, _iterated, _eigenvectors], moment, sides.basis)
            return Sides(moment, basis)

        left = side(state.left, lambda g: g @ g.mT)
        right = side(state.right, lambda g: g.mT @ g)
        return steps, ScaleBySoapState(state.count + 1, mu, nu, left, right)

    return optax.GradientTransformation(init, update)


def _keep(moment, basis):
    return basis


def _iterated(moment, basis):
    return jax.tree.map(lambda x, q: jnp.linalg.qr(x @ q)[0], moment, basis)


def _eigenvectors(moment, basis):
    """Those of the largest eigenvalues first."""
    return jax.tree.map(lambda x: jnp.linalg.eigh(x)[1][..., ::-1], moment)
