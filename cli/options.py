"""What several commands share: their common options, and how they print."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..engines.base_weights import BaseWeights as BaseWeightsName
from ..engines.vllm_start import EngineName
from ..primitives.errors import InvalidInput, NotFound
from ..primitives.paths import default_home

Home = Annotated[
    Path,
    typer.Option(
        default_factory=default_home,
        show_default="$TINSMITH_HOME, else ~/.tinsmith",
        help="Where runs, checkpoints and models are kept.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        show_default="start one on this machine",
        help='Cluster to join: "auto" for one that runs here, or ray://host:port.',
    ),
]
Engine = Annotated[
    EngineName,
    typer.Option(help="What samples; auto: vLLM where it is installed and there is a GPU."),
]
Learners = Annotated[int, typer.Option(min=1, help="Learners that share each model's batches.")]
Layout = Annotated[
    str | None,
    typer.Option(
        show_default="one rank",
        help='Ranks of each model\'s learner: "auto", or degrees as in "shard=2,tensor=2".',
    ),
]
BaseWeights = Annotated[
    BaseWeightsName,
    typer.Option(
        help="What the frozen weights are kept in; auto: on a GPU bf16 for a model stored in it, "
        "else fp32."
    ),
]
ReorderSamplerWeights = Annotated[
    bool,
    typer.Option(
        "--reorder-sampler-weights",
        help="Torch samplers keep a second copy of fp32 weights, which is quicker on a CPU.",
    ),
]
Samplers = Annotated[int, typer.Option(min=1, help="Samplers of each base model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
RunDir = Annotated[
    Path | None,
    typer.Option(show_default="runs/<run id> at home", help="Folder for the run's files."),
]
Resume = Annotated[
    Path | None, typer.Option(help="A run folder to go on with; --steps sets another end.")
]
Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="A module that registers environments."),
]
EnvName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="As `tinsmith envs` lists it, LIBRARY:ID, or package.module:Class."
    ),
]
EnvKwargs = Annotated[
    str, typer.Option("--env-kwargs", metavar="JSON", help="What the environment is made with.")
]


def import_environments(modules: list[str] | None) -> None:
    """Import the modules that `--import` names; those in the current folder are found.

    Raises:
        NotFound: no such module.
    """
    sys.path.insert(0, str(Path.cwd()))
    for module in modules or []:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            # A module missing inside the user's own module is that module's failure.
            if error.name is not None and f"{module}.".startswith(f"{error.name}."):
                raise NotFound(f"--import {module}: there is no module {error.name!r}") from None
            raise


def parse_env_kwargs(text: str) -> dict[str, Any]:
    """
    Raises:
        InvalidInput: not a JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"--env-kwargs is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidInput(f"--env-kwargs must be a JSON object, got {text}")
    return value


def print_json(value: Any) -> None:
    """One line on stdout, the same wherever stdout goes."""
    print(json.dumps(value), flush=True)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table whose first column stays on one line. No header where `columns` are empty."""
    table = Table(title=title, title_justify="left", show_header=any(columns), box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
