"""Replay: groups trained on again while they are fresh enough.

In a loop that is the user's own:

    replay = Replay(max_staleness=4, seed=0)
    async with Rollouts(...) as rollouts:
        ...
        fresh = await rollouts.next_batch()
        batch = fresh + replay.draw(2, version)
        replay.add(fresh)
        ...                                   # train on batch
        save(replay.state())                  # with a checkpoint; Replay(..., state=...) goes on

Every step trains on `groups_per_step` fresh groups and a few replayed ones, so that the pacing of
`Rollouts` stays as it is, and a group is used `1 + drawn / groups_per_step` times on average. The
loss must take the age of the data into account: ppo, cispo or gspo on the recorded logprobs (Wang et
al., ACER, 2017, sec. 3: replay with truncated importance weights).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from ..primitives.errors import InvalidInput
from .rollout import Group


@dataclass
class ReplayCounts:
    """Since the start of the loop, in groups. `replayed` counts every use."""

    replayed: int = 0
    expired: int = 0
    used_up: int = 0
    evicted: int = 0


@dataclass
class ReplayState:
    """All that a buffer holds; `primitives.codec` makes bytes of it."""

    groups: list[Group] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)
    draws: int = 0
    counts: ReplayCounts = field(default_factory=ReplayCounts)


class Replay:
    """Groups to be drawn again, at random but by `seed`.

    Args:
        max_staleness: largest `learner version - version of the oldest token` handed out; what is
            older is forgotten.
        max_uses: how often a group is handed out at most.
        capacity: groups held at most; beyond it the oldest are forgotten.
        seed: of the draws.

    Raises:
        InvalidInput: a limit below what makes sense.
    """

    def __init__(
        self,
        max_staleness: int,
        *,
        max_uses: int = 4,
        capacity: int = 1024,
        seed: int = 0,
        state: ReplayState | None = None,
    ) -> None:
        for name, value, least in (
            ("max_staleness", max_staleness, 0),
            ("max_uses", max_uses, 1),
            ("capacity", capacity, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise InvalidInput(f"Replay: {name} must be at least {least}, got {value}")
        self.max_staleness = max_staleness
        self.max_uses = max_uses
        self.capacity = capacity
        self.seed = seed
        held = state or ReplayState()
        self._groups, self._uses = list(held.groups), list(held.uses)
        self._draws = held.draws
        self.counts = replace(held.counts)

    def __len__(self) -> int:
        return len(self._groups)

    def state(self) -> ReplayState:
        """What `Replay(..., state=...)` goes on from exactly."""
        return ReplayState(list(self._groups), list(self._uses), self._draws, replace(self.counts))

    def add(self, groups: Iterable[Group]) -> None:
        """Hold groups for later."""
        for group in groups:
            self._groups.append(group)
            self._uses.append(0)
        excess = max(len(self) - self.capacity, 0)
        self.counts.evicted += excess
        self._keep(np.arange(len(self)) >= excess)

    def draw(self, count: int, version: int) -> list[Group]:
        """Up to `count` different groups that a learner at `version` may train on, oldest first;
        fewer where there are not so many."""
        fresh = [version - group.oldest_version <= self.max_staleness for group in self._groups]
        self.counts.expired += len(fresh) - sum(fresh)
        self._keep(fresh)
        random = np.random.default_rng((self.seed, self._draws))
        self._draws += 1
        chosen = np.sort(random.permutation(len(self))[:count])
        drawn = [self._groups[i] for i in chosen]
        for i in chosen:
            self._uses[i] += 1
        self.counts.replayed += len(drawn)
        left = [uses < self.max_uses for uses in self._uses]
        self.counts.used_up += len(left) - sum(left)
        self._keep(left)
        return drawn

    def _keep(self, kept: Iterable[bool]) -> None:
        pairs = zip(self._groups, self._uses, kept, strict=True)
        held = [(group, uses) for group, uses, keep in pairs if keep]
        self._groups, self._uses = [g for g, _ in held], [u for _, u in held]
