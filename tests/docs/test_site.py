"""The documentation site's parts. Building it is `mkdocs build --strict`."""

import ast
import json
import pathlib
import re

import pytest

import adafisher_jax as af

pytest.importorskip("mkdocstrings", reason="the site is made with pip install -e '.[docs]'")

import markdown
import yaml

from docs.hooks import (
    docstrings,
    doctests,
    equations,
    notebooks,
    sources,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def navigation(entry):
    """The pages under an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in navigation(part)]


NAVIGATION = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


def test_the_navigation_has_every_page_once():
    expected = [*PAGES, *notebooks.SOURCES.glob("[!_]*.py")]
    assert {sources.uri(path) for path in expected} <= set(NAVIGATION)
    assert len(set(NAVIGATION)) == len(NAVIGATION)
    assert all(sources.origin(uri).is_file() for uri in NAVIGATION)


def test_every_public_name_is_on_a_page():
    api = "".join(path.read_text() for path in PAGES if path.name.startswith("api"))
    shown = set(re.findall(r"^::: (\S+)$", api, re.MULTILINE))
    for package in (af, af.diagnostics):
        for name in package.__all__:
            found = getattr(package, name)
            module = getattr(found, "__module__", None)
            own = f"{package.__name__}.{name}"
            known_as = {own, f"{own}.{name}", module, f"{module}.{name}"}
            assert known_as & shown or name == "diagnostics", name


def test_docstrings_become_markdown():
    text = "For :math:`x\n> 0`\n\n.. math::\n\n    a &= b \\\\\n\n    c\n\nso.\n\nExample:\n  >>> 1"
    assert docstrings.to_markdown(text) == (
        "For $x\n> 0$\n\n$$\na &= b \\\\\nc\n$$\n\nso.\n\nExamples:\n  >>> 1"
    )
    text = "Args:\n  x: with\n\n    .. math:: a,\n              b\n\n    in it"
    assert (
        docstrings.to_markdown(text)
        == "Args:\n  x: with\n\n    $$\n    a,\n    b\n    $$\n\n    in it"
    )


def package_docstrings():
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    for path in sorted((ROOT / "adafisher_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield docstrings.to_markdown(text)


def test_every_equation_becomes_mathml():
    render = markdown.Markdown(
        extensions=["tables", "pymdownx.superfences", "pymdownx.arithmatex"],
        extension_configs={"pymdownx.arithmatex": {"generic": True}},
    )
    texts = [*(path.read_text() for path in PAGES), *package_docstrings()]
    found = []
    for text in texts:
        page = equations.on_page_content(render.reset().convert(text))
        assert "arithmatex" not in page
        assert "math::" not in re.sub("<code>.*?</code>", "", page, flags=re.DOTALL)
        found += re.findall("<math.*?</math>", page, re.DOTALL)
    assert len(found) > 50


def test_lines_of_an_equation_are_aligned():
    assert equations.to_mathml(r"a &amp;= b \\ c &amp;= d", True).count("<mtr>") == 2
    assert 'display="block"' in equations.to_mathml("a", True)
    assert "display" not in equations.to_mathml("a", False)


def test_doctests_are_shown_as_in_a_console():
    page = "```python\n>>> f(1)  # doctest: +NUMBER\n2.0\n```\n\n```python\nf(1)  # one\n```"
    assert doctests.on_page_markdown(page) == (
        "```pycon\n>>> f(1)\n2.0\n```\n\n```python\nf(1)  # one\n```"
    )


def test_links_lead_to_where_files_are_on_the_site():
    page, notebook = ROOT / "docs" / "devices.md", notebooks.SOURCES / "five_minutes.py"
    text = "[a](../examples/many_devices.py) [b](speed.md#x) [c](../benchmarks/results) ![d](https://e)"
    assert sources.relinked(text, page) == (
        "[a](examples/many_devices.md) [b](speed.md#x) c ![d](https://e)"
    )
    text = "[a](from_adamw.py) [b](../../docs/optax.md#x) f[0](1)"
    assert sources.relinked(text, notebook) == "[a](from_adamw.md) [b](../../optax.md#x) f[0](1)"


@pytest.mark.parametrize("path", [*PAGES, *ROOT.glob("*.md")])
def test_links_lead_somewhere(path):
    links = [link for _, link, _ in sources.LINK.findall(path.read_text())]
    missing = [link for link in links if not sources.target(path, link).exists()]
    assert not missing


SOURCE = "# %% [markdown]\n# # Title\n#\n# Prose\n# goes on.\n\n# %%\nprint(1)\n"
EXECUTED = {
    "cells": [
        {"cell_type": "markdown", "source": "# Title\n\nProse\ngoes on."},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": "1\n"},
                {"output_type": "stream", "name": "stdout", "text": ["2\n", "3\n"]},
                {"output_type": "stream", "name": "stderr", "text": "not this\n"},
                {"output_type": "display_data", "data": {"image/png": "QUJD\n"}},
            ],
        },
    ]
}


def test_a_notebook_becomes_a_page(tmp_path):
    source, executed = tmp_path / "one.py", tmp_path / "one.ipynb"
    source.write_text(SOURCE)
    page = notebooks.page(source, executed)
    assert page.startswith("# Title\n\n*This is `examples/notebooks/one.py`, not executed here")
    assert page.endswith("\n\nProse\ngoes on.\n\n```python\nprint(1)\n```")
    executed.write_text(json.dumps(EXECUTED))
    page = notebooks.page(source, executed)
    assert page.endswith(
        "\n\nProse\ngoes on.\n\n```python\nprint(1)\n```\n\n```text\n1\n2\n3\n```\n\n"
        "![](data:image/png;base64,QUJD)"
    )
