"""What the OpenAI-compatible endpoints call `model`: a base model by name, a checkpoint by its
path, or a run by its id, then the newest weights that it published."""

from __future__ import annotations

import asyncio
from functools import lru_cache, partial
from typing import Any

from fastapi import HTTPException, Request

from ..engines.models import model_facts
from ..primitives.client import load_tokenizer
from ..primitives.errors import TinsmithError
from ..primitives.op import Op, completed
from ..primitives.paths import SCHEME
from ..primitives.sampler_link import SamplerGrant
from ..primitives.types import PolicyRef
from .access import Unauthorized
from .core import Gateway
from .metered import MeteredClient
from .openai import ServedModel, ServedPolicy


class GatewayPolicies:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._tokenizer = lru_cache(16)(load_tokenizer)
        self._facts = lru_cache(16)(model_facts)
        self._checkpoints: dict[str, SamplerGrant] = {}

    async def owner(self, request: Request) -> str:
        """
        Raises:
            HTTPException: 401, no key or a wrong one.
        """
        try:
            return self._gateway.access.owner(request)
        except Unauthorized as error:
            raise HTTPException(401, str(error)) from None

    async def models(self, owner: str) -> list[ServedModel]:
        """The base models, then the owner's checkpoints, newest first."""
        names = [name for name, _ in await self._gateway.models.list()]
        checkpoints = await Op(self._gateway.controller.call("list_checkpoints", None))
        own = {run.run_id for run in await self._gateway.owned_runs(owner)}
        return [ServedModel(name, 0) for name in names] + [
            ServedModel(c.path, int(c.created), owner) for c in checkpoints if c.run_id in own
        ]

    async def open(self, owner: str, model: str) -> ServedPolicy:
        """
        Raises:
            Busy: the owner's tokens are used up for now.
            NotFound: no such model, or not this owner's.
            Unavailable: it cannot be loaded.
        """
        gateway = self._gateway
        gateway.rates.check(owner)
        if model.startswith(SCHEME):
            await gateway.checkpoint(owner, model)
            grant = await self._checkpoint(model)
        elif (run := await gateway.store.run(model)) is not None and run.owner == owner:
            known_as = await gateway.models.resolve(run.base_model)
            grant = await self._grant("grant_sampler", known_as, PolicyRef(model, None))
        else:
            known_as = await gateway.models.resolve(model)
            grant = await self._grant("grant_sampler", known_as, PolicyRef())
        gateway.used(grant.base_model)
        stats = await Op(grant.sampler.call("stats"))
        facts = await asyncio.to_thread(self._facts, grant.model_path)
        tokenizer = await asyncio.to_thread(self._tokenizer, grant.model_path)
        room = min(facts.max_context, stats["num_blocks"] * stats["block_size"])
        client = MeteredClient(completed(grant), partial(gateway.rates.take, owner))
        return ServedPolicy(client, tokenizer, room)

    async def _grant(self, method: str, *args: Any) -> SamplerGrant:
        return await Op(self._gateway.controller.call(method, *args))

    async def _checkpoint(self, path: str) -> SamplerGrant:
        """Loaded once, and again where its sampler has lost it."""
        grant = self._checkpoints.get(path)
        if grant is not None:
            try:
                if await Op(grant.sampler.call("latest_version", path)) is not None:
                    return grant
            except TinsmithError:
                pass
        self._checkpoints[path] = await self._grant("grant_checkpoint_sampler", path)
        return self._checkpoints[path]
