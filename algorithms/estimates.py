"""What a handful of samples says about a policy: pass@k, maj@k, and how sure one can be.

Dimension names: P tasks, n samples of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb

import numpy as np
from scipy.stats import binomtest, bootstrap

from ..primitives.errors import InvalidInput


@dataclass(frozen=True)
class Estimate:
    """A value between the ends of its interval. They are equal to it where a single observation
    says nothing about its spread."""

    value: float
    low: float
    high: float


def rate_interval(successes: int, episodes: int, confidence: float = 0.95) -> Estimate:
    """A success rate with Wilson's score interval (1927).

    Raises:
        InvalidInput: no episodes.
    """
    if episodes < 1:
        raise InvalidInput("a rate needs at least one episode")
    interval = binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    return Estimate(successes / episodes, float(interval.low), float(interval.high))


def mean_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95, *, seed: int = 0
) -> Estimate:
    """A mean with its percentile bootstrap interval (Efron, 1979), over 2000 resamples, repeatable
    by `seed`. The values must be independent: one per task, not one per sample of it.

    Raises:
        InvalidInput: no values, or one that is not finite.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) == 0 or not np.isfinite(array).all():
        raise InvalidInput("a mean needs a list of at least one value, all finite")
    mean = float(array.mean())
    if np.ptp(array) == 0:
        return Estimate(mean, mean, mean)
    interval = bootstrap(
        (array,),
        np.mean,
        confidence_level=confidence,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


def pass_at_k(successes: int, samples: int, k: int) -> float:
    """The probability that one of `k` samples is right, from `samples` of which `successes` are:
    `1 - C(n - c, k) / C(n, k)`, without bias (Chen et al., Codex, 2021, eq. 1).

    Raises:
        InvalidInput: not `0 <= successes <= samples`, or not `1 <= k <= samples`.
    """
    if not 0 <= successes <= samples:
        raise InvalidInput(f"{successes} of {samples} samples cannot have succeeded")
    _check_k(k, samples)
    # Not a difference of nearly equal numbers: one minus a product of small factors.
    return float(-np.expm1(_log_all_wrong(samples - successes, samples, k)))


def _log_all_wrong(wrong: int, samples: int, k: int) -> float:
    if wrong < k:
        return float("-inf")
    drawn = np.arange(k)
    return float(np.log((wrong - drawn) / (samples - drawn)).sum())


def maj_at_k(counts: Sequence[int], correct: Sequence[bool], k: int) -> float:
    """The probability that the majority of `k` samples is right, a tie being decided by lot, from
    n samples: `counts[j]` of them gave answer j, which is right if `correct[j]` (majority voting:
    Wang et al., "Self-consistency", 2023). Exact over all `C(n, k)` subsets, hence without bias.

    Raises:
        InvalidInput: lengths differ, a negative count, or not `1 <= k <= n`.
    """
    if len(counts) != len(correct) or any(count < 0 for count in counts):
        raise InvalidInput("maj_at_k: give a count, not negative, and a verdict for every answer")
    samples = int(sum(counts))
    _check_k(k, samples)
    won = Fraction(0)
    for j, (count, right) in enumerate(zip(counts, correct, strict=True)):
        if not right:
            continue
        others = [int(c) for i, c in enumerate(counts) if i != j]
        for votes in range(1, min(int(count), k) + 1):
            for ties, ways in enumerate(_ways(others, k - votes, votes)):
                won += Fraction(comb(int(count), votes) * ways, ties + 1)
    return float(won / comb(samples, k))


def _ways(counts: Sequence[int], total: int, most: int) -> list[int]:
    """`ways[t]`: subsets of `total` samples in which no answer has more than `most` votes and t
    answers have just as many."""
    # table[t][s]: the same for s samples of the answers so far.
    table = [[0] * (total + 1) for _ in range(total // most + 2)]
    table[0][0] = 1
    for count in counts:
        new = [row[:] for row in table]
        for ties, row in enumerate(table):
            for s, ways in enumerate(row):
                if ways:
                    for votes in range(1, min(count, most, total - s) + 1):
                        new[ties + (votes == most)][s + votes] += ways * comb(count, votes)
        table = new
    return [row[total] for row in table]


def _check_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise InvalidInput(f"k must be from 1 to the number of samples {samples}, got {k}")
