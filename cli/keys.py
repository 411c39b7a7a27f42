"""`tinsmith keys`: who may use a service over HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ..gateway.keys import KeyFile
from ..gateway.quotas import Quota
from ..primitives.paths import default_home
from .options import AsJson, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="API keys of a service that is reached over HTTP.")

File = Annotated[
    Path,
    typer.Option(
        default_factory=lambda: default_home() / "keys.json",
        show_default="keys.json in $TINSMITH_HOME, else in ~/.tinsmith",
        help="The key file.",
    ),
]
Owner = Annotated[str, typer.Argument(help="Whose key it is.")]
Runs = Annotated[
    int | None,
    typer.Option(min=1, show_default="no limit", help="Training runs open at once."),
]
TokensPerMinute = Annotated[
    int | None,
    typer.Option(
        min=1, show_default="no limit", help="Tokens trained on, prompted and sampled, together."
    ),
]
ResidentBytes = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="no limit",
        help="Bytes of the open runs' adapters, gradients and optimizer states.",
    ),
]


@app.command()
def add(
    owner: Owner,
    file: File,
    runs: Runs = None,
    tokens_per_minute: TokensPerMinute = None,
    resident_bytes: ResidentBytes = None,
    as_json: AsJson = False,
) -> None:
    """Make a key for OWNER and print it, this once: the file keeps only its hash."""
    key = KeyFile(file).add(owner, Quota(runs, tokens_per_minute, resident_bytes))
    if as_json:
        print_json({"owner": owner, "key": key})
        return
    typer.echo(f"{owner}'s key, shown only now; the client's machine needs\n", err=True)
    typer.echo(f"export TINKER_API_KEY={key}")


@app.command()
def limit(
    owner: Owner,
    file: File,
    runs: Runs = None,
    tokens_per_minute: TokensPerMinute = None,
    resident_bytes: ResidentBytes = None,
) -> None:
    """Set what OWNER may use, all of it anew, at once also in services that run."""
    quota = Quota(runs, tokens_per_minute, resident_bytes)
    KeyFile(file).limit(owner, quota)
    typer.echo(f"{owner} may use: {quota}")


@app.command("list")
def list_(file: File, as_json: AsJson = False) -> None:
    """Who has a key."""
    entries = KeyFile(file).list()
    if as_json:
        print_json(
            [
                {
                    "owner": entry.owner,
                    "created": entry.created,
                    "quota": msgspec.to_builtins(entry.quota),
                }
                for entry in entries
            ]
        )
    elif not entries:
        typer.echo(f"no keys in {file} yet; `tinsmith keys add OWNER` makes one")
    else:
        rows = [
            [
                entry.owner,
                time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.created)),
                str(entry.quota),
            ]
            for entry in entries
        ]
        print_table(f"keys in {file}", ["owner", "created", "quota"], rows)


@app.command()
def remove(owner: Owner, file: File) -> None:
    """Take OWNER's key away, at once also from services that run."""
    KeyFile(file).remove(owner)
    typer.echo(f"removed {owner}'s key")
