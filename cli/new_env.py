"""`tinsmith envs new`: a small installable package around a new environment."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from ..primitives.errors import InvalidInput

# File of the template -> where it goes.
FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "env.py.txt": "{name}/__init__.py",
    "test_env.py.txt": "tests/test_{name}.py",
}


def new(
    name: Annotated[str, typer.Argument(help="Of the package and the environment: snake_case.")],
    folder: Annotated[
        Path, typer.Option("--in", help="Where the package's folder is made.")
    ] = Path("."),
) -> None:
    """Write a package with an environment in it, ready to be installed."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise InvalidInput(
            f"{name!r} cannot be a package's name: small letters, digits and _, a letter first"
        )
    root = folder / name
    if root.exists():
        raise InvalidInput(f"{root} exists already")
    class_name = "".join(map(str.capitalize, name.split("_")))
    template = files(f"{__package__}") / "env_template"
    for source, target in FILES.items():
        text = Template((template / source).read_text("utf-8"))
        file = root / target.format(name=name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.substitute(name=name, class_name=class_name), "utf-8")
        typer.echo(f"wrote {file}")
    typer.echo(f"next: pip install -e {root} && tinsmith envs try {name}")
