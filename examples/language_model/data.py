"""Text as token indices (words or characters), and batches of them."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

UNKNOWN, END = "<unk>", "<eos>"
WIKITEXT = "wikitext-2"
HELD_OUT = 0.1


class Text(NamedTuple):
    """The token indices of a training and an evaluation text, and the vocabulary."""

    train: np.ndarray
    evaluation: np.ndarray
    vocabulary: tuple[str, ...]


def load(data: str, eval_data: str, level: str, limit: int | None) -> Text:
    """Reads a text as token indices.

    Args:
      data: a file; "wikitext-2", downloaded by the package `datasets`; or "" for the reference
        manual that comes with Python.
      eval_data: a file, or "" for WikiText-2's own split or else the last tenth of the text.
      level: "words" or "characters".
      limit: the size of the vocabulary, or None; the rarest tokens become `<unk>`.
    """
    if data == WIKITEXT:
        train, evaluation = (_wikitext(split) for split in ("train", "validation"))
    else:
        train, evaluation = _lines(data) if data else _reference(), []
    tokens = list(split(train, level))
    if eval_data:
        evaluation = _lines(eval_data)
    if evaluation:
        held_out = list(split(evaluation, level))
    else:
        kept = round(len(tokens) * (1 - HELD_OUT))
        tokens, held_out = tokens[:kept], tokens[kept:]
    vocabulary = (UNKNOWN, *_most_common(tokens, limit))
    return Text(_numbers(tokens, vocabulary), _numbers(held_out, vocabulary), vocabulary)


def split(lines: Iterable[str], level: str) -> Iterator[str]:
    """Splits a text into characters, or into words with `<eos>` after each line, as WikiText."""
    for line in lines:
        yield from [*line.split(), END] if level == "words" else line


def _lines(path: str) -> list[str]:
    with open(path, encoding="utf-8", newline="") as file:
        return file.readlines()


def _reference() -> list[str]:
    """The reference manual that comes with Python, for `help("keywords")`."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values()).splitlines(keepends=True)


def _wikitext(part: str) -> list[str]:
    import datasets

    return datasets.load_dataset("Salesforce/wikitext", "wikitext-2-v1", split=part)["text"]


def _most_common(tokens: list[str], limit: int | None) -> list[str]:
    counts = collections.Counter(token for token in tokens if token != UNKNOWN)
    return [token for token, _ in counts.most_common(limit and limit - 1)]


def _numbers(tokens: list[str], vocabulary: tuple[str, ...]) -> np.ndarray:
    number = {token: i for i, token in enumerate(vocabulary)}
    return np.array([number.get(token, 0) for token in tokens], np.int32)


class Batches:
    """Batches of `(inputs, next tokens)`, each of shape `(batch, length)`."""

    def __init__(self, text: Text, batch: int, length: int, seed: int):
        # A pass starts anywhere in the first window. A window needs the token after its end.
        self._windows = (len(text.train) - length) // length
        self.steps_per_epoch = self._windows // batch
        if not self.steps_per_epoch or len(text.evaluation) <= length:
            raise ValueError(
                f"a text of {len(text.train):,} tokens, and {len(text.evaluation):,} to evaluate "
                f"on, is too short for batches of {batch} windows of {length}"
            )
        self._text, self._batch, self._length, self._seed = text, batch, length, seed

    def train(self, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Training batches. Each pass over the text has its own window offset and order."""
        first_epoch, first = divmod(start, self.steps_per_epoch)
        for epoch in itertools.count(first_epoch):
            rng = np.random.default_rng([self._seed, epoch])
            shift, order = rng.integers(self._length), rng.permutation(self._windows)
            for step in range(first, self.steps_per_epoch):
                chosen = order[step * self._batch : (step + 1) * self._batch]
                yield self._at(self._text.train, shift + chosen * self._length)
            first = 0

    def evaluation(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Evaluation batches: consecutive windows, without an incomplete one at the end."""
        tokens = self._text.evaluation
        starts = np.arange(0, len(tokens) - self._length, self._length)
        for first in range(0, len(starts), self._batch):
            yield self._at(tokens, starts[first : first + self._batch])

    def _at(self, tokens: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        windows = tokens[starts[:, None] + np.arange(self._length + 1)]
        return windows[:, :-1], windows[:, 1:]
