"""Every endpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from ...primitives.errors import NotFound
from .chat import chat_completion
from .completions import completion
from .errors import OpenAIRoute
from .policies import Policies, ServedModel
from .requests import ChatRequest, CompletionRequest
from .sessions import Session
from .store import TrajectoryStore
from .trajectories import delete_trajectory, get_trajectory, list_trajectories


def openai_router(policies: Policies, store: TrajectoryStore | None = None) -> APIRouter:
    """OpenAI-compatible endpoints over `policies`, recording trajectories in `store`."""
    kept = store or TrajectoryStore()

    async def authenticate(request: Request) -> None:
        # A dependency, so that it comes before the body's checks.
        request.state.owner = await policies.owner(request)

    router = APIRouter(
        prefix="/v1", route_class=OpenAIRoute, dependencies=[Depends(authenticate)], tags=["openai"]
    )

    @router.get("/models")
    async def models(request: Request) -> dict[str, Any]:
        served = await policies.models(request.state.owner)
        return {"object": "list", "data": [_shown(model) for model in served]}

    @router.get("/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        for served in await policies.models(request.state.owner):
            if served.name == name:
                return _shown(served)
        raise NotFound(f"no model {name!r}; GET /v1/models lists them")

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        body.check_supported()
        owner = request.state.owner
        policy = await policies.open(owner, body.model)
        return await completion(body, policy, Session.of(kept, owner, body, request))

    @router.post("/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        body.check_supported()
        owner = request.state.owner
        policy = await policies.open(owner, body.model)
        return await chat_completion(body, policy, Session.of(kept, owner, body, request))

    @router.get("/trajectories")
    async def trajectories(request: Request) -> Response:
        return list_trajectories(kept, request.state.owner)

    @router.get("/trajectories/{name:path}")
    async def trajectory(name: str, request: Request) -> Response:
        return get_trajectory(kept, request.state.owner, name)

    @router.delete("/trajectories/{name:path}")
    async def forget(name: str, request: Request) -> Response:
        return delete_trajectory(kept, request.state.owner, name)

    return router


def _shown(model: ServedModel) -> dict[str, Any]:
    facts = asdict(model)
    return {"id": facts.pop("name"), "object": "model", **facts}
