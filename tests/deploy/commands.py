"""What the recipes run, as the command line would take it."""

from __future__ import annotations

import typer

from tinsmith.cli import app


def parsed(words: list[str]) -> tuple[str, dict[str, object]]:
    """The `tinsmith` command that the words are, and its parameters.

    Raises:
        UsageError: (of Typer's own click) there is no such command or option.
    """
    program, *rest = words
    assert program == "tinsmith"
    group = typer.main.get_command(app)
    with group.make_context("tinsmith", rest) as context:
        # What follows the group's own options, which click keeps apart.
        name, command, after = group.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        with command.make_context(name, after, parent=context) as of_command:
            return name, of_command.params
