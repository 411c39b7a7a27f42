from __future__ import annotations

import json

from rich.console import Console

from tinsmith import EvalResult, TrainConfig, Trajectory
from tinsmith.algorithms.train import TrainResult
from tinsmith.cli.report import report


def said(*pairs: str) -> list[dict[str, str]]:
    return [dict(zip(("role", "content"), pair.split(": "), strict=True)) for pair in pairs]


def test_a_report_shows_the_episode_without_the_worked_examples_before_it(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    messages = said(
        *("system: Add.", "user: 1+1?", "assistant: 2"),  # an example
        *("user: 2+3?", "assistant: CALC(2+3)", "user: 5", "assistant: five"),
    )
    trajectory = Trajectory([], [0.0, 1.0], True, False, messages)
    after = EvalResult(1, 1, 1.0, 0.2, 1.0, 1.0, [trajectory], [])
    totals = {"episodes": 64}
    result = TrainResult("run", tmp_path, 3, False, None, after, totals)
    console = Console(record=True, width=100)
    summary = report(console, TrainConfig(), result, 12.34)
    shown = console.export_text()
    assert "2+3?" in shown
    assert "CALC(2+3)" in shown
    assert "1+1?" not in shown
    assert (tmp_path / "reward.png").exists()
    assert json.loads(json.dumps(summary)) == {
        "task": "calculator",
        "before": None,
        "after": after.to_json(),
        "episodes": 64,
        "optim_steps": 3,
        "seconds": 12.3,
        "run_dir": str(tmp_path),
    }


def test_a_long_message_is_shown_without_its_middle(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    messages = said("user: begins" + 3000 * "x" + "ends", "assistant: yes")
    trajectory = Trajectory([], [1.0], True, False, messages)
    after = EvalResult(1, 1, 1.0, 0.2, 1.0, 1.0, [trajectory], [])
    result = TrainResult("run", tmp_path, 3, False, None, after, {"episodes": 1})
    console = Console(record=True, width=100)
    report(console, TrainConfig(), result, 1.0)
    shown = console.export_text().replace("\n", "")
    assert "begins" in shown
    assert "... 1010 characters ..." in shown
    assert shown.count("x") < 2001
    assert "ends" in shown
