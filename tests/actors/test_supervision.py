"""The controller is killed: clients wait, and get what they would have got."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import tinsmith
from tests.actors.test_recovery import assert_same, kill_one
from tests.actors.test_training import LORA, new_run, same_weights_logprobs, script

MODEL = "tiny-qwen3"  # whose actors only tests of faults use
PROMPT = np.arange(20)
PARAMS = tinsmith.SamplingParams(max_tokens=400, stop=[], seed=0)


@pytest.mark.timeout(400)
async def test_a_controller_that_dies_comes_back_and_no_client_notices(service):
    undisturbed, killed = await new_run(service, LORA, MODEL), await new_run(service, LORA, MODEL)
    wanted = [await getattr(undisturbed, kind)(*args) for kind, args in script(7, 24)]
    weights = await same_weights_logprobs(undisturbed)
    policy = await service.create_sampling_client(base_model=MODEL)
    workers = await service.create_env_client(MODEL)
    few = tinsmith.SamplingParams(max_tokens=4)
    spec = tinsmith.EpisodeSpec("tests.envs.misbehaving:Misbehaving", policy, few)
    assert (await workers.run_episode(spec)).reward == 3.0

    first = [await getattr(killed, kind)(*args) for kind, args in script(7, 12)]
    pinned = await killed.save_weights_and_get_sampling_client()
    live = await killed.live_sampling_client().ready()
    sampled = (await pinned.sample(PROMPT, 1, PARAMS)).sequences[0].tokens
    there = {run.run_id for run in await service.list_training_runs()}

    rest = [getattr(killed, kind)(*args) for kind, args in list(script(7, 24))[12:]]
    under_way = [client.sample(PROMPT, 1, PARAMS) for client in (pinned, live)]
    episode, made = workers.run_episode(spec), service.create_lora_training_client(MODEL, rank=2)
    await rest[2]
    await asyncio.to_thread(kill_one, "Controller")
    asked = service.list_checkpoints()
    results = [*first, *await asyncio.wait_for(asyncio.gather(*rest), 300)]
    for got, expected in zip(results, wanted, strict=True):
        assert_same(got, expected)
    for a, b in zip(weights, await same_weights_logprobs(killed), strict=True):
        np.testing.assert_array_equal(a, b)
    again, newest = await asyncio.wait_for(asyncio.gather(*under_way), 120)
    np.testing.assert_array_equal(again.sequences[0].tokens, sampled)
    assert len(newest.sequences[0].tokens) == 400
    assert (await asyncio.wait_for(episode, 120)).reward == 3.0
    await asked
    made = await asyncio.wait_for(made, 120)
    assert {run.run_id for run in await service.list_training_runs()} == there | {made.run_id}

    # All of it goes on: what is published, by whom, and what is told of the deaths.
    await made.optim_step()
    assert (await killed.optim_step()).version == 9
    assert set((await live.sample(PROMPT, 1, few)).sequences[0].versions) == {9}
    assert (await workers.run_episode(spec)).reward == 3.0
    await workers.close()
    told = await service.metrics()
    assert 'tinsmith_crashes_total{model="",of="controller",process="controller"} 1.0' in told
