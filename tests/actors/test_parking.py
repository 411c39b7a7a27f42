"""Runs leave memory and come back; checkpoints expire, are shared and copied; models unload."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import ray

import tinsmith
from tests.actors.test_checkpoints import assert_same_weights, train, trained_run
from tests.actors.test_training import new_run
from tests.data import text_datum
from tinsmith.primitives.client import TrainingClient
from tinsmith.primitives.op import Op
from tinsmith.primitives.types import AdamParams, LoraConfig


async def reopen(service, run_id: str) -> TrainingClient:
    grant = await Op(service.controller.call("reopen_run", run_id))
    return TrainingClient(grant, service.controller)


async def test_a_parked_run_goes_on_bitwise_in_the_middle_of_a_step(service):
    parked, other = await trained_run(service), await trained_run(service)
    data = [text_datum(np.random.default_rng(5), 12)]
    for run in (parked, other):
        await run.forward_backward(data)  # half a step: a gradient waits
    before = (await parked.get_info()).version
    await Op(parked._grant.learner.call("park", parked.run_id))
    ray.kill(parked._grant.learner.actor)
    back = await reopen(service, parked.run_id)
    assert back._next_seq_id == parked._next_seq_id
    assert (await back.get_info()).version == before
    for run in (back, other):
        await run.optim_step(AdamParams(learning_rate=1e-2))
        await train(run, 3)
    await assert_same_weights(back, other)
    await Op(service.controller.call("close_run", parked.run_id))
    with pytest.raises(tinsmith.NotFound, match="not in memory and has no log"):
        await reopen(service, parked.run_id)


async def test_a_run_in_memory_is_reopened_as_it_is(service):
    training = await trained_run(service)
    again = await reopen(service, training.run_id)
    assert again._next_seq_id == training._next_seq_id
    await assert_same_weights(training, again)


async def test_a_closed_run_keeps_what_is_saved(service):
    training = await trained_run(service)
    await training.save_state("kept")
    twin = await service.create_training_client_from_state(
        f"tinker://{training.run_id}/weights/kept"
    )
    await service.close_training_run(training.run_id)
    await service.close_training_run(training.run_id)
    with pytest.raises(tinsmith.NotFound, match="not open"):
        await training.get_info()
    again = await service.resume_training_client(training.run_id)
    await assert_same_weights(again, twin)
    with pytest.raises(tinsmith.NotFound):
        await service.close_training_run("nobody")


async def test_a_run_id_is_given_once(service):
    create = ("create_run", "twice:train:0", "tiny-llama", LoraConfig(rank=2), None, False, {})
    both = await asyncio.gather(
        *(Op(service.controller.call(*create)) for _ in range(2)), return_exceptions=True
    )
    assert sum(isinstance(result, tinsmith.InvalidInput) for result in both) == 1


async def test_an_idle_model_is_unloaded_and_comes_back(service):
    training = await service.create_lora_training_client("tiny-qwen3", rank=2)
    assert not await service.unload_model("tiny-qwen3")
    await service.close_training_run(training.run_id)
    others = [r for r in await service.list_training_runs() if r.base_model == "tiny-qwen3"]
    for run in others:
        await service.close_training_run(run.run_id)
    old = await service.create_sampling_client(base_model="tiny-qwen3")
    assert await service.unload_model("tiny-qwen3")
    assert (await old.sample([1, 2], 1, tinsmith.SamplingParams(max_tokens=1))).sequences
    assert await service.create_lora_training_client("tiny-qwen3", rank=2)


async def test_checkpoints_expire_are_shared_and_copied(service, tiny_home):
    training, other = await trained_run(service), await new_run(service)
    brief = (await training.save_state("brief", ttl_seconds=1)).path
    path = (await training.save_weights_for_sampler("s", user_metadata={"a": 1})).path
    await asyncio.sleep(1.1)
    assert [c.path for c in await service.list_checkpoints(training.run_id)] == [path]
    with pytest.raises(tinsmith.NotFound):
        await Op(service.controller.call("get_checkpoint", brief))
    with pytest.raises(tinsmith.InvalidInput, match="ttl_seconds"):
        await training.save_state("never", ttl_seconds=0)
    await Op(service.controller.call("publish_checkpoint", path, True))
    await Op(service.controller.call("set_checkpoint_ttl", path, 60))
    (shared,) = await service.list_checkpoints(training.run_id)
    assert shared.public
    assert shared.expires is not None
    copy = await Op(service.controller.call("copy_checkpoint", path, other.run_id))
    (copied,) = await service.list_checkpoints(other.run_id)
    assert (copied.path, copied.public, copied.expires) == (copy, False, None)
    assert copied.user_metadata == {"a": 1}
    with pytest.raises(tinsmith.InvalidInput, match="exists already"):
        await Op(service.controller.call("copy_checkpoint", path, other.run_id))
    policies = [await service.create_sampling_client(model_path=p) for p in (path, copy)]
    params = tinsmith.SamplingParams(max_tokens=6, seed=1)
    a, b = [(await p.sample([5, 6], 1, params)).sequences[0].tokens.tolist() for p in policies]
    assert a == b


async def test_a_sample_under_way_is_withdrawn(service):
    policy = await service.create_sampling_client(base_model="tiny-llama")
    grant = policy._grant.result()
    request = tinsmith.primitives.types.SampleRequest(
        np.array([5, 6]), tinsmith.SamplingParams(max_tokens=500, stop=[]), grant.policy
    )
    under_way = grant.sampler.call("sample", request, "mine")
    for _ in range(100):  # calls to an asyncio actor may overtake each other
        if await Op(grant.sampler.call("withdraw", "mine")):
            break
    with pytest.raises(tinsmith.OpCancelled):
        await Op(under_way)
    assert not await Op(grant.sampler.call("withdraw", "mine"))
    assert (await Op(grant.sampler.call("stats")))["running"] == 0
