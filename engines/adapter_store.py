"""Which adapter versions a sampler holds."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from ..primitives.errors import InvalidInput, NotFound
from ..primitives.types import PolicyRef


class AdapterKey(NamedTuple):
    """Names weights. `serial` tells apart different weights that had one run's same version, as
    after a resume from an older checkpoint: nothing computed with the ones may serve the others."""

    run_id: str
    version: int
    serial: int = 0


BASE = AdapterKey("", 0)
"""The bare base model."""


class Adapted(Protocol):
    def same_as(self, other: Any, /) -> bool:
        """Whether both are the same weights."""


A = TypeVar("A", bound=Adapted)


class AdapterStore(Generic[A]):
    """Adapters by run and version. The newest version of a run is always kept, and so are those
    that requests use; others only if `keep` was asked for, the last `max_kept` of them."""

    def __init__(self, max_kept: int = 32) -> None:
        self.max_kept = max_kept
        self._serials = itertools.count(1)
        self._keys: dict[tuple[str, int], AdapterKey] = {}
        self._adapters: dict[AdapterKey, A] = {}
        self._newest: dict[str, AdapterKey] = {}
        self._kept: OrderedDict[AdapterKey, None] = OrderedDict()

    def key_for(self, run_id: str, version: int, adapter: A) -> AdapterKey:
        """What to `add` an adapter as: what it is held as, or a new key."""
        held = self._keys.get((run_id, version))
        if held is not None and self._adapters[held].same_as(adapter):
            return held
        return AdapterKey(run_id, version, next(self._serials))

    def add(self, key: AdapterKey, adapter: A, keep: bool) -> None:
        run_id, version, _ = key
        held = self._keys.get((run_id, version))
        if key != held:
            if held is not None:
                self._kept.pop(held, None)
            self._keys[run_id, version] = key
            self._adapters[key] = adapter
        self._newest[run_id] = key
        if keep:
            self._kept[key] = None
            self._kept.move_to_end(key)
            while len(self._kept) > self.max_kept:
                self._kept.popitem(last=False)

    def remove(self, key: AdapterKey) -> None:
        """Take back what `add` has just added, before a `sweep`: what was the newest is it again."""
        del self._adapters[key]
        self._kept.pop(key, None)
        self._keys = {(k.run_id, k.version): k for k in self._adapters}
        before = [k for k in self._adapters if k.run_id == key.run_id]
        if before:
            self._newest[key.run_id] = before[-1]
        else:
            self._newest.pop(key.run_id, None)

    def held(self) -> list[tuple[AdapterKey, A, bool]]:
        """All versions of all runs, and whether each is to be kept, in an order in which adding them
        anew gives such a store again."""
        newest = list(self._newest.values())
        older = [*self._kept, *(key for key in self._adapters if key not in self._kept)]
        older = [key for key in older if key not in newest and key.run_id in self._newest]
        return [
            *((key, self._adapters[key], True) for key in older),
            *((key, self._adapters[key], key in self._kept) for key in newest),
        ]

    def drop_run(self, run_id: str) -> None:
        self._newest.pop(run_id, None)
        for key in [key for key in self._kept if key.run_id == run_id]:
            del self._kept[key]

    def sweep(self, used: Collection[AdapterKey]) -> dict[AdapterKey, A]:
        """Forget versions that nobody can ask for any more; returns them."""
        needed = {*used, *self._newest.values(), *self._kept}
        gone = {key: a for key, a in self._adapters.items() if key not in needed}
        self._adapters = {k: a for k, a in self._adapters.items() if k in needed}
        self._keys = {name: k for name, k in self._keys.items() if k in needed}
        return gone

    def holds(self, key: AdapterKey) -> bool:
        return key in self._adapters

    def runs(self) -> list[str]:
        return list(self._newest)

    def newest(self, run_id: str) -> int | None:
        key = self._newest.get(run_id)
        return None if key is None else key.version

    def resolve(self, policy: PolicyRef) -> AdapterKey:
        """
        Raises:
            NotFound: this sampler does not hold the run, or not that version any more.
            InvalidInput: a version without a run.
        """
        if policy.run_id is None:
            if policy.version is not None:
                raise InvalidInput("the base model has no versions: give a run_id too")
            return BASE
        newest = self._newest.get(policy.run_id)
        if newest is None:
            raise NotFound(
                f"the sampler holds no weights of run {policy.run_id!r}; publish them with "
                "save_weights_and_get_sampling_client() or live_sampling_client()"
            )
        if policy.version is None:
            return newest
        key = self._keys.get((policy.run_id, policy.version))
        if key is None:
            raise NotFound(
                f"the sampler no longer holds version {policy.version} of run {policy.run_id!r} "
                f"(newest: {newest.version}); save_weights_for_sampler() keeps one for good"
            )
        return key

    def adapter(self, key: AdapterKey) -> A | None:
        return None if key == BASE else self._adapters[key]
