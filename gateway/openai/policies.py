"""What these endpoints need to be given: who calls, and the policies that they may sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request

from ...envs.renderer import ChatRenderer
from ...primitives.client import SamplingClient


@dataclass(frozen=True)
class ServedModel:
    """A line of `GET /v1/models`. `created` is in Unix seconds."""

    name: str
    created: int
    owned_by: str = "tinsmith"


@dataclass(frozen=True)
class ServedPolicy:
    """A policy to sample from. `max_context` are the tokens that prompt and answer may have
    together, None where only the sampler knows."""

    client: SamplingClient
    tokenizer: Any
    max_context: int | None = None

    def renderer(self, template_kwargs: dict[str, Any] | None = None) -> ChatRenderer:
        """
        Raises:
            InvalidInput: the model has no chat template.
        """
        return ChatRenderer(self.tokenizer, self.max_context, template_kwargs)


class Policies(Protocol):
    async def owner(self, request: Request) -> str:
        """Who calls.

        Raises:
            HTTPException: 401, no key or a wrong one.
        """
        ...

    async def models(self, owner: str) -> list[ServedModel]:
        """What this owner may name as `model`."""
        ...

    async def open(self, owner: str, model: str) -> ServedPolicy:
        """
        Raises:
            NotFound: no such model, or not this owner's.
        """
        ...
