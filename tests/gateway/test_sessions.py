"""What a client leaves behind when it finishes, dies, or changes its mind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from tests.data import text_datum
from tests.gateway.sdk import prompt, sdk_datum
from tests.gateway.serving import serving
from tinsmith.gateway.settings import Settings

LONG = types.SamplingParams(max_tokens=480, stop=[])
BUSY_CLIENT = """
import sys, tinker
from tinker import types
client = tinker.ServiceClient(base_url=sys.argv[1])
training = client.create_lora_training_client("tiny-llama", rank=4).result()
sampler = training.save_weights_and_get_sampling_client().result()
datum = types.Datum(
    model_input=types.ModelInput.from_ints([1, 2, 3]),
    loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]},
)
training.forward_backward([datum], "cross_entropy").result()
print(client.holder.get_session_id(), training.model_id, flush=True)
params = types.SamplingParams(max_tokens=480, stop=[])
while True:
    waiting = [sampler.sample(types.ModelInput.from_ints([i + 1]), 1, params) for i in range(8)]
    training.forward_backward([datum], "cross_entropy")
    training.optim_step(types.AdamParams()).result()
    [w.result() for w in waiting]
"""


def until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def actors(service):
    """What the learner and the sampler of tiny-llama hold."""

    class Actors:
        def __init__(self) -> None:
            self.training = service.create_lora_training_client("tiny-llama", rank=2).result()
            sampler = service.controller.call("sampler_handle", "tiny-llama")
            self.sampler = sampler.result()

        def open_runs(self) -> list[str]:
            return self.training._grant.learner.call("open_runs").result()

        def stats(self) -> dict[str, int]:
            return self.sampler.call("stats").result()

    return Actors()


@pytest.fixture(scope="module")
def impatient(service, sdk_environment):
    """A gateway that gives up on its clients after five seconds."""
    with serving(service, Settings(session_timeout_s=5)) as (url, gateway):
        yield url, gateway


def heartbeat(url: str, session_id: str) -> int:
    return httpx.post(
        f"{url}/api/v1/session_heartbeat", json={"session_id": session_id}
    ).status_code


def test_a_killed_client_is_let_go(impatient, actors):
    url, gateway = impatient
    before = actors.stats()["running"]
    bystander = service_client(url)
    other = bystander.create_lora_training_client("tiny-llama", rank=4).result()
    client = subprocess.Popen(
        [sys.executable, "-c", BUSY_CLIENT, url], stdout=subprocess.PIPE, text=True
    )
    session_id, run_id = client.stdout.readline().split()
    until(lambda: actors.stats()["running"] > before)
    assert run_id in actors.open_runs()
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    deadline = time.monotonic() + 30
    while run_id in actors.open_runs() or actors.stats()["running"] > before:
        assert time.monotonic() < deadline
        # Somebody else, heard of all the time, goes on all the while.
        datum = sdk_datum(text_datum(np.random.default_rng(0)))
        assert other.forward_backward([datum], "cross_entropy").result()
    until(lambda: session_id not in gateway._sessions)
    assert heartbeat(url, session_id) == 410
    assert other.model_id in actors.open_runs()
    bystander.close("success").result()
    until(lambda: other.model_id not in actors.open_runs())


def service_client(url: str) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=url)


def test_a_finished_session_is_over(url, gateway, actors):
    client = service_client(url)
    training = client.create_lora_training_client("tiny-llama", rank=4).result()
    session_id = client.holder.get_session_id()
    datum = sdk_datum(text_datum(np.random.default_rng(0)))
    last = training.forward_backward([datum], "cross_entropy")
    httpx.post(f"{url}/api/v1/sessions/{session_id}/finish", json={})
    assert last.result().metrics["loss:sum"] > 0  # what was asked for is done
    until(lambda: training.model_id not in actors.open_runs())
    assert heartbeat(url, session_id) == 410
    until(lambda: session_id not in gateway._sessions)
    with pytest.raises(tinker.BadRequestError, match="is over"):
        client.create_lora_training_client("tiny-llama", rank=4).result()
    with pytest.raises(tinker.RequestFailedError, match="its session ended"):
        training.forward_backward([datum], "cross_entropy").result()


def test_a_run_that_comes_too_late_is_closed(url, gateway, actors):
    """Its session ended while it was made."""

    def post(path, **body):
        return httpx.post(f"{url}/api/v1/{path}", json=body).raise_for_status().json()

    for _ in range(3):
        session_id = post("create_session")["session_id"]
        model = dict(session_id=session_id, model_seq_id=0, base_model="tiny-llama")
        request = post("create_model", **model, lora_config={"rank": 4})["request_id"]
        post(f"sessions/{session_id}/finish")
        post("retrieve_future", request_id=request)
        until(lambda session_id=session_id: session_id not in gateway._sessions)
        until(lambda name=f"{session_id}:train:0": name not in actors.open_runs())


def test_a_cancelled_sample_stops(url, actors):
    client = service_client(url)
    sampler = client.create_sampling_client(base_model="tiny-llama").result()
    before = actors.stats()["running"]

    waiting = sampler.sample(prompt([1, 2, 3]), 16, LONG).future()
    until(lambda: actors.stats()["running"] > before)
    time.sleep(0.5)  # until the SDK knows what to cancel
    waiting.cancel()
    until(lambda: actors.stats()["running"] <= before, 5)
    assert sampler.sample(prompt([1]), 1, types.SamplingParams(max_tokens=2)).result()
    client.close("success").result()


def test_idle_models_are_unloaded_and_loaded_again(service, sdk_environment):
    settings = Settings(idle_unload_s=2)
    with serving(service, settings) as (url, gateway):
        client = service_client(url)
        sampler = client.create_sampling_client(base_model="tiny-qwen3").result()
        training = client.create_lora_training_client("tiny-qwen3", rank=4).result()
        params = types.SamplingParams(max_tokens=4, seed=1)
        before = sampler.sample(prompt([1, 2]), 1, params).result().sequences[0].tokens
        time.sleep(4)
        assert "tiny-qwen3" in gateway._used  # there is a run on it
        assert training.model_id in [run.run_id for run in service.list_training_runs().result()]
        for run in service.list_training_runs().result():  # those of other tests too
            if run.base_model == "tiny-qwen3":
                service.close_training_run(run.run_id).result()
        until(lambda: "tiny-qwen3" not in gateway._used)
        after = sampler.sample(prompt([1, 2]), 1, params).result().sequences[0].tokens
        assert after == before
        client.close("success").result()
