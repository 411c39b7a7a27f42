"""A league: the learner's opponents, and whom it should meet next.

Members are checkpoints of past selves and scripted players, by name; the loop that owns the league
makes players of them (`create_sampling_client(member.path)`). Matchmaking is prioritised
fictitious self-play (Vinyals et al., AlphaStar, Nature 2019, Methods, "Multi-agent learning"): the
member that the learner beats with probability p is met in proportion to a weight f(p).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..primitives.errors import InvalidInput, NotFound

WEIGHTINGS: dict[str, Callable[[float], float]] = {
    "hard": lambda p: (1 - p) ** 2,  # those it loses to
    "var": lambda p: p * (1 - p),  # those it is level with
    "uniform": lambda p: 1.0,
}
"""Matchmaking weights by name: `f(p)` of the learner's win rate p."""


@dataclass(frozen=True)
class LeagueConfig:
    """How a league matches, admits and forgets.

    Attributes:
        self_play: share of games against the learner itself rather than a member.
        weighting: name of the matchmaking weight.
        size: most members; one beyond it costs the member that matchmaking wants least.
        admit_every: the learner is due as a new member after so many steps (0: never by time).
        admit_win_rate: it is due as well once it beats every member at this rate (above 1: never),
            with `min_games` games counted against each.
        min_games: see above. Games are counted with `decay`, so below `1 / (1 - decay)`.
        decay: what a game counts for once the next one against the same member is played: the
            learner changes, so old games tell less.
        seed: of the draws.
    """

    self_play: float = 0.5
    weighting: str = "var"
    size: int = 16
    admit_every: int = 10
    admit_win_rate: float = 0.7
    min_games: float = 20.0
    decay: float = 0.98
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise NotFound(
                f"no matchmaking weight {self.weighting!r}; there are {', '.join(WEIGHTINGS)}"
            )
        for name in ("self_play", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(f"LeagueConfig.{name} must be from 0 to 1")
        if self.size < 1 or self.admit_every < 0:
            raise InvalidInput("LeagueConfig: size must be at least 1, admit_every at least 0")
        if self.decay < 1 and self.min_games >= 1 / (1 - self.decay):
            raise InvalidInput(
                f"LeagueConfig: with decay {self.decay:g} no member ever counts "
                f"{self.min_games:g} games; min_games must be below {1 / (1 - self.decay):.0f}"
            )


@dataclass
class Member:
    """An opponent. `path` is its checkpoint, None for a scripted player; `step` the learner's when
    it joined. A `pinned` one is never dropped. `score` and `games` are the learner's against it,
    with decay."""

    name: str
    path: str | None = None
    step: int = 0
    pinned: bool = False
    score: float = 0.0
    games: float = 0.0

    @property
    def win_rate(self) -> float:
        """The learner's against it: one half before the first game (two draws are added)."""
        return (self.score + 1) / (self.games + 2)


@dataclass
class League:
    """All of its state is in `to_json()`; a draw depends on that and its number alone, so that a
    loop goes on after a restart as if it had not stopped."""

    config: LeagueConfig = field(default_factory=LeagueConfig)
    members: list[Member] = field(default_factory=list)
    admitted_step: int = 0

    def __getitem__(self, name: str) -> Member:
        """
        Raises:
            NotFound: no member of that name.
        """
        for member in self.members:
            if member.name == name:
                return member
        raise NotFound(f"the league has no member {name!r}; it has {self._names()}")

    def _names(self) -> str:
        return ", ".join(m.name for m in self.members) or "none"

    def weights(self) -> np.ndarray:
        """How often each member is met, by the weighting: float64 `[members]`, sum 1. Uniform
        where every weight is 0."""
        weigh = WEIGHTINGS[self.config.weighting]
        weights = np.array([weigh(m.win_rate) for m in self.members], float)
        return (
            weights / weights.sum()
            if weights.sum() > 0
            else np.full(len(weights), 1) / len(weights)
        )

    def opponent(self, number: int) -> Member | None:
        """Whom the learner meets in game `number`; None: itself."""
        random = np.random.default_rng([self.config.seed, number])
        if not self.members or random.random() < self.config.self_play:
            return None
        return self.members[random.choice(len(self.members), p=self.weights())]

    def record(self, name: str, score: float) -> None:
        """Count a game of the learner against a member: 1 won, 0.5 drawn, 0 lost. One against a
        member that has been dropped since is let go.

        Raises:
            InvalidInput: a score beyond 0 to 1.
        """
        if not 0 <= score <= 1:
            raise InvalidInput(f"a game's score must be from 0 to 1, got {score!r}")
        for member in self.members:
            if member.name == name:
                member.score = self.config.decay * member.score + score
                member.games = self.config.decay * member.games + 1

    def due(self, step: int) -> bool:
        """Whether the learner should join as it is at `step`."""
        every = self.config.admit_every
        if every and step - self.admitted_step >= every:
            return True
        return bool(self.members) and all(
            m.games >= self.config.min_games and m.win_rate >= self.config.admit_win_rate
            for m in self.members
        )

    def admit(
        self, name: str, path: str | None = None, *, step: int = 0, pinned: bool = False
    ) -> Member | None:
        """Add a member. Beyond the league's size the one that matchmaking wants least is dropped
        (the oldest of equals; never a pinned one or the new one) and returned.

        Raises:
            InvalidInput: the name is taken, or there is no room beside the pinned members.
        """
        if any(m.name == name for m in self.members):
            raise InvalidInput(f"the league has a member {name!r} already; members need own names")
        dropped = None
        if len(self.members) >= self.config.size:
            loose = [i for i, m in enumerate(self.members) if not m.pinned]
            if not loose:
                raise InvalidInput(
                    f"no room for {name!r}: all {len(self.members)} members are pinned and "
                    f"size is {self.config.size}; make size larger"
                )
            weights = self.weights()
            dropped = self.members.pop(min(loose, key=lambda i: (weights[i], i)))
        self.members.append(Member(name, path, step, pinned))
        self.admitted_step = step
        return dropped

    def to_json(self) -> dict[str, Any]:
        """JSON values, for a file or for the `user_metadata` of the learner's own checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> League:
        """
        Raises:
            InvalidInput: not what `to_json` made.
        """
        try:
            config = LeagueConfig(**state["config"])
            members = [Member(**member) for member in state["members"]]
            return cls(config, members, state["admitted_step"])
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"this is not a league's state: {error!r}") from None
