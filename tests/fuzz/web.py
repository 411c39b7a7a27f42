"""Requests to every route of a real gateway: bodies that say something odd, and bodies that are none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np

import tinsmith
from tests.data import policy_datum
from tests.fuzz.driver import Case, quiet
from tests.fuzz.odd import OTHERS, TEXTS, Rng, changed, damaged, json_value, pick
from tests.gateway.sdk import sdk_datum
from tests.gateway.serving import serving
from tests.gateway.test_wire import encode
from tests.tiny import make_tiny_model
from tinsmith.gateway.settings import Settings

MODEL = "tiny-llama"
ENDS = ("finish", "unload")  # routes that end what the other cases need
WAIT_SECONDS = 60.0


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """A service of its own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        make_tiny_model(f"{home}/models/{MODEL}", "llama")
        connecting = tinsmith.connect(
            home=home, num_cpus=2, learner_threads=1, sampler_threads=1, kv_bytes=1 << 24
        )
        # Ray's processes end with the thread that started them, which is the event loop's.
        with asyncio.Runner() as runner:
            service = runner.run(connecting.__aenter__())
            try:
                yield service
            finally:
                service.close()


@contextlib.contextmanager
def requests() -> Iterator[Case]:
    with connected() as service, requests_to(service) as case:
        yield case


@contextlib.contextmanager
def requests_to(service: Any) -> Iterator[Case]:
    with (
        quiet(),
        serving(service, Settings(poll_s=0.05)) as (url, _),
        httpx.Client(base_url=url, timeout=WAIT_SECONDS) as http,
    ):
        document = http.get("/openapi.json").json()
        routes = [(m, path) for path, each in document["paths"].items() for m in each]
        assert len(routes) > 40
        known = _known(http)

        def case(rng: Rng) -> str:
            method, path = pick(rng, routes)
            ends = any(word in path for word in ENDS)
            url = re.sub(r"\{(\w+)(:path)?\}", lambda m: _part(rng, m[1], known, ends), path)
            answer = _send(rng, http, method, url, _body(rng, path, known, ends))
            _check(http, answer, f"{method} {url}")
            # The run goes on, with that number or with the next.
            step = _post(
                http, "/api/v1/optim_step", model_id=known["model_id"], seq_id=known["seq_id"]
            )
            assert _result(http, step["request_id"])
            known["seq_id"] += 1
            return str(answer.status_code)

        yield case
        _post(http, f"/api/v1/sessions/{known['session_id']}/finish")  # and its runs


def _known(http: httpx.Client) -> dict[str, Any]:
    """Names that there are, so that requests get past looking them up."""
    session = _post(http, "/api/v1/create_session")["session_id"]
    about = dict(session_id=session, model_seq_id=0, base_model=MODEL, lora_config={"rank": 2})
    created = _post(http, "/api/v1/create_model", **about)
    model_id = _result(http, created["request_id"])["model_id"]
    about = dict(session_id=session, sampling_session_seq_id=0, base_model=MODEL)
    sampler = _post(http, "/api/v1/create_sampling_session", **about)["sampling_session_id"]
    saved = _post(http, "/api/v1/save_weights", model_id=model_id, seq_id=1, path="saved")
    _result(http, saved["request_id"])
    return {
        "session_id": session,
        "model_id": model_id,
        "run_id": model_id,
        "sampling_session_id": sampler,
        "sampler_id": sampler,
        "request_id": created["request_id"],
        "kind": "weights",
        "name": "saved",
        "base_model": MODEL,
        "seq_id": 2,  # the next
    }


def _post(http: httpx.Client, path: str, /, **body: Any) -> Any:
    return http.post(path, json=body).raise_for_status().json()


def _result(http: httpx.Client, request_id: str) -> Any:
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        answer = http.post("/api/v1/retrieve_future", json={"request_id": request_id})
        if answer.status_code == 408 or "try_again" in answer.text:
            continue
        return answer.json() if "json" in answer.headers["content-type"] else answer.content
    raise AssertionError(f"{request_id} hangs")


def _part(rng: Rng, name: str, known: dict[str, Any], ends: bool) -> str:
    odd = ends or rng.random() < 0.3 or name not in known
    text = pick(rng, TEXTS)[:2000] if odd else str(known[name])
    return urllib.parse.quote(text.encode("utf-8", "surrogatepass"), safe="")


def _body(rng: Rng, path: str, known: dict[str, Any], ends: bool) -> Any:
    """One that is taken, for that route; a good part of the fields that there are for others."""
    numbers = policy_datum(np.random.default_rng(int(rng.integers(0, 50))), 5)
    prompt = {"chunks": [{"type": "encoded_text", "tokens": numbers.model_input.to_ints()}]}
    inputs = {
        name: {"data": a.tolist(), "dtype": "int64" if a.dtype.kind == "i" else "float32"}
        for name, a in numbers.loss_fn_inputs.items()
    }
    data = [{"model_input": prompt, "loss_fn_inputs": inputs}]
    sampling = {
        "max_tokens": 3,
        "temperature": 1.0,
        "seed": 1,
        "stop": ["x"],
        "top_p": 0.9,
        "top_k": 5,
    }
    route, model = (
        path.rpartition("/")[2],
        {"model_id": known["model_id"], "seq_id": known["seq_id"]},
    )
    session = {"session_id": known["session_id"]}
    if ends:
        model, session = {"model_id": "nobody", "seq_id": 1}, {"session_id": "nobody"}
    sampler = {
        "sampling_session_id": known["sampling_session_id"],
        "seq_id": int(rng.integers(1 << 40)),
    }
    saved = f"tinker://{known['run_id']}/weights/saved"
    bodies: dict[str, Any] = {
        "create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "display_name": "x"},
        "create_model": session
        | {
            "model_seq_id": int(rng.integers(1 << 40)),
            "base_model": MODEL,
            "lora_config": {"rank": 1, "seed": 1},
        },
        "load_weights": model | {"path": saved, "optimizer": True},
        "forward": model
        | {
            "forward_input": {
                "data": data,
                "loss_fn": "ppo",
                "loss_fn_config": {"clip_low_threshold": 0.8},
            }
        },
        "forward_backward": model
        | {
            "forward_backward_input": {
                "data": data,
                "loss_fn": "ppo",
                "loss_fn_config": {"clip_low_threshold": 0.8},
            }
        },
        "optim_step": model | {"adam_params": {"learning_rate": 1e-4, "beta1": 0.9, "eps": 1e-8}},
        "save_weights": model | {"path": "again", "ttl_seconds": 60, "overwrite": True},
        "save_weights_for_sampler": model
        | {"path": "for-sampler", "overwrite": True, "kind": "snapshot"},
        "save_weights_external": model
        | {"path": "outside", "overwrite": True, "age_encryption_recipients": ["age1x"]},
        "asample": sampler
        | {
            "prompt": prompt,
            "num_samples": 1,
            "sampling_params": sampling,
            "prompt_logprobs": True,
            "topk_prompt_logprobs": 2,
        },
        "create_sampling_session": session
        | {"sampling_session_seq_id": int(rng.integers(1 << 40)), "base_model": MODEL},
        "retrieve_futures": {"target": sampler, "prev_cursor": 0, "timeout": 0.05},
        "retrieve_future": {"request_id": known["request_id"]},
        "completions": {
            "model": MODEL,
            "prompt": "abc",
            "max_tokens": 3,
            "n": 1,
            "logprobs": 2,
            "echo": False,
            "stop": "x",
        },
        "search": {"display_name": "x", "user_metadata": {"a": "b"}, "limit": 5},
        "weights_info": {"tinker_path": saved},
        "copy_weights": session
        | {"source_path": saved, "model_seq_id": int(rng.integers(1 << 40))},
        "ttl": {"ttl_seconds": 60},
    }
    bodies["chat"] = bodies["completions"] | {
        "messages": [{"role": "user", "content": "abc"}],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        ],
        "logprobs": True,
    }
    body = bodies["chat"] if "chat" in path else bodies.get(route, {**model, **session, **sampler})
    if route in ("forward", "forward_backward") and rng.random() < 0.4:
        return encode([sdk_datum(numbers)])
    if rng.random() < 0.15:
        return body
    body = changed(rng, body)
    number = body.get("seq_id") if isinstance(body, dict) else None
    if isinstance(number, int) and number > known["seq_id"]:
        body["seq_id"] = known["seq_id"]  # what comes early waits, and is right to
    return body


def _send(rng: Rng, http: httpx.Client, method: str, url: str, body: Any) -> httpx.Response:
    if isinstance(body, bytes):
        content = damaged(rng, body)
        headers = {"content-type": "application/x-protobuf"}
        if rng.random() < 0.3:
            headers["content-encoding"] = pick(rng, ["zstd", "gzip", "nothing"])
    else:
        content = json.dumps(body).encode("utf-8", "surrogatepass")
        headers = {"content-type": "application/json"}
        if rng.random() < 0.1:
            content = damaged(rng, content)
        if rng.random() < 0.05:
            content = pick(
                rng, [b"[" * 100_000, b"\xff\xfe\0", b"", b'{"a":' * 20_000, b"9" * 5000]
            )
        if rng.random() < 0.05:
            headers["content-type"] = pick(
                rng, ["text/plain", "", "application/msgpack", "multipart/form-data"]
            )
    if rng.random() < 0.2:
        odd = [json_value(rng), *OTHERS[:1]]
        query = {pick(rng, ["limit", "offset", "cursor", "x"]): str(odd[0])[:500]}
        url += "?" + urllib.parse.urlencode(
            {k: v.encode("utf-8", "replace") for k, v in query.items()}
        )
    return http.request(method.upper(), url, content=content, headers=headers)


def _check(http: httpx.Client, answer: httpx.Response, what: str) -> None:
    assert answer.status_code < 500, (what, answer.status_code, answer.text[:500])
    told = answer.headers.get("content-type", "")
    if answer.status_code >= 400:
        body = answer.json()
        assert body.get("detail") or body.get("error"), (what, body)
    elif "json" in told and "future" not in what and "request_id" in answer.text:
        body = answer.json()
        if isinstance(body, dict) and isinstance(request_id := body.get("request_id"), str):
            result = _result(http, request_id)
            if isinstance(result, dict) and result.get("category"):
                assert result["category"] == "user", (what, result)
