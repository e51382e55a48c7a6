"""Twelve small tasks of many kinds; half are held back while optimizers are changed."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.study import problems
from benchmarks.study.ladders import small_images
from benchmarks.study.models import LSTM, MLP, ConvNet
from benchmarks.study.problems import CHARACTERS, Data, Examples, Problem
from examples.language_model.model import GPT

VOCABULARY, LENGTH = 64, 24  # of WikiText's characters
MASKED = 0.2  # of the tokens
POINTS = 16  # of a digit
BODIES = 6
VISCOSITY = 0.05


class ResNet(nn.Module):
    """Residual blocks of two convolutions with BatchNorm, each stage half as large as the last."""

    features: Sequence[int]
    classes: int = 10

    @nn.compact
    def __call__(self, x, train):
        def normalized(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        def conv(x, features, size, strides=1):
            return nn.Conv(features, (size, size), strides, use_bias=False)(x)

        x = nn.relu(normalized(conv(x, self.features[0], 3, 2)))
        for features in self.features:
            strides = 1 + (features != x.shape[-1])
            inner = nn.relu(normalized(conv(x, features, 3, strides)))
            shortcut = x if strides == 1 else conv(x, features, 1, strides)
            x = nn.relu(shortcut + normalized(conv(inner, features, 3)))
        return nn.Dense(self.classes)(x.mean((1, 2)))


class DeepSets(nn.Module):
    """Every point on its own, their mean, and a network on that (Zaheer et al., 2017)."""

    width: int
    outputs: int

    @nn.compact
    def __call__(self, points, train):
        each = nn.relu(MLP((self.width,), self.width)(points, train))
        return MLP((self.width,), self.outputs)(each.mean(1), train)


class Interactions(nn.Module):
    """A message between any two bodies, their sums, and a network on each (Battaglia et al., 2016).

    A body is where it is and its charge, `(x, y, q)`.
    """

    width: int

    @nn.compact
    def __call__(self, bodies, train):
        where, charge = bodies[..., :2], bodies[..., 2:]
        apart = where[:, :, None] - where[:, None]
        ends = (jnp.broadcast_to(side, (*apart.shape[:3], 1)) for side in _both(charge))
        pairs = jnp.concatenate([apart, *ends], -1)
        messages = MLP((self.width,), self.width // 2)(pairs, train).sum(2)
        return MLP((self.width,), 2)(jnp.concatenate([messages, charge], -1), train)


def _both(values):
    return values[:, :, None], values[:, None]


class Encoder(nn.Module):
    """Dense layers over each token and the two on both of its sides."""

    vocabulary: int
    layers: int
    width: int

    @nn.compact
    def __call__(self, tokens, train):
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        for _ in range(self.layers):
            padded = jnp.pad(nn.LayerNorm()(x), [(0, 0), (2, 2), (0, 0)])
            windows = [padded[:, i : i + tokens.shape[1]] for i in range(5)]
            x += nn.relu(nn.Dense(self.width)(jnp.concatenate(windows, -1)))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


@dataclasses.dataclass(frozen=True)
class Applied:
    """A network, and what is made of it and of inputs in place of its outputs."""

    net: nn.Module

    def init(self, *args: Any) -> Any:
        return self.net.init(*args)

    def apply(self, variables: Any, inputs: Any, train: bool, mutable: Any) -> Any:
        def net(x):
            return self.net.apply(variables, x, train)

        return self.of(net, inputs), {}


class Burgers(Applied):
    r"""The residual of :math:`u_t + u u_x = \nu u_{xx}` at points `(x, t)`.

    The solution is 0 at :math:`x = \pm 1` and :math:`-\sin \pi x` at time 0, whatever the network
    (Raissi et al., 2019).
    """

    def of(self, net, points):
        def u(points):
            x, t = points[:, 0], points[:, 1]
            return t * (1 - x**2) * net(points)[:, 0] - jnp.sin(math.pi * x)

        def along(function, axis):
            direction = jnp.zeros_like(points).at[:, axis].set(1)
            return lambda points: jax.jvp(function, (points,), (direction,))[1]

        u_x, u_t = along(u, 0), along(u, 1)
        residual = u_t(points) + u(points) * u_x(points) - VISCOSITY * along(u_x, 0)(points)
        return residual[:, None]


class Control(Applied):
    """What it costs to hold up a pendulum by the network's torques."""

    def of(self, net, states):
        return costs(lambda state: 2 * jnp.tanh(net(state)[:, 0]), states, 0.0, 40)[:, None]


def costs(policy: Any, states: Any, forgotten: float, steps: int) -> jax.Array:
    """A pendulum's cost under a policy, from each of some states (angle from the top, velocity).

    The mean over the steps, or with `forgotten` that share of what is to come counts for less in
    each step.
    """

    def step(states, number):
        torque = policy(states)
        angle, velocity = states[:, 0], states[:, 1]
        cost = 1 - jnp.cos(angle) + 0.1 * velocity**2 + 0.01 * torque**2
        velocity = velocity + 0.1 * (3 * jnp.sin(angle) + torque)
        angle = angle + 0.1 * velocity
        weight = (1 - forgotten) ** number
        return jnp.stack([angle, velocity], 1), (weight * cost, weight)

    _, (found, weights) = jax.lax.scan(step, jnp.asarray(states), jnp.arange(steps))
    return found.sum(0) / weights.sum()


def digit_points(folder):
    """The brightest pixels of each digit, in no order: where they are, and how bright."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 8)] * 2), -1).reshape(64, 2)

    def split(source):
        brightest = np.argsort(-source.inputs, 1)[:, :POINTS]
        values = np.take_along_axis(source.inputs, brightest, 1)[..., None]
        return Examples(
            np.concatenate([grid[brightest], values], -1, dtype=np.float32), source.targets
        )

    return Data(*map(split, problems.digits(folder)))


def drawn(make, train=4096, held_out=512):
    """Data that are made of a generator and their number."""

    def read(folder):
        rng = np.random.default_rng(0)
        return Data(*(Examples(*make(rng, count)) for count in (train, held_out)))

    return read


def collocation(rng, count):
    points = rng.uniform([-1, 0], [1, 1], (count, 2)).astype(np.float32)
    return points, np.zeros((count, 1), np.float32)


def starts(rng, count):
    states = rng.uniform([-math.pi, -1], [math.pi, 1], (count, 2)).astype(np.float32)
    return states, np.zeros((count, 1), np.float32)


def returns(rng, count):
    """The discounted cost of a policy that swings a pendulum up and then holds it."""

    def policy(states):
        angle, velocity = states[:, 0], states[:, 1]
        held = -10 * jnp.sin(angle) - 4 * velocity
        return jnp.where(jnp.cos(angle) > 0.8, jnp.clip(held, -2, 2), 2 * jnp.sign(velocity))

    states = rng.uniform([-math.pi, -3], [math.pi, 3], (count, 2)).astype(np.float32)
    return states, np.asarray(costs(policy, states, 0.05, 60))[:, None]


def forces(rng, count):
    """Bodies in a square and the softened electric force on each."""
    bodies = rng.uniform(-1, 1, (count, BODIES, 3)).astype(np.float32)
    where, charge = bodies[..., :2], bodies[..., 2]
    apart = where[:, :, None] - where[:, None]
    strength = (charge[:, :, None] * charge[:, None]) / (np.square(apart).sum(-1) + 0.1) ** 1.5
    return bodies, (strength[..., None] * apart).sum(2)


def noisy(read):
    """Data in noise of any share, which is told, and the noise as targets (Ho et al., 2020)."""

    def read_noisy(folder):
        rng = np.random.default_rng(0)

        def split(source):
            angle = rng.uniform(0, math.pi / 2, (len(source.inputs), 1))
            noise = rng.normal(size=source.inputs.shape)
            share = [np.cos(angle), np.sin(angle)]
            mixed = share[0] * 2 * source.inputs + share[1] * noise  # of about unit variance
            inputs = np.concatenate([mixed, *share], 1, dtype=np.float32)
            return Examples(inputs, noise.astype(np.float32))

        return Data(*map(split, read(folder)))

    return read_noisy


def masked(read):
    """Tokens of which some are masked by one more; targets are -1 where none is."""

    def read_masked(folder):
        rng = np.random.default_rng(0)

        def split(source):
            hidden = rng.random(source.inputs.shape) < MASKED
            tokens = np.where(hidden, VOCABULARY, source.inputs)
            return Examples(tokens, np.where(hidden, source.inputs, -1))

        return Data(*map(split, read(folder)))

    return read_masked


def classify_masked(logits, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.mean(losses, where=labels >= 0)


def mean(outputs, targets):
    return outputs.mean()


def squares(images):
    """Images of 16 × 16 from their vectors."""

    def read(folder):
        splits = images(folder)
        return Data(
            *(split._replace(inputs=split.inputs.reshape(-1, 16, 16, 3)) for split in splits)
        )

    return read


brief = functools.partial(Problem, steps=200, measured=256)
wikitext = problems.windows(
    "wikitext2-valid.txt", "wikitext2-test.txt", "characters", LENGTH, VOCABULARY
)
images = squares(small_images)
characters = problems.characters(32)
classify, reconstruct = problems.classify, problems.reconstruct
TANH = functools.partial(MLP, activation=jnp.tanh)

OPEN = {
    "autoencoder": brief(
        TANH(problems.DEEP, 64), problems.itself(problems.digits), reconstruct, batch=64, steps=600
    ),
    "chars": brief(GPT(CHARACTERS, 32, 2, 48, 2), characters, classify, batch=8, measured=32),
    "resnet": brief(ResNet((8, 16)), images, classify, batch=16, measured=96),
    "points": brief(DeepSets(64, 10), digit_points, classify, batch=32, steps=400),
    "burgers": brief(
        Burgers(TANH((48, 48, 48), 1)), drawn(collocation), reconstruct, batch=128, steps=400
    ),
    "control": brief(Control(TANH((32, 32), 1)), drawn(starts), mean, batch=32),
}
HELD_BACK = {
    "denoiser": brief(
        MLP((128, 128), 64, nn.silu), noisy(problems.patches), reconstruct, batch=64, steps=600
    ),
    "masked": brief(
        Encoder(VOCABULARY + 1, 2, 48), masked(wikitext), classify_masked, batch=16, measured=64
    ),
    "batch_norm": brief(ConvNet(True, (8, 16, 32)), images, classify, batch=32, measured=96),
    "forces": brief(Interactions(64), drawn(forces), reconstruct, batch=16, steps=400),
    "lstm": brief(LSTM(VOCABULARY, 32, 64), wikitext, classify, batch=16, measured=64),
    "returns": brief(MLP((96, 96), 1), drawn(returns), reconstruct, batch=64, steps=600),
}
TASKS = OPEN | HELD_BACK
