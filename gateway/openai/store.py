"""The trajectories that requests are recorded in, by owner and id.

In memory: they end with the process, and the least recently used are forgotten when there are too
many. Fetch a trajectory when its episode is over, and delete it.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict

from ...envs.recording import Recording
from ...primitives.errors import InvalidInput, NotFound

_ID = re.compile(r"[A-Za-z0-9_.:@/-]{1,200}")
_MAX_FORGOTTEN = 100_000


class TrajectoryStore:
    """
    Args:
        owner_tokens: tokens kept of one owner.
        total_tokens: tokens kept of all. A token with all that belongs to it takes some 30 bytes.
    """

    def __init__(self, owner_tokens: int = 4_000_000, total_tokens: int = 16_000_000) -> None:
        self.owner_tokens, self.total_tokens = owner_tokens, total_tokens
        self._kept: OrderedDict[tuple[str, str], Recording] = OrderedDict()
        self._sizes: dict[tuple[str, str], int] = {}
        self._owned: Counter[str] = Counter()
        self._forgotten: OrderedDict[tuple[str, str], None] = OrderedDict()

    def open(self, owner: str, name: str) -> Recording:
        """The trajectory of this id, new if there is none.

        Raises:
            InvalidInput: no usable id.
            NotFound: it was forgotten: what follows would be a trajectory without its beginning.
        """
        if not _ID.fullmatch(name):
            raise InvalidInput(
                f"a trajectory id is up to 200 letters, digits and any of _ . : @ / -, got {name!r}"
            )
        if (owner, name) in self._kept:
            return self.get(owner, name)
        self._refuse_forgotten(owner, name)
        self._kept[owner, name] = recording = Recording()
        self.settle(owner, name, recording)
        return recording

    def get(self, owner: str, name: str) -> Recording:
        """
        Raises:
            NotFound: this owner has none of this id, or it was forgotten.
        """
        if (owner, name) not in self._kept:
            self._refuse_forgotten(owner, name)
            raise NotFound(f"no trajectory {name!r}")
        self._kept.move_to_end((owner, name))
        return self._kept[owner, name]

    def settle(self, owner: str, name: str, recording: Recording) -> None:
        """Account for what was recorded, forgetting others if need be."""
        key = (owner, name)
        if self._kept.get(key) is not recording:
            return  # deleted or forgotten while it was being answered
        self._kept.move_to_end(key)
        self._owned[owner] += recording.size - self._sizes.get(key, 0)
        self._sizes[key] = recording.size
        while self._owned[owner] > self.owner_tokens:
            self._forget(next(kept for kept in self._kept if kept[0] == owner))
        while self._owned.total() > self.total_tokens:
            self._forget(next(iter(self._kept)))

    def delete(self, owner: str, name: str) -> None:
        """
        Raises:
            NotFound: this owner has none of this id.
        """
        key = (owner, name)
        if key in self._forgotten:
            del self._forgotten[key]
            return
        self.get(owner, name)
        self._drop(key)

    def of(self, owner: str) -> dict[str, Recording]:
        """This owner's trajectories by id, least recently used first."""
        return {name: kept for (whose, name), kept in self._kept.items() if whose == owner}

    def _forget(self, key: tuple[str, str]) -> None:
        self._drop(key)
        self._forgotten[key] = None
        if len(self._forgotten) > _MAX_FORGOTTEN:
            self._forgotten.popitem(last=False)

    def _drop(self, key: tuple[str, str]) -> None:
        del self._kept[key]
        self._owned[key[0]] -= self._sizes.pop(key)
        if not self._owned[key[0]]:
            del self._owned[key[0]]

    def _refuse_forgotten(self, owner: str, name: str) -> None:
        if (owner, name) in self._forgotten:
            raise NotFound(
                f"trajectory {name!r} was forgotten to make room: the service keeps the "
                f"{self.owner_tokens} tokens of an owner that were used last. Fetch and delete "
                "trajectories when they are over; use a new id, or delete this one first"
            )
