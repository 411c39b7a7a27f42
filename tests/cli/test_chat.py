from __future__ import annotations

import json

BRIEF = ("--max-tokens", 8, "--seed", 3)


def test_once_answers_from_the_newest_checkpoint(trained, command):
    result = command("chat", trained.run_id, "--once", "Say a vowel.", *BRIEF, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["model"] == f"tinker://{trained.run_id}/weights/step-000002"
    assert 1 <= answer["tokens"] <= 8
    assert answer["stop_reason"] in ("stop", "length")


def test_what_is_streamed_is_the_answer(trained, command):
    args = ("chat", trained.run_dir, "--once", "Say a vowel.", *BRIEF)
    answer = json.loads(command(*args, "--json").stdout)["text"]
    assert command(*args).stdout == answer + "\n"


def test_a_conversation_goes_on_until_reset_and_quit(trained, command):
    path = f"tinker://{trained.run_id}/weights/step-000000"
    lines = "Say a vowel.\n\nAnd again.\n/reset\nSay a vowel.\n/quit\n"
    result = command("chat", path, "--temperature", 0, "--max-tokens", 8, answers=lines)
    assert result.exit_code == 0, result.output
    assert path in result.stderr
    first, _, fresh = [part for part in result.stdout.split("> ") if part.strip()]
    assert first == fresh


def test_a_turn_that_does_not_fit_leaves_the_conversation_going(service, command):
    lines = f"{'long ' * 600}\n/reset\nshort\n"
    result = command("chat", "--base", "tiny-llama", *BRIEF, answers=lines)
    assert result.exit_code == 0, result.output
    assert "do not fit" in result.stderr
    assert "/reset starts over" in result.stderr
    assert result.stdout.strip(" >\n")


def test_one_of_a_run_and_a_base_model_is_needed(command):
    for args in (("chat",), ("chat", "some-run", "--base", "tiny-llama")):
        result = command(*args)
        assert result.exit_code == 2
        assert result.stderr == "tinsmith: give either a run or --base MODEL\n"
