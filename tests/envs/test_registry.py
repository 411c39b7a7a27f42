from __future__ import annotations

import subprocess
import sys

import pytest

import tinsmith
from tests.envs.misbehaving import Misbehaving, chatter
from tinsmith.envs import Env, make, names, register
from tinsmith.envs.calculator import Calculator
from tinsmith.primitives.errors import InvalidInput, NotFound


def test_environments_are_made_by_name_by_path_and_after_registration():
    assert isinstance(make("calculator", terms=2), Calculator)
    assert isinstance(make("tests.envs.misbehaving:Misbehaving"), Misbehaving)
    register("mine", chatter)
    assert isinstance(make("mine"), Misbehaving)
    assert {"calculator", "mine"} <= set(names())


def test_register_is_a_decorator_too():
    @register("decorated")
    class Decorated(Env):
        pass

    assert isinstance(make("decorated"), Decorated)


def test_an_installed_package_adds_environments_by_entry_point(tmp_path, monkeypatch):
    folder = tmp_path / "plugin-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[tinsmith.envs]\nplugged = tests.envs.misbehaving:Misbehaving\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "plugged" in names()
    assert isinstance(make("plugged"), Misbehaving)


def test_unknown_names_are_not_found():
    with pytest.raises(NotFound, match=r"no environment 'nothing'; known are .*calculator"):
        make("nothing")
    with pytest.raises(NotFound, match="no module 'nowhere'"):
        make("nowhere.to:Find")
    with pytest.raises(NotFound, match="has no 'Nothing'"):
        make("tests.envs.misbehaving:Nothing")


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(InvalidInput, match=r"unexpected keyword argument 'colour'; .*max_number"):
        make("calculator", colour="red")
    with pytest.raises(InvalidInput, match="without colon"):
        register("a:b", Misbehaving)
    with pytest.raises(InvalidInput, match="neither a class nor a function"):
        register("number", 3)


def test_the_room_is_cheap_to_import():
    heavy = ["torch", "transformers", "ray", "gymnasium", "numpy", "pydantic"]
    code = (
        "import sys, tinsmith.envs, tinsmith.envs.fork_server, tinsmith.envs.calculator\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    path = str(tinsmith.__path__[0]).rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path}
    )
    assert done.stdout.strip() == "[]", done.stderr
