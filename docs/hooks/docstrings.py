"""Docstrings as the site wants them: what they write as Sphinx does, in Markdown."""

import re
from typing import Any

import griffe

INLINE = re.compile(r":math:`([^`]*)`")
BLOCK = re.compile(r"^([ \t]*)\.\. math::(.*(?:\n(?:[ \t]*\n)*\1[ \t]+\S.*)*)", re.MULTILINE)
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is taken apart."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    """Equations between dollars, and `Example:` as the section that holds doctests."""
    docstring = INLINE.sub(lambda found: f"${found[1]}$", docstring)
    return EXAMPLE.sub("Examples:", BLOCK.sub(_block, docstring))


def _block(found: re.Match[str]) -> str:
    indent, equation = found.groups()
    lines = [line.strip() for line in ["$$", *equation.splitlines(), "$$"]]
    return "\n".join(indent + line for line in lines if line)
