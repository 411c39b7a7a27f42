from __future__ import annotations

import json

PNG = b"\x89PNG"


def test_a_run_is_drawn_by_its_id(trained, command, tmp_path):
    result = command("plot", trained.run_id, "--out", tmp_path / "curve.png", "--json")
    assert json.loads(result.stdout) == {"path": str(tmp_path / "curve.png")}
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)


def test_a_folder_is_drawn_into_itself(trained, command):
    (trained.run_dir / "reward.png").unlink()
    assert command("plot", trained.run_dir).exit_code == 0
    assert (trained.run_dir / "reward.png").read_bytes().startswith(PNG)


def test_a_folder_without_metrics_is_refused(command, tmp_path):
    result = command("plot", tmp_path)
    assert result.exit_code == 2
    assert "no metrics" in result.stderr
