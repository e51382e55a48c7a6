"""The settings of a run, from flags or a file."""

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
    """A dataclass field with the help text of its flag."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


ENDS = "steps", "epochs", "seconds"
DEFAULT_STEPS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of every run; a program adds its own fields in a subclass."""

    optimizer: str = setting("adafisher:centered", "the optimizer", tuple(NAMES))
    rate: float = setting(3e-2, "peak learning rate; the default is for adafisher:centered")
    weight_decay: float = setting(0.0, "decoupled, except for sgd and kfac (docs/training.md)")
    option: tuple[str, ...] = setting((), "options of the optimizer, such as refresh_every=10")
    warmup: float = setting(0.05, "share of the steps in which the rate rises")
    steps: int | None = setting(None, f"length of the run in steps (default: {DEFAULT_STEPS})")
    epochs: int | None = setting(None, "length of the run in passes over the data")
    seconds: float | None = setting(None, "length of the run in seconds, without compilation")
    batch: int = setting(64, "examples in a batch")
    seed: int = setting(0, "seed for parameters, batches and dropout")
    log_every: int = setting(10, "steps between two records")
    evaluate_every: int = setting(100, "steps between two evaluations")
    checkpoint_every: int = setting(100, "steps between two checkpoints")
    folder: str = setting("", "folder of the run, to write or resume (default: a new one)")

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
        """The options of the optimizer by name; a value is JSON or else a string."""
        return {name: _value(text) for name, _, text in (o.partition("=") for o in self.option)}

    @classmethod
    def from_flags(cls, argv: Sequence[str] | None = None, description: str | None = None) -> Self:
        """The settings from the command line and the `--config` file; flags override the file."""
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
        """The settings in a file.

        Raises:
          ValueError: if a setting is unknown or has the wrong type.
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
        """The settings as text for a `--config` file."""
        values = {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }
        # JSON and TOML have the same syntax for numbers, strings and lists of them.
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


_ACCEPTED = {int: int, float: (int, float), str: str, bool: bool, tuple: list}


def _kind(cls: type, name: str) -> type:
    """The type of a field: `int` for `int | None`, `tuple` for `tuple[str, ...]`."""
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
    # Suppressed, so that only given flags override the file.
    parser.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **how)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
