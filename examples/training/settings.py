"""What a run can be told, by flags or in a file, and how it is stored."""

import argparse
import dataclasses
import json
import pathlib
import tomllib
import typing
from collections.abc import Sequence
from typing import Any, Self

from examples.training.optimizers import NAMES


def setting(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A field with its flag's help."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


ENDS = "steps", "epochs", "seconds"
DEFAULT_STEPS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What every run can be told; a program adds fields of its own in a subclass."""

    optimizer: str = setting("adafisher:centered", "its name", tuple(NAMES))
    rate: float = setting(3e-2, "peak learning rate; this one is for adafisher:centered")
    weight_decay: float = setting(0.0, "see docs/training.md")
    option: tuple[str, ...] = setting((), "the optimizer's own: refresh_every=10 damping=0.1")
    warmup: float = setting(0.05, "share of the steps in which the rate rises; then a cosine")
    steps: int | None = setting(None, f"train so many steps ({DEFAULT_STEPS} if no end is given)")
    epochs: int | None = setting(None, "or so many passes over the data")
    seconds: float | None = setting(None, "or as many steps as take so long, compilation apart")
    batch: int = setting(64, "examples in a batch")
    seed: int = setting(0, "of parameters, batches and dropout")
    log_every: int = setting(10, "steps between two records")
    evaluate_every: int = setting(100, "steps between two evaluations")
    checkpoint_every: int = setting(100, "steps between two checkpoints")
    folder: str = setting(
        "", "the run's own; one that was begun there goes on (default: a new one)"
    )

    def __post_init__(self) -> None:
        given = [name for name in ENDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a run has one end, got {' and '.join(given)}")
        for name in ("log_every", "evaluate_every", "checkpoint_every", "batch", *given):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"{field.name} is one of {', '.join(choices)}, got {value!r}")
        for option in self.option:
            if "=" not in option:
                raise ValueError(f"an option is given as name=value, got {option!r}")

    @property
    def options(self) -> dict[str, Any]:
        """Those of the optimizer, by name; values are read as JSON, or else are strings."""
        return {name: _value(text) for name, _, text in (o.partition("=") for o in self.option)}

    @classmethod
    def from_flags(cls, argv: Sequence[str] | None = None, description: str | None = None) -> Self:
        """Those of the command line, and of the file it names with `--config`; flags win."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--config", help="a TOML file of settings; flags override it")
        for field in dataclasses.fields(cls):
            _add_flag(parser, field, _kind(cls, field.name))
        flags = vars(parser.parse_args(argv))
        path = flags.pop("config")
        try:
            stored = cls._read(path) if path else {}
            if any(name in flags for name in ENDS):
                stored = {name: value for name, value in stored.items() if name not in ENDS}
            return cls(**stored | {name: _plain(value) for name, value in flags.items()})
        except (OSError, ValueError) as error:
            parser.error(str(error))

    @classmethod
    def from_file(cls, path: str | pathlib.Path) -> Self:
        return cls(**cls._read(path))

    @classmethod
    def _read(cls, path: str | pathlib.Path) -> dict[str, Any]:
        """The file's settings.

        Raises:
          ValueError: for one that is not known, or not of its type.
        """
        values = tomllib.loads(pathlib.Path(path).read_text())
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{path}: no setting {name!r}; there are {', '.join(known)}")
            kind = _kind(cls, name)
            if not isinstance(value, _ACCEPTED[kind]) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{path}: {name} wants a {kind.__name__}, got {value!r}")
        return {name: _plain(value) for name, value in values.items()}

    def to_toml(self) -> str:
        """A file for `--config`."""
        values = {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }
        # Numbers, strings and lists of them are written alike in JSON and TOML.
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


_ACCEPTED = {int: int, float: (int, float), str: str, bool: bool, tuple: list}


def _kind(cls: type, name: str) -> type:
    """Of `int | None` int, of `tuple[str, ...]` tuple."""
    hint = typing.get_type_hints(cls)[name]
    if type(None) in typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    return typing.get_origin(hint) or hint


def _add_flag(parser: argparse.ArgumentParser, field: Any, kind: type) -> None:
    text, default = field.metadata["help"], field.default
    if field.metadata["choices"]:
        text += f": {', '.join(field.metadata['choices'])}"
    if default not in (None, "", ()):
        text += f" (default: {default})"
    how: dict[str, Any] = {"type": kind}
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    if kind is tuple:
        how = {"nargs": "*"}
    flag = "--" + field.name.replace("_", "-")
    # Suppressed, so that only what was given overrides the file.
    parser.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **how)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
