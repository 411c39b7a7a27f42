"""Paced rollouts: groups of episodes played ahead of the learner, but never too far.

`Rollouts` starts group after group while the number issued stays within
`(version + max_staleness + 1) * groups_per_step` (AReaL's rule, Fu et al., 2025), and hands out
batches. A group is waited for before it would get too old, not thrown away: a batch takes the
oldest groups first, and is not handed out while it would leave more of them behind than the next
batches can hold in time. With `max_staleness=0` this is exactly the synchronous loop.

`oversubscription` trades work for time: more groups are started than needed, none is waited for
once a batch is full, and what is too old by then is dropped and counted.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from ..primitives.errors import EnvironmentFailure, InvalidInput, RolloutFailure, Unavailable
from ..primitives.types import Match, Trajectory


@dataclass(frozen=True, eq=False)
class Group:
    """G episodes of one task. `start_version` is the learner's version when it was issued.

    A group of matches holds them in `matches` and has no `trajectories`: those of one agent,
    with rewards that can be compared, are the group `of(agent)`.
    """

    index: int
    start_version: int
    trajectories: list[Trajectory]
    failures: list[str] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)

    def of(self, agent: str) -> Group:
        """One agent's part of a group of matches.

        Raises:
            InvalidInput: there is no such agent.
        """
        if self.matches and agent not in self.matches[0].trajectories:
            agents = ", ".join(self.matches[0].trajectories)
            raise InvalidInput(f"no agent {agent!r} in these matches; there are {agents}")
        own = [match.trajectories[agent] for match in self.matches]
        return Group(self.index, self.start_version, own, self.failures)

    @property
    def rewards(self) -> np.ndarray:
        """Returns `[G]`, float64.

        Raises:
            InvalidInput: in a group of matches.
        """
        if self.matches:
            raise InvalidInput("every agent of a match has its own reward: take group.of(agent)")
        return np.array([t.reward for t in self.trajectories])

    @property
    def oldest_version(self) -> int:
        """Of any token, in matches of any that a live policy sampled: a frozen opponent does not
        age. The version at issue when there is none."""
        played = self.matches or self.trajectories
        versions = [one.oldest_version for one in played if one.oldest_version >= 0]
        return min(versions, default=self.start_version)

    def __len__(self) -> int:
        """G, without the episodes that failed."""
        return len(self.matches or self.trajectories)


PlayEpisode = Callable[[int, int], Awaitable[Trajectory | Match]]
"""`(group index, member) -> trajectory`, or match."""


async def play_group(play: PlayEpisode, index: int, start_version: int, group_size: int) -> Group:
    """Play a group's episodes or matches at once. One that fails is left out and reported."""
    outcomes = await asyncio.gather(
        *(play(index, member) for member in range(group_size)), return_exceptions=True
    )
    trajectories, matches, failures = [], [], []
    for outcome in outcomes:
        if isinstance(outcome, Trajectory):
            trajectories.append(outcome)
        elif isinstance(outcome, Match):
            matches.append(outcome)
        elif isinstance(outcome, EnvironmentFailure | Unavailable):
            failures.append(str(outcome))
        else:
            raise outcome
    return Group(index, start_version, trajectories, failures, matches)


def has_signal(group: Group) -> bool:
    """Whether the group's rewards differ, so that its advantages are not all zero; in matches,
    those of any agent with a live policy (of any at all, where there is none)."""
    if group.matches:
        first = group.matches[0]
        return any(has_signal(group.of(agent)) for agent in first.live or first.trajectories)
    return len(group.trajectories) > 1 and bool(np.ptp(group.rewards) > 0)


@dataclass
class RolloutCounts:
    """Since the start of the loop, in groups; `failed_episodes` in episodes."""

    issued: int = 0
    trained: int = 0
    dropped_no_signal: int = 0
    dropped_stale: int = 0
    failed_episodes: int = 0


class Rollouts:
    """An async context manager around the group tasks; leaving it cancels those under way.

    Args:
        play: plays one episode or match.
        groups_per_step: groups in a batch.
        group_size: episodes in a group.
        max_staleness: largest `learner version - version of the oldest token` trained on.
        version: the learner's version now.
        oversubscription: groups started beyond what pacing allows, as a share of a batch.
        max_groups_in_flight: how many groups may play at once (None: as pacing allows).
        total: groups that will be trained on in all (None: no end); none is started beyond, where
            it would only take time from the last ones.
        keep: which finished groups are worth training on; the others are counted and replaced,
            `max_replaced` of them per batch (None: as many as a batch holds). More are taken as
            they are, so that a batch gets full even where nothing has signal.
        first_index, redo: where group numbers go on, and those to play again, after a resume.
        max_failures_in_a_row: `RolloutFailure` after so many failed episodes without a success.
    """

    def __init__(
        self,
        play: PlayEpisode,
        *,
        groups_per_step: int,
        group_size: int,
        max_staleness: int = 0,
        version: int = 0,
        oversubscription: float = 0.0,
        max_groups_in_flight: int | None = None,
        total: int | None = None,
        keep: Callable[[Group], bool] = has_signal,
        max_replaced: int | None = None,
        first_index: int = 0,
        redo: Sequence[int] = (),
        max_failures_in_a_row: int = 64,
    ) -> None:
        self.play = play
        self.groups_per_step = groups_per_step
        self.group_size = group_size
        self.max_staleness = max_staleness
        self.surplus = math.ceil(oversubscription * groups_per_step)
        self.max_groups_in_flight = max_groups_in_flight
        self.total = total
        self.keep = keep
        self.max_replaced = groups_per_step if max_replaced is None else max_replaced
        self.max_failures_in_a_row = max_failures_in_a_row
        self.counts = RolloutCounts()
        self.on_group: Callable[[Group], None] = lambda group: None
        self._version = self._first_version = version
        self._fresh_index = first_index
        self._redo = sorted(redo)
        self._running: dict[asyncio.Task[Group], tuple[int, int]] = {}
        self._cancelled: set[asyncio.Task[Group]] = set()
        self._ready: list[Group] = []
        self._failures_in_a_row = 0
        self._replaced = 0  # since the last batch

    async def __aenter__(self) -> Rollouts:
        self._issue()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, *self._cancelled, return_exceptions=True)
        self._running.clear()

    @property
    def outstanding(self) -> list[int]:
        """Numbers of the groups issued but not trained on or dropped, to be redone on a resume."""
        running = (index for index, _ in self._running.values())
        return sorted([*running, *(group.index for group in self._ready), *self._redo])

    @property
    def next_index(self) -> int:
        """The first group number never issued."""
        return self._fresh_index

    def _indices(self) -> Iterator[int]:
        while True:
            if self._redo:
                yield self._redo.pop(0)
            else:
                self._fresh_index += 1
                yield self._fresh_index - 1

    def _issue(self) -> None:
        steps = self._version - self._first_version
        allowed = (steps + self.max_staleness + 1) * self.groups_per_step
        if self.total is not None:
            allowed = min(allowed, self.total)
        trained_or_pending = self.counts.trained + len(self._ready) + len(self._running)
        room = allowed + self.surplus - trained_or_pending
        if self.max_groups_in_flight is not None:
            room = min(room, self.max_groups_in_flight - len(self._running))
        for index in itertools.islice(self._indices(), max(room, 0)):
            group = play_group(self.play, index, self._version, self.group_size)
            task = asyncio.create_task(group, name=f"group-{index}")
            self._running[task] = (index, self._version)
            self.counts.issued += 1

    def advance(self, version: int) -> None:
        """Tell that the learner is at `version` now; starts what pacing allows."""
        self._version = version
        if self.surplus:
            self._drop_stale()
        self._issue()

    def _drop_stale(self) -> None:
        oldest = self._version - self.max_staleness
        for task, (_, started) in list(self._running.items()):
            if started < oldest:
                del self._running[task]
                task.cancel()
                self._cancelled.add(task)
                task.add_done_callback(self._cancelled.discard)
                self.counts.dropped_stale += 1
        fresh = [group for group in self._ready if group.oldest_version >= oldest]
        self.counts.dropped_stale += len(self._ready) - len(fresh)
        self._ready = fresh

    def _must_wait(self) -> bool:
        """Whether a batch handed out now would be short, or would leave more old groups behind
        than the batches can hold until they are too old."""
        if len(self._ready) < self.groups_per_step:
            return True
        if self.surplus or not self._running:
            return False
        ready = sorted(group.oldest_version for group in self._ready)[self.groups_per_step :]
        left = sorted([*ready, *(started for _, started in self._running.values())])
        batches_until = (version + self.max_staleness - self._version for version in left)
        return any(
            number > self.groups_per_step * batches
            for number, batches in enumerate(batches_until, start=1)
        )

    async def next_batch(self) -> list[Group]:
        """The next `groups_per_step` groups, those with the oldest tokens first.

        Raises:
            RolloutFailure: too many episodes failed in a row.
        """
        while self._must_wait():
            done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            # By number, so that a batch does not depend on which of two finished first.
            for task in sorted(done, key=lambda t: self._running[t]):
                del self._running[task]
                self._take(task.result())
            self._issue()
        self._ready.sort(key=lambda group: (group.oldest_version, group.index))
        batch = self._ready[: self.groups_per_step]
        self._ready = self._ready[self.groups_per_step :]
        self.counts.trained += len(batch)
        self._replaced = 0
        return batch

    def _take(self, group: Group) -> None:
        self.on_group(group)
        self.counts.failed_episodes += len(group.failures)
        self._failures_in_a_row += len(group.failures)
        if len(group):
            self._failures_in_a_row = 0
        elif self._failures_in_a_row >= self.max_failures_in_a_row:
            raise RolloutFailure(
                f"{self._failures_in_a_row} episodes failed in a row; "
                f"the last one:\n{group.failures[-1]}"
            )
        if self._version - group.oldest_version > self.max_staleness:
            self.counts.dropped_stale += 1
        elif not len(group):
            self.counts.dropped_no_signal += 1
        elif not self.keep(group) and self._replaced < self.max_replaced:
            self.counts.dropped_no_signal += 1
            self._replaced += 1
        else:
            self._ready.append(group)
