"""Routes that look things up and look after them: runs, checkpoints, sessions, exports."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from ..actors.archive import adapter_archive, adapter_file, adapter_sizes
from ..actors.storage import Storage
from ..primitives.errors import InvalidInput, NotFound
from ..primitives.op import Op
from ..primitives.paths import CheckpointPath
from ..primitives.types import Checkpoint, TrainingRun
from . import encryption
from .core import Gateway
from .requests import CopyWeights, SearchSessions, SetTtl, WeightsInfo, strings
from .store import SessionRow

CHECKPOINT_TYPES = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
Kind = Literal["weights", "sampler_weights", "external_weights"]
Limit = Annotated[int, Query(ge=0, le=100_000)]
Offset = Annotated[int, Query(ge=0, le=1 << 40)]
URL_LIFE_S = 3600.0


def rest_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["runs and checkpoints"])
    controller, storage = gateway.controller, Storage(gateway.service.home)
    signing_key = secrets.token_bytes(32)

    # ---- runs ----

    @router.get("/training_runs")
    async def training_runs(
        request: Request, limit: Limit = 20, offset: Offset = 0
    ) -> dict[str, Any]:
        owner = gateway.access.owner(request)
        runs = await gateway.owned_runs(owner)
        page = runs[offset : offset + limit]
        return {
            "training_runs": [await run_json(owner, run) for run in page],
            "cursor": {"offset": offset, "limit": limit, "total_count": len(runs)},
        }

    @router.get("/training_runs/{run_id}")
    async def training_run(request: Request, run_id: str) -> dict[str, Any]:
        owner = gateway.access.owner(request)
        return await run_json(owner, await owned_run(owner, run_id))

    @router.get("/training_runs/{run_id}/checkpoints")
    async def run_checkpoints(request: Request, run_id: str) -> dict[str, Any]:
        run = await owned_run(gateway.access.owner(request), run_id)
        found = await Op(controller.call("list_checkpoints", run.run_id))
        return {"checkpoints": [checkpoint_json(checkpoint) for checkpoint in found]}

    async def owned_run(owner: str, run_id: str) -> TrainingRun:
        if not await gateway.owns_run(owner, run_id):
            raise NotFound(f"no training run {run_id!r}")
        return await gateway.training_run(run_id)

    async def run_json(owner: str, run: TrainingRun) -> dict[str, Any]:
        found = {
            "training_run_id": run.run_id,
            "base_model": await gateway.base_model(run.run_id),
            "model_owner": owner,
            "is_lora": True,
            "lora_rank": run.lora.rank,
            "last_request_time": _time(run.last_request),
            "user_metadata": strings(run.user_metadata) or None,
        }
        checkpoints = await Op(controller.call("list_checkpoints", run.run_id))
        for field, kind in (
            ("last_checkpoint", "weights"),
            ("last_sampler_checkpoint", "sampler_weights"),
        ):
            newest = next((c for c in checkpoints if c.kind == kind), None)
            if newest is not None:
                found[field] = checkpoint_json(newest)
        return found

    # ---- checkpoints ----

    @router.get("/checkpoints")
    async def checkpoints(
        request: Request, limit: Limit = 100, offset: Offset = 0
    ) -> dict[str, Any]:
        mine = {run.run_id for run in await gateway.owned_runs(gateway.access.owner(request))}
        found = [c for c in await Op(controller.call("list_checkpoints", None)) if c.run_id in mine]
        return {
            "checkpoints": [checkpoint_json(c) for c in found[offset : offset + limit]],
            "cursor": {"offset": offset, "limit": limit, "total_count": len(found)},
        }

    async def own_checkpoint(request: Request, run_id: str, kind: str, name: str) -> str:
        path = str(CheckpointPath(run_id, kind, name))
        await gateway.checkpoint(gateway.access.owner(request), path, own=True)
        return path

    @router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}")
    async def delete(request: Request, run_id: str, kind: Kind, name: str) -> dict[str, str]:
        path = await own_checkpoint(request, run_id, kind, name)
        await Op(controller.call("delete_checkpoint", path))
        return {"tinker_path": path}

    @router.post("/training_runs/{run_id}/checkpoints/{kind}/{name}/publish")
    async def publish(request: Request, run_id: str, kind: Kind, name: str) -> dict[str, str]:
        path = await own_checkpoint(request, run_id, kind, name)
        await Op(controller.call("publish_checkpoint", path, True))
        return {"tinker_path": path}

    @router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}/publish")
    async def unpublish(request: Request, run_id: str, kind: Kind, name: str) -> dict[str, str]:
        path = await own_checkpoint(request, run_id, kind, name)
        await Op(controller.call("publish_checkpoint", path, False))
        return {"tinker_path": path}

    @router.put("/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl")
    async def set_ttl(
        request: Request, run_id: str, kind: Kind, name: str, body: SetTtl
    ) -> dict[str, str]:
        path = await own_checkpoint(request, run_id, kind, name)
        await Op(controller.call("set_checkpoint_ttl", path, body.ttl_seconds))
        return {"tinker_path": path}

    @router.get(
        "/training_runs/{run_id}/checkpoints/{kind}/{name}/archive",
        response_class=StreamingResponse,
    )
    async def archive(request: Request, run_id: str, kind: Kind, name: str) -> StreamingResponse:
        """The checkpoint's adapter as a tar.gz that PEFT loads once unpacked."""
        path = str(CheckpointPath(run_id, kind, name))
        await gateway.checkpoint(gateway.access.owner(request), path)
        parts = await asyncio.to_thread(adapter_archive, storage, path)
        return StreamingResponse(parts, media_type="application/gzip")

    @router.get("/training_runs/{run_id}/checkpoints/{kind}/{name}/external_weights_urls")
    async def external_weights_urls(
        request: Request, run_id: str, kind: Kind, name: str
    ) -> dict[str, Any]:
        """Addresses of the files, good for an hour for whoever has them."""
        path = str(CheckpointPath(run_id, kind, name))
        checkpoint = await gateway.checkpoint(gateway.access.owner(request), path)
        files = await asyncio.to_thread(adapter_sizes, storage, path)
        suffix = encryption.SUFFIX if encryption.recipients_of(checkpoint) else ""
        expires = time.time() + URL_LIFE_S
        urls = {}
        for file in (file + suffix for file in files):
            ticket = f"{int(expires)}.{signature(path, file, int(expires))}"
            address = request.url_for(
                "signed_file", run_id=run_id, kind=kind, name=name, file=file, ticket=ticket
            )
            urls[file] = str(address)
        return {"urls": urls, "expires": _time(expires)}

    def signature(path: str, file: str, expires: int) -> str:
        message = json.dumps([path, file, expires]).encode()
        return hmac.new(signing_key, message, hashlib.sha256).hexdigest()

    @router.get("/files/{ticket}/{run_id}/{kind}/{name}/{file}", name="signed_file")
    async def signed_file(ticket: str, run_id: str, kind: Kind, name: str, file: str) -> Response:
        path = str(CheckpointPath(run_id, kind, name))
        expires, _, given = ticket.partition(".")
        good = (
            len(expires) < 16
            and expires.isdecimal()
            and hmac.compare_digest(given.encode(), signature(path, file, int(expires)).encode())
        )
        if not good or int(expires) < time.time():
            raise NotFound("this address is not valid, or not any more: ask for new ones")
        recipients = encryption.recipients_of(await Op(controller.call("get_checkpoint", path)))
        plain = file.removesuffix(encryption.SUFFIX) if recipients else file
        data = await asyncio.to_thread(adapter_file, storage, path, plain)
        if recipients:
            data = await asyncio.to_thread(encryption.seal, data, recipients)
        return Response(data, media_type="application/octet-stream")

    @router.post("/weights_info")
    async def weights_info(request: Request, body: WeightsInfo) -> dict[str, Any]:
        checkpoint = await gateway.checkpoint(gateway.access.owner(request), body.tinker_path)
        run = await gateway.training_run(checkpoint.run_id)
        return {
            "base_model": await gateway.base_model(run.run_id),
            "is_lora": True,
            "lora_rank": run.lora.rank,
            "train_unembed": run.lora.train_unembed,
            "train_mlp": run.lora.train_mlp,
            "train_attn": run.lora.train_attn,
        }

    @router.post("/copy_weights")
    async def copy_weights(request: Request, body: CopyWeights) -> dict[str, str]:
        owner = gateway.access.owner(request)
        await gateway.checkpoint(owner, body.source_path)
        if body.session_id is None or body.model_seq_id is None:
            raise InvalidInput(
                "there are no projects here: give session_id and model_seq_id of the run to copy to"
            )
        session = await gateway.active_session(owner, body.session_id)
        run_id = f"{session.session_id}:train:{body.model_seq_id}"
        await owned_run(owner, run_id)
        path = await Op(controller.call("copy_checkpoint", body.source_path, run_id))
        if body.ttl_seconds is not None:
            await Op(controller.call("set_checkpoint_ttl", path, body.ttl_seconds))
        return {"tinker_path": path}

    # ---- sessions ----

    @router.get("/sessions")
    async def sessions(request: Request, limit: Limit = 20, offset: Offset = 0) -> dict[str, Any]:
        rows = await gateway.store.sessions(gateway.access.owner(request))
        return {"sessions": [row.session_id for row in rows[offset : offset + limit]]}

    async def own_session(request: Request, session_id: str) -> SessionRow:
        row = await gateway.store.session(session_id)
        if row is None or row.owner != gateway.access.owner(request):
            raise NotFound(f"no session {session_id!r}")
        return row

    @router.get("/sessions/{session_id}")
    async def get_session(request: Request, session_id: str) -> dict[str, Any]:
        row = await own_session(request, session_id)
        runs = await gateway.store.runs(row.owner, session_id)
        samplers = await gateway.store.samplers(session_id)
        return {
            "training_run_ids": [run.run_id for run in runs],
            "sampler_ids": [sampler.sampler_id for sampler in samplers],
            "user_metadata": strings(row.user_metadata) or None,
            "display_name": row.display_name,
        }

    @router.put("/sessions/{session_id}/project")
    async def set_project(request: Request, session_id: str) -> None:
        await own_session(request, session_id)
        raise InvalidInput("there are no projects here: owners have their sessions to themselves")

    @router.get("/sessions/{session_id}/trace_export")
    async def trace_export(request: Request, session_id: str) -> None:
        await own_session(request, session_id)
        raise NotFound("this server keeps no traces")

    @router.post("/sessions/search")
    async def search_sessions(request: Request, body: SearchSessions) -> dict[str, Any]:
        """Newest first; `cursor` is the previous answer's `next_cursor`."""
        owner = gateway.access.owner(request)
        rows = [row for row in await gateway.store.sessions(owner) if _matches(row, body)]
        if body.cursor is not None:
            last = body.cursor.get("last_session_id")
            ids = [row.session_id for row in rows]
            if last not in ids:
                raise InvalidInput("the cursor names no session of this search")
            rows = rows[ids.index(last) + 1 :]
        page = rows[: body.limit]
        found: dict[str, Any] = {"sessions": [await session_json(row) for row in page]}
        if len(rows) > len(page):
            found["next_cursor"] = {
                "last_created_at": _time(page[-1].created),
                "last_session_id": page[-1].session_id,
            }
        return found

    async def session_json(row: SessionRow) -> dict[str, Any]:
        count, size = 0, 0
        for run in await gateway.store.runs(row.owner, row.session_id):
            for checkpoint in await Op(controller.call("list_checkpoints", run.run_id)):
                count, size = count + 1, size + checkpoint.size_bytes
        return {
            "session_id": row.session_id,
            "created_at": _time(row.created),
            "owner": row.owner,
            "project_id": "",
            "status": _status(row),
            "checkpoints_count": count,
            "checkpoint_storage_bytes": size,
            "display_name": row.display_name,
            "user_metadata": strings(row.user_metadata) or None,
        }

    # ---- what a hosted service would charge and log: nothing ----

    @router.get("/billing/usage/events")
    async def billing_events(request: Request) -> dict[str, Any]:
        gateway.access.owner(request)
        return {"data": [], "sessions": {}}

    @router.get("/billing/usage/checkpoints/current")
    async def billing_checkpoints(request: Request) -> dict[str, Any]:
        gateway.access.owner(request)
        return {"data": []}

    @router.get("/audit")
    async def audit(request: Request) -> dict[str, Any]:
        gateway.access.owner(request)
        return {"entries": []}

    return router


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    found = {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": CHECKPOINT_TYPES[checkpoint.kind],
        "time": _time(checkpoint.created),
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.public,
        "user_metadata": strings(checkpoint.user_metadata) or None,
    }
    if checkpoint.expires is not None:
        found["expires_at"] = _time(checkpoint.expires)
    return found


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _status(row: SessionRow) -> dict[str, Any] | None:
    if row.status == "active":
        return {"type": "active"}
    if row.status == "expired":
        return None
    return {"type": "client_finished", "reason": {"type": row.status}, "detail": row.detail}


def _matches(row: SessionRow, wanted: SearchSessions) -> bool:
    names = []
    if wanted.session_id is not None:
        names.append(row.session_id == wanted.session_id)
    if wanted.display_name is not None:
        shown = (row.display_name or "").lower()
        names.append(all(word in shown for word in wanted.display_name.lower().split()))
    if names and not any(names):
        return False
    if any(row.user_metadata.get(k) != v for k, v in wanted.user_metadata.items()):
        return False
    status = _status(row)
    return wanted.statuses is None or any(
        status is not None
        and status["type"] == query.type
        and (query.reasons is None or status.get("reason", {}).get("type") in query.reasons)
        for query in wanted.statuses
    )
