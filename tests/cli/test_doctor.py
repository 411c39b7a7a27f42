from __future__ import annotations

import importlib.util
import json

import torch


def test_doctor_names_the_engines_versions_and_models(command, tiny_home):
    result = command("doctor", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["ok"]
    assert facts["engines"]["torch"] == {"ok": True, "why_not": None}
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["models"] == {"tiny-llama": "llama", "tiny-qwen3": "qwen3"}
    assert facts["home"] == str(tiny_home)


def test_an_engine_that_cannot_run_says_why(command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "the torch engine samples" in " ".join(command("doctor").stdout.split())


def test_a_home_that_cannot_be_written_fails_the_basics(command, tmp_path):
    (tmp_path / "file").touch()
    command = type(command)(tmp_path / "file" / "home")
    result = command("doctor", "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert not facts["home_writable"]
    assert "set TINSMITH_HOME" in facts["problems"][0]
