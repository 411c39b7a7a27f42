"""Requests made up from our own OpenAPI document: whatever comes, no server error."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.serving import serving
from tinsmith.gateway.settings import Settings


@pytest.fixture(scope="module")
def url(service, sdk_environment):
    with serving(service, Settings(poll_s=0.05)) as (url, _):
        yield url


@schemathesis.serializer("application/x-protobuf")
def as_it_is(context, value):
    return value if isinstance(value, bytes) else repr(value).encode()


@pytest.fixture(scope="module")
def known(url):
    """Names that there are, so that requests get past looking them up."""

    def post(path, **body):
        return httpx.post(f"{url}/api/v1/{path}", json=body).raise_for_status().json()

    session = post("create_session")["session_id"]
    created = post(
        "create_model",
        session_id=session,
        model_seq_id=0,
        base_model="tiny-llama",
        lora_config={"rank": 2},
    )
    while "model_id" not in (run := post("retrieve_future", request_id=created["request_id"])):
        pass
    sampler = post(
        "create_sampling_session",
        session_id=session,
        sampling_session_seq_id=0,
        base_model="tiny-llama",
    )
    return {
        "session_id": session,
        "model_id": run["model_id"],
        "run_id": run["model_id"],
        "sampling_session_id": sampler["sampling_session_id"],
        "sampler_id": sampler["sampling_session_id"],
        "base_model": "tiny-llama",
    }


def test_no_request_is_a_server_error(url, known):
    schemathesis.openapi.media_type("application/x-protobuf", st.binary())
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) > 30
    for operation in operations:
        ends_it = "finish" in operation.path or "unload" in operation.path
        no_server_error(operation, {} if ends_it else known)


def no_server_error(operation, known: dict[str, str]) -> None:
    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case):
        for values in (case.path_parameters, case.body):
            if isinstance(values, dict):
                values.update({name: known[name] for name in values if name in known})
        answer = case.call(timeout=30)
        assert answer.status_code < 500, (case.path, case.body, answer.text)

    check()


@pytest.mark.parametrize(
    "body",
    [
        b'{"user_metadata": {"a": "\\ud800"}}',
        b'{"user_metadata": {"a": NaN}}',
        b'{"display_name": "\\ud800"}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_json_that_could_not_be_sent_back_is_refused(url, body):
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{url}/api/v1/create_session", content=body, headers=headers)
    assert answer.status_code in (400, 422)
    assert answer.json()["detail"]


def test_what_is_not_unicode_is_no_name_of_a_run_or_a_model(url):
    refused = b'{"model_id": "\\ud800", "seq_id": 1}'
    headers = {"content-type": "application/json"}
    for path in ("session_heartbeat", "optim_step"):
        answer = httpx.post(f"{url}/api/v1/{path}", content=refused, headers=headers)
        assert answer.status_code == 422
    body = {"model": "a\0b", "prompt": "abc"}
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "null character" in answer.json()["error"]["message"]


def test_a_ticket_of_thousands_of_digits(url):
    ticket = "1" * 6000 + ".x"
    answer = httpx.get(f"{url}/api/v1/files/{ticket}/run/weights/name/file")
    assert answer.status_code == 404
