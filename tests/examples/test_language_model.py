"""`examples/language_model`: its text, its models, and a run by its command line."""

import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.language_model import __main__ as program
from examples.language_model import data, model, task
from examples.training import records
from tests.examples.test_training import quick  # noqa: F401, for all tests here

TEXT = "the cat sat\n\nthe dog ran off\n"


def write(folder, text, name="text.txt"):
    path = folder / name
    path.write_text(text)
    return str(path)


def numbers(count):
    return data.Text(np.arange(count), np.arange(100, 100 + count // 3), ("<unk>",))


# Text.


def test_words_are_wikitexts(tmp_path):
    """Each line, blank ones too, ends with <eos>; the rarest words are <unk>."""
    path = write(tmp_path, TEXT)
    assert list(data.split(TEXT.splitlines(), "words")) == (
        "the cat sat <eos> <eos> the dog ran off <eos>".split()
    )
    text = data.load(path, write(tmp_path, "the <unk> bird\n", "other.txt"), "words", 4)
    assert text.vocabulary == ("<unk>", "<eos>", "the", "cat")
    assert text.train.tolist() == [2, 3, 0, 1, 1, 2, 0, 0, 0, 1]
    assert text.evaluation.tolist() == [2, 0, 0, 1]


def test_characters_are_all_of_the_files_and_the_last_tenth_is_held_out(tmp_path):
    path = write(tmp_path, "ab\r\n" * 25)
    text = data.load(path, "", "characters", None)
    assert set(text.vocabulary) == {"<unk>", *"ab\r\n"}
    read = "".join(text.vocabulary[i] for i in [*text.train, *text.evaluation])
    assert read == "ab\r\n" * 25
    assert len(text.evaluation) == 10


def test_wikitext_by_name(monkeypatch):
    """Rows as the library `datasets` gives them."""
    rows = {"train": ["", " = Title = \n", " a b \n"], "validation": [" b c \n"]}

    def load_dataset(path, name, split):
        assert (path, name) == ("Salesforce/wikitext", "wikitext-2-v1")
        return {"text": rows[split]}

    stub = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stub)
    text = data.load("wikitext-2", "", "words", None)
    read = [text.vocabulary[i] for i in text.train]
    assert read == "<eos> = Title = <eos> a b <eos>".split()
    assert [text.vocabulary[i] for i in text.evaluation] == "b <unk> <eos>".split()


def test_there_is_text_on_any_machine():
    text = data.load("", "", "words", 1000)
    assert len(text.train) > 20_000
    assert "statement" in text.vocabulary


# Batches.


def test_a_batch_depends_on_the_seed_and_its_step():
    batches = data.Batches(numbers(203), batch=3, length=10, seed=5)
    assert batches.steps_per_epoch == 6
    whole = list(itertools.islice(batches.train(0), 20))
    for start in (1, 6, 13):
        for expected, got in zip(whole[start:], batches.train(start), strict=False):
            np.testing.assert_array_equal(expected, got)
    other = next(data.Batches(numbers(203), batch=3, length=10, seed=6).train(0))
    assert not np.array_equal(other, whole[0])


def test_a_pass_sees_each_window_once():
    batches = data.Batches(numbers(203), batch=3, length=10, seed=5)
    for epoch in range(3):
        steps = itertools.islice(batches.train(6 * epoch), 6)
        inputs, following = map(np.concatenate, zip(*steps, strict=True))
        np.testing.assert_array_equal(inputs + 1, following)
        shift = inputs.min()
        assert 0 <= shift < 20
        assert len(np.unique(inputs)) == inputs.size == 180


def test_evaluation_is_in_order_and_its_last_batch_smaller():
    batches = data.Batches(numbers(203), batch=4, length=10, seed=5)
    found = list(batches.evaluation())
    assert [len(inputs) for inputs, _ in found] == [4, 2]
    inputs, following = map(np.concatenate, zip(*found, strict=True))
    assert inputs.ravel().tolist() == list(range(100, 160))
    np.testing.assert_array_equal(inputs + 1, following)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=r"30 tokens, .* too short for batches of 3 windows of 10"):
        data.Batches(numbers(30), batch=3, length=10, seed=0)


# Models.

SIZES = {"vocabulary": 11, "layers": 2, "width": 8, "heads": 2}
MODELS = {
    "gpt": model.GPT(length=6, dropout=0.1, **SIZES),
    "gpt untied": model.GPT(length=6, tied=False, **SIZES),
    "gpt bfloat16": model.GPT(length=6, dtype=jnp.bfloat16, **SIZES),
    "scanned": model.ScannedTransformer(dropout=0.1, **SIZES),
    "scanned bfloat16": model.ScannedTransformer(dtype=jnp.bfloat16, **SIZES),
}
any_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 11)


@any_model
def test_no_token_sees_what_follows(model):
    variables = jax.jit(lambda: model.init(jax.random.key(0), TOKENS, train=False))()
    apply = jax.jit(lambda tokens: model.apply(variables, tokens, train=False))
    changed = TOKENS.at[:, 4].add(1) % 11
    before, after = apply(TOKENS), apply(changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).min(-1).max() > 0
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


@any_model
def test_every_parameter_is_under_a_fisher_block(model):
    batches = data.Batches(numbers(40), batch=2, length=6, seed=0)
    assert task.make("tiny", model, batches).layout.covered == 1


def test_rotation_tells_the_distance_of_two_positions():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    x, y = (model.rotated(jnp.broadcast_to(v, (1, 6, 1, 8)))[0, :, 0] for v in (x, y))
    np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(x[0]), rtol=1e-5)
    np.testing.assert_allclose(x[3] @ y[1], x[5] @ y[3], rtol=1e-4)
    assert abs(x[3] @ y[1] - x[4] @ y[1]) > 1e-3


# The program.


def test_a_run_by_its_command_line(tmp_path, capsys):
    path = write(tmp_path, TEXT * 40)
    flags = "--steps 30 --layers 1 --width 8 --heads 2 --length 8 --batch 4 --rate 0.03"
    folder = tmp_path / "run"
    result = program.main([*flags.split(), "--data", path, "--folder", str(folder)])
    printed = capsys.readouterr().out
    assert "360 tokens, and 40 to evaluate on, of 8 words; 11 steps an epoch" in printed
    assert "parameters under a Fisher block" in printed
    assert f"{'perplexity':<17}{np.exp(result.evaluation['loss']):.4f}" in printed
    first = records.read(folder)[0]["train/loss"]
    assert result.evaluation["loss"] < first
    again = program.main(["--config", str(folder / "settings.toml")])
    assert again == result
