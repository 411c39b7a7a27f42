"""Routes of a run's log: every operation is accepted with a request id and answered through it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request

from ..engines.models import model_facts
from ..primitives.errors import InvalidInput, OutOfCapacity
from ..primitives.op import Op
from ..primitives.types import PolicyRef, PublishResponse
from ..primitives.validation import check_ttl
from .access import is_local
from .body_limit import TooLarge
from .core import Gateway, Run
from .encryption import recipients_metadata
from .futures import Answer
from .provenance import with_recorded
from .requests import CreateModel, LoadWeights, Lora, ModelRef, OptimStep, SaveWeights, strings
from .wire import (
    HEAD_BYTES,
    TrainingRequest,
    decompress,
    place_in_log,
    read_training_request,
)

T = TypeVar("T")
LARGE_BYTES = 1 << 18


def training_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["training"])
    settings = gateway.settings

    @router.post("/create_model")
    async def create_model(request: Request, body: CreateModel) -> dict[str, Any]:
        session = await gateway.active_session(gateway.access.owner(request), body.session_id)
        body.optimizer_config.check()
        lora = (body.lora_config or Lora()).config()
        request_id = await gateway.create_run(
            session,
            body.model_seq_id,
            body.base_model,
            lora,
            None,
            False,
            body.user_metadata or {},
        )
        return {"request_id": request_id}

    @router.post("/load_weights")
    async def load_weights(request: Request, body: LoadWeights) -> dict[str, Any]:
        """A new run from a checkpoint, or a checkpoint into a run that is there."""
        owner = gateway.access.owner(request)
        if body.optimizer_config is not None:
            body.optimizer_config.check()
        if body.session_id is not None and body.model_seq_id is not None:
            session = await gateway.active_session(owner, body.session_id)
            request_id = await gateway.create_run(
                session,
                body.model_seq_id,
                body.base_model,
                None,
                body.path,
                body.optimizer,
                body.user_metadata or {},
            )
            return {"request_id": request_id}
        if body.model_id is None or body.seq_id is None:
            raise InvalidInput("give session_id and model_seq_id, or model_id and seq_id")
        run = await gateway.run(owner, body.model_id)

        async def args() -> dict[str, Any]:
            await gateway.checkpoint(owner, body.path)
            return {"path": body.path, "optimizer": body.optimizer}

        return await gateway.operate(run, body.seq_id, "load_state", args)

    @router.post("/get_info")
    async def get_info(request: Request, body: ModelRef) -> dict[str, Any]:
        owner = gateway.access.owner(request)
        run = await gateway.run(owner, body.model_id)
        facts = await gateway.training_run(body.model_id)
        data: dict[str, Any] = {"model_name": run.row.base_model}
        if run.grant is not None:
            grant = await asyncio.shield(run.grant)
            data["arch"] = (await asyncio.to_thread(model_facts, grant.model_path)).family
            if is_local(request):
                # The tokenizer that the engines use, for clients that see the same files.
                data["tokenizer_id"] = grant.model_path
        return {
            "type": "get_info",
            "model_id": body.model_id,
            "model_data": data,
            "is_lora": True,
            "lora_rank": facts.lora.rank,
            "model_name": run.row.base_model,
        }

    @router.post("/forward_backward", openapi_extra=_PROTO_BODY)
    async def forward_backward(request: Request) -> dict[str, Any]:
        owner = gateway.access.owner(request)
        body = await read_body(request, owner)
        message = await aside(body, read_training_request, settings.max_decoded_bytes)
        run = await gateway.run(owner, message.run_id)
        kind = "forward" if message.forward_only else "forward_backward"

        async def args() -> dict[str, Any]:
            if message.error is not None:
                raise message.error
            return await training_args(gateway, run, message)

        tokens = sum(len(datum.model_input.tokens) for datum in message.data)
        return await gateway.operate(run, message.seq_id, kind, args, size=len(body), tokens=tokens)

    async def read_body(request: Request, owner: str) -> bytes:
        encoding, body = request.headers.get("content-encoding"), bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
            return await aside(bytes(body), decompress, encoding, settings.max_decoded_bytes)
        except (OutOfCapacity, TooLarge) as error:
            if isinstance(error, TooLarge):
                body += error.part
            place = place_in_log(bytes(body[:HEAD_BYTES]), encoding)
            if place is not None:
                await gateway.skip(owner, *place)
            raise

    @router.post("/optim_step")
    async def optim_step(request: Request, body: OptimStep) -> dict[str, Any]:
        run = await gateway.run(gateway.access.owner(request), body.model_id)

        async def args() -> dict[str, Any]:
            return {"adam_params": body.params()}

        return await gateway.operate(run, body.seq_id, "optim_step", args)

    @router.post("/save_weights")
    async def save_weights(request: Request, body: SaveWeights) -> dict[str, Any]:
        run = await gateway.run(gateway.access.owner(request), body.model_id)

        async def args() -> dict[str, Any]:
            return {**_named(body), "overwrite": body.overwrite}

        return await gateway.operate(run, body.seq_id, "save_state", args)

    @router.post("/save_weights_external")
    async def save_weights_external(request: Request, body: SaveWeights) -> dict[str, Any]:
        run = await gateway.run(gateway.access.owner(request), body.model_id)

        async def args() -> dict[str, Any]:
            named = _named(body)
            named["user_metadata"] |= recipients_metadata(body.age_encryption_recipients or [])
            return named

        return await gateway.operate(run, body.seq_id, "save_weights_external", args)

    @router.post("/save_weights_for_sampler")
    async def save_weights_for_sampler(request: Request, body: SaveWeights) -> dict[str, Any]:
        """Under a name, or for a sampling session of its own."""
        owner = gateway.access.owner(request)
        run = await gateway.run(owner, body.model_id)
        if body.sampling_session_seq_id is None:

            async def args() -> dict[str, Any]:
                return {**_named(body), "overwrite": body.overwrite}

            return await gateway.operate(run, body.seq_id, "save_weights_for_sampler", args)

        session = await gateway.active_session(owner, run.row.session_id)
        pinned = body.kind == "snapshot"

        async def sampler(response: PublishResponse) -> Answer:
            policy = PolicyRef(body.model_id, response.version if pinned else None)
            sampler_id = await gateway.create_sampler(
                session,
                body.sampling_session_seq_id or 0,
                base_model=run.row.base_model,
                policy=policy,
            )
            return Answer.json(
                {"type": "save_weights_for_sampler", "sampling_session_id": sampler_id}
            )

        async def publish() -> dict[str, Any]:
            return {"keep": pinned, "every_step": False}

        return await gateway.operate(run, body.seq_id, "publish", publish, sampler)

    @router.post("/unload_model")
    async def unload_model(request: Request, body: ModelRef) -> dict[str, Any]:
        run = await gateway.run(gateway.access.owner(request), body.model_id)
        if run.grant is not None:
            await Op(gateway.controller.call("close_run", body.model_id))
            run.grant = None
        return {"type": "unload_model", "model_id": body.model_id}

    return router


_PROTO_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/x-protobuf": {"schema": {"type": "string", "format": "binary"}}},
    }
}


async def aside(body: bytes, function: Callable[..., T], *args: Any) -> T:
    """`function(body, *args)`, in a thread where a large body would keep other clients waiting."""
    if len(body) < LARGE_BYTES:
        return function(body, *args)
    return await asyncio.to_thread(function, body, *args)


async def training_args(gateway: Gateway, run: Run, message: TrainingRequest) -> dict[str, Any]:
    """
    Raises:
        InvalidInput: a loss that there is not, or a setting that is no number.
    """
    if message.loss_fn == "custom":
        raise InvalidInput("custom losses run in the client here: forward_backward_custom()")
    config = {}
    for key, value in message.config.items():
        if isinstance(value, str):
            raise InvalidInput(f"loss_fn_config[{key!r}] must be a number, got {value!r}")
        config[key] = value
    data = message.data
    if message.loss_fn == "stable_reinforce":
        data = await with_recorded(gateway.store, run.row.session_id, message)
    return {
        "data": data,
        "loss_fn": message.loss_fn,
        "loss_fn_config": config,
        "logprobs": "all",
    }


def _named(body: SaveWeights) -> dict[str, Any]:
    if body.path is None:
        raise InvalidInput("give the checkpoint a name: path")
    metadata = strings(body.user_metadata or {})
    return {
        "name": body.path,
        "user_metadata": metadata,
        "ttl_seconds": check_ttl(body.ttl_seconds),
    }
