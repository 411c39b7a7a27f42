"""A run's log over raw HTTP: numbers in any order, once each, whatever becomes of a request; and
the ways in which requests wait and answers come."""

from __future__ import annotations

import threading
import time
import tracemalloc

import httpx
import numpy as np
import pytest
import tinker
import zstandard
from tinker import types
from tinker.proto import request_conv, response_conv
from tinker.proto import tinker_public_pb2 as pb

from tests.data import text_datum, untimed
from tests.gateway.sdk import prompt, sdk_datum
from tests.gateway.serving import serving
from tinsmith.gateway import sampling_routes
from tinsmith.gateway.settings import MiB, Settings

ADAM = types.AdamParams(learning_rate=1e-2)


class Raw:
    """A session and a run in it, by hand."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1", timeout=60)
        self.session_id = self.post("create_session", sdk_version="0")["session_id"]
        created = self.post(
            "create_model",
            session_id=self.session_id,
            model_seq_id=0,
            base_model="tiny-llama",
            lora_config={"rank": 4, "seed": 1},
        )
        self.model_id = self.wait(created["request_id"])["model_id"]

    def post(self, path: str, **body):
        return self.http.post(path, json=body).raise_for_status().json()

    def message(self, seq_id: int, seed: int = 0, count: int = 2) -> bytes:
        rng = np.random.default_rng(seed)
        data = [sdk_datum(text_datum(rng)) for _ in range(count)]
        inputs = types.ForwardBackwardInput(data=data, loss_fn="cross_entropy")
        request = types.ForwardBackwardRequest(
            forward_backward_input=inputs, model_id=self.model_id, seq_id=seq_id
        )
        return request_conv.forward_backward_request_to_proto(request).SerializeToString()

    def send(self, body: bytes, compressed: bool = False) -> httpx.Response:
        headers = {"content-type": "application/x-protobuf"}
        if compressed:
            headers["content-encoding"] = "zstd"
        return self.http.post("forward_backward", content=body, headers=headers)

    def train(self, seq_id: int, seed: int = 0) -> str:
        return self.send(self.message(seq_id, seed)).raise_for_status().json()["request_id"]

    def step(self, seq_id: int, **adam) -> str:
        body = {"learning_rate": 1e-2, **adam}
        answer = self.post("optim_step", model_id=self.model_id, seq_id=seq_id, adam_params=body)
        return answer["request_id"]

    def fetch(self, request_id: str, **how) -> httpx.Response:
        return self.http.post("retrieve_future", json={"request_id": request_id, **how})

    def wait(self, request_id: str):
        """The answer: JSON, or a training output's loss."""
        for _ in range(60):
            answer = self.fetch(request_id).raise_for_status()
            if "protobuf" in answer.headers["content-type"]:
                metrics = response_conv.deserialize_forward_backward_output(answer.content).metrics
                return untimed(metrics)
            if answer.json().get("type") != "try_again":
                return answer.json()
        raise TimeoutError(request_id)


@pytest.fixture
def raw(url):
    return Raw(url)


@pytest.fixture(scope="module")
def narrow(service, sdk_environment):
    """A gateway with little room."""
    settings = Settings(
        max_body_bytes=100_000, max_decoded_bytes=150_000, max_pending_samples=2, poll_s=0.5
    )
    with serving(service, settings) as (url, gateway):
        yield url, gateway


def losses(raw: Raw, requests: list[str]) -> list[float]:
    return [raw.wait(request)["loss:sum"] for request in requests]


def test_early_operations_wait_for_their_turn(raw, url):
    third = raw.train(3, seed=1)
    second = raw.step(2)
    first = raw.train(1, seed=0)
    got = losses(raw, [first, third])
    assert raw.wait(second)["metrics"]["grad_norm"] > 0
    other = Raw(url)
    a = other.train(1, seed=0)
    other.step(2)
    assert got == losses(other, [a, other.train(3, seed=1)])


def test_the_same_number_is_the_same_operation(raw):
    first = raw.train(1)
    assert raw.train(1) == first
    step = raw.step(2)
    assert raw.step(2) == raw.step(2, learning_rate=1.0) == step
    once = [raw.wait(first), raw.wait(step)]
    assert raw.train(1) == first
    assert [raw.wait(first), raw.wait(step)] == once
    assert once[0] != raw.wait(raw.train(3))  # applied once: one step further, not two


def test_an_operation_that_makes_no_sense_is_over(raw):
    answer = raw.http.post(
        "optim_step", json={"model_id": raw.model_id, "seq_id": 1, "adam_params": {"beta1": []}}
    )
    assert answer.status_code == 422
    assert "adam_params.beta1" in answer.json()["detail"]
    assert "loss:sum" in raw.wait(raw.train(2))
    assert "error" in raw.wait(raw.step(3, learning_rate=-1.0))
    assert "metrics" in raw.wait(raw.step(4))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("count", [1500, 20_000])
def test_a_request_that_is_too_large_is_over(narrow, compressed, count):
    raw = Raw(narrow[0])
    large = raw.message(1, count=count)
    answer = raw.send(zstandard.compress(large) if compressed else large, compressed)
    assert answer.status_code == 413
    assert "larger than" in answer.text or "decompresses to more" in answer.text
    assert "loss:sum" in raw.wait(raw.train(2))


def test_compressed_requests_train(raw):
    plain = raw.wait(raw.train(1))
    sent = raw.send(zstandard.compress(raw.message(2)), compressed=True)
    assert raw.wait(sent.raise_for_status().json()["request_id"]) == plain
    broken = raw.send(zstandard.compress(raw.message(3))[:-9], compressed=True)
    assert broken.status_code == 400
    assert raw.wait(raw.train(3)) == plain  # its number was not used


def test_a_bomb_costs_little(narrow):
    raw = Raw(narrow[0])
    bomb = zstandard.compress(raw.message(1) + bytes(512 * MiB))
    assert len(bomb) < 100_000
    tracemalloc.start()
    started = time.monotonic()
    assert raw.send(bomb, compressed=True).status_code == 413
    assert tracemalloc.get_traced_memory()[1] < 8 * MiB
    tracemalloc.stop()
    assert time.monotonic() - started < 5
    assert "loss:sum" in raw.wait(raw.train(2))


def test_a_giant_sparse_tensor_is_over(raw):
    message = pb.ForwardBackwardRequest.FromString(raw.message(1))
    tensor = message.data[1].loss_fn_inputs["weights"]
    tensor.Clear()
    tensor.dtype = pb.DTYPE_FLOAT32
    tensor.shape.extend([1 << 20, 1 << 20])
    tensor.sparse_csr.crow_indices = bytes(8)
    answer = raw.wait(raw.send(message.SerializeToString()).json()["request_id"])
    assert answer["category"] == "user"
    assert "datum 1" in answer["error"]
    assert "loss:sum" in raw.wait(raw.train(2))


def test_who_asks_is_told_to_ask_again(narrow):
    raw = Raw(narrow[0])
    early = raw.train(2)
    started = time.monotonic()
    answer = raw.fetch(early).json()
    assert time.monotonic() - started >= 0.5
    assert answer == {"type": "try_again", "request_id": early, "queue_state": "active"}
    raw.train(1)
    assert "loss:sum" in raw.wait(early)


def test_large_answers_are_announced(raw, training, monkeypatch):
    monkeypatch.setattr(sampling_routes, "INLINE_BYTES", 50)
    request = raw.train(1)
    announced = raw.fetch(request, allow_metadata_only=True)
    assert announced.json()["status"] == "complete_metadata"
    body = raw.fetch(request, allow_metadata_only=False)
    assert len(body.content) == announced.json()["response_payload_size"]
    data = [sdk_datum(text_datum(np.random.default_rng(0)))]
    assert training.forward_backward(data, "cross_entropy").result().metrics["loss:sum"] > 0


def test_draining_lets_in_what_others_wait_for(service, sdk_environment):
    with serving(service) as (url, gateway):
        raw = Raw(url)
        second = raw.train(2)
        gateway.draining = True
        assert raw.send(raw.message(3)).status_code == 503
        first = raw.train(1)
        assert raw.wait(first) == raw.wait(second)


# ---- back-pressure ----


def test_samples_beyond_the_limit_come_later(narrow):
    url, _ = narrow
    with tinker.ServiceClient(base_url=url) as client:
        sampler = client.create_sampling_client(base_model="tiny-llama").result()
        params = types.SamplingParams(max_tokens=24, stop=[])
        waiting = [sampler.sample(prompt([i + 1]), 1, params) for i in range(6)]
        tokens = [w.result().sequences[0].tokens for w in waiting]
    assert all(len(t) == 24 for t in tokens)


def test_samples_beyond_the_limit_are_told_so(narrow):
    raw = Raw(narrow[0])
    sampler = raw.post(
        "create_sampling_session",
        session_id=raw.session_id,
        sampling_session_seq_id=0,
        base_model="tiny-llama",
    )["sampling_session_id"]

    def ask(seq_id):
        body = {
            "sampling_session_id": sampler,
            "seq_id": seq_id,
            "prompt": {"chunks": [{"tokens": [1, 2]}]},
            "sampling_params": {"max_tokens": 400, "stop": []},
        }
        return raw.http.post("asample", json=body)

    answers = [ask(i) for i in range(4)]
    assert [a.status_code for a in answers] == [200, 200, 429, 429]
    assert "try again" in answers[2].json()["detail"]
    for answer in answers[:2]:
        raw.post("cancel_future", request_id=answer.json()["request_id"])


def test_training_beyond_the_limit_comes_later(service, sdk_environment, monkeypatch):
    """Twenty chunks of one call, the first one last, where three have room: each is applied once."""
    data = [sdk_datum(text_datum(np.random.default_rng(i))) for i in range(20)]
    results = {}
    for room in (5_000, MiB):
        with (
            serving(service, Settings(max_pending_bytes=room)) as (url, gateway),
            tinker.ServiceClient(base_url=url) as client,
        ):
            training = client.create_lora_training_client("tiny-llama", rank=4, seed=1).result()
            config = training.holder._client_config.model_copy(update={"fwdbwd_max_chunk_len": 1})
            monkeypatch.setattr(training.holder, "_client_config", config)
            fb = training.forward_backward(data, "cross_entropy")
            step = training.optim_step(ADAM)
            results[room] = (fb.result().metrics["loss:sum"], step.result().metrics["grad_norm"])
            assert gateway._pending_bytes == 0
    np.testing.assert_allclose(results[5_000], results[MiB], rtol=1e-6)


# ---- what the server tells its clients to do ----


@pytest.mark.parametrize("pyqwest", [True, False])
def test_both_transports_and_compression(service, sdk_environment, monkeypatch, pyqwest):
    with serving(service, Settings(compress=True)) as (url, _):
        client = tinker.ServiceClient(base_url=url)
        assert client.holder._client_config.proto_compress_fwdbwd
        config = client.holder._client_config.model_copy(update={"use_pyqwest_transport": pyqwest})
        monkeypatch.setattr(client.holder, "_client_config", config)
        client.holder._constructor_kwargs["_client_config"] = config
        client.holder._client_pools.clear()
        training = client.create_lora_training_client("tiny-llama", rank=4, seed=1).result()
        data = [sdk_datum(text_datum(np.random.default_rng(0)))]
        assert training.forward_backward(data, "cross_entropy").result().metrics["loss:sum"] > 0
        sampler = training.save_weights_and_get_sampling_client().result()
        assert sampler.sample(prompt([1]), 2, types.SamplingParams(max_tokens=2)).result()
        client.close("success").result()


def test_many_samples_are_waited_for_at_once(service, sdk_environment):
    with serving(service, Settings(batch_polls=True)) as (url, gateway):
        with tinker.ServiceClient(base_url=url) as client:
            sampler = client.create_sampling_client(base_model="tiny-llama").result()
            params = types.SamplingParams(max_tokens=4, seed=1)
            waiting = [sampler.sample(prompt([i % 9 + 1]), 1, params) for i in range(200)]
            failing = sampler.sample(prompt([1]), 1, types.SamplingParams(max_tokens=9999))
            tokens = [w.result().sequences[0].tokens for w in waiting]
            with pytest.raises(tinker.RequestFailedError, match="512"):
                failing.result()
            assert tokens[0] == tokens[9] == tokens[198]
            session_id = client.holder.get_session_id()
        until(lambda: session_id not in gateway._sessions)
        assert not gateway.completions._channels  # nothing is kept of a session that is over


def until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nothing_is_kept_of_what_is_done(gateway, client, training):
    data = [sdk_datum(text_datum(np.random.default_rng(0)))]
    for _ in range(3):
        training.forward_backward(data, "cross_entropy").result()
    session = gateway._sessions[client.holder.get_session_id()]
    assert not session.samples
    assert not session.runs[training.model_id].pending
    assert threading.active_count() < 200
