"""With keys, what belongs to one owner does not exist for another, unless it is published."""

from __future__ import annotations

import time

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from tests.data import text_datum
from tests.gateway.sdk import prompt, sdk_datum
from tests.gateway.serving import serving
from tinsmith.gateway.access import Access
from tinsmith.gateway.keys import KeyFile
from tinsmith.gateway.server import check_host
from tinsmith.primitives.errors import InvalidInput

PARAMS = types.SamplingParams(max_tokens=2)


class Owner:
    """Somebody with a key, at work."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self.key = url, key
        self.client = tinker.ServiceClient(base_url=url, api_key=key)
        self.rest = tinker.RestClient(base_url=url, api_key=key)
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers={"x-api-key": key}, timeout=60)
        self.session_id = self.client.holder.get_session_id()

    def train(self) -> None:
        self.training = self.client.create_lora_training_client("tiny-llama", rank=4).result()
        datum = sdk_datum(text_datum(np.random.default_rng(0)))
        self.training.forward_backward([datum], "cross_entropy").result()
        self.training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        self.state = self.training.save_state("mine").result().path
        self.weights = self.training.save_weights_for_sampler("mine").result().path
        self.sampler = self.training.save_weights_and_get_sampling_client().result()
        self.sampler_id = self.sampler._sampling_session_id
        self.sampler.sample(prompt([1]), 1, PARAMS).result()


@pytest.fixture(scope="module")
def open_to(service, sdk_environment, tmp_path_factory):
    """The URL of a gateway with keys, and those of alice and bob."""
    keys = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    made = [keys.add("alice"), keys.add("bob")]
    with serving(service, access=Access(keys)) as (url, _):
        yield url, *made


@pytest.fixture(scope="module")
def alice(open_to):
    owner = Owner(open_to[0], open_to[1])
    owner.train()
    return owner


@pytest.fixture(scope="module")
def bob(open_to):
    return Owner(open_to[0], open_to[2])


def test_lists_show_ones_own(alice, bob):
    def run_ids(owner):
        return [
            run.training_run_id for run in owner.rest.list_training_runs().result().training_runs
        ]

    assert run_ids(alice) == [alice.training.model_id]
    assert run_ids(bob) == []
    assert len(alice.rest.list_user_checkpoints().result().checkpoints) == 2
    assert bob.rest.list_user_checkpoints().result().checkpoints == []
    assert alice.session_id not in bob.rest.list_sessions().result().sessions
    assert alice.session_id in alice.rest.list_sessions().result().sessions


def test_what_is_anothers_cannot_be_read(alice, bob):
    run = alice.training.model_id
    for get in (
        f"training_runs/{run}",
        f"training_runs/{run}/checkpoints",
        f"training_runs/{run}/checkpoints/weights/mine/archive",
        f"training_runs/{run}/checkpoints/weights/mine/external_weights_urls",
        f"sessions/{alice.session_id}",
        f"sessions/{alice.session_id}/trace_export",
        f"samplers/{alice.sampler_id}",
    ):
        assert bob.http.get(get).status_code == 404, get
        if "trace" not in get:
            assert alice.http.get(get).status_code == 200, get
    for path, body in (
        ("get_info", {"model_id": run}),
        ("weights_info", {"tinker_path": alice.state}),
        ("retrieve_future", {"request_id": f"{run}:op:1"}),
        ("retrieve_future", {"request_id": f"{run}:create"}),
        ("retrieve_future", {"request_id": f"{run}:op:99"}),
        ("retrieve_future", {"request_id": f"{alice.sampler_id}:0"}),
        ("retrieve_future", {"request_id": f"{alice.sampler_id}:99"}),
        ("retrieve_futures", {"target": {"sampling_session_id": alice.sampler_id}}),
        ("join_sampling_session", {"sampling_session_id": alice.sampler_id}),
    ):
        assert bob.http.post(path, json=body).status_code == 404, (path, body)
    assert alice.http.post("retrieve_future", json={"request_id": f"{run}:op:1"}).status_code == 200


def test_what_is_anothers_cannot_be_used_or_changed(alice, bob):
    run, session = alice.training.model_id, alice.session_id
    sample = {"sampling_session_id": alice.sampler_id, "prompt": {"chunks": [{"tokens": [1]}]}}
    mine = {"session_id": bob.session_id, "model_seq_id": 7}
    for method, path, body in (
        ("POST", "optim_step", {"model_id": run, "seq_id": 9}),
        ("POST", "save_weights", {"model_id": run, "seq_id": 9, "path": "x"}),
        ("POST", "unload_model", {"model_id": run}),
        ("POST", "asample", {**sample, "seq_id": 9}),
        ("POST", "create_sampling_session", {"session_id": session, "sampling_session_seq_id": 9}),
        ("POST", "session_heartbeat", {"session_id": session}),
        ("POST", f"sessions/{session}/finish", {}),
        ("POST", "copy_weights", {"source_path": alice.state, **mine}),
        ("DELETE", f"training_runs/{run}/checkpoints/weights/mine", None),
        ("POST", f"training_runs/{run}/checkpoints/weights/mine/publish", {}),
        ("DELETE", f"training_runs/{run}/checkpoints/weights/mine/publish", None),
        ("PUT", f"training_runs/{run}/checkpoints/weights/mine/ttl", {"ttl_seconds": 1}),
        ("PUT", f"sessions/{session}/project", {}),
    ):
        answer = bob.http.request(method, path, json=body)
        assert answer.status_code == 404, (path, answer.text)
    with pytest.raises(tinker.NotFoundError):
        bob.client.create_sampling_client(model_path=alice.weights).result()
    with pytest.raises(tinker.RequestFailedError, match="no checkpoint"):
        bob.client.create_training_client_from_state(alice.state).result()
    cancelled = bob.http.post("cancel_future", json={"request_id": f"{run}:op:1"})
    assert cancelled.status_code == 200  # says nothing, and does nothing
    # Alice's is as it was.
    assert len(alice.rest.list_checkpoints(run).result().checkpoints) == 2
    assert alice.training.save_state("later").result().path
    assert alice.sampler.sample(prompt([1]), 1, PARAMS).result()


def test_a_published_checkpoint_is_everybodys_to_read(alice, bob):
    path = alice.training.save_weights_for_sampler("shown").result().path
    alice.rest.publish_checkpoint_from_tinker_path(path).result()
    sampler = bob.client.create_sampling_client(model_path=path).result()
    assert sampler.sample(prompt([1]), 1, PARAMS).result().sequences
    checkpoint = f"training_runs/{alice.training.model_id}/checkpoints/sampler_weights/shown"
    assert bob.http.get(f"{checkpoint}/archive").status_code == 200
    assert bob.http.delete(checkpoint).status_code == 404
    assert bob.http.delete(f"{checkpoint}/publish").status_code == 404
    assert bob.http.put(f"{checkpoint}/ttl", json={"ttl_seconds": 1}).status_code == 404
    alice.rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert bob.http.get(f"{checkpoint}/archive").status_code == 404


@pytest.mark.parametrize("key", ["tml-nobodys", None])
def test_without_a_key_nothing_goes(open_to, monkeypatch, key):
    started = time.monotonic()
    with pytest.raises(tinker.AuthenticationError, match="API key"):
        tinker.RestClient(base_url=open_to[0], api_key=key).list_training_runs().result()
    with pytest.raises(tinker.AuthenticationError, match="API key"):
        tinker.ServiceClient(base_url=open_to[0], api_key=key).create_sampling_client(
            base_model="tiny-llama"
        ).result()
    assert time.monotonic() - started < 10
    headers = {} if key is None else {"x-api-key": key}
    for path in ("create_session", "optim_step", "forward_backward", "retrieve_future", "asample"):
        for body in ({}, {"request_id": "x", "model_id": "x", "seq_id": 1}):
            answer = httpx.post(f"{open_to[0]}/api/v1/{path}", json=body, headers=headers)
            assert answer.status_code in (401, 422), path
    assert httpx.get(f"{open_to[0]}/api/v1/healthz").status_code == 200


def test_models_that_are_not_listed_are_not_served(bob, tiny_qwen2):
    """A path on this machine is not for clients to name."""
    with pytest.raises(tinker.RequestFailedError, match="not served here"):
        bob.client.create_lora_training_client(tiny_qwen2, rank=4).result()


def test_a_server_without_keys_stays_at_home(tmp_path):
    for host in ("127.0.0.1", "localhost", "::1"):
        check_host(host, Access())
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(InvalidInput, match="api-key-file"):
            check_host(host, Access())
        check_host(host, Access(KeyFile(tmp_path / "keys.json")))
