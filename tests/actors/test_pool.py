"""A model's samplers as one: requests and adapters reach them all, and deaths are mended."""

from __future__ import annotations

import json

import pytest

from tests.actors.script import run_script, wait_until_gone

COMMON = """
import asyncio, json, sys
import numpy as np
import psutil
import tinsmith
from tests.actors.script import children_settled, descendants
from tests.data import text_datum
from tinsmith import Op, Replicas
from tinsmith.primitives.types import SampleRequest, SampleResponse

PROMPT = np.arange(100)

def seeded(tokens, seed=0):
    return tinsmith.SamplingParams(max_tokens=tokens, stop=[], seed=seed)

def samplers():
    # Ray writes what an actor is doing behind its name.
    return [
        p for p in map(psutil.Process, descendants())
        if p.name().startswith("ray::Sampler") and "Pool" not in p.name()
    ]

async def until(condition, seconds=60):
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.1)

async def count(client):
    return (await Op(client._grant.result().sampler.call("stats")))["replicas"]

def service(home, replicas, **more):
    return tinsmith.connect(
        home=home, num_cpus=2, learner_threads=1, sampler_threads=1, kv_bytes=1 << 24,
        engine="torch", samplers=replicas, **more
    )

async def step(training, seed):
    training.forward_backward([text_datum(np.random.default_rng(seed))])
    await training.optim_step(tinsmith.AdamParams(learning_rate=0.01))

def same(responses):
    first, *rest = [r.sequences[0] for r in responses]
    for other in rest:
        np.testing.assert_array_equal(other.tokens, first.tokens)
        np.testing.assert_allclose(other.logprobs, first.logprobs, atol=1e-4)
"""


def told(script: str, *args: object, seconds: float = 300) -> dict:
    out = run_script(COMMON + script, *args, seconds=seconds)
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_samplers_share_requests_and_adapters_and_their_deaths_are_mended(tiny_home):
    result = told(
        """
async def main(home):
    async with service(home, 2) as cluster:
        training = await cluster.create_lora_training_client("tiny-llama", rank=4, seed=0)
        live = await training.live_sampling_client().ready()
        await step(training, 0)
        first = await training.save_weights_and_get_sampling_client()
        await until(lambda: both(live))
        pids = descendants()

        # One seed gives one answer, wherever it is drawn; the second round finds its prefixes.
        await asyncio.gather(*(first.sample(PROMPT + i, 1, seeded(8)) for i in range(6)))
        again = [first.sample(PROMPT + i, 1, seeded(8)) for i in (5, 3, 1, 0, 2, 4)]
        cached = [(await response).prompt_cache_hit_tokens for response in again]
        reference = await first.sample(PROMPT, 1, seeded(300, seed=7))

        # One of two dies with requests under way.
        under_way = [first.sample(PROMPT, 1, seeded(300, seed=7)) for _ in range(24)]
        await asyncio.sleep(0.3)
        samplers()[0].kill()
        same([reference, *await asyncio.gather(*under_way)])
        await until(lambda: both(first))

        # Both die: their successors are given every version, the older one too.
        await step(training, 1)
        second = await training.save_weights_and_get_sampling_client()
        before = await second.sample(PROMPT, 1, seeded(20))
        for process in samplers():
            process.kill()
        same([reference, await first.sample(PROMPT, 1, seeded(300, seed=7))])
        same([before, await second.sample(PROMPT, 1, seeded(20))])
        versions = {int(v) for v in (await live.sample(PROMPT, 1, seeded(4))).sequences[0].versions}
        await until(lambda: both(first))

        # What none of them can serve is refused, and changes nothing.
        pool = live._grant.result().sampler
        wrong = pool.call("add_adapter", training.run_id, 9, tinsmith.LoraConfig(rank=4), np.zeros(3, np.float32), True)
        try:
            await Op(wrong)
        except tinsmith.InvalidInput as error:
            refused = str(error)
        assert await Op(pool.call("latest_version", training.run_id)) == 2
        await live.sample(PROMPT, 1, seeded(1))

        # One hangs: a publication does not wait for it long, and it serves nothing old afterwards.
        hanging = samplers()[0]
        hanging.suspend()
        await step(training, 2)
        third = await training.save_weights_and_get_sampling_client()
        same([await asyncio.wait_for(third.sample(PROMPT, 1, seeded(20)), 60) for _ in range(3)])
        hanging.resume()
        reference = await third.sample(PROMPT, 1, seeded(20))
        same([reference, *await asyncio.gather(*(third.sample(PROMPT, 1, seeded(20)) for _ in range(60)))])

        # What is forgotten is forgotten by all.
        await cluster.delete_training_run(training.run_id)
        forgotten = []
        for client in (first, third, live):
            try:
                await client.sample(PROMPT, 1, seeded(1))
            except tinsmith.NotFound as error:
                forgotten.append(str(error))
        pids += descendants()
    print(json.dumps(dict(cached=cached, versions=sorted(versions), refused=refused,
                          forgotten=forgotten, pids=pids, settled=children_settled())))

async def both(client):
    return await count(client) == 2

asyncio.run(main(*sys.argv[1:]))
""",
        tiny_home,
    )
    assert min(result["cached"]) > 0
    assert result["versions"] == [2]
    assert "parameters, expected" in result["refused"]
    assert len(result["forgotten"]) == 3
    assert result["settled"]
    assert wait_until_gone(result["pids"]) == []


@pytest.mark.slow
def test_samplers_come_and_go_with_what_is_asked_of_them(tiny_home):
    result = told(
        """
async def main(home):
    replicas = Replicas(
        1, 2, target_ongoing_requests=4, upscale_delay_s=0.5, downscale_delay_s=2, max_requests=10
    )
    async with service(home, replicas) as cluster:
        base = await cluster.create_sampling_client(base_model="tiny-llama")
        counts = [await count(base)]
        grown = asyncio.Event()

        async def ask(seed):
            while not grown.is_set():
                await base.sample(PROMPT, 1, seeded(50, seed))

        asking = [asyncio.create_task(ask(seed)) for seed in range(10)]

        async def two():
            return await count(base) == 2

        await until(two)
        # There is no room for more: they are told to come again, and clients do.
        grant, busy = base._grant.result(), 0
        while not busy:
            raw = [
                Op(grant.sampler.call("sample", SampleRequest(PROMPT, seeded(50), grant.policy)))
                for _ in range(10)
            ]
            told = await asyncio.gather(*raw, return_exceptions=True)
            busy = sum(isinstance(answer, tinsmith.Busy) for answer in told)
            assert busy + sum(isinstance(answer, SampleResponse) for answer in told) == 10, told
        crowd = [base.sample(PROMPT, 1, seeded(9)) for _ in range(20)]
        streamed = [token.token async for token in base.sample_stream(PROMPT, 1, seeded(9))]
        same(await asyncio.gather(*crowd))
        assert streamed == (await crowd[0]).sequences[0].tokens.tolist()
        same([await base.sample(PROMPT, 1, seeded(9)) for _ in range(2)])
        grown.set()
        await asyncio.gather(*asking)

        async def one():
            return len(samplers()) == 1 and await count(base) == 1

        await until(one)
        same([await base.sample(PROMPT, 1, seeded(9)) for _ in range(2)])
    print(json.dumps(dict(counts=counts, settled=children_settled())))

asyncio.run(main(*sys.argv[1:]))
""",
        tiny_home,
    )
    assert result["counts"] == [1]
    assert result["settled"]
