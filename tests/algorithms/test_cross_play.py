from __future__ import annotations

import asyncio
import json
import random

import numpy as np
import pytest

import tinsmith
from tinsmith.algorithms.cross_play import Pairing, cross_play
from tinsmith.algorithms.league_plot import plot_cross_play, plot_ladder
from tinsmith.algorithms.ratings import bradley_terry, score_interval

STRENGTH = {"weak": 0.0, "middling": 1.0, "strong": 2.0}


async def race(pairing: Pairing) -> float:
    """Who is stronger wins more often."""
    await asyncio.sleep(0)
    chance = 1 / (1 + np.exp(STRENGTH[pairing.second] - STRENGTH[pairing.first]))
    return float(random.Random(repr(pairing)).random() < chance)


async def test_everyone_meets_everyone_in_both_orders_and_the_ratings_follow(tmp_path):
    cross = await cross_play(race, list(STRENGTH), games=200, seed=3)
    assert (cross.games == 200 * (1 - np.eye(3))).all()
    assert np.isnan(cross.score.diagonal()).all()
    scores = [await race(Pairing("weak", "strong", 3 + game)) for game in range(200)]
    assert cross.score[0, 2] == np.mean(scores)
    assert (cross.low[0, 2], cross.high[0, 2]) == score_interval(sum(scores), 200)
    players = bradley_terry(cross.results(), anchor="weak").players
    assert players["strong"].low > players["middling"].high > players["middling"].low > 0
    assert json.loads(json.dumps(cross.to_json()))["score"][0][0] is None
    for path in (
        plot_cross_play(cross, tmp_path / "cross.png"),
        plot_ladder(bradley_terry(cross.results()), tmp_path / "elo.png"),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")


async def test_two_sides_may_be_different_players():
    async def ask(pairing: Pairing) -> float:
        return float(pairing.first == "asker-1" and pairing.second == "answerer-1")

    cross = await cross_play(ask, ["asker-0", "asker-1"], ["answerer-0", "answerer-1"], games=5)
    np.testing.assert_array_equal(cross.score, [[0, 0], [0, 1]])


async def test_a_broken_game_costs_only_itself():
    async def play(pairing: Pairing) -> float:
        if pairing.seed == 1 and pairing.first == "b":
            raise tinsmith.EnvironmentFailure("the board fell over")
        return 0.5

    cross = await cross_play(play, ["a", "b"], games=3)
    assert cross.games.tolist() == [[0, 3], [2, 0]]
    assert len(cross.failures) == 1
    assert "the board fell over" in cross.failures[0]


async def test_no_more_games_are_played_at_once_than_asked():
    running = most = 0

    async def play(pairing: Pairing) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return 1.0

    await cross_play(play, ["a", "b", "c"], games=4, max_concurrent=5)
    assert most == 5


async def test_what_cannot_be_played_is_refused():
    async def play(pairing: Pairing) -> float:
        return 2.0

    with pytest.raises(tinsmith.InvalidInput, match="must be from 0 to 1, got 2"):
        await cross_play(play, ["a", "b"], games=1)
    with pytest.raises(tinsmith.InvalidInput, match="names of their own"):
        await cross_play(play, ["a", "a"], games=1)
    with pytest.raises(tinsmith.InvalidInput, match="games must be at least 1"):
        await cross_play(play, ["a", "b"], games=0)
