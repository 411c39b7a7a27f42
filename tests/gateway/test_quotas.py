"""Quotas of keys: what is over them is refused with a time to come back, and nothing else is."""

from __future__ import annotations

import json
import time

import httpx
import numpy as np
import pytest
import tinker
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from typer.testing import CliRunner

import tinsmith
from tests.data import text_datum
from tests.gateway.sdk import prompt, sdk_datum
from tests.gateway.serving import serving
from tinsmith.cli import app
from tinsmith.gateway.access import Access
from tinsmith.gateway.keys import KeyFile
from tinsmith.gateway.quotas import Quota, TokenRates

RATE = 600  # tokens a minute: ten a second
PARAMS = types.SamplingParams(max_tokens=2, seed=0)


@given(
    steps=st.lists(st.tuples(st.floats(0, 90), st.integers(1, 2 * RATE)), min_size=1, max_size=60)
)
def test_what_is_let_in_is_bounded_over_any_time_and_nobody_waits_longer_than_told(steps):
    now = 0.0
    rates = TokenRates(lambda _: Quota(tokens_per_minute=RATE), lambda: now)
    let_in: list[tuple[float, int]] = []
    for pause, tokens in steps:
        now += pause
        try:
            rates.check("alice")
        except tinsmith.Busy as busy:
            now += busy.retry_after_s + 1e-6
            rates.check("alice")
        rates.take("alice", tokens)
        let_in.append((now, tokens))
    for first, (start, _) in enumerate(let_in):
        total = 0
        for end, tokens in let_in[first:]:
            # What came before the last one fits the minute's worth and what time has refilled.
            assert total <= RATE + (end - start) * RATE / 60 + 1e-3
            total += tokens


def test_owners_do_not_share_and_no_limit_is_none():
    quotas = {"alice": Quota(tokens_per_minute=RATE), "bob": Quota()}
    rates = TokenRates(lambda owner: quotas[owner], lambda: 0.0)
    for owner in quotas:
        rates.take(owner, 10 * RATE)
    rates.check("bob")
    assert (rates.left("alice"), rates.left("bob")) == (-9 * RATE, None)
    with pytest.raises(tinsmith.Busy, match="600 tokens per minute are used up") as refused:
        rates.check("alice")
    assert refused.value.retry_after_s == pytest.approx(540.1)


def test_the_file_keeps_quotas_and_the_command_sets_them(tmp_path):
    path = tmp_path / "keys.json"

    def command(*words: str):
        return CliRunner().invoke(app, ["keys", *words, "--file", str(path)])

    key = json.loads(command("add", "alice", "--runs", "2", "--json").stdout)["key"]
    keys = KeyFile(path)
    assert keys.quota("alice") == Quota(runs=2)
    assert keys.quota("nobody") == Quota()
    shown = command("limit", "alice", "--tokens-per-minute", "5000", "--resident-bytes", "1000")
    assert shown.stdout == "alice may use: 5,000 tokens per minute, 1,000 resident bytes\n"
    assert keys.quota("alice") == Quota(tokens_per_minute=5000, resident_bytes=1000)
    assert keys.owner(key) == "alice"
    listed = json.loads(command("list", "--json").stdout)
    assert listed[0]["quota"] == {"tokens_per_minute": 5000, "resident_bytes": 1000}
    assert command("limit", "bob").exit_code == 2
    path.write_text(path.read_text().replace("5000", "0"))
    with pytest.raises(tinsmith.InvalidInput, match="tokens_per_minute must be at least 1"):
        keys.list()


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def served(service, sdk_environment, keys):
    with serving(service, access=Access(keys)) as (url, gateway):
        yield url, gateway


class Owner:
    """Somebody with a key that allows so much."""

    def __init__(self, url: str, keys: KeyFile, name: str, quota: Quota) -> None:
        self.key = keys.add(name, quota)
        self.client = tinker.ServiceClient(base_url=url, api_key=self.key)
        self.http = httpx.Client(base_url=url, headers={"x-api-key": self.key}, timeout=60)

    def begin(self, rank: int = 4) -> tinker.TrainingClient:
        return self.client.create_lora_training_client("tiny-llama", rank=rank).result()

    def used(self) -> dict[str, float | None]:
        return self.http.get("/api/v1/quota").json()["used"]


def test_runs_beyond_the_quota_are_refused_until_one_goes(served, keys):
    owner = Owner(served[0], keys, "of two runs", Quota(runs=2))
    first, _ = owner.begin(), owner.begin()
    with pytest.raises(tinker.RequestFailedError, match="2 training runs are open, and your key"):
        owner.begin()
    body = {"model_id": first.model_id}
    owner.http.post("/api/v1/unload_model", json=body).raise_for_status()
    owner.begin()
    assert owner.used()["runs"] == 2


def test_a_run_too_large_is_refused_and_leaves_nothing(served, keys):
    url, gateway = served
    owner = Owner(url, keys, "of little memory", Quota(resident_bytes=1 << 20))
    run = owner.begin(rank=1)
    size = owner.used()["resident_bytes"]
    facts = gateway.service.get_training_run(run.model_id).result()
    assert facts.lora.rank == 1
    assert 0 < size < 1 << 20
    with pytest.raises(tinker.RequestFailedError, match=r"need [\d,]+ bytes.* allows 1,048,576"):
        owner.begin(rank=64)
    assert (owner.used()["runs"], owner.used()["resident_bytes"]) == (1, size)
    runs = owner.http.get("/api/v1/training_runs").json()["training_runs"]
    assert [shown["training_run_id"] for shown in runs] == [run.model_id]


def test_training_waits_for_the_minute_and_goes_on(served, keys):
    owner = Owner(served[0], keys, "of few tokens", Quota(tokens_per_minute=RATE))
    training = owner.begin()
    datum = text_datum(np.random.default_rng(0))
    data = [sdk_datum(datum)] * -(-(RATE + 20) // len(datum.model_input.tokens))
    start = time.monotonic()
    first = training.forward_backward(data, "cross_entropy").result()
    assert owner.used()["tokens_left"] < 0
    second = training.forward_backward(data[:1], "cross_entropy").result()
    assert time.monotonic() - start > 2  # at ten tokens a second
    np.testing.assert_array_equal(
        first.loss_fn_outputs[0]["logprobs"].to_numpy(),
        second.loss_fn_outputs[0]["logprobs"].to_numpy(),
    )


def test_samples_are_refused_with_a_time_and_one_that_is_known_is_not(served, keys):
    owner = Owner(served[0], keys, "of few samples", Quota(tokens_per_minute=RATE))
    sampler = owner.client.create_sampling_client(base_model="tiny-llama").result()
    sampler.sample(prompt([1, 2, 3]), 2, PARAMS).result()
    assert RATE - 7 <= owner.used()["tokens_left"] < RATE

    def ask(number: int) -> httpx.Response:
        body = {
            "sampling_session_id": sampler._sampling_session_id,
            "seq_id": number,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1] * 200}]},
            "sampling_params": {"max_tokens": 1},
        }
        return owner.http.post("/api/v1/asample", json=body)

    answers = [ask(number) for number in range(100, 106)]
    assert [a.status_code for a in answers[:3]] == [200] * 3
    refused = answers[-1]
    assert refused.status_code == 429
    assert "600 tokens per minute are used up" in refused.json()["detail"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert ask(100).json() == answers[0].json()


def test_openai_clients_are_told_too(served, keys):
    owner = Owner(served[0], keys, "of OpenAI", Quota(tokens_per_minute=5))
    body = {"model": "tiny-llama", "prompt": [1] * 5, "max_tokens": 3, "seed": 0}
    answer = owner.http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    drawn = answer.json()["usage"]["completion_tokens"]
    assert owner.used()["tokens_left"] == pytest.approx(-drawn, abs=2)
    refused = owner.http.post("/v1/completions", json={**body, "stream": True})
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 10
    keys.limit("of OpenAI", Quota())
    chunks = owner.http.post("/v1/completions", json={**body, "stream": True})
    assert chunks.status_code == 200
    assert owner.used()["tokens_left"] is None
