"""What several commands share: their common options, and how they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


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
