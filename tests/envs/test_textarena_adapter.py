"""Real games of TextArena."""

from __future__ import annotations

import re

import pytest

from tests.envs.games import any_legal
from tests.envs.scripted import Scripted as Policy
from tests.tiny import tiny_tokenizer
from tinsmith.envs import (
    ChatRenderer,
    EnvPool,
    EpisodeLimits,
    EpisodeSpec,
    MatchSpec,
    Scripted,
    check_env,
    make,
    play_episode,
    play_match,
)
from tinsmith.primitives.errors import InvalidInput, NotFound
from tinsmith.primitives.types import Match

TICTACTOE = "textarena:TicTacToe-v0"
PLAYERS = ("player_0", "player_1")


@pytest.fixture(scope="module")
async def pool():
    async with EnvPool() as pool:
        yield pool


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(tiny_tokenizer(), max_context=4096)


async def match(pool, env, policies, **spec) -> Match:
    return await play_match(pool, lambda agent: None, MatchSpec(env, policies, **spec))


async def test_two_scripts_play_tictactoe_to_its_end(pool):
    scripts = dict.fromkeys(PLAYERS, Scripted(any_legal))
    outcomes = set()
    for seed in range(4):
        played = await match(pool, TICTACTOE, scripts, seed=seed)
        assert sum(played.rewards.values()) == 0.0
        assert all(t.terminated for t in played.trajectories.values())
        assert "Player" in played.trajectories["player_0"].info["reason"] or not any(
            played.rewards.values()
        )
        outcomes.add(tuple(t.messages[-1]["content"] for t in played.trajectories.values()))
    assert len(outcomes) > 1


async def test_an_agent_is_told_what_happened_since_it_last_acted_and_not_what_it_said(pool):
    played = await match(pool, TICTACTOE, dict.fromkeys(PLAYERS, Scripted(any_legal)))
    first = played.trajectories["player_0"].messages
    assert first[0]["content"].startswith("[GAME] You are Player 0 in Tic Tac Toe.")
    assert "You are Player 0" not in first[2]["content"]
    assert f"[Player 0] [{first[1]['content']}]" not in first[2]["content"]
    answer = played.trajectories["player_1"].messages[1]["content"]
    assert f"[Player 1] [{answer}]" in first[2]["content"]


def test_invalid_moves_are_judged_by_the_game():
    game = make(TICTACTOE)
    game.reset(seed=0)
    game.step({"player_0": "[4]"})
    observations, rewards, *_ = game.step({"player_1": "[4]"})
    assert "attempted an invalid move" in observations["player_1"][0]["content"]
    assert rewards == {}
    _, rewards, terminations, _, infos = game.step({"player_1": "my move is [4]"})
    assert rewards == {"player_0": 1.0, "player_1": -1.0}
    assert all(terminations.values())
    assert infos["player_1"]["invalid_move"]


def test_an_agent_that_cannot_act_loses_to_its_one_opponent():
    game = make(TICTACTOE)
    game.reset(seed=0)
    _, rewards, terminations, *_ = game.forfeit({"player_0": "its context is full"})
    assert rewards == {"player_0": -1.0, "player_1": 1.0}
    assert all(terminations.values())


async def test_policies_play_with_their_own_tokens(pool, renderer):
    policies = {agent: Policy(renderer.tokenizer, [f"[{n}]"]) for n, agent in enumerate(PLAYERS)}
    played = await play_match(pool, lambda agent: renderer, MatchSpec(TICTACTOE, policies))
    assert sorted(played.rewards.values()) == [-1.0, 1.0]
    for trajectory in played.trajectories.values():
        assert len(trajectory.segments) == 1


async def test_a_game_of_one_player_is_an_episode_like_any_other(pool, renderer):
    policy = Policy(renderer.tokenizer, [f"[{n}]" for n in range(1, 21)])
    spec = EpisodeSpec(
        "textarena:GuessTheNumber-v0",
        policy,
        seed=3,
        env_kwargs={"max_turns": 30},
        limits=EpisodeLimits(max_turns=30),
    )
    trajectory = await play_episode(pool, renderer, spec)
    assert trajectory.terminated
    assert trajectory.reward == 1.0
    assert 1 <= trajectory.info["turns"] <= 20
    assert "The target number is" in trajectory.messages[2]["content"]


async def test_other_games_are_played_too(pool):
    def bets(messages, rng):
        return rng.choice(re.findall(r"\[\w+\]", messages[-1]["content"].lower()) or ["[check]"])

    played = await match(pool, "textarena:KuhnPoker-v0", dict.fromkeys(PLAYERS, Scripted(bets)))
    assert sorted(played.rewards.values()) in ([-1.0, 1.0], [0.0, 0.0])


def test_a_game_whose_wrappers_show_it_in_another_way_is_shown_that_way():
    game = make("textarena:TicTacToe-v0-train")
    observations, _ = game.reset(seed=0)
    for agent, action in (("player_0", "[0]"), ("player_1", "[1]"), ("player_0", "[2]")):
        assert "in Tic Tac Toe" in observations[agent][0]["content"]
        observations, *_ = game.step({agent: action})


def test_the_fewest_players_are_found_and_others_may_be_asked_for():
    assert make("textarena:ThreePlayerTicTacToe-v0").possible_agents[-1] == "player_2"
    assert len(make("textarena:QuantumTicTacToe-v0").possible_agents) == 2
    assert len(make("textarena:LiarsDice-v0", num_players=5).possible_agents) == 5


def test_games_keep_to_the_interface():
    for name in (TICTACTOE, "textarena:GuessTheNumber-v0", "textarena:KuhnPoker-v0"):
        check_env(name, actions=["[1]", "[check]", "[2]", "nonsense", "[3]"])


def test_what_cannot_be_made_says_why():
    with pytest.raises(NotFound, match="TextArena has no such game"):
        make("textarena:Chess3D-v0")
    with pytest.raises(InvalidInput, match=r"cannot be made with \{'size': 3\}"):
        make(TICTACTOE, size=3)
