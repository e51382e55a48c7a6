"""Equations as MathML, which browsers draw by themselves: no script and no network."""

import html
import importlib.metadata
import re
from typing import Any

from math_core import LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# What `pymdownx.arithmatex` makes of text between dollars.
FOUND = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
CONVERTER = LatexToMathML(fancy_error=False)
FONT = "STIXTwoMath-Regular.ttf"  # for machines that have none for equations; see site.css


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs before it reads pages: the font goes to the site."""
    path = importlib.metadata.distribution("ziamath").locate_file(f"ziamath/fonts/{FONT}")
    files.append(File.generated(config, f"assets/{FONT}", abs_src_path=str(path)))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Called by MkDocs with the page as HTML."""
    return FOUND.sub(lambda found: to_mathml(found[2], found[1] == "div"), content)


def to_mathml(equation: str, display: bool) -> str:
    """One equation of a page, escaped as in HTML; on a line of its own where `display`.

    Raises:
      LatexError: for what it does not understand.
    """
    equation = html.unescape(equation).strip()
    if r"\\" in equation and r"\begin" not in equation:  # Sphinx aligns lines by itself
        equation = rf"\begin{{aligned}}{equation}\end{{aligned}}"
    return CONVERTER.convert_with_local_state(equation, displaystyle=display)
