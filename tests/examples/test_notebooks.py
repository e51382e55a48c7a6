"""The notebooks of `examples/notebooks`: their sources, and, slowly, their execution."""

import asyncio
import re

import pytest

pytest.importorskip("jupytext", reason="notebooks are run with pip install -e '.[docs]'")

import jupytext

from examples.notebooks import __main__ as program

notebooks = pytest.mark.parametrize(
    "source", program.sources().values(), ids=lambda path: path.stem
)


def test_they_are_found():
    assert {"five_minutes", "five_minutes_nnx", "from_adamw"} <= program.sources().keys()


@notebooks
def test_a_source_is_a_notebook(source):
    text = source.read_text()
    notebook = jupytext.reads(text, fmt="py:percent")
    assert jupytext.writes(notebook, fmt="py:percent") == text
    title, *_, last = notebook.cells
    assert title.cell_type == last.cell_type == "markdown"
    assert title.source.startswith("# ")
    assert "## Read next\n" in last.source
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, source.name, "exec")


@notebooks
def test_links_lead_somewhere(source):
    cells = jupytext.read(source, fmt="py:percent").cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)#]+)", prose):
        assert (source.parent / link).exists(), link


@pytest.mark.slow
@notebooks
def test_a_notebook_runs_without_a_warning(source):
    assert program.complaints(asyncio.run(program.execute(source))) == ""


@pytest.mark.slow
def test_a_failing_cell_is_shown(monkeypatch, tmp_path, capsys):
    (tmp_path / "good.py").write_text("# %%\nimport sys\n\nprint('a warning', file=sys.stderr)\n")
    (tmp_path / "bad.py").write_text("# %%\nraise ValueError('not this one')\n")
    monkeypatch.setattr(program, "FOLDER", tmp_path)
    assert program.main(["--out", str(tmp_path / "made")]) == 1
    printed = capsys.readouterr().out
    assert ": not this one\n" in printed  # of the traceback, in colours
    assert re.search(r"good: \d+\.\d s\na warning", printed)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["good.ipynb"]


@pytest.mark.slow
def test_a_notebook_has_only_so_much_time(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("# %%\nimport time\n\ntime.sleep(60)\n")
    with pytest.raises(program.CellTimeoutError):
        asyncio.run(program.execute(path, limit=1))
