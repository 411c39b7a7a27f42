"""Routes of a client's life: configuration, sessions, heartbeats."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request

from ..primitives.errors import InvalidInput
from .access import is_local
from .core import Gateway
from .requests import CreateSession, FinishSession, SessionRef, strings


class Gone(InvalidInput):
    """The session is over (HTTP 410: its client stops its heartbeats)."""


def session_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["sessions"])
    settings = gateway.settings

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.post("/client/config")
    async def client_config(request: Request) -> dict[str, Any]:
        compress = not is_local(request) if settings.compress is None else settings.compress
        return {
            "proto_compress_fwdbwd": compress,
            "parallel_fwdbwd_chunks": True,
            "sample_use_retrieve_futures": settings.batch_polls,
            "sample_join_sampling_session": True,
            "sample_max_concurrent_requests": settings.max_pending_samples,
            # Long prompts wait their turn here as everywhere: that is no sign of being stuck.
            "sample_enable_stuck_detection": False,
        }

    @router.post("/client/dynamic_config")
    async def dynamic_config() -> dict[str, Any]:
        return {"sample_cancel_enabled": True}

    @router.get("/get_server_capabilities")
    async def capabilities(request: Request) -> dict[str, Any]:
        gateway.access.owner(request)
        return {
            "supported_models": [
                {
                    "model_name": name,
                    "max_context_length": length,
                    "trainable": True,
                    "sampleable": True,
                }
                for name, length in await gateway.models.list()
            ]
        }

    @router.post("/create_session")
    async def create_session(request: Request, body: CreateSession) -> dict[str, Any]:
        owner = gateway.access.owner(request)
        metadata = strings(body.user_metadata or {})
        session_id = await gateway.create_session(owner, body.display_name, metadata)
        return {"type": "create_session", "session_id": session_id}

    @router.post("/session_heartbeat")
    async def heartbeat(request: Request, body: SessionRef) -> dict[str, Any]:
        session = await gateway.session(gateway.access.owner(request), body.session_id)
        if not session.active:
            raise Gone(f"session {body.session_id} is over")
        session.seen()
        return {"type": "session_heartbeat"}

    @router.post("/sessions/{session_id}/finish")
    async def finish(request: Request, session_id: str, body: FinishSession) -> dict[str, Any]:
        session = await gateway.session(gateway.access.owner(request), session_id)
        await gateway.end_session(session, body.reason.type, body.detail)
        return {"status": "ok"}

    @router.get("/auth/apikey/me")
    async def whose_key(request: Request) -> dict[str, Any]:
        """What `tinker auth login` asks about the key that it is given."""
        owner = gateway.access.owner(request)
        details = {"org_details": {"name": "tinsmith"}, "user_details": {"email": owner}}
        return {"key_id": 0, "name": owner, "note": "", "details": details}

    @router.get("/quota")
    async def quota(request: Request) -> dict[str, Any]:
        """What the key allows, None where there is no limit, and what is in use of it now."""
        allowed, used = await gateway.usage(gateway.access.owner(request))
        return {"quota": msgspec.structs.asdict(allowed), "used": used}

    @router.post("/telemetry")
    async def telemetry(request: Request) -> dict[str, str]:
        """Accepted and dropped."""
        gateway.access.owner(request)
        return {"status": "accepted"}

    return router
