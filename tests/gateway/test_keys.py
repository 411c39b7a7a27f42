"""API keys: only hashes are kept, changes are seen, nobody's write is lost."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

import tinsmith
from tinsmith.cli import app
from tinsmith.gateway.keys import KeyFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "not yet there" / "keys.json"


def test_a_key_names_its_owner_and_is_not_in_the_file(path):
    keys = KeyFile(path)
    alice, bob = keys.add("alice"), keys.add("bob")
    assert alice.startswith("tml-")
    assert len(alice) == len("tml-") + 43  # 256 bits in base64
    assert (keys.owner(alice), keys.owner(bob)) == ("alice", "bob")
    assert [entry.owner for entry in keys.list()] == ["alice", "bob"]
    for wrong in ("", "tml-", alice[:-1], alice + "x", alice.upper(), "ключ", "\ud800"):
        assert keys.owner(wrong) is None
    for file in path.parent.iterdir():
        assert alice not in file.read_text()
        assert alice.removeprefix("tml-") not in file.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_does_not_exist_lets_nobody_in(path):
    assert KeyFile(path).owner("tml-x") is None
    assert KeyFile(path).list() == []


def test_an_owner_has_one_key(path):
    keys = KeyFile(path)
    keys.add("alice")
    with pytest.raises(tinsmith.InvalidInput, match=r"'alice' has a key in .*remove it first"):
        keys.add("alice")
    keys.remove("alice")
    with pytest.raises(tinsmith.NotFound, match="'alice' has no key"):
        keys.remove("alice")
    for name in ("", " alice", "a\nb"):
        with pytest.raises(tinsmith.InvalidInput, match="printable name"):
            keys.add(name)


def test_what_another_process_changes_is_seen(path):
    running, command = KeyFile(path), KeyFile(path)
    key = command.add("alice")
    assert running.owner(key) == "alice"
    command.remove("alice")
    assert running.owner(key) is None


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b'{"keys": [{"owner": 1}]}', b"\xff\xfe"])
def test_a_file_of_something_else_is_named_and_left_alone(path, garbage):
    keys = KeyFile(path)
    key = keys.add("alice")
    path.write_bytes(garbage)
    for call in (keys.list, lambda: keys.add("bob"), lambda: keys.remove("alice")):
        with pytest.raises(tinsmith.InvalidInput, match=r"keys\.json is not a key file"):
            call()
    with pytest.raises(tinsmith.Unavailable, match="operator") as error:
        keys.owner(key)  # goes to whoever calls: it says nothing about the machine
    assert str(path) not in str(error.value)
    assert path.read_bytes() == garbage


def test_keys_added_at_the_same_time_are_all_there(path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: KeyFile(path).add(f"owner {n}"), range(24)))
    keys = KeyFile(path)
    assert [keys.owner(key) for key in made] == [f"owner {n}" for n in range(24)]
    assert {file.name for file in path.parent.iterdir()} <= {"keys.json", "keys.json.lock"}


def test_the_command_prints_a_key_once(path):
    def command(*words: str):
        return CliRunner().invoke(app, ["keys", *words, "--file", str(path)])

    assert "no keys" in command("list").stdout
    shown = command("add", "alice")
    key = shown.stdout.strip().removeprefix("export TINKER_API_KEY=")
    assert KeyFile(path).owner(key) == "alice"
    made = json.loads(command("add", "bob", "--json").stdout)
    assert KeyFile(path).owner(made["key"]) == made["owner"] == "bob"
    listed = command("list")
    assert "alice" in listed.stdout
    assert key not in listed.stdout
    assert [e["owner"] for e in json.loads(command("list", "--json").stdout)] == ["alice", "bob"]
    assert command("remove", "alice").exit_code == 0
    assert KeyFile(path).owner(key) is None
    again = command("remove", "alice")
    assert again.exit_code == 2
    assert again.stderr == f"tinsmith: 'alice' has no key in {path}\n"
