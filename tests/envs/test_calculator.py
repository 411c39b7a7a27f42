from __future__ import annotations

import random

import pytest

from tinsmith.envs import make
from tinsmith.envs.calculator import Calculator, question, split_of
from tinsmith.primitives.errors import InvalidInput


def play(*actions: str, numbers=(4, 7, 6), **kwargs):
    """(total reward, last step) of an episode on the given numbers."""
    env = Calculator(**kwargs)
    env.reset(seed=0, options={"numbers": list(numbers)})
    total = 0.0
    for action in actions:
        step = env.step(action)
        total += step[1]
    return total, step


def test_chained_calls_and_the_right_answer_earn_one():
    reward, step = play("CALC(4+7)", "CALC(11+6)", "ANSWER: 17")
    assert reward == 1.0
    assert step[2:] == (
        True,
        False,
        {"success": True, "calls": 2, "answer": 17, "expected": 17},
    )


@pytest.mark.parametrize(
    "actions",
    [
        ["ANSWER: 17"],
        ["CALC(4+7)", "ANSWER: 17"],
        ["CALC(1+1)", "CALC(1+1)", "ANSWER: 17"],
        ["CALC(4+7)", "CALC(11+6)", "ANSWER: 18"],
        ["CALC(4+7)", "CALC(11+6)", "17"],
        ["calculator", "CALC(11+6)", "ANSWER: 17"],
        ["CALC(4+7+6)", "CALC(4+7)", "ANSWER: 11"],
        ["CALC(4+7) CALC(11+6) ANSWER: 17", "ANSWER: 17"],
    ],
)
def test_without_the_tool_or_with_a_wrong_answer_nothing_is_earned(actions):
    assert play(*actions)[0] == 0.0


def test_results_are_shown_and_malformed_turns_told_apart():
    assert play("CALC( 4 * -7 )")[1][0] == "RESULT: -28"
    assert play("CALC(4-7)")[1][0] == "RESULT: -3"
    observation, _, terminated, truncated, _ = play("I would say 17")[1]
    assert observation.startswith("ERROR: write CALC(a+b)")
    assert not terminated
    assert not truncated


def test_an_episode_without_answer_is_truncated():
    assert play("hm", "hm", "hm")[1][2:4] == (False, True)
    assert play("hm", "hm", "hm", max_turns=4)[1][2:4] == (False, False)


def test_shaping_pays_for_the_calls_needed_and_no_more():
    assert play("CALC(4+7)", "CALC(1+1)", "CALC(1+1)", shaping=0.1)[0] == pytest.approx(0.2)


def test_splits_are_disjoint_in_any_order_and_hold_no_example():
    drawn = {}
    for split in ("train", "eval"):
        env = Calculator(split=split)
        drawn[split] = {tuple(sorted(env.reset(seed=seed)[1]["numbers"])) for seed in range(500)}
        assert all(tuple(sorted(example)) not in drawn[split] for example in env.examples)
    assert not drawn["train"] & drawn["eval"]
    assert len(drawn["eval"]) >= 100
    draws = random.Random(0)
    triples = [tuple(sorted(draws.randint(2, 50) for _ in range(3))) for _ in range(2000)]
    assert 0.15 < sum(split_of(t) == "eval" for t in triples) / 2000 < 0.25


def test_the_prompt_is_the_same_in_every_episode_but_for_the_question():
    first, second = (make("calculator").reset(seed=seed)[0] for seed in (1, 2))
    assert first[:-1] == second[:-1]
    assert first[-1] != second[-1]
    assert make("calculator").reset(seed=1)[0] == first
    assert question([4, 7, 6]) == "First 4 + 7. Then + 6."


def test_impossible_settings_are_refused():
    with pytest.raises(InvalidInput, match="terms >= 2"):
        make("calculator", terms=1)
    with pytest.raises(InvalidInput, match="split"):
        make("calculator", split="test")
