"""Floor 7: the command line. A file is a command; rooms that load torch are imported inside."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..primitives.errors import TinsmithError
from . import chat, doctor, envs, export, keys, plan, plot, profile, runs, serve, sft, top, train


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """What Tinsmith raises on purpose is a message to the user, not a traceback."""
        try:
            return super().invoke(ctx)
        except TinsmithError as error:
            typer.echo(f"tinsmith: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="tinsmith",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(doctor.doctor)
app.command()(train.train)
app.command()(sft.sft)
app.command()(runs.runs)
app.command()(plot.plot)
app.command()(profile.profile)
app.command()(plan.plan)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(top.top)
app.command()(export.export)
app.add_typer(envs.app, name="envs")
app.add_typer(keys.app, name="keys")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tinsmith {version('tinsmith')}")
        raise typer.Exit


@app.callback()
def _tinsmith(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Asynchronous, actor-based RL post-training of language models."""
