"""Links from pages to files of the repository outside docs/: the site shows those, too.

Pages link as a code host wants it, relative to where they lie. A linked Python file becomes a
page, other files go to the site as they are, and folders stay names.
"""

import os
import pathlib
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
IN_NAVIGATION = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs before it reads pages."""
    prose = [*DOCS.glob("*.md"), *ROOT.glob("examples/notebooks/[!_]*.py"), *IN_NAVIGATION]
    linked = {target for path in prose for target in targets(path)}
    for path in sorted(linked.union(IN_NAVIGATION)):
        if path.is_file() and not files.get_file_from_path(uri(path)):
            files.append(_file(config, path))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Called by MkDocs with each page."""
    return relinked(markdown, origin(page.file.src_uri))


def targets(page: pathlib.Path) -> set[pathlib.Path]:
    """The files and folders that a file with prose links to."""
    found = {target(page, link[2]) for link in LINK.finditer(page.read_text())}
    return {path for path in found if path.exists()}


def target(page: pathlib.Path, link: str) -> pathlib.Path:
    """What a page of the repository means by a link."""
    return pathlib.Path(os.path.normpath(page.parent / link))


def uri(path: pathlib.Path) -> str:
    """Where a file of the repository is among the site's sources."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    path = path.relative_to(ROOT)
    return (path.with_suffix(".md") if path.suffix == ".py" else path).as_posix()


def origin(uri: str) -> pathlib.Path:
    """The inverse of `uri`."""
    candidates = [DOCS / uri, ROOT / uri, (ROOT / uri).with_suffix(".py")]
    return next(path for path in candidates if path.exists())


def relinked(markdown: str, page: pathlib.Path) -> str:
    """A page's text with its links as they are on the site."""

    def relink(link: re.Match[str]) -> str:
        label, _, anchor = link.groups()
        path = target(page, link[2])
        if path.is_dir():
            return label
        if not path.exists():
            return link[0]
        address = os.path.relpath(uri(path), os.path.dirname(uri(page)))
        return f"[{label}]({address}{anchor or ''})"

    return LINK.sub(relink, markdown)


def _file(config: MkDocsConfig, path: pathlib.Path) -> File:
    if path.suffix == ".py":
        name = path.relative_to(ROOT).as_posix()
        content = f"# {name}\n\n~~~~ python\n{path.read_text()}~~~~\n"
        return File.generated(
            config, uri(path), content=content, inclusion=InclusionLevel.NOT_IN_NAV
        )
    return File.generated(config, uri(path), abs_src_path=str(path))
