"""Whose request this is."""

from __future__ import annotations

from typing import Protocol

from fastapi import Request

from ..primitives.errors import TinsmithError
from .quotas import Quota

EVERYBODY = "local"


def is_local(request: Request) -> bool:
    """Whether the client is on this machine."""
    return request.client is not None and request.client.host in ("127.0.0.1", "::1")


class Keys(Protocol):
    def owner(self, key: str) -> str | None: ...

    def quota(self, owner: str) -> Quota: ...


class Unauthorized(TinsmithError):
    """No key, or none that is known (HTTP 401)."""


class Access:
    """With a key file every request needs one of its keys; without, everybody is one owner."""

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys = keys

    @property
    def closed(self) -> bool:
        return self._keys is not None

    def owner(self, request: Request) -> str:
        """
        Raises:
            Unauthorized: no key, or none that is known.
        """
        if self._keys is None:
            return EVERYBODY
        key = request.headers.get("x-api-key")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if key is None and scheme.lower() == "bearer":
            key = token.strip()
        owner = self._keys.owner(key) if key else None
        if owner is None:
            raise Unauthorized("send a valid API key: TINKER_API_KEY, or a bearer token")
        return owner

    def quota(self, owner: str) -> Quota:
        """What the owner may use: without keys, all."""
        return Quota() if self._keys is None else self._keys.quota(owner)
