"""Doctests in the colours of a console, which tell prompts and outputs from code."""

import re
from typing import Any

DIRECTIVE = re.compile(r" +# doctest: .*")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with each page."""
    return DIRECTIVE.sub("", markdown.replace("```python\n>>>", "```pycon\n>>>"))
