"""Runs the notebooks of this folder, each in a new kernel.

python -m examples.notebooks --out notebooks five_minutes choosing_a_rule
"""

import argparse
import asyncio
import pathlib
import sys
import time
from collections.abc import Sequence

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

FOLDER = pathlib.Path(__file__).parent
LIMIT = 120  # seconds for one notebook


def sources() -> dict[str, pathlib.Path]:
    """The files of the notebooks, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("[!_]*.py"))}


async def execute(source: pathlib.Path, limit: float = LIMIT) -> nbformat.NotebookNode:
    """Runs a notebook and returns it with the output of its cells.

    Raises:
      CellExecutionError: if a cell fails; with its traceback.
      CellTimeoutError: if the notebook takes longer than `limit` seconds.
    """
    notebook = jupytext.read(source, fmt="py:percent")
    end = time.monotonic() + limit
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # fewer messages from the kernel itself
        timeout_func=lambda _: max(1, int(end - time.monotonic())),
    )
    await client.async_execute()
    return notebook


def complaints(notebook: nbformat.NotebookNode) -> str:
    """What the cells wrote to stderr, such as warnings."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stderr")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the notebooks; returns the number of those that failed."""
    found = sources()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(found)}")
    parser.add_argument("--out", type=pathlib.Path, help="folder for .ipynb files with outputs")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many at once")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.names) - found.keys():
        parser.error(f"names: got {', '.join(unknown)}, wanted some of {', '.join(found)}")

    async def run(name: str, turns: asyncio.Semaphore) -> bool:
        async with turns:
            start = time.perf_counter()
            try:
                notebook = await execute(found[name])
            except (CellExecutionError, CellTimeoutError) as error:
                print(f"{name}: {error}", flush=True)
                return False
            seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.1f} s\n{complaints(notebook)}", end="", flush=True)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, arguments.out / f"{name}.ipynb")
        return True

    async def run_all() -> list[bool]:
        turns = asyncio.Semaphore(arguments.jobs)
        return await asyncio.gather(*(run(name, turns) for name in arguments.names or found))

    return asyncio.run(run_all()).count(False)


if __name__ == "__main__":
    sys.exit(main())
