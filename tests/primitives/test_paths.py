from __future__ import annotations

from pathlib import Path

import pytest

import tinsmith
from tinsmith.primitives.paths import CheckpointPath, default_home


@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_a_path_is_parsed_into_its_parts_and_back(kind):
    path = f"tinker://0123456789ab/{kind}/step-40"
    parsed = CheckpointPath.parse(path)
    assert (parsed.run_id, parsed.kind, parsed.name) == ("0123456789ab", kind, "step-40")
    assert str(parsed) == path
    assert parsed.folder == f"runs/0123456789ab/{kind}/step-40"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "step-40",
        "tinker://run/step-40",
        "tinker://run/other/step-40",
        "tinker://run/weights/a/b",
        "file://run/weights/a",
    ],
)
def test_what_is_no_checkpoint_path_is_refused(path):
    with pytest.raises(tinsmith.InvalidInput, match="is not a checkpoint path"):
        CheckpointPath.parse(path)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a b", "x" * 129, "a/b", "ü"])
def test_names_and_runs_cannot_lead_out_of_their_folder(name):
    with pytest.raises(tinsmith.InvalidInput, match="must be 1 to 128"):
        CheckpointPath("run", "weights", name)
    with pytest.raises(tinsmith.InvalidInput, match="must be 1 to 128"):
        CheckpointPath(name, "weights", "a")


def test_home_is_tinsmith_home_or_below_the_users(monkeypatch):
    monkeypatch.setenv("TINSMITH_HOME", "~/elsewhere")
    assert default_home() == Path.home() / "elsewhere"
    monkeypatch.delenv("TINSMITH_HOME")
    assert default_home() == Path.home() / ".tinsmith"
