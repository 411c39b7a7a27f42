"""`tinsmith envs`: which environments there are; check one, play one, begin a new one."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, entry_points, version

import typer

from ..envs.check import check_env
from ..envs.registry import ADAPTERS, BUNDLED, ENTRY_POINT_GROUP, names
from .new_env import new
from .options import (
    AsJson,
    EnvKwargs,
    EnvName,
    Imports,
    import_environments,
    parse_env_kwargs,
    print_json,
    print_table,
)
from .play import try_env

app = typer.Typer(no_args_is_help=False)


@app.callback(invoke_without_command=True)
def envs(context: typer.Context, imports: Imports = None, as_json: AsJson = False) -> None:
    """List the environments; `try`, `check` or begin a `new` one."""
    import_environments(imports)
    if context.invoked_subcommand is not None:
        return
    environments, libraries = _environments(), _libraries()
    if as_json:
        print_json({"environments": environments, "libraries": libraries})
        return
    rows = [[e["name"], e["from"]] for e in environments]
    print_table("environments", ["name", "from"], rows)
    rows = [
        [f"{library['prefix']}:ID", library["version"] or f"missing; {library['install']}"]
        for library in libraries
    ]
    print_table("libraries of environments", ["name", "version"], rows)
    typer.echo("also package.module:Class; `tinsmith envs try NAME` plays one")


def _environments() -> list[dict[str, str]]:
    """Every environment with a name of its own, and where it comes from: JSON values."""
    packages = {
        point.name: f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        for point in entry_points(group=ENTRY_POINT_GROUP)
    }
    sources = packages | dict.fromkeys(BUNDLED, "tinsmith")
    return [{"name": name, "from": sources.get(name, "--import")} for name in names()]


def _libraries() -> list[dict[str, str | None]]:
    distributions = {prefix: prefix.replace("_", "-") for prefix in ADAPTERS}
    return [
        {"prefix": prefix, "version": _version(name), "install": f"pip install {name}"}
        for prefix, name in distributions.items()
    ]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@app.command()
def check(name: EnvName, env_kwargs: EnvKwargs = "{}", seed: int = 0) -> None:
    """Say whether an environment keeps to the interface, and if not, how it breaks it."""
    check_env(name, seed=seed, **parse_env_kwargs(env_kwargs))
    typer.echo(f"environment {name!r} keeps to the interface")


app.command("new")(new)
app.command("try")(try_env)
