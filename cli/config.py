"""A run's config from a TOML file and flags: its fields are the file's keys and the flags."""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import msgspec
import typer

from ..algorithms.config import TrainConfig
from ..algorithms.run_folder import load_run_of
from ..primitives.errors import InvalidInput, NotFound

SCALARS = (str, int, float, bool)
C = TypeVar("C")


def with_config_flags(
    kind: type[Any], *, without: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes `**flags` a flag for every field of the config class `kind` but
    those `without`. A flag not given is None."""

    def give(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        flags = [flag for flag in _flags(kind) if flag.name not in without]
        command.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
        return command

    return give


def _flags(kind: type[Any]) -> list[inspect.Parameter]:
    helps = _helps(kind)
    kinds = get_type_hints(kind)
    flags = []
    for field in fields(kind):
        scalar = kinds[field.name] in SCALARS
        option: Any = typer.Option(
            help=helps.get(field.name, ""),
            show_default=(str(field.default) or False) if scalar else False,
            metavar=None if scalar else "JSON",
            parser=None if scalar else json.loads,
            rich_help_panel=f"The run ({kind.__name__}; the same names in the TOML file)",
        )
        wanted: Any = kinds[field.name] if scalar else dict
        flags.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[wanted | None, option],
            )
        )
    return flags


def _helps(kind: type[Any]) -> dict[str, str]:
    """What the docstrings of a config class and of those it extends say of its fields."""
    documented = [
        param
        for base in reversed(kind.__mro__)
        if is_dataclass(base)
        for param in docstring_parser.parse(base.__doc__ or "").params
    ]
    return {p.arg_name: " ".join((p.description or "").split()) for p in documented}


def chosen_config(
    kind: type[C],
    file: Path | None,
    flags: dict[str, Any],
    run_dir: Path | None,
    resume: Path | None,
) -> C:
    """The config that a command's flags choose (None: not given): a new run's, or that of the run
    in `resume`, of which only the end may be set.

    Raises:
        NotFound: there is no such file or run.
        InvalidInput: a key or value cannot be used, or not beside `--resume`.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if resume is None:
        return load_config(file, given, kind)
    if file is not None or run_dir is not None or given.keys() - {"steps"}:
        raise InvalidInput("--resume goes on with the run's own config: of it, give only --steps")
    return replace(load_run_of(kind, resume)[1], **given)  # type: ignore[type-var]


def load_config(
    file: Path | None,
    flags: dict[str, Any],
    kind: type[C] = TrainConfig,  # type: ignore[assignment]
) -> C:
    """The config of a TOML file, None for none, under flags that override it.

    Raises:
        NotFound: there is no such file.
        InvalidInput: it is no TOML, or a key or value cannot be used.
    """
    values = {} if file is None else _read(file)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
            raise InvalidInput(f"{file}: unknown key {key!r}; {hint}")
    try:
        return msgspec.convert(values | flags, kind)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{file}: {error}" if file else str(error)) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise NotFound(f"there is no file {file}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file} is not TOML: {error}") from None
