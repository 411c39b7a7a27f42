from __future__ import annotations

import json


def test_a_step_is_traced_and_its_stages_timed(command, tmp_path):
    trace = tmp_path / "deep" / "trace.json"
    options = ("--runs", 2, "--sequences", 2, "--tokens", 16, "--rank", 4, "--out", trace)
    result = command("profile", "tiny-llama", *options, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["tokens"] == 2 * 2 * 16
    assert set(told["seconds"]) == {"queue", "pack", "forward", "backward", "optimizer"}
    assert all(seconds > 0 for seconds in told["seconds"].values())
    assert told["operators"]
    events = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"pack", "forward", "backward", "optimizer", "aten::mm"} <= events


def test_a_sequence_beyond_the_context_is_refused(command, tmp_path):
    result = command("profile", "tiny-llama", "--tokens", 5000, "--out", tmp_path / "t.json")
    assert result.exit_code == 2
    assert "5000 tokens are beyond the model's 512" in result.output
