from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest

import tinsmith
from tinsmith.algorithms.league import League, LeagueConfig


def league_of(win_rates: dict[str, float], games: int = 400, **config) -> League:
    """A league whose learner has beaten each member at this rate."""
    league = League(LeagueConfig(**{"self_play": 0.0, "decay": 1.0, **config}))
    for name, rate in win_rates.items():
        member = league.admit(name, f"tinker://run/sampler_weights/{name}") or league[name]
        member.score, member.games = rate * games, games
    return league


@pytest.mark.parametrize(
    ("weighting", "share"),
    [
        ("hard", {"easy": 0.01 / 0.9, "even": 0.25 / 0.9, "strong": 0.64 / 0.9}),
        ("var", {"easy": 0.18, "even": 0.5, "strong": 0.32}),
        ("uniform", {"easy": 1 / 3, "even": 1 / 3, "strong": 1 / 3}),
    ],
)
def test_members_are_met_as_often_as_the_weighting_says(weighting, share):
    league = league_of({"easy": 0.9, "even": 0.5, "strong": 0.2}, 10**6, weighting=weighting)
    assert league.weights() == pytest.approx([share[m.name] for m in league.members], abs=1e-3)
    met = Counter(league.opponent(number).name for number in range(4000))
    for name, expected in share.items():
        assert met[name] / 4000 == pytest.approx(expected, abs=0.03)


def test_the_learner_plays_itself_as_often_as_asked_and_always_in_an_empty_league():
    league = league_of({"a": 0.5}, self_play=0.3)
    selves = sum(league.opponent(number) is None for number in range(4000))
    assert selves / 4000 == pytest.approx(0.3, abs=0.03)
    assert all(League(LeagueConfig(self_play=0)).opponent(n) is None for n in range(20))


def test_a_league_goes_on_after_a_restart_as_if_it_had_not_stopped():
    def play(league: League, numbers: range) -> list[str | None]:
        met = []
        for number in numbers:
            member = league.opponent(number)
            met.append(member and member.name)
            if member:
                league.record(member.name, number % 3 / 2)
        return met

    whole, first = (league_of({"a": 0.2, "b": 0.5, "c": 0.7}, 9, self_play=0.4) for _ in "12")
    expected = play(whole, range(200))
    before = play(first, range(77))
    second = League.from_json(json.loads(json.dumps(first.to_json())))
    assert before + play(second, range(77, 200)) == expected
    assert second == whole


def test_old_games_fade():
    league = League(LeagueConfig(decay=0.9, min_games=5), [])
    league.admit("past")
    for score in [0] * 50 + [1] * 50:
        league.record("past", score)
    assert league["past"].games == pytest.approx(10, abs=0.01)
    assert league["past"].win_rate == pytest.approx((10 + 1) / 12, abs=0.01)


def test_the_learner_joins_by_time_or_once_it_beats_every_member():
    by_time = league_of({"a": 0.1}, admit_every=10)
    assert [step for step in range(25) if by_time.due(step)] == list(range(10, 25))
    by_time.admit("b", step=12)
    assert not by_time.due(21)
    assert by_time.due(22)
    by_strength = league_of({"a": 0.9, "b": 0.9}, admit_every=0)
    assert by_strength.due(1)
    by_strength.admit("c", step=1)  # not met yet
    assert not by_strength.due(1000)
    assert not league_of({"a": 0.9, "b": 0.6}, admit_every=0).due(1)
    assert not League(LeagueConfig(admit_every=0)).due(1000)


def test_beyond_its_size_the_league_drops_whom_matchmaking_wants_least():
    league = league_of({"easy": 0.95, "even": 0.5, "hard": 0.1}, size=4)
    assert league.admit("scripted", pinned=True) is None
    league["scripted"].score = league["scripted"].games = 400  # always beaten, but pinned
    dropped = league.admit("new", "tinker://run/sampler_weights/new", step=3)
    assert dropped is not None
    assert dropped.name == "easy"
    assert [m.name for m in league.members] == ["even", "hard", "scripted", "new"]
    league.record("easy", 1)  # a game that was still under way
    with pytest.raises(tinsmith.NotFound, match="no member 'easy'; it has even, hard"):
        league["easy"]


def test_a_league_that_cannot_be_is_refused():
    with pytest.raises(tinsmith.NotFound, match="no matchmaking weight 'soft'"):
        LeagueConfig(weighting="soft")
    with pytest.raises(tinsmith.InvalidInput, match="self_play must be from 0 to 1"):
        LeagueConfig(self_play=1.5)
    with pytest.raises(tinsmith.InvalidInput, match="min_games must be below 10"):
        LeagueConfig(decay=0.9, min_games=20)
    league = league_of({"a": 0.5}, size=1)
    with pytest.raises(tinsmith.InvalidInput, match="has a member 'a' already"):
        league.admit("a")
    league.members[0] = dataclasses.replace(league.members[0], pinned=True)
    with pytest.raises(tinsmith.InvalidInput, match="no room for 'b'"):
        league.admit("b")
    with pytest.raises(tinsmith.InvalidInput, match="from 0 to 1, got 2"):
        league.record("a", 2)
    with pytest.raises(tinsmith.InvalidInput, match="not a league's state"):
        League.from_json({"members": []})
