"""Real games of PettingZoo, one of each kind."""

from __future__ import annotations

import numpy as np
import pytest

from tests.envs.games import any_legal
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
)
from tinsmith.primitives.errors import InvalidInput, NotFound
from tinsmith.primitives.types import Match

TICTACTOE = "pettingzoo:classic.tictactoe_v3"
RPS = "pettingzoo:classic.rps_v2"
PLAYERS = ("player_1", "player_2")


@pytest.fixture(scope="module")
async def pool():
    async with EnvPool() as pool:
        yield pool


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


def test_an_illegal_move_is_answered_and_too_many_forfeit():
    game = make(TICTACTOE)
    game.reset(seed=0)
    told, rewards, *_, infos = game.step({"player_1": "nine"})
    assert told["player_1"].startswith("That is not a legal action: answer with a number, one of 0")
    assert rewards == {}
    assert infos == {"player_1": {"illegal_action": True}}
    told, *_ = game.step({"player_1": "77"})
    assert told == {"player_1": "That is not a legal action: '77' is not one of the legal ones."}
    observations, *_ = game.step({"player_1": "4"})
    assert list(observations) == ["player_2"]
    for _ in range(3):
        told, rewards, terminations, *_ = game.step({"player_2": "4"})
    assert rewards == {"player_2": -1.0}
    assert all(terminations.values())
    assert told["player_1"] == "player_2 forfeits: 3 illegal actions in a row"


def test_in_a_parallel_game_the_others_action_waits_for_a_legal_one():
    game = make(RPS)
    game.reset(seed=0)
    told, *_ = game.step({"player_0": "paper", "player_1": "0"})
    assert list(told) == ["player_0"]
    _, rewards, *_ = game.step({"player_0": "1"})
    assert rewards == {"player_0": 1.0, "player_1": -1.0}


def a_chess_position(observation, agent: str) -> str:
    return f"{agent}, {int(observation['action_mask'].sum())} moves"


def digits(text: str, agent: str) -> int:
    if not text.isdigit():
        raise ValueError("write digits")
    return int(text)


def test_what_is_no_text_needs_words_of_the_users():
    chess = "pettingzoo:classic.chess_v6"
    with pytest.raises(
        InvalidInput, match=r"shape \(8, 8, 111\): give describe\(observation, agent"
    ):
        make(chess).reset(seed=0)
    game = make(chess, describe=a_chess_position, parse=digits)
    assert game.reset(seed=0)[0] == {"player_0": "player_0, 20 moves"}
    told, *_ = game.step({"player_0": "e4"})
    assert told == {"player_0": "That is not a legal action: write digits."}
    legal = game.legal["player_0"][0]
    observations, *_ = game.step({"player_0": str(legal)})
    assert observations == {"player_1": "player_1, 20 moves"}


def test_games_keep_to_the_interface():
    check_env(TICTACTOE, actions=["0", "1", "x", "2", "3", "4", "5"])
    check_env(RPS, actions=["0", "1", "x", "2"], max_cycles=3)


def test_what_cannot_be_made_says_why():
    with pytest.raises(NotFound, match=r"PettingZoo has no module 'classic\.tictactoe_v99'"):
        make("pettingzoo:classic.tictactoe_v99")
    with pytest.raises(InvalidInput, match=r"cannot be made with \{'size': 3\}"):
        make(TICTACTOE, size=3)
    assert np.ndim(make(RPS).possible_agents) == 1
