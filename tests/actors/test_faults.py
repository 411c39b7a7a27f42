"""Actors that die: calls say so at once, and what was saved goes on in a new actor."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import ray

import tinsmith
from tests.actors.test_checkpoints import assert_same_weights, train
from tests.actors.test_recovery import kill_one
from tests.actors.test_training import LORA, new_run
from tests.data import text_datum

MODEL = "tiny-qwen3"  # whose actors no other test uses
PROMPT = np.arange(20)
PARAMS = tinsmith.SamplingParams(max_tokens=400, stop=[], seed=0)


def kill(handle) -> None:
    ray.kill(handle.actor, no_restart=True)


async def drain(stream) -> None:
    async for _ in stream:
        pass


async def test_when_a_learner_dies_its_runs_go_on_where_they_were(service):
    training = await new_run(service, LORA, MODEL)
    await train(training, 0)
    path = (await training.save_state("safe")).path
    other = await service.create_training_client_from_state_with_optimizer(path)
    await train(training, 1)
    live = await training.live_sampling_client().ready()

    kill(training._grant.learner)
    # All at once, and with a new run: one new learner serves them.
    await asyncio.wait_for(
        asyncio.gather(train(other, 1), assert_version(training, 4), new_run(service, LORA, MODEL)),
        60,
    )
    assert training._grant.learner == other._grant.learner
    await assert_same_weights(training, other)

    kill(training._grant.learner)
    custom = training.forward_backward_custom(
        [text_datum(np.random.default_rng(0))], lambda d, p: (-p[0].sum(), {})
    )
    step = training.optim_step()
    await asyncio.wait_for(asyncio.gather(custom, step), 60)
    response = await live.sample(PROMPT, 1, tinsmith.SamplingParams(max_tokens=4))
    assert set(response.sequences[0].versions) == {5}


async def assert_version(training, version: int) -> None:
    assert (await training.get_info()).version == version


async def test_a_pool_that_dies_comes_back_with_all_versions_and_samples_the_same_again(service):
    training = await new_run(service, LORA, MODEL)
    await train(training, 0)
    pinned = await training.save_weights_and_get_sampling_client()
    live = await training.live_sampling_client().ready()
    await train(training, 1)
    path = (await training.save_weights_for_sampler("saved")).path
    saved = await service.create_sampling_client(path)
    base = await service.create_sampling_client(base_model=MODEL)
    clients = (pinned, live, saved, base)
    wanted = await asyncio.gather(*(client.sample(PROMPT, 2, PARAMS) for client in clients))

    under_way = [client.sample(PROMPT, 2, PARAMS) for client in clients]
    stream = live.sample_stream(PROMPT, 1, PARAMS)
    await anext(stream)
    kill_one("SamplerPool")
    with pytest.raises(tinsmith.Unavailable, match="the sampler actor is gone"):
        await asyncio.wait_for(drain(stream), 30)  # it had begun
    for op, response in zip(under_way, wanted, strict=True):
        got = await asyncio.wait_for(op, 120)
        for a, b in zip(got.sequences, response.sequences, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
            assert set(a.versions) == set(b.versions)

    kill_one("SamplerPool")
    step = training.optim_step()  # publishes: to the pool that takes its place
    assert (await asyncio.wait_for(step, 120)).version == 5
    few = tinsmith.SamplingParams(max_tokens=4)
    assert set((await live.sample(PROMPT, 1, few)).sequences[0].versions) == {5}
    # A version from before it is newer to the new pool, but not the newest.
    assert set((await pinned.sample(PROMPT, 1, few)).sequences[0].versions) == {2}
    assert set((await live.sample(PROMPT, 1, few)).sequences[0].versions) == {5}


async def test_an_environment_worker_that_dies_costs_its_episodes_and_comes_back(service):
    policy = await service.create_sampling_client(base_model="tiny-llama")
    client = await service.create_env_client("tiny-llama")
    spec = tinsmith.EpisodeSpec(
        "tests.envs.misbehaving:Misbehaving", policy, tinsmith.SamplingParams(max_tokens=4)
    )
    assert (await client.run_episode(spec)).reward == 3.0
    worker = client._workers[0]
    ray.kill(worker.actor, no_restart=False)
    async with asyncio.timeout(120):
        while True:
            try:
                assert (await client.run_episode(spec)).reward == 3.0
                break
            except tinsmith.Unavailable as error:
                assert "the environment worker actor is gone" in str(error)  # noqa: PT017
