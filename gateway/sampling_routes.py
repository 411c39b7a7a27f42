"""Routes of sampling sessions, and of waiting for any request's answer."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from ..primitives.errors import InvalidInput, NotFound
from ..primitives.types import PolicyRef, SampleRequest
from .core import Gateway, sample_id
from .futures import Answer
from .provenance import record
from .requests import (
    CreateSamplingSession,
    RequestRef,
    RetrieveFuture,
    RetrieveFutures,
    Sample,
    SamplingSessionRef,
)
from .store import Result
from .wire import write_sample_response

PROTOBUF = "application/x-protobuf"
INLINE_BYTES = 8 << 20  # larger answers are announced first, so that clients can make room


class Lost(NotFound):
    """The request was under way when the server stopped (HTTP 410: clients sample again)."""


def sampling_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["sampling"])
    settings = gateway.settings

    @router.post("/create_sampling_session")
    async def create_sampling_session(
        request: Request, body: CreateSamplingSession
    ) -> dict[str, Any]:
        session = await gateway.active_session(gateway.access.owner(request), body.session_id)
        sampler_id = await gateway.create_sampler(
            session, body.sampling_session_seq_id, body.base_model, body.model_path
        )
        return {"type": "create_sampling_session", "sampling_session_id": sampler_id}

    @router.post("/join_sampling_session")
    async def join_sampling_session(request: Request, body: SamplingSessionRef) -> dict[str, Any]:
        owner = gateway.access.owner(request)
        _, sampler = await gateway.sampler(owner, body.sampling_session_id)
        row = await gateway.store.next_client(sampler.row)
        return {"type": "join_sampling_session", "client_counter": row.clients}

    @router.get("/samplers/{sampler_id}")
    async def get_sampler(request: Request, sampler_id: str) -> dict[str, Any]:
        owner = gateway.access.owner(request)
        row = await gateway.sampler_row(owner, sampler_id)
        found = {"sampler_id": sampler_id, "base_model": row.base_model}
        return found if row.model_path is None else {**found, "model_path": row.model_path}

    @router.post("/asample")
    async def asample(request: Request, body: Sample) -> dict[str, Any]:
        owner = gateway.access.owner(request)
        session, sampler = await gateway.sampler(owner, body.sampling_session_id)
        request_id = sample_id(body.sampling_session_id, body.seq_id)
        names = [f"{request_id}:{i}" for i in range(body.num_samples)]
        await gateway.let_sample(owner, request_id)

        async def work() -> Answer:
            native, csr = sample_request(body, settings.max_decoded_bytes // 8)
            response = await gateway.sample(sampler, request_id, native)
            gateway.rates.take(owner, sum(len(sequence.tokens) for sequence in response.sequences))
            if body.record_stability_info:
                await record(gateway.store, session.session_id, names, native.prompt, response)
            return Answer.proto(write_sample_response(response, csr))

        session.samples.add(request_id)
        if await gateway.futures.begin(request_id, owner, work):
            gateway.rates.take(owner, body.prompt.size)
        else:
            known = gateway.futures.settled(request_id)
            if known.done():
                session.samples.discard(request_id)
        return {"request_id": request_id, "sample_sequence_ids": names}

    @router.post("/retrieve_future", response_model=None)
    async def retrieve_future(request: Request, body: RetrieveFuture) -> Response | dict[str, Any]:
        owner = gateway.access.owner(request)
        try:
            result = await gateway.futures.wait(body.request_id, owner, settings.poll_s)
        except NotFound:
            await refuse_lost(owner, body.request_id)
            if not await gateway.lost_operation(owner, body.request_id):
                raise
            await gateway.recover(owner, body.request_id)
            result = await gateway.futures.wait(body.request_id, owner, settings.poll_s)
        if result is None:
            return {
                "type": "try_again",
                "request_id": body.request_id,
                "queue_state": "active",
            }
        return reply(result, body.allow_metadata_only)

    async def refuse_lost(owner: str, request_id: str) -> None:
        """
        Raises:
            Lost: a sampling session of this owner could have asked for it.
        """
        sampler_id, _, number = request_id.rpartition(":")
        row = await gateway.store.sampler(sampler_id)
        if row is not None and row.owner == owner and number.isdigit():
            raise Lost(f"request {request_id} was lost when the server stopped: sample again")

    @router.post("/retrieve_futures")
    async def retrieve_futures(request: Request, body: RetrieveFutures) -> dict[str, Any]:
        owner = gateway.access.owner(request)
        await gateway.sampler(owner, body.target.sampling_session_id)
        prefix = f"{body.target.sampling_session_id}:"
        done = [name for name in body.retrieved_request_ids if name.startswith(prefix)]
        if done:
            await gateway.store.drop_results(owner, done)
        wait = settings.poll_s if body.timeout is None else body.timeout
        completions, cursor = await gateway.completions.wait(
            body.target.sampling_session_id,
            body.target.cloned_sampler_id,
            body.prev_cursor,
            min(max(wait, 0.0), settings.poll_s),
        )
        return {"completions": completions, "cursor": cursor}

    @router.post("/cancel_future")
    async def cancel_future(request: Request, body: RequestRef) -> dict[str, Any]:
        """Of samples alone: an operation of a run's log cannot be taken out of its middle."""
        owner = gateway.access.owner(request)
        if ":sample:" in body.request_id:
            gateway.futures.cancel(body.request_id, owner)
        return {"request_id": body.request_id}

    return router


def reply(result: Result, metadata_only: bool) -> Response | dict[str, Any]:
    if metadata_only and len(result.body) > INLINE_BYTES:
        return {"status": "complete_metadata", "response_payload_size": len(result.body)}
    media = PROTOBUF if result.kind == "proto" else "application/json"
    return Response(result.body, media_type=media)


def sample_request(
    body: Sample, max_size: int
) -> tuple[SampleRequest, tuple[np.ndarray, np.ndarray] | None]:
    """The native request, and the row pointers and columns of sparse targets.

    Raises:
        InvalidInput: whatever is wrong with it.
    """
    prompt = body.prompt.tokens()
    targets, csr = None, None
    if body.target_prompt_logprobs is not None:
        tensor = body.target_prompt_logprobs
        if tensor.dtype != "int64":
            raise InvalidInput("target_prompt_logprobs must hold int64 token ids")
        targets = tensor.array(-1, max_size)
        if tensor.sparse_crow_indices is not None:
            csr = (
                np.array(tensor.sparse_crow_indices, np.int64),
                np.array(tensor.sparse_col_indices, np.int64),
            )
    request = SampleRequest(
        prompt,
        body.sampling_params.params(),
        PolicyRef(),
        body.num_samples,
        prompt_logprobs=bool(body.prompt_logprobs),
        topk_prompt_logprobs=body.topk_prompt_logprobs,
        prompt_logprobs_last_n=body.prompt_logprobs_last_n,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=body.prompt_alt_tokens_k,
        topk_sample_logprobs=body.topk_sample_logprobs,
    )
    return request, csr
