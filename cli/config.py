"""A `TrainConfig` from a TOML file and flags: its fields are the file's keys and the flags."""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import docstring_parser
import msgspec
import typer

from ..algorithms.config import TrainConfig
from ..primitives.errors import InvalidInput, NotFound

SCALARS = (str, int, float, bool)


def with_config_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**flags` a flag for every field of `TrainConfig`. A flag not
    given is None."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    command.__signature__ = signature.replace(parameters=[*own, *_flags()])  # type: ignore[attr-defined]
    return command


def _flags() -> list[inspect.Parameter]:
    documented = docstring_parser.parse(TrainConfig.__doc__ or "").params
    helps = {p.arg_name: " ".join((p.description or "").split()) for p in documented}
    kinds = get_type_hints(TrainConfig)
    flags = []
    for field in fields(TrainConfig):
        scalar = kinds[field.name] in SCALARS
        option: Any = typer.Option(
            help=helps.get(field.name, ""),
            show_default=str(field.default) if scalar else False,
            metavar=None if scalar else "JSON",
            parser=None if scalar else json.loads,
            rich_help_panel="The run (TrainConfig; the same names in the TOML file)",
        )
        kind: Any = kinds[field.name] if scalar else dict
        flags.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )
    return flags


def load_config(file: Path | None, flags: dict[str, Any]) -> TrainConfig:
    """The config of a TOML file, None for none, under flags that override it.

    Raises:
        NotFound: there is no such file.
        InvalidInput: it is no TOML, or a key or value cannot be used.
    """
    values = {} if file is None else _read(file)
    known = [field.name for field in fields(TrainConfig)]
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
            raise InvalidInput(f"{file}: unknown key {key!r}; {hint}")
    try:
        return msgspec.convert(values | flags, TrainConfig)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{file}: {error}" if file else str(error)) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise NotFound(f"there is no file {file}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file} is not TOML: {error}") from None
