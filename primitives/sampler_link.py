"""The way to a policy's sampler, which may die and be started again meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from .errors import OpCancelled, Unavailable
from .op import Handle, Op, failed
from .resending import Resending
from .types import PolicyRef, SampledToken, SampleRequest, SampleResponse


@dataclass(frozen=True)
class SamplerGrant:
    """What the controller hands out for a policy: the way to a sampler that can serve it, and to the
    controller, for when the sampler dies."""

    base_model: str
    model_path: str
    sampler: Handle
    policy: PolicyRef
    controller: Handle


class SamplerLink:
    """Sends a policy's requests. When the sampler dies under one, the controller is asked for the one
    that takes its place, which holds the policy again, and the request is sent again: with a seed it
    gives the same tokens."""

    def __init__(self, grant: SamplerGrant) -> None:
        self._way = Resending(
            grant,
            lambda held: held.sampler,
            lambda held: held.controller.call("grant_sampler", held.base_model, held.policy),
            grant.controller,
        )
        self._withdrawn: set[str | None] = set()

    @property
    def grant(self) -> SamplerGrant:
        return self._way.grant

    def sample(self, request: SampleRequest, name: str | None = None) -> Future[SampleResponse]:
        """`name`, unique among those under way, is what `withdraw` calls the request."""

        def call(grant: SamplerGrant) -> Future[SampleResponse]:
            if name in self._withdrawn:
                return failed(OpCancelled("the sampling request was withdrawn"))
            return grant.sampler.call("sample", replace(request, policy=grant.policy), name)

        sent = self._way.send(call, f"request {request.request_id}")
        sent.add_done_callback(lambda _: self._withdrawn.discard(name))
        return sent

    def withdraw(self, name: str) -> None:
        """End a request under way: it fails with `OpCancelled`."""
        self._withdrawn.add(name)
        self.grant.sampler.call("withdraw", name)

    async def stream(self, request: SampleRequest) -> AsyncIterator[SampledToken]:
        """A stream that has given something is not begun again: it fails with `Unavailable`."""
        while True:
            grant, told = self.grant, False
            stream: Any = grant.sampler.stream("stream", replace(request, policy=grant.policy))
            try:
                async with aclosing(stream):
                    async for token in stream:
                        told = True
                        yield token
                return
            except Unavailable as error:
                if told:
                    raise
                await Op(self._way.successor(grant, error, f"request {request.request_id}"))
