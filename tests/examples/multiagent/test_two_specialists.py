"""Two specialists: the game's rules and credit, and the script on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys

import pytest

from tests.actors.script import ROOT
from tinsmith.envs import check_env

HERE = ROOT / "examples" / "multiagent"


@pytest.fixture(scope="module")
def kiosk():
    spec = importlib.util.spec_from_file_location("kiosk", HERE / "kiosk.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def play(kiosk, plan: str, calls: list[str], seed: int = 0):
    """The rewards and the info of a match; `calls` may name prices as `{pen}`."""
    env = kiosk.Kiosk()
    env.reset(seed=seed)
    observations, *_ = await env.step({"planner": plan})
    assert plan in observations["tool_user"]
    for call in calls:
        observations, rewards, done, _, infos = await env.step(
            {"tool_user": call.format(**env.prices)}
        )
    assert done == {"planner": True, "tool_user": True}
    return rewards, infos["planner"]


def order_of(kiosk, seed: int = 0) -> tuple[str, str, int, str, int]:
    env = kiosk.Kiosk()
    env.reset(seed=seed)
    (a, n), (b, m) = kiosk.read_order(env.order).items()
    return env.order, a, n, b, m


@pytest.mark.parametrize(
    ("order", "counts"),
    [
        ("two pens and twice as many cups", {"pen": 2, "cup": 4}),
        ("three bags and as many maps", {"bag": 3, "map": 3}),
        ("four hats and one more keys", {"hat": 4, "key": 5}),
        ("two keys and four pens", {"key": 2, "pen": 4}),
    ],
)
def test_orders_mean_what_they_say(kiosk, order, counts):
    assert kiosk.read_order(order) == counts


async def test_both_are_paid_for_a_right_order(kiosk):
    _, a, n, b, m = order_of(kiosk)
    calls = [f'price("{a}") price("{b}")', f'pay("{n}*{{{a}}}+{m}*{{{b}}}")']
    rewards, info = await play(kiosk, f"{n}*{a}+{m}*{b}", calls)
    assert rewards == {"planner": 1.0, "tool_user": 1.0}
    assert info == {"planned": True, "executed": True, "success": True}


async def test_each_is_blamed_for_its_own_part(kiosk):
    _, a, n, b, m = order_of(kiosk)
    prices = f'price("{a}") price("{b}")'
    wrong_plan, _ = await play(
        kiosk, f"{n}*{a}+{m + 1}*{b}", [prices, f'pay("{n}*{{{a}}}+{m + 1}*{{{b}}}")']
    )
    assert wrong_plan == {"planner": 0.0, "tool_user": 1.0}
    wrong_sum, _ = await play(
        kiosk, f"{n}*{a}+{m}*{b}", [prices, f'pay("{n}*{{{a}}}+{m + 1}*{{{b}}}")']
    )
    assert wrong_sum == {"planner": 0.5, "tool_user": 0.0}
    silent, _ = await play(kiosk, f"{n}*{a}+{m}*{b}", ["I do not know"])
    assert silent == {"planner": 0.5, "tool_user": 0.0}


async def test_a_match_ends_after_so_many_turns_whatever_is_called(kiosk):
    rewards, info = await play(kiosk, "no plan", ['price("dragon")', "pay(1)", 'pay("all")'])
    assert rewards == {"planner": 0.0, "tool_user": 0.0}
    assert not info["success"]


def test_no_order_is_in_both_splits(kiosk):
    rng = random.Random(0)
    train, held_out = ({kiosk.draw_order(rng, s) for _ in range(3000)} for s in ("train", "eval"))
    assert not train & held_out
    assert len(train) > 400
    assert len(held_out) > 90


def test_the_game_keeps_to_the_interface(kiosk):
    check_env(kiosk.Kiosk())


def test_the_script_trains_both_and_measures_the_pair_and_either_alone(tiny_llama, tmp_path):
    flags = "--steps 2 --orders 2 --games-per-order 2 --warm-up-games 4 --warm-up-steps 1"
    flags += f" --eval-games 2 --staleness 1 --out {tmp_path}"
    done = subprocess.run(
        [sys.executable, str(HERE / "two_specialists.py"), "--model", tiny_llama, *flags.split()],
        env={**os.environ, "TINSMITH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result["held_out"]) == [
        "the pair at the start",
        "the pair at the end",
        "the planner in both seats",
        "the tool user in both seats",
        "the tool user, no plan",
    ]
    assert all(0 <= r["success"][0] <= 1 for r in result["held_out"].values())
    assert (tmp_path / "two_specialists.png").read_bytes().startswith(b"\x89PNG")
