"""Ratings of players from the games they played: how strong, and how sure one can be of it.

The Bradley-Terry model (Bradley and Terry, 1952), on Elo's scale: a player rated 400 above another
scores 10/11 against it. With `order_effect` the first player of a game has an advantage of its own.

Dimension names: P players, R results, K parameters (the players, then the order effect).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import norm

from ..primitives.errors import InvalidInput, NotFound

ELO_PER_LOGIT = 400 / math.log(10)
Z95 = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Result:
    """What `first` scored in `games` games against `second`: a win counts 1, a draw one half."""

    first: str
    second: str
    score: float
    games: int = 1

    def __post_init__(self) -> None:
        if self.games < 1 or not 0 <= self.score <= self.games:
            raise InvalidInput(
                f"{self.first!r} against {self.second!r}: a score must be from 0 to the number of "
                f"games, at least one, got {self.score!r} of {self.games!r}"
            )


@dataclass(frozen=True)
class Rating:
    """In Elo; `low` and `high` bound it with 95% confidence."""

    elo: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratings:
    """`players` in the order in which they first played. `first_mover` is what moving first is
    worth, None where it was not asked for."""

    players: dict[str, Rating]
    first_mover: Rating | None = None

    def expected_score(self, first: str, second: str) -> float:
        """What `first` should score in a game against `second`, 0 to 1.

        Raises:
            NotFound: one of them has no rating.
        """
        for name in (first, second):
            if name not in self.players:
                raise NotFound(f"no rating for {name!r}; rated are {', '.join(self.players)}")
        gap = self.players[first].elo - self.players[second].elo
        gap += self.first_mover.elo if self.first_mover else 0.0
        return float(expit(gap / ELO_PER_LOGIT))


def bradley_terry(
    results: Sequence[Result],
    *,
    anchor: str | None = None,
    order_effect: bool = False,
    prior_sd: float = 700.0,
) -> Ratings:
    """Ratings of largest posterior density, with Laplace's intervals (the inverse of Fisher's
    information and the prior's).

    `anchor` is the player rated 0, without interval; without one the players' mean is 0. The prior
    on every rating, normal around 0 with `prior_sd` Elo, keeps the rating of who won every game,
    and of players never linked by games, finite. A draw counts as half a win and half a loss,
    which leaves the intervals on the wide side where there are many.

    Raises:
        InvalidInput: no results, a player against itself, a `prior_sd` not above 0.
        NotFound: the anchor has not played.
    """
    if not results:
        raise InvalidInput("there are no results to rate")
    if not prior_sd > 0:
        raise InvalidInput(f"prior_sd must be above 0, got {prior_sd!r}")
    names = list(dict.fromkeys(name for r in results for name in (r.first, r.second)))
    if anchor is not None and anchor not in names:
        raise NotFound(f"the anchor {anchor!r} has not played; players are {', '.join(names)}")
    index = {name: i for i, name in enumerate(names)}
    design_RK = np.zeros((len(results), len(names) + order_effect))
    for row, result in zip(design_RK, results, strict=True):
        if result.first == result.second:
            raise InvalidInput(f"{result.first!r} cannot be rated by games against itself")
        row[index[result.first]], row[index[result.second]] = 1, -1
        if order_effect:
            row[-1] = 1
    score_R = np.array([r.score for r in results], float)
    games_R = np.array([r.games for r in results], float)
    mode_K, covariance_KK = _posterior(design_RK, score_R, games_R, prior_sd / ELO_PER_LOGIT)
    zero_KK = np.eye(len(mode_K))  # what makes the anchor, or else the mean, 0
    if anchor is None:
        zero_KK[: len(names), : len(names)] -= 1 / len(names)
    else:
        zero_KK[: len(names), index[anchor]] -= 1
    elo_K = zero_KK @ mode_K * ELO_PER_LOGIT
    variance_K = np.einsum("ij,jk,ik->i", zero_KK, covariance_KK, zero_KK)
    margin_K = Z95 * np.sqrt(variance_K.clip(min=0)) * ELO_PER_LOGIT
    ratings = [
        Rating(float(elo), float(elo - margin), float(elo + margin))
        for elo, margin in zip(elo_K, margin_K, strict=True)
    ]
    players = dict(zip(names, ratings, strict=False))
    return Ratings(players, ratings[-1] if order_effect else None)


def _posterior(
    design_RK: np.ndarray, score_R: np.ndarray, games_R: np.ndarray, prior_sd: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mode `[K]` and Laplace covariance `[K, K]`, in logits."""
    precision_KK = np.eye(design_RK.shape[1]) / prior_sd**2

    def loss(x_K: np.ndarray) -> float:
        z_R = design_RK @ x_K
        fit = games_R @ np.logaddexp(0, z_R) - score_R @ z_R
        return float(fit + 0.5 * x_K @ precision_KK @ x_K)

    def gradient(x_K: np.ndarray) -> np.ndarray:
        return design_RK.T @ (games_R * expit(design_RK @ x_K) - score_R) + precision_KK @ x_K

    def hessian(x_K: np.ndarray) -> np.ndarray:
        p_R = expit(design_RK @ x_K)
        return (design_RK.T * (games_R * p_R * (1 - p_R))) @ design_RK + precision_KK

    start_K = np.zeros(design_RK.shape[1])
    found = minimize(
        loss, start_K, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-9}
    )
    return found.x, np.linalg.inv(hessian(found.x))


def score_interval(score: float, games: int) -> tuple[float, float]:
    """Bounds of the mean score per game with 95% confidence: Wilson's interval (1927, eq. 4).

    `score` need not be whole: draws count half (the interval is then on the wide side).

    Raises:
        InvalidInput: no games, or a score beyond them.
    """
    if games < 1 or not 0 <= score <= games:
        raise InvalidInput(f"a score must be from 0 to the games, got {score!r} of {games!r}")
    rate, spread = score / games, Z95**2 / games
    centre = rate + spread / 2
    margin = math.sqrt(rate * (1 - rate) * spread + spread**2 / 4)
    low, high = (centre - margin) / (1 + spread), (centre + margin) / (1 + spread)
    return max(low, 0.0), min(high, 1.0)
