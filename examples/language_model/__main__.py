"""Trains a small language model, by default on the text that comes with Python.

python -m examples.language_model --steps 300 --data tinyshakespeare.txt --level characters
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from examples.language_model import data, task
from examples.language_model.model import GPT, ScannedTransformer
from examples.training.loop import Result
from examples.training.report import table
from examples.training.run import run
from examples.training.settings import Settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageSettings(Settings):
    data: str = setting("", f"a text file, or {data.WIKITEXT} (default: Python's reference)")
    eval_data: str = setting("", "a text file (default: the last tenth of the data)")
    level: str = setting("words", "the kind of tokens", ("words", "characters"))
    vocabulary: int | None = setting(None, "number of tokens, others are <unk> (default: all)")
    model: str = setting("gpt", "the architecture", ("gpt", "scanned"))
    layers: int = setting(4, "number of blocks")
    width: int = setting(128, "features of a token")
    heads: int = setting(4, "number of attention heads")
    length: int = setting(64, "tokens in a window")
    dropout: float = setting(0.0, "share of features dropped in training")
    tied: bool = setting(True, "gpt: share the embeddings and the output weights")
    dtype: str = setting("float32", "type of the arithmetic", ("float32", "bfloat16"))
    batch: int = setting(16, "windows in a batch")


def make_model(settings: LanguageSettings, vocabulary: int) -> Any:
    sizes = {"vocabulary": vocabulary, "dtype": jnp.dtype(settings.dtype)}
    sizes |= {name: getattr(settings, name) for name in ("layers", "width", "heads", "dropout")}
    if settings.model == "scanned":
        return ScannedTransformer(**sizes)
    return GPT(length=settings.length, tied=settings.tied, **sizes)


def main(argv: Sequence[str] | None = None) -> Result:
    settings = LanguageSettings.from_flags(argv, __doc__.split("\n")[0])
    text = data.load(settings.data, settings.eval_data, settings.level, settings.vocabulary)
    batches = data.Batches(text, settings.batch, settings.length, settings.seed)
    language = task.make(settings.model, make_model(settings, len(text.vocabulary)), batches)
    print(
        f"{len(text.train):,} tokens, and {len(text.evaluation):,} to evaluate on, of "
        f"{len(text.vocabulary):,} {settings.level}; {batches.steps_per_epoch} steps an epoch"
    )
    print(language.layout)
    result = run(language, settings)
    perplexity = {"perplexity": math.exp(result.evaluation["loss"])} if result.evaluation else {}
    print(table(settings, result, perplexity))
    return result


if __name__ == "__main__":
    main()
