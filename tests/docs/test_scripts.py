"""Pages whose code is one script to copy: it runs, and prints what stands below it."""

import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def blocks(page, language):
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def run(tmp_path):
    def run(script):
        file = tmp_path / "script.py"
        file.write_text(script)
        runpy.run_path(str(file))

    return run


@pytest.mark.parametrize("page", ["README.md", "docs/getting_started.md"])
def test_the_script_prints_what_the_page_says(page, run, capsys):
    run("\n".join(blocks(page, "python")))
    assert capsys.readouterr().out == "".join(blocks(page, "text"))


def test_both_sides_of_the_difference_train(run):
    [script], [difference] = blocks("README.md", "python"), blocks("README.md", "diff")
    optax, adafisher = (
        re.sub("^[+ -]", "", re.sub(f"^[{other}].*\n", "", difference, flags=re.M), flags=re.M)
        for other in "+-"
    )
    assert adafisher in script
    run(script.replace(adafisher, optax))
