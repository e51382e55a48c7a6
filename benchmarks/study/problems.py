"""Real tasks small enough for two cores."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.study.models import LSTM, MLP, ConvNet, DigitsCNN, VisionTransformer
from examples.image_classification import formats
from examples.language_model import data as text
from examples.language_model.model import GPT
from examples.training import losses
from examples.training.task import Task

MEASURED = 2000  # examples


class Examples(NamedTuple):
    inputs: np.ndarray
    targets: np.ndarray

    def head(self, count: int) -> "Examples":
        return Examples(*(values[:count] for values in self))


class Data(NamedTuple):
    train: Examples
    held_out: Examples


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, its data and loss, and how long and in which batches it is trained.

    Attributes:
      model: a Linen module, or what has its `init` and `apply`.
      read: of the folder of data sets: the data.
      loss: of outputs and targets, the mean over a batch.
      measured: how many examples of each split, at most, tell the end of a run.
    """

    model: Any
    read: Callable[[pathlib.Path], Data]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    batch: int
    steps: int
    measured: int = MEASURED

    def task(self, name: str, data: Data, batch: int, seed: int) -> Task:
        def apply(params, model_state, inputs, train):
            variables = {"params": params, **model_state}
            outputs, changed = self.model.apply(variables, inputs, train, mutable=list(model_state))
            return outputs.astype(jnp.float32), changed

        def init(key):
            variables = self.model.init(key, data.train.inputs[:1], False)
            return variables.pop("params"), variables

        def loss(params, model_state, batch, key):
            outputs, changed = apply(params, model_state, batch.inputs, True)
            return self.loss(outputs, batch.targets), (changed, {})

        def evaluate(params, model_state, batch):
            outputs, _ = apply(params, model_state, batch.inputs, False)
            count = jnp.asarray(len(batch.inputs))
            sums = {"loss": count * self.loss(outputs, batch.targets), "count": count}
            if self.loss is classify:
                right = (outputs.argmax(-1) == batch.targets).mean()
                sums["accuracy"] = count * right
            return sums

        return Task(
            name=name,
            init=init,
            loss=loss,
            evaluate=evaluate,
            train_batches=functools.partial(_batches, data.train, batch, seed),
            eval_batches=functools.partial(in_order, data.held_out, self.measured),
            steps_per_epoch=len(data.train.inputs) // batch,
        )


def _batches(examples, batch, seed, start):
    """Each pass over the examples is in an order of its own; what is left at its end is dropped."""
    per_epoch = len(examples.inputs) // batch
    epoch, first = divmod(start, per_epoch)
    for number in itertools.count(epoch):
        order = np.random.default_rng([seed, number]).permutation(len(examples.inputs))
        for step in range(first, per_epoch):
            chosen = order[step * batch : (step + 1) * batch]
            yield Examples(examples.inputs[chosen], examples.targets[chosen])
        first = 0


def in_order(examples, most, batch=250):
    """The first so many examples at most, in batches."""
    for start in range(0, min(len(examples.inputs), most), batch):
        stop = min(start + batch, most)
        yield Examples(*(values[start:stop] for values in examples))


def digits(folder, flat=True):
    found = formats.digits()

    def split(source):
        images = source.images.astype(np.float32) / 255
        return Examples(images.reshape(len(images), -1) if flat else images, source.labels)

    return Data(split(found.train), split(found.test))


def itself(read):
    """Data whose targets are its inputs."""

    def read_both(folder):
        return Data(*(Examples(split.inputs, split.inputs) for split in read(folder)))

    return read_both


@functools.cache
def cifar(folder, train=10_000, test=MEASURED):
    found = formats.read(str(folder / "cifar10-jpeg.npz"))

    def scaled(source, count):
        return source.images[:count].astype(np.float32) / 255

    seen = scaled(found.train, train)
    mean, deviation = seen.mean((0, 1, 2)), seen.std((0, 1, 2))

    def split(source, count):
        return Examples((scaled(source, count) - mean) / deviation, source.labels[:count])

    return Data(split(found.train, train), split(found.test, test))


def patches(folder):
    """Grey patches of 8 × 8, half as large as their standard deviation."""

    def cut(split):
        grey = split.inputs.mean(-1).reshape(-1, 4, 8, 4, 8).transpose(0, 1, 3, 2, 4)
        return Examples(0.5 * grey.reshape(-1, 64), split.targets.repeat(16))

    return Data(*map(cut, cifar(folder, 2000, 400)))


def windows(train, held_out, level, length, limit=None):
    def read(folder):
        held = str(folder / held_out) if held_out else ""
        found = text.load(str(folder / train), held, level, limit)

        def split(tokens):
            count = (len(tokens) - 1) // length
            inputs, following = (tokens[i : i + count * length] for i in (0, 1))
            return Examples(inputs.reshape(count, length), following.reshape(count, length))

        return Data(split(found.train), split(found.evaluation))

    return read


characters = functools.partial(windows, "tinyshakespeare.txt", "", "characters")
words = functools.partial(windows, "wikitext2-valid.txt", "wikitext2-test.txt", "words")
digit_images = functools.partial(digits, flat=False)
classify, reconstruct = losses.cross_entropy, losses.squared_error
DEEP, SHALLOW = (128, 64, 32, 16, 32, 64, 128), (256, 128, 32, 128, 256)
CHARACTERS, WORDS = 66, 2000

# name: model, data, loss, batch, steps
PROBLEMS = {
    "digits_mlp": Problem(MLP((128, 128), 10), digits, classify, 64, 400),
    "digits_cnn": Problem(DigitsCNN(), digit_images, classify, 64, 400),
    "autoencoder": Problem(MLP(DEEP, 64, jnp.tanh), itself(digits), reconstruct, 64, 800),
    "patches": Problem(MLP(SHALLOW, 64), itself(patches), reconstruct, 128, 800),
    "cifar_conv": Problem(ConvNet(batch_norm=False), cifar, classify, 128, 300),
    "cifar_batch_norm": Problem(ConvNet(batch_norm=True), cifar, classify, 128, 300),
    "cifar_vit": Problem(VisionTransformer(), cifar, classify, 64, 300),
    "chars": Problem(GPT(CHARACTERS, 64, 2, 128, 4), characters(64), classify, 16, 400),
    "words": Problem(GPT(WORDS, 32, 2, 128, 4), words(32, WORDS), classify, 24, 400),
    "lstm": Problem(LSTM(CHARACTERS), characters(48), classify, 24, 400),
}
