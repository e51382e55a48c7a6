"""The records of a run, as lines of JSON and for TensorBoard."""

import json
import pathlib
from typing import Any, Self

from tensorboardX import SummaryWriter

NAME = "metrics.jsonl"


class Records:
    """Appends to `metrics.jsonl` and to TensorBoard's files in a folder.

    A run that resumes from step `start` first drops the records of later steps, which will be
    taken again.
    """

    def __init__(self, folder: pathlib.Path, start: int):
        path = folder / NAME
        kept = [line for line in read(folder) if line["step"] <= start] if path.exists() else []
        self._file = path.open("w")
        for line in kept:
            self._append(line)
        self._board = SummaryWriter(str(folder), purge_step=start + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._board.close()

    def write(self, step: int, seconds: float, kind: str, values: dict[str, float]) -> None:
        """Writes the values of a step under names such as `"train/loss"`."""
        named = {f"{kind}/{name}": value for name, value in values.items()}
        self._append({"step": step, "seconds": round(seconds, 3), **named})
        for name, value in named.items():
            self._board.add_scalar(name, value, step)

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a run, without an incomplete last line."""
    lines = (folder / NAME).read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
