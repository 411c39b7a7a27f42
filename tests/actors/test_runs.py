"""Runs are opened, closed and opened again; base models come into memory and leave it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import tinsmith
from tests.actors.test_checkpoints import assert_same_weights, train
from tests.actors.test_training import LORA, new_run
from tests.data import text_datum
from tinsmith.primitives.client import TrainingClient
from tinsmith.primitives.op import Op
from tinsmith.primitives.types import PolicyRef

MODEL = "tiny-llama"
GATEWAY_ID = "2f6c1e9a-0b1d-4c8e-9a57-3f2d7c6b5a40:train:0"


def call(service, method: str, *args):
    return Op(service.controller.call(method, *args))


def create(service, run_id: str, path: str | None = None):
    return call(service, "create_run", run_id, None if path else MODEL, LORA, path, False, {})


async def test_a_closed_run_frees_its_memory_keeps_its_checkpoints_and_opens_again(service):
    training = await new_run(service)
    await train(training, 0)
    live = await training.live_sampling_client().ready()
    await live.sample([1, 2, 3], 1, tinsmith.SamplingParams(max_tokens=1))
    path = (await training.save_state("before-closing")).path
    training._take_seq_ids()  # what follows waits
    waiting = training.optim_step()
    await asyncio.sleep(0.1)

    for _ in range(2):
        await service.close_training_run(training.run_id)
    with pytest.raises(tinsmith.NotFound, match="was closed"):
        await waiting
    with pytest.raises(tinsmith.NotFound, match="not open on this learner"):
        await training.get_info()
    with pytest.raises(tinsmith.NotFound, match="holds no weights of run"):
        await live.sample([1, 2, 3], 1, tinsmith.SamplingParams(max_tokens=1))
    assert [c.path for c in await service.list_checkpoints(training.run_id)] == [path]

    again = await service.resume_training_client(training.run_id)
    assert (await again.get_info()).version == 2
    reference = await service.create_training_client_from_state(path)
    await assert_same_weights(again, reference)
    with pytest.raises(tinsmith.NotFound, match="no run 'none'"):
        await service.close_training_run("none")


async def test_a_publication_under_way_does_not_outlive_its_run(service):
    for _ in range(5):
        training = await new_run(service)
        publications = [training.live_sampling_client() for _ in range(3)]
        await service.close_training_run(training.run_id)
        await asyncio.gather(*(p.ready() for p in publications), return_exceptions=True)
        sampler = (await call(service, "grant_sampler", MODEL, PolicyRef())).sampler
        assert await Op(sampler.call("latest_version", training.run_id)) is None


async def test_a_model_is_unloaded_when_no_run_is_open_and_loaded_again_by_its_next_use(
    service, tiny_qwen2
):
    assert await service.unload_model(tiny_qwen2)  # not in memory yet
    training = await service.create_lora_training_client(tiny_qwen2, rank=2)
    policy = await service.create_sampling_client(base_model=tiny_qwen2)
    prompt, params = np.arange(20), tinsmith.SamplingParams(max_tokens=4, temperature=0)
    before = await policy.sample(prompt, 1, params)
    assert await service.unload_model(tiny_qwen2) is False
    await training.get_info()

    saving = training.save_state("last")
    await asyncio.sleep(0.05)
    await service.close_training_run(training.run_id)
    assert await service.unload_model(tiny_qwen2) is True
    assert (await saving).path == f"tinker://{training.run_id}/weights/last"
    with pytest.raises(tinsmith.Unavailable, match="the learner actor is gone"):
        await asyncio.wait_for(training.get_info(), 30)
    assert await service.unload_model(tiny_qwen2) is True

    after = await policy.sample(prompt, 1, params)
    np.testing.assert_array_equal(before.sequences[0].tokens, after.sequences[0].tokens)
    again = await service.resume_training_client(training.run_id)
    assert await service.unload_model(tiny_qwen2) is False
    await service.delete_training_run(again.run_id)
    assert await service.unload_model(tiny_qwen2) is True


async def test_opening_runs_and_unloading_at_once_ends_no_open_run(service, tiny_qwen2):
    async def use() -> None:
        training = await service.create_lora_training_client(tiny_qwen2, rank=2)
        await training.get_info()
        await service.close_training_run(training.run_id)

    async def unload() -> None:
        for _ in range(20):
            await service.unload_model(tiny_qwen2)
            await asyncio.sleep(0.05)

    await asyncio.gather(unload(), *(use() for _ in range(4)))
    assert await service.unload_model(tiny_qwen2) is True


async def test_a_run_id_is_taken_once_also_by_two_at_once(service):
    results = await asyncio.gather(
        create(service, GATEWAY_ID), create(service, GATEWAY_ID), return_exceptions=True
    )
    (grant,) = [r for r in results if not isinstance(r, Exception)]
    (refused,) = [r for r in results if isinstance(r, Exception)]
    assert isinstance(refused, tinsmith.InvalidInput)
    assert f"run '{GATEWAY_ID}' exists already" in str(refused)
    with pytest.raises(tinsmith.InvalidInput, match="exists already"):
        await create(service, GATEWAY_ID)
    with pytest.raises(tinsmith.InvalidInput, match="run id"):
        await create(service, "../up")

    # Colons go everywhere a run's id does.
    training = TrainingClient(grant, service.controller)
    await train(training, 0)
    path = (await training.save_state("a")).path
    assert path == f"tinker://{GATEWAY_ID}/weights/a"
    await training.load_state_with_optimizer(path)
    policy = await service.create_sampling_client(path)
    await policy.sample([1, 2], 1, tinsmith.SamplingParams(max_tokens=1))
    other = await create(service, GATEWAY_ID.replace("train:0", "train:1"), path)
    await service.delete_training_run(other.run_id)
    await service.delete_training_run(GATEWAY_ID)
    await create(service, GATEWAY_ID)  # its id is free again
    await service.delete_training_run(GATEWAY_ID)


async def test_an_id_whose_first_use_failed_is_free(service):
    with pytest.raises(tinsmith.NotFound, match="no checkpoint"):
        await create(service, "second-try", "tinker://none/weights/none")
    await create(service, "second-try")
    await service.delete_training_run("second-try")


async def test_a_run_opened_again_goes_on_with_its_clients_numbers(service):
    training = await new_run(service)
    await train(training, 0)
    path = (await training.save_state("seven")).path
    assert training._next_seq_id == 8
    await service.close_training_run(training.run_id)
    grant = await call(service, "resume_run", training.run_id, path, 8)
    assert grant.next_seq_id == 8
    training.forward_backward([text_datum(np.random.default_rng(0))])  # by the client it had
    assert (await training.optim_step()).version == 3
    following = await call(service, "resume_run", training.run_id, None)
    assert following.next_seq_id == 10
    with pytest.raises(tinsmith.InvalidInput, match="was applied before"):
        await Op(grant.learner.call("submit", training.run_id, 7, "get_info", {}))
    with pytest.raises(tinsmith.InvalidInput, match="next_seq_id must be at least 1"):
        await call(service, "resume_run", training.run_id, path, 0)
