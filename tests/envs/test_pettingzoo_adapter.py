"""Real games of PettingZoo, one of each kind."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from tests.envs.scripted import Scripted as Policy
from tests.tiny import tiny_tokenizer
from tinsmith.envs import (
    ChatRenderer,
    EnvPool,
    MatchSpec,
    Scripted,
    check_env,
    make,
    play_match,
    register,
)
from tinsmith.primitives.errors import EnvironmentFailure, InvalidInput, NotFound
from tinsmith.primitives.types import Match

TICTACTOE = "pettingzoo:classic.tictactoe_v3"
RPS = "pettingzoo:classic.rps_v2"
PLAYERS = ("player_1", "player_2")


@pytest.fixture(scope="module")
async def pool():
    async with EnvPool() as pool:
        yield pool


def any_legal(messages, rng: random.Random) -> str:
    return rng.choice(re.findall(r"\d+", messages[-1]["content"].rpartition("one of")[2]))


def says(*texts: str):
    return Scripted(lambda messages, rng: texts[min(len(messages) // 2, len(texts) - 1)])


async def match(pool, env, policies, **spec) -> Match:
    renderer = ChatRenderer(tiny_tokenizer(), max_context=4096)
    return await play_match(pool, lambda agent: renderer, MatchSpec(env, policies, **spec))


async def test_an_aec_game_is_played_in_turns(pool):
    won = await match(
        pool, TICTACTOE, {"player_1": says("0", "1", "2"), "player_2": says("I take 3.", "4")}
    )
    assert won.rewards == {"player_1": 1.0, "player_2": -1.0}
    assert won.trajectories["player_1"].rewards == [0.0, 0.0, 1.0]
    assert won.trajectories["player_2"].rewards == [0.0, -1.0]
    opening = won.trajectories["player_2"].messages[0]["content"]
    assert opening.endswith("Answer with the number of an action, one of 1, 2, 3, 4, 5, 6, 7, 8.")
    for seed in range(3):
        drawn = await match(pool, TICTACTOE, dict.fromkeys(PLAYERS, Scripted(any_legal)), seed=seed)
        assert sum(drawn.rewards.values()) == 0.0
        assert all(t.terminated for t in drawn.trajectories.values())


async def test_a_parallel_game_is_played_at_the_same_time(pool):
    tokenizer = tiny_tokenizer()
    policies = {"player_0": Policy(tokenizer, ["1"]), "player_1": Scripted(
        lambda messages, rng: "0")}  # fmt: skip
    played = await match(pool, RPS, policies, env_kwargs={"max_cycles": 4})
    assert played.rewards == {"player_0": 4.0, "player_1": -4.0}
    assert all(t.truncated for t in played.trajectories.values())
    assert [t.info["turns"] for t in played.trajectories.values()] == [4, 4]
    (segment,) = played.trajectories["player_0"].segments
    assert segment.mask.any()


async def test_an_illegal_move_is_answered_and_too_many_forfeit(pool):
    patient = {"player_1": says("nine", "77", "4", "0"), "player_2": Scripted(any_legal)}
    played = await match(pool, TICTACTOE, patient)
    told = [m["content"] for m in played.trajectories["player_1"].messages if m["role"] == "user"]
    assert told[1].startswith("That is not a legal action: answer with a number, one of 0, 1")
    assert told[2] == "That is not a legal action: '77' is not one of the legal ones."
    stubborn = {"player_1": says("4"), "player_2": Scripted(any_legal)}
    lost = await match(pool, TICTACTOE, stubborn)
    assert lost.rewards == {"player_1": -1.0, "player_2": 0.0}
    assert "player_1 forfeits: 3 illegal" in lost.trajectories["player_2"].messages[-1]["content"]


async def test_in_a_parallel_game_the_others_action_waits_for_a_legal_one(pool):
    policies = {"player_0": says("paper", "1"), "player_1": says("0")}
    played = await match(pool, RPS, policies, env_kwargs={"max_cycles": 2})
    assert played.rewards == {"player_0": 2.0, "player_1": -2.0}
    assert [t.info["turns"] for t in played.trajectories.values()] == [3, 2]


def a_chess_position(observation, agent: str) -> str:
    return f"{agent}, {int(observation['action_mask'].sum())} moves"


def first_move(text: str, agent: str) -> int:
    if not text.isdigit():
        raise ValueError("write digits")
    return int(text)


async def test_what_is_no_text_needs_words_of_the_users(pool):
    with pytest.raises(
        EnvironmentFailure, match=r"shape \(8, 8, 111\): give describe\(observation"
    ):
        await match(pool, "pettingzoo:classic.chess_v6", {
            "player_0": says("1"), "player_1": says("1")})  # fmt: skip

    def described():
        return make(
            "pettingzoo:classic.chess_v6",
            describe=a_chess_position,
            parse=first_move,
            max_illegal=2,
        )

    register("chess-in-words", described)
    played = await match(pool, "chess-in-words", {"player_0": says("e4"), "player_1": says("e5")})
    said = [m["content"] for m in played.trajectories["player_0"].messages]
    assert said[0] == "player_0, 20 moves"
    assert said[2] == "That is not a legal action: write digits."
    assert played.rewards == {"player_0": -1.0, "player_1": 0.0}


def test_games_keep_to_the_interface():
    check_env(TICTACTOE, actions=["0", "1", "x", "2", "3", "4", "5"])
    check_env(RPS, actions=["0", "1", "x", "2"], max_cycles=3)


def test_what_cannot_be_made_says_why():
    with pytest.raises(NotFound, match="PettingZoo has no module 'classic.tictactoe_v99'"):
        make("pettingzoo:classic.tictactoe_v99")
    with pytest.raises(InvalidInput, match="cannot be made with {'size': 3}"):
        make(TICTACTOE, size=3)
    assert np.ndim(make(RPS).possible_agents) == 1
