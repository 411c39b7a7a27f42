from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tinsmith
from tinsmith.cli import app

BROKEN = "tests.cli.test_envs:Broken"


class Broken(tinsmith.envs.Env):
    def reset(self, *, seed=None, options=None):
        return "hello", {}

    def step(self, action):
        return "hello", "much", False, False, {}


def run(*words: object, answers: str | None = None) -> Result:
    return CliRunner().invoke(app, ["envs", *map(str, words)], input=answers)


def test_environments_and_the_libraries_of_more_are_listed():
    listed = json.loads(run("--import", "tests.cli.letters", "--json").stdout)
    sources = {e["name"]: e["from"] for e in listed["environments"]}
    assert sources["calculator"] == sources["python"] == "tinsmith"
    assert sources["say-a-vowel"] == "--import"
    libraries = {library["prefix"]: library for library in listed["libraries"]}
    assert libraries["gymnasium"]["version"][0].isdigit()
    assert libraries["textarena"]["install"] == "pip install textarena"
    table = run("--import", "tests.cli.letters").stdout
    assert "say-a-vowel" in table
    assert "gymnasium:ID" in table
    missing = run("--import", "tests.no_such_module")
    assert missing.exit_code == 2
    assert "there is no module 'tests.no_such_module'" in missing.stderr


def test_every_agent_of_a_game_is_played_by_hand():
    moves = "[4]\n[0]\n[1]\n[8]\n[7]\n"
    played = run("try", "textarena:TicTacToe-v0", "--json", answers=moves)
    assert played.exit_code == 0, played.output
    agents = json.loads(played.stdout.splitlines()[-1])["agents"]
    assert {name: seat["reward"] for name, seat in agents.items()} == {
        "player_0": 1.0,
        "player_1": -1.0,
    }
    assert [seat["terminated"] for seat in agents.values()] == [True, True]


def test_an_episode_is_played_by_hand():
    numbers = {"terms": 2, "max_number": 9}
    args = ("try", "calculator", "--env-kwargs", json.dumps(numbers), "--seed", 4)
    first = run(*args, "--json", answers="CALC(1+\\\n1)\n/quit\n")
    assert first.exit_code == 0, first.output
    episode = json.loads(first.stdout.splitlines()[-1])
    assert episode["messages"][-2:] == [
        {"role": "assistant", "content": "CALC(1+\n1)"},
        {"role": "user", "content": "RESULT: 2"},
    ]
    assert (episode["rewards"], episode["terminated"], episode["truncated"]) == (
        [0.0],
        False,
        False,
    )
    total = episode["info"]["expected"]
    won = run(*args, answers=f"CALC({total}+0)\nANSWER: {total}\n")
    assert f"user  RESULT: {total}" in won.stdout
    assert "terminated after 2 turns, reward 1" in won.stdout
    assert '"success": true' in won.stdout
    assert "left after 0 turns" in run(*args, answers="").stdout
    cut = run(*args, "--max-turns", 1, answers="what?\n").stdout
    assert "truncated after 1 turns, reward 0" in cut


def test_an_environment_that_fails_or_is_not_there_says_so():
    failed = run("try", BROKEN, answers="hello\n")
    assert failed.exit_code == 2
    assert "reward must be a number, got 'much'" in failed.stderr
    assert "no environment 'nonsense'" in run("try", "nonsense").stderr
    assert "--env-kwargs is not JSON" in run("try", "calculator", "--env-kwargs", "{").stderr
    assert "must be a JSON object" in run("check", "calculator", "--env-kwargs", "[]").stderr


def test_check_says_whether_an_environment_keeps_to_the_interface():
    kept = run("check", "calculator", "--env-kwargs", '{"terms": 4}')
    assert kept.stdout == "environment 'calculator' keeps to the interface\n"
    broken = run("check", BROKEN)
    assert broken.exit_code == 2
    assert "reward must be a number" in broken.stderr


async def test_a_model_plays_an_episode_through_the_service(service, command):
    # The command joins the tests' cluster.
    words = ("envs", "try", "calculator", "--model", "tiny-llama", "--max-tokens", 8, "--json")
    result = await asyncio.to_thread(command, *words)
    assert result.exit_code == 0, result.output
    episode = json.loads(result.stdout.splitlines()[-1])
    assert episode["truncated"]
    said = [m["content"] for m in episode["messages"] if m["role"] == "assistant"]
    assert len(said) - 6 == len(episode["rewards"]) == 3  # six are worked examples'
    again = await asyncio.to_thread(command, *words)
    assert json.loads(again.stdout.splitlines()[-1]) == episode
    assert said[-1] in result.stderr


@pytest.fixture(scope="module")
def plug_in(tmp_path_factory) -> tuple[Path, Path]:
    """A package that `envs new` wrote, and the folder that pip installed it into."""
    root = tmp_path_factory.mktemp("plug-in")
    result = run("new", "guess_it", "--in", root)
    assert result.exit_code == 0, result.output
    installed = root / "installed"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", installed]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, root / "guess_it"], check=True
    )
    return root / "guess_it", installed


def test_a_plug_in_package_is_written_installed_found_and_played(plug_in):
    package, installed = plug_in

    def tinsmith_command(*words: str, answers: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from tinsmith.cli import app; app()", "envs", *words],
            env=os.environ | {"PYTHONPATH": str(installed)},
            cwd=package.parent,
            input=answers,
            capture_output=True,
            text=True,
            check=False,
        )

    listed = json.loads(tinsmith_command("--json").stdout)["environments"]
    assert {"name": "guess_it", "from": "guess_it 0.1.0"} in listed
    checked = tinsmith_command("check", "guess_it")
    assert checked.returncode == 0, checked.stderr
    kwargs = ("--env-kwargs", '{"highest": 3}')
    played = tinsmith_command("try", "guess_it", *kwargs, "--json", answers="1\n2\n3\n")
    assert json.loads(played.stdout.splitlines()[-1])["reward"] == 1.0


def test_the_plug_ins_own_tests_pass(plug_in):
    package, installed = plug_in
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", package],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in tests.stdout, tests.stdout


def test_names_that_cannot_be_packages_are_refused(tmp_path):
    for name in ("My-Env", "class", "2fast"):
        refused = run("new", name, "--in", tmp_path)
        assert refused.exit_code == 2
        assert "cannot be a package's name" in refused.stderr
    (tmp_path / "taken").mkdir()
    assert "exists already" in run("new", "taken", "--in", tmp_path).stderr


def test_the_wheel_carries_the_template(tmp_path):
    root = Path(tinsmith.__file__).parent
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, tmp_path], cwd=copied(root, tmp_path / "source"), check=False
    )
    assert done.returncode == 0
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n for n in names if "env_template" in n} == {
        f"tinsmith/cli/env_template/{file.name}" for file in (root / "cli/env_template").iterdir()
    }


def copied(root: Path, target: Path) -> Path:
    """What a wheel is built from, without touching the checkout."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py"):
        shutil.copy(root / name, target / name)
    for package in project["tool"]["setuptools"]["packages"][1:]:
        folder = package.removeprefix("tinsmith.").replace(".", "/")
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / folder, target / folder, ignore=ignore, dirs_exist_ok=True)
    return target
