"""pass@k, maj@k and intervals against enumeration, their own formulas and coverage."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

import tinsmith
from tinsmith.algorithms.estimates import maj_at_k, mean_interval, pass_at_k, rate_interval


@pytest.mark.parametrize("samples", [1, 2, 5, 9])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(samples):
    for successes, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations(range(samples), k))
        expected = np.mean([any(i < successes for i in subset) for subset in subsets])
        assert pass_at_k(successes, samples, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_samples_is_exact():
    for successes, samples, k in [(1, 1000, 100), (3, 4096, 1), (700, 1000, 999), (1, 10**6, 10)]:
        wrong = math.comb(samples - successes, k), math.comb(samples, k)
        expected = (wrong[1] - wrong[0]) / wrong[1]
        assert pass_at_k(successes, samples, k) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_maj_at_k_is_the_mean_over_subsets_with_ties_by_lot(seed):
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, 4, rng.integers(1, 10)).tolist()
    verdicts = (rng.random(4) < 0.4).tolist()
    counts = Counter(answers)
    for k in range(1, len(answers) + 1):
        scores = []
        for subset in itertools.combinations(answers, k):
            votes = Counter(subset)
            winners = [a for a, n in votes.items() if n == max(votes.values())]
            scores.append(sum(verdicts[a] for a in winners) / len(winners))
        got = maj_at_k(list(counts.values()), [verdicts[a] for a in counts], k)
        assert got == pytest.approx(np.mean(scores), abs=1e-12)


def test_voting_helps_where_the_right_answer_is_the_likeliest():
    counts, correct = [26, 20, 10, 8], [True, False, False, False]
    values = [maj_at_k(counts, correct, k) for k in (1, 8, 32, 64)]
    assert values[0] == pytest.approx(26 / 64)
    assert values == sorted(values)
    assert values[-1] == 1.0


def test_a_means_interval_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        estimate = mean_interval(rng.exponential(2.0, 60), 0.9, seed=seed)
        inside += estimate.low <= 2.0 <= estimate.high
    assert 165 <= inside <= 195  # 180 +- 3.5 standard deviations, and the bootstrap runs low


def test_an_interval_is_repeatable_and_a_point_where_nothing_varies():
    values = [0.0, 1.0, 1.0, 0.25]
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    estimate = mean_interval([0.5])
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k(3, 2, 1), "3 of 2 samples cannot have succeeded"),
        (lambda: pass_at_k(1, 2, 3), "k must be from 1 to the number of samples 2, got 3"),
        (lambda: maj_at_k([2, 1], [True], 1), "a verdict for every answer"),
        (lambda: maj_at_k([2], [True], 0), "k must be from 1"),
        (lambda: mean_interval([]), "at least one value"),
        (lambda: mean_interval([1.0, math.nan]), "all finite"),
        (lambda: rate_interval(0, 0), "at least one episode"),
    ],
)
def test_what_cannot_be_estimated_is_refused(call, message):
    with pytest.raises(tinsmith.InvalidInput, match=message):
        call()
