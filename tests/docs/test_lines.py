"""Lines of prose in Markdown are at most 100 wide."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
WIDTH = 100
FENCED = re.compile(r"^ *(```|\$\$).*?^ *\1$", re.MULTILINE | re.DOTALL)
GENERATED = re.compile(r"^<!-- .* -->\n[^<]*<!-- end -->$", re.MULTILINE)
NO_PROSE = "|", "    ", "<!--", "!["  # tables, code, comments, images


def too_wide(markdown):
    """Lines of prose that are wider than `WIDTH` and have a space to break at."""
    lines = FENCED.sub("", GENERATED.sub("", markdown)).splitlines()
    wide = [line for line in lines if len(line) > WIDTH and not line.startswith(NO_PROSE)]
    return [line for line in wide if " " in line[:WIDTH].lstrip("-* ")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lines_of_prose_fit(path):
    assert not too_wide(path.read_text())


def test_only_prose_must_fit():
    prose, link = "word " * 21, "[a](" + "b" * 100 + ")"
    assert too_wide(f"{prose}\n- {prose}") == [prose, f"- {prose}"]
    fences = [f"```\n{prose}\n```", f"$$\n{prose}\n$$", f"<!-- a: b -->\n{prose}\n<!-- end -->"]
    for exempt in (*fences, f"| {prose} |", f"![{prose}](a.png)", link, f"- {link}"):
        assert not too_wide(f"{exempt}\n")
