from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tinsmith.cli import app

RUN_TOML = """
model = "tiny-llama"
env = "say-a-vowel"
rank = 4
steps = 2
groups_per_step = 2
group_size = 4
max_tokens = 4
eval_episodes = 4

[env_kwargs]
hint = "a, e, i, o or u"
"""


class CommandLine:
    """`tinsmith ARGS --home HOME`, in this process."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def __call__(self, *args: object, answers: str | None = None) -> Result:
        words = [str(arg) for arg in args]
        return CliRunner().invoke(app, [*words, "--home", str(self.home)], input=answers)


@dataclass(frozen=True)
class Trained:
    """A run that the command line made: what it printed, where it is."""

    stdout: str
    run_dir: Path
    run_id: str


@pytest.fixture(scope="package")
def command(tiny_home) -> CommandLine:
    return CommandLine(tiny_home)


@pytest.fixture(scope="package")
def run_toml(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "run.toml"
    file.write_text(RUN_TOML)
    return file


@pytest.fixture(scope="package")
def trained(service, command, run_toml, tmp_path_factory) -> Trained:
    # The command joins the tests' cluster.
    folder = tmp_path_factory.mktemp("runs") / "vowels"
    result = command(
        "train", run_toml, "--import", "tests.cli.letters", "--run-dir", folder, "--json"
    )
    assert result.exit_code == 0, result.output
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    return Trained(result.stdout, folder, run_id)
