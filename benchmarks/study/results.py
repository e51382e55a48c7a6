"""Runs that were made, a line of JSON each, so that a study goes on where it stopped."""

import dataclasses
import json
import pathlib
from typing import Any

from benchmarks.study.trial import Trial


class Results:
    """The file's records, by trial."""

    def __init__(self, path: pathlib.Path):
        self.path, self.records = path, {}
        if path.exists():
            for line in path.read_text().splitlines():
                record = json.loads(line)
                self.records[_trial(record)] = record

    def __contains__(self, trial: Trial) -> bool:
        return trial in self.records

    def __getitem__(self, trial: Trial) -> dict[str, Any]:
        return self.records[trial]

    def add(self, trial: Trial, found: dict[str, Any]) -> None:
        record = dataclasses.asdict(trial) | found
        self.records[trial] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _trial(record):
    fields = {field.name: record[field.name] for field in dataclasses.fields(Trial)}
    options = tuple((name, value) for name, value in record["options"])
    return Trial(**fields | {"options": options})
