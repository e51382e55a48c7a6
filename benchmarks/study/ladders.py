"""Ladders: one model in several sizes, all else equal, and runs short enough for the largest."""

import dataclasses
import functools

from benchmarks.models import NNXMLP
from benchmarks.study import problems
from benchmarks.study.models import MLP, ConvNet, InNNX, Transformer
from benchmarks.study.problems import CHARACTERS, Data, Examples, Problem

LENGTH, WORDS = 64, 32  # tokens
brief = functools.partial(Problem, loss=problems.classify, measured=500)


def small_images(folder):
    """Images of CIFAR-10, averaged over squares of 2 × 2, as vectors of 768 numbers."""

    def averaged(split):
        squares = split.inputs.reshape(-1, 16, 2, 16, 2, 3)
        return Examples(squares.mean((2, 4)).reshape(-1, 768), split.targets)

    return Data(*map(averaged, problems.cifar(folder)))


def of_characters(layers=2, width=128, length=LENGTH, steps=160):
    """Batches of 1,024 characters."""
    model = Transformer(CHARACTERS, layers, width)
    return brief(model, problems.characters(length), batch=16 * LENGTH // length, steps=steps)


def of_words(vocabulary=2000, width=256, **options):
    model = Transformer(vocabulary, 2, width, **options)
    return brief(model, problems.words(WORDS, vocabulary), batch=24, steps=160)


def mlp(width, batch=128):
    return brief(MLP((width, width), 10), small_images, batch=batch, steps=200)


def nnx_mlp(width):
    """`mlp` in NNX."""
    model = InNNX(lambda rngs: NNXMLP(768, width, 2, 10, rngs))
    return dataclasses.replace(mlp(width), model=model)


def conv_net(channels=32, kernel=3):
    features = (channels, 2 * channels, 4 * channels)
    return brief(ConvNet(False, features, kernel=kernel), problems.cifar, batch=64, steps=120)


# What grows: of which size, the problem.
LADDERS = {
    "width": {n: of_characters(width=n) for n in (32, 64, 128, 256, 512, 1024)},
    "depth": {n: of_characters(n) for n in (2, 4, 8, 16, 24)},
    "length": {n: of_characters(length=n) for n in (16, 64, 256)},
    "longer": {n: of_characters(length=n, steps=480) for n in (64, 256)},
    "mlp": {n: mlp(n) for n in (64, 128, 256, 512, 1024, 2048)},
    "nnx": {n: nnx_mlp(n) for n in (64, 256, 1024)},
    "batch": {n: mlp(256, n) for n in (16, 64, 256, 1024)},
    "channels": {n: conv_net(n) for n in (16, 32, 64)},
    "kernel": {n: conv_net(kernel=n) for n in (1, 3, 5, 7)},
    "vocabulary": {n: of_words(n) for n in (500, 2000, 8000)},
    "tied": {n: of_words(width=n, tied=True, scanned=True) for n in (64, 256, 512)},
}
RUNGS = {f"{what} {n}": problem for what, sizes in LADDERS.items() for n, problem in sizes.items()}
