"""Which adapter versions a sampler holds."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection
from hashlib import blake2b
from typing import NamedTuple

import torch

from ..primitives.errors import InvalidInput, NotFound
from ..primitives.types import PolicyRef
from .lora import Adapter


class AdapterKey(NamedTuple):
    """`serial` tells apart weights that were published under the same version, as happens when a
    run goes back to an older checkpoint. The bare base model is `BASE`."""

    run_id: str
    version: int
    serial: int

    @property
    def cache_root(self) -> bytes:
        """The key that begins the chain of a cached prefix's block keys."""
        return blake2b(repr(self).encode(), digest_size=16).digest()


BASE = AdapterKey("", 0, 0)


class AdapterStore:
    """Adapters by run and version. The newest version of a run is always kept, and so are those
    that requests use; others only if `keep` was asked for, the last `max_kept` of them."""

    def __init__(self, max_kept: int = 32) -> None:
        self.max_kept = max_kept
        self._serials = itertools.count(1)
        self._adapters: dict[AdapterKey, Adapter] = {}
        self._named: dict[tuple[str, int], AdapterKey] = {}
        self._newest: dict[str, AdapterKey] = {}
        self._kept: OrderedDict[AdapterKey, None] = OrderedDict()

    def add(self, run_id: str, version: int, adapter: Adapter, keep: bool) -> None:
        key = self._named.get((run_id, version))
        if key is None or not _equal(self._adapters[key], adapter):
            if key is not None:
                self._kept.pop(key, None)
            key = AdapterKey(run_id, version, next(self._serials))
            self._adapters[key] = adapter
            self._named[run_id, version] = key
        self._newest[run_id] = key
        if keep:
            self._kept[key] = None
            self._kept.move_to_end(key)
            while len(self._kept) > self.max_kept:
                self._kept.popitem(last=False)

    def drop_run(self, run_id: str) -> None:
        self._newest.pop(run_id, None)
        for key in [key for key in self._kept if key.run_id == run_id]:
            del self._kept[key]

    def sweep(self, used: Collection[AdapterKey]) -> None:
        """Forget versions that nobody can ask for any more."""
        wanted = {*used, *self._newest.values(), *self._kept}
        self._adapters = {key: a for key, a in self._adapters.items() if key in wanted}
        self._named = {name: key for name, key in self._named.items() if key in wanted}

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
        key = self._named.get((policy.run_id, policy.version))
        if key is None:
            raise NotFound(
                f"the sampler no longer holds version {policy.version} of run {policy.run_id!r} "
                f"(newest: {newest.version}); save_weights_for_sampler() keeps one for good"
            )
        return key

    def adapter(self, key: AdapterKey) -> Adapter | None:
        return None if key == BASE else self._adapters[key]


def _equal(a: Adapter, b: Adapter) -> bool:
    return a.weights.keys() == b.weights.keys() and all(
        torch.equal(mine, its)
        for name in a.weights
        for mine, its in zip(a.weights[name], b.weights[name], strict=True)
    )
