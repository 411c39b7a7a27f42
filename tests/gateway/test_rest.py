"""Looking things up and looking after them: runs, checkpoints, sessions, exports."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import httpx
import numpy as np
import peft
import pyrage
import pytest
import tinker
import torch
from tinker import types
from tinker.types import SessionSearchRequest
from transformers import AutoModelForCausalLM

from tests.data import text_datum
from tests.gateway.conftest import KEY
from tests.gateway.sdk import outputs, prompt, sdk_datum

KEYED = {"X-API-Key": KEY}


@pytest.fixture(scope="module")
def trained(url):
    """A run of two steps with a checkpoint of each kind, and its session's client."""
    with tinker.ServiceClient(base_url=url, user_metadata={"who": "tests"}) as client:
        training = client.create_lora_training_client(
            base_model="tiny-qwen3", rank=4, seed=3, user_metadata={"renderer_name": "role_colon"}
        ).result()
        for seed in range(2):
            data = [sdk_datum(text_datum(np.random.default_rng(seed), 16))]
            training.forward_backward(data, "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=1e-2))
        training.save_state("kept", user_metadata={"step": "2"}).result()
        training.save_weights_for_sampler("kept").result()
        yield client, training


@pytest.fixture(scope="module")
def rest(url):
    return tinker.RestClient(base_url=url)


def test_a_run_is_found_with_its_metadata_and_checkpoints(rest, trained):
    _, training = trained
    run = rest.get_training_run(training.model_id).result()
    assert run.base_model == "tiny-qwen3"
    assert (run.is_lora, run.lora_rank) == (True, 4)
    assert run.user_metadata == {"renderer_name": "role_colon"}
    assert run.last_checkpoint.tinker_path == f"tinker://{training.model_id}/weights/kept"
    assert run.last_sampler_checkpoint.checkpoint_id == "sampler_weights/kept"
    by_path = rest.get_training_run_by_tinker_path(run.last_checkpoint.tinker_path).result()
    assert by_path.training_run_id == training.model_id


def test_lists_are_paged(rest, trained):
    _, training = trained
    whole = rest.list_training_runs(limit=1000).result()
    first = rest.list_training_runs(limit=1).result()
    assert first.cursor.total_count == len(whole.training_runs)
    assert [r.training_run_id for r in first.training_runs] == [
        whole.training_runs[0].training_run_id
    ]
    assert training.model_id in {r.training_run_id for r in whole.training_runs}
    second = rest.list_user_checkpoints(limit=1, offset=1).result()
    assert len(second.checkpoints) == 1
    assert second.cursor.total_count >= 2


def test_a_checkpoints_facts(rest, trained):
    _, training = trained
    (kept,) = [
        c
        for c in rest.list_checkpoints(training.model_id).result().checkpoints
        if c.checkpoint_id == "weights/kept"
    ]
    assert (kept.checkpoint_type, kept.public, kept.expires_at) == ("training", False, None)
    assert kept.user_metadata == {"step": "2"}
    assert kept.size_bytes > 1000
    info = rest.get_weights_info_by_tinker_path(kept.tinker_path).result()
    assert (info.base_model, info.lora_rank, info.train_mlp) == ("tiny-qwen3", 4, True)


def test_publish_ttl_and_delete(rest, trained):
    _, training = trained
    path = training.save_state("passing", ttl_seconds=3600).result().path

    def listed():
        found = rest.list_checkpoints(training.model_id).result().checkpoints
        return next((c for c in found if c.tinker_path == path), None)

    assert 3000 < listed().expires_at.timestamp() - time.time() < 3601
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert listed().expires_at is None
    rest.publish_checkpoint_from_tinker_path(path).result()
    assert listed().public
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert not listed().public
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert listed() is None
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(path).result()


def test_an_expired_checkpoint_is_gone(service, rest, trained):
    _, training = trained
    path = training.save_state("brief", ttl_seconds=1).result().path
    time.sleep(1.2)
    assert path not in {
        c.tinker_path for c in rest.list_checkpoints(training.model_id).result().checkpoints
    }
    with pytest.raises(tinker.NotFoundError):
        rest.get_weights_info_by_tinker_path(path).result()


def test_an_archive_is_an_adapter_that_peft_loads(url, tiny_home, trained, tmp_path):
    _, training = trained
    address = (
        f"{url}/api/v1/training_runs/{training.model_id}/checkpoints/sampler_weights/kept/archive"
    )
    got = httpx.get(address, headers=KEYED)
    assert got.headers["content-type"] == "application/gzip"
    assert httpx.get(address, headers=KEYED).content == got.content
    with tarfile.open(fileobj=io.BytesIO(got.content)) as tar:
        tar.extractall(tmp_path, filter="data")
    datum = text_datum(np.random.default_rng(5), 20)
    assert_peft_agrees(tiny_home, tmp_path, training, datum)


def assert_peft_agrees(tiny_home: Path, adapter: Path, training, datum) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_home / "models" / "tiny-qwen3")
    model = peft.PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        logits = model(torch.tensor(datum.model_input.tokens[None])).logits[0]
    targets = torch.tensor(datum.loss_fn_inputs["target_tokens"])
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].numpy()
    (ours,) = outputs(training.forward([sdk_datum(datum)], "cross_entropy").result())
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_sessions_and_samplers(rest, trained):
    client, training = trained
    sampler = client.create_sampling_client(base_model="tiny-llama").result()
    sampler.sample(prompt([1, 2]), 1, types.SamplingParams(max_tokens=1)).result()
    session_id = training.model_id.partition(":")[0]
    assert session_id in rest.list_sessions(limit=1000).result().sessions
    session = rest.get_session(session_id).result()
    assert training.model_id in session.training_run_ids
    assert session.user_metadata == {"who": "tests"}
    assert session.sampler_ids
    found = rest.get_sampler(session.sampler_ids[0]).result()
    assert found.base_model == "tiny-llama"


@pytest.mark.filterwarnings("ignore::Warning")
def test_sessions_are_searched(url, rest):
    for name in ("nightly one", "nightly two", "other"):
        with tinker.ServiceClient(base_url=url, display_name=name) as client:
            client.create_sampling_client(base_model="tiny-llama").result()
    page = rest.search_sessions(SessionSearchRequest(display_name="nightly", limit=1)).result()
    assert [s.display_name for s in page.sessions] == ["nightly two"]
    assert page.sessions[0].status.type == "client_finished"
    following = SessionSearchRequest(display_name="nightly", limit=1, cursor=page.next_cursor)
    page = rest.search_sessions(following).result()
    assert [s.display_name for s in page.sessions] == ["nightly one"]
    assert page.next_cursor is None


@pytest.mark.filterwarnings("ignore::Warning")
def test_there_is_nothing_to_pay_and_nothing_audited(url):
    admin = tinker.AdminClient(base_url=url)
    assert admin.get_billing_usage("2026-01-01", "2026-01-02").result().data == []
    assert admin.get_current_checkpoint_storage_usage().result().data == []
    assert admin.get_audit_log().result().entries == []


def test_weights_are_copied_to_another_run(url, trained):
    client, training = trained
    other = client.create_lora_training_client(base_model="tiny-qwen3", rank=4).result()
    session_id, _, number = other.model_id.split(":")
    body = {
        "source_path": f"tinker://{training.model_id}/weights/kept",
        "session_id": session_id,
        "model_seq_id": int(number),
    }
    copied = httpx.post(f"{url}/api/v1/copy_weights", json=body, headers=KEYED).json()
    assert copied == {"tinker_path": f"tinker://{other.model_id}/weights/kept"}
    again = client.create_training_client_from_state_with_optimizer(copied["tinker_path"]).result()
    data = [sdk_datum(text_datum(np.random.default_rng(5), 20))]
    a, b = (outputs(r.forward(data, "cross_entropy").result()) for r in (training, again))
    np.testing.assert_array_equal(a[0], b[0])


# ---- the SDK's command line ----


@pytest.fixture
def tinker_cli(url, tmp_path, monkeypatch):
    monkeypatch.setenv("TINKER_BASE_URL", url)
    monkeypatch.setenv("HOME", str(tmp_path))

    script = "from tinker.cli.__main__ import main; main()"

    def run(*command: str):
        call = [sys.executable, "-W", "ignore", "-c", script, "--format", "json", *command]
        how = dict(capture_output=True, text=True, timeout=120, cwd=tmp_path)
        done = subprocess.run(call, **how)
        if done.returncode == -signal.SIGABRT:  # the SDK, now and then, as its process ends
            done = subprocess.run(call, **how)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout) if done.stdout.startswith(("{", "[")) else done

    return run


def test_the_command_line_lists_and_shows(tinker_cli, trained):
    _, training = trained
    assert "tiny-qwen3" in json.dumps(tinker_cli("model", "list"))
    assert training.model_id in json.dumps(tinker_cli("run", "list", "--limit", "0"))
    assert "tiny-qwen3" in json.dumps(tinker_cli("run", "info", training.model_id))
    path = f"tinker://{training.model_id}/weights/kept"
    assert path in json.dumps(tinker_cli("checkpoint", "list", "--run-id", training.model_id))
    assert "step" in json.dumps(tinker_cli("checkpoint", "info", path))
    assert "yes" in tinker_cli("auth", "status").stdout
    tinker_cli("billing", "checkpoint-storage")


def test_the_command_line_looks_after_checkpoints(tinker_cli, trained, rest):
    _, training = trained
    path = training.save_state("by-hand").result().path
    tinker_cli("checkpoint", "publish", path)
    tinker_cli("checkpoint", "set-ttl", path, "--ttl", "7200")
    found = rest.list_checkpoints(training.model_id).result().checkpoints
    (kept,) = [c for c in found if c.tinker_path == path]
    assert kept.public
    assert kept.expires_at is not None
    tinker_cli("checkpoint", "unpublish", path)
    tinker_cli("checkpoint", "delete", path, "--yes")
    found = rest.list_checkpoints(training.model_id).result().checkpoints
    assert path not in {c.tinker_path for c in found}


def test_the_command_line_downloads_an_adapter(tinker_cli, trained, tiny_home, tmp_path):
    _, training = trained
    path = f"tinker://{training.model_id}/weights/kept"
    tinker_cli("checkpoint", "download", path, "--output", str(tmp_path / "out"))
    (folder,) = (tmp_path / "out").iterdir()
    datum = text_datum(np.random.default_rng(6), 20)
    assert_peft_agrees(tiny_home, folder, training, datum)


def test_addresses_of_files_are_good_for_their_files_alone(url, trained):
    _, training = trained
    path = training.save_weights_for_sampler("signed").result().path
    _, _, rest = path.partition("://")
    run_id, kind, name = rest.split("/")
    base = f"{url}/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}"
    urls = httpx.get(f"{base}/external_weights_urls", headers=KEYED).json()["urls"]
    config = urls["adapter_config.json"]
    assert httpx.get(config).json()["r"] == 4  # no key: the address is the permission
    assert (
        httpx.get(config.replace("adapter_config.json", "optimizer.safetensors")).status_code == 404
    )
    assert httpx.get(config.replace("signed", "kept")).status_code == 404


def test_an_encrypted_export_is_for_its_recipients_alone(trained, rest):
    _, training = trained
    identity, other = (pyrage.x25519.Identity.generate() for _ in range(2))
    plain, sealed = (
        training.save_weights_external(name, age_encryption_recipients=recipients).result().path
        for name, recipients in (("plain", None), ("sealed", [str(identity.to_public())]))
    )
    expected, urls = (rest.get_external_weights_urls(p).result().urls for p in (plain, sealed))
    assert set(urls) == {f"{name}.age" for name in expected}
    for name, url in expected.items():
        data = httpx.get(urls[f"{name}.age"]).content
        assert pyrage.decrypt(data, [identity]) == httpx.get(url).content
        with pytest.raises(pyrage.DecryptError):
            pyrage.decrypt(data, [other])
    for recipients in (["age1nobody"], ["ssh-rsa nobody"], [str(other.to_public())] * 11):
        with pytest.raises(tinker.RequestFailedError, match="recipient"):
            training.save_weights_external("bad", age_encryption_recipients=recipients).result()
