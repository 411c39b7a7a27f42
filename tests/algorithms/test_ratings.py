from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binomtest

import tinsmith
from tinsmith.algorithms.ratings import ELO_PER_LOGIT, Result, bradley_terry, score_interval

NAMES = ["a", "b", "c", "d", "e"]


def tournament(random, elo_P, games, first_mover=0.0) -> list[Result]:
    """Every ordered pair plays `games` games."""
    results = []
    for i, j in itertools.permutations(range(len(elo_P)), 2):
        p = expit((elo_P[i] - elo_P[j] + first_mover) / ELO_PER_LOGIT)
        results.append(Result(NAMES[i], NAMES[j], int(random.binomial(games, p)), games))
    return results


def by_minorisation(results, rounds=5000) -> np.ndarray:
    """Maximum-likelihood Elo, mean 0, by Hunter's MM algorithm (Annals of Statistics 2004, eq. 3)."""
    names = list(dict.fromkeys(name for r in results for name in (r.first, r.second)))
    wins, games = np.zeros((len(names),) * 2), np.zeros((len(names),) * 2)
    for r in results:
        i, j = names.index(r.first), names.index(r.second)
        wins[i, j] += r.score
        wins[j, i] += r.games - r.score
        games[i, j] += r.games
        games[j, i] += r.games
    strength = np.ones(len(names))
    for _ in range(rounds):
        strength = wins.sum(1) / (games / np.add.outer(strength, strength)).sum(1)
        strength /= np.exp(np.log(strength).mean())
    return np.log(strength) * ELO_PER_LOGIT


@pytest.mark.parametrize("seed", range(5))
def test_ratings_equal_those_of_an_independent_algorithm(seed):
    random = np.random.default_rng(seed)
    results = [
        Result(r.first, r.second, (r.score + random.integers(r.games + 1)) / 2, r.games)  # draws
        for r in tournament(random, random.normal(0, 200, 5), 20)
    ]
    rated = bradley_terry(results, prior_sd=1e6)
    elo_P = [rated.players[name].elo for name in rated.players]
    np.testing.assert_allclose(elo_P, by_minorisation(results), atol=1e-3)


@pytest.mark.parametrize("anchor", [None, "c"])
def test_the_intervals_hold_the_true_ratings_19_times_in_20(anchor):
    random, inside = np.random.default_rng(0), []
    for _ in range(200):
        elo_P = random.normal(0, 200, 5)
        elo_P -= elo_P.mean() if anchor is None else elo_P[NAMES.index(anchor)]
        rated = bradley_terry(
            tournament(random, elo_P, 15, first_mover=60), anchor=anchor, order_effect=True
        )
        truth = dict(zip(NAMES, elo_P, strict=True))
        for name, rating in rated.players.items():
            if name != anchor:
                inside.append(rating.low <= truth[name] <= rating.high)
        inside.append(rated.first_mover.low <= 60 <= rated.first_mover.high)
    assert 0.93 < np.mean(inside) < 0.97


def test_who_won_every_game_has_a_finite_rating_above_the_others():
    rated = bradley_terry([Result("a", "b", 50, 50), Result("c", "d", 1, 2)], anchor="b")
    assert rated.players["a"].low > 0
    assert all(abs(r.high) < 3000 and abs(r.low) < 3000 for r in rated.players.values())
    # Nothing links c and d to the others: their intervals say so.
    assert rated.players["c"].high - rated.players["c"].low > 1500


def test_a_draw_is_half_a_win_and_half_a_loss():
    drawn = bradley_terry([Result("a", "b", 0.5), Result("a", "b", 0.5), Result("a", "b", 1)])
    split = bradley_terry([Result("a", "b", 1), Result("a", "b", 0), Result("b", "a", 0)])
    assert drawn.players["a"].elo == pytest.approx(split.players["a"].elo)


def test_the_anchor_is_rated_zero_and_the_expected_score_is_elos():
    results = [Result("a", "b", 10, 11), Result("b", "a", 1, 11)]
    rated = bradley_terry(results, anchor="b", prior_sd=1e6)
    assert rated.players["b"].low == rated.players["b"].high == 0
    assert rated.players["a"].elo == pytest.approx(400, abs=0.1)
    assert rated.expected_score("a", "b") == pytest.approx(10 / 11, abs=1e-4)


@pytest.mark.parametrize(("score", "games"), [(0, 10), (3, 10), (10, 10), (97, 200)])
def test_the_score_interval_is_wilsons(score, games):
    reference = binomtest(score, games).proportion_ci(method="wilson")
    assert score_interval(score, games) == pytest.approx((reference.low, reference.high), abs=1e-9)


def test_results_that_cannot_be_are_refused():
    with pytest.raises(tinsmith.InvalidInput, match="'a' against 'b': a score must be from 0"):
        Result("a", "b", 3, 2)
    with pytest.raises(tinsmith.InvalidInput, match="no results"):
        bradley_terry([])
    with pytest.raises(tinsmith.InvalidInput, match="against itself"):
        bradley_terry([Result("a", "a", 1)])
    with pytest.raises(tinsmith.NotFound, match="the anchor 'z' has not played"):
        bradley_terry([Result("a", "b", 1)], anchor="z")
    with pytest.raises(tinsmith.NotFound, match="no rating for 'z'"):
        bradley_terry([Result("a", "b", 1)]).expected_score("a", "z")
