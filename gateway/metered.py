"""Sampling whose tokens are counted."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

from ..primitives.client import SamplingClient
from ..primitives.op import Op
from ..primitives.sampler_link import SamplerGrant
from ..primitives.types import SampledToken, SampleResponse


class MeteredClient(SamplingClient):
    """
    Args:
        count: called with the tokens of prompts as they come, and of samples as they are drawn.
    """

    def __init__(self, grant: Future[SamplerGrant], count: Callable[[int], None]) -> None:
        super().__init__(grant)
        self._count = count

    def sample(self, prompt: Any, *args: Any, **kwargs: Any) -> Op[SampleResponse]:
        self._count(len(prompt))

        def counted(response: SampleResponse) -> SampleResponse:
            self._count(sum(len(sequence.tokens) for sequence in response.sequences))
            return response

        return super().sample(prompt, *args, **kwargs).then(counted)

    async def sample_stream(
        self, prompt: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[SampledToken]:
        self._count(len(prompt))
        async with aclosing(super().sample_stream(prompt, *args, **kwargs)) as stream:
            async for token in stream:
                self._count(1)
                yield token
