"""Which adapter versions a sampler holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from ..primitives.errors import InvalidInput, NotFound
from ..primitives.types import PolicyRef
from .lora import Adapter

AdapterKey = tuple[str, int]
"""(run id, version); the bare base model is `BASE`."""

BASE: AdapterKey = ("", 0)


class AdapterStore:
    """Adapters by run and version. The newest version of a run is always kept, and so are those
    that requests use; others only if `keep` was asked for, the last `max_kept` of them."""

    def __init__(self, max_kept: int = 32) -> None:
        self.max_kept = max_kept
        self._adapters: dict[AdapterKey, Adapter] = {}
        self._newest: dict[str, int] = {}
        self._kept: OrderedDict[AdapterKey, None] = OrderedDict()

    def add(self, run_id: str, version: int, adapter: Adapter, keep: bool) -> None:
        key = (run_id, version)
        self._adapters[key] = adapter
        self._newest[run_id] = version
        if keep:
            self._kept[key] = None
            self._kept.move_to_end(key)
            while len(self._kept) > self.max_kept:
                self._kept.popitem(last=False)

    def drop_run(self, run_id: str) -> None:
        self._newest.pop(run_id, None)
        for key in [key for key in self._kept if key[0] == run_id]:
            del self._kept[key]

    def sweep(self, used: Collection[AdapterKey]) -> None:
        """Forget versions that nobody can ask for any more."""
        newest = set(self._newest.items())
        for key in list(self._adapters):
            if key not in used and key not in newest and key not in self._kept:
                del self._adapters[key]

    def newest(self, run_id: str) -> int | None:
        return self._newest.get(run_id)

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
        key = (policy.run_id, newest if policy.version is None else policy.version)
        if key not in self._adapters:
            raise NotFound(
                f"the sampler no longer holds version {policy.version} of run "
                f"{policy.run_id!r} (newest: {newest}); save_weights_for_sampler() keeps one for good"
            )
        return key

    def adapter(self, key: AdapterKey) -> Adapter | None:
        return None if key == BASE else self._adapters[key]
