"""Learners and whole services that are killed: runs go on as if nothing had happened."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

import tinsmith
from tests.actors.script import ROOT, python_path, run_script
from tests.actors.test_training import (
    LORA,
    engine_threads,
    new_run,
    same_weights_logprobs,
    script,
)
from tests.data import text_datum
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.primitives.op import Op

MODEL = "tiny-qwen3"


def kill_all(kind: str) -> int:
    """kill -9 to the actors of that class of this test's service, also while they start; returns
    how many."""
    killed = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            # Ray writes what an actor is doing behind its name.
            if re.fullmatch(rf"ray::{kind}(\..*)?", process.name()):
                process.kill()
                killed += 1
    return killed


def kill_one(kind: str = "Learner") -> None:
    while not kill_all(kind):
        time.sleep(0.02)


def assert_same(a, b) -> None:
    """Results, but for how long they took."""
    if hasattr(a, "loss_fn_outputs"):
        for x, y in zip(a.loss_fn_outputs, b.loss_fn_outputs, strict=True):
            np.testing.assert_array_equal(x["logprobs"], y["logprobs"])
    else:
        assert a.version == b.version
        assert a.metrics["grad_norm"] == b.metrics["grad_norm"]


async def test_a_learner_killed_again_and_again_loses_and_repeats_nothing(service):
    undisturbed, killed = await new_run(service, LORA, MODEL), await new_run(service, LORA, MODEL)
    wanted = [await getattr(undisturbed, kind)(*args) for kind, args in script(7, 45)]
    weights = await same_weights_logprobs(undisturbed)

    killed._link._keep = True  # as the gateway's: it asks again at the end
    rng = np.random.default_rng(0)
    ops = [getattr(killed, kind)(*args) for kind, args in script(7, 30)]
    for _ in range(3):
        waited_for = ops[int(rng.integers(0, 20))]
        await waited_for
        await asyncio.sleep(float(rng.uniform(0, 0.05)))  # between operations, and within one
        await asyncio.to_thread(kill_one)  # also one that is starting
    ops += [getattr(killed, kind)(*args) for kind, args in list(script(7, 45))[30:]]
    results = await asyncio.wait_for(asyncio.gather(*ops), 300)
    for got, expected in zip(results, wanted, strict=True):
        assert_same(got, expected)
    for a, b in zip(weights, await same_weights_logprobs(killed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (await killed.get_info()).version == 15

    # What was given is given again, to the last bit: also how long it took.
    learner = killed._grant.learner
    for seq_id in range(1, 46):
        again = await Op(learner.call("submit", killed.run_id, seq_id, "get_info", {}))
        assert tinsmith.primitives.codec.encode(again) == tinsmith.primitives.codec.encode(
            results[seq_id - 1]
        )


async def test_a_run_is_opened_though_learners_die_under_it(service):
    training = await new_run(service, LORA, MODEL)
    (kind, args), *_ = script(7, 1)
    await getattr(training, kind)(*args)
    await training.optim_step()
    await asyncio.to_thread(kill_one)
    opening = service.resume_training_client(training.run_id)
    for _ in range(2):
        await asyncio.to_thread(kill_one)  # one that is starting, or going through the log
    assert (await (await opening).get_info()).version == 1


async def test_busy_tenants_whose_learner_is_killed_end_as_if_undisturbed(service, tiny_home):
    loras = [tinsmith.LoraConfig(rank=rank, seed=rank) for rank in (2, 4, 8)]
    runs = await asyncio.gather(*(new_run(service, lora, MODEL) for lora in loras))
    ops = [
        [getattr(run, kind)(*args) for kind, args in script(20 + i, 24)]
        for i, run in enumerate(runs)
    ]
    for number in (3, 12):  # all three have batches or steps under way then
        await asyncio.gather(*(each[number] for each in ops))
        await asyncio.to_thread(kill_one)
    results = await asyncio.wait_for(asyncio.gather(*(asyncio.gather(*each) for each in ops)), 200)
    weights = await asyncio.gather(*map(same_weights_logprobs, runs))

    engine = LearnerEngine(Backbone(str(tiny_home / "models" / MODEL)))
    data = [text_datum(np.random.default_rng(100 + i), 40) for i in range(2)]
    with engine_threads():
        for i, (run, lora) in enumerate(zip(runs, loras, strict=True)):
            engine.create_run(run.run_id, lora)
            for got, (kind, args) in zip(results[i], script(20 + i, 24), strict=True):
                assert_same(got, getattr(engine, kind)(run.run_id, *args))
            wanted = engine.forward(run.run_id, data, "cross_entropy").loss_fn_outputs
            for a, b in zip(weights[i], wanted, strict=True):
                np.testing.assert_array_equal(a, b["logprobs"])


async def test_what_was_loaded_is_there_after_a_kill_and_an_operation_refused_leaves_no_gap(
    service,
):
    runs = [await new_run(service, LORA, MODEL) for _ in range(2)]
    for i, training in enumerate(runs):
        for kind, args in script(9, 6):
            await getattr(training, kind)(*args)
        path = (await training.save_state("saved")).path
        for kind, args in script(10, 6):
            getattr(training, kind)(*args)
        await training.load_state_with_optimizer(path)
        if i:
            await asyncio.to_thread(kill_one)
        for kind, args in script(11, 3):
            await getattr(training, kind)(*args)
        if i:
            refuse_writes()
            with pytest.raises(tinsmith.StorageFailure, match="File too large"):
                await training.optim_step()
            await asyncio.to_thread(kill_one)
        for kind, args in script(12, 3):
            await asyncio.wait_for(getattr(training, kind)(*args), 120)
    for a, b in zip(*[await same_weights_logprobs(training) for training in runs], strict=True):
        np.testing.assert_array_equal(a, b)


def refuse_writes() -> None:
    """The learner's files may not grow any more, as on a full disk."""
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::Learner"):
            process.rlimit(psutil.RLIMIT_FSIZE, (1, psutil.RLIM_INFINITY))


async def test_learner_and_sampler_killed_together_come_back_with_what_was_published(service):
    training = await new_run(service, LORA, MODEL)
    live = await training.live_sampling_client().ready()
    for kind, args in script(13, 6):
        await getattr(training, kind)(*args)
    pinned = await training.save_weights_and_get_sampling_client()
    params = tinsmith.SamplingParams(max_tokens=300, stop=[], seed=5)
    wanted = (await pinned.sample(np.arange(20), 1, params)).sequences[0]
    under_way = [client.sample(np.arange(20), 1, params) for client in (pinned, live)]
    await asyncio.sleep(0.3)
    await asyncio.to_thread(kill_one, "Sampler")
    await asyncio.to_thread(kill_one)
    for response in await asyncio.wait_for(asyncio.gather(*under_way), 120):
        np.testing.assert_array_equal(response.sequences[0].tokens, wanted.tokens)
        assert set(response.sequences[0].versions) == {2}
    await asyncio.wait_for(training.optim_step(), 120)
    response = await live.sample(np.arange(20), 1, tinsmith.SamplingParams(max_tokens=4))
    assert set(response.sequences[0].versions) == {3}


async def test_what_was_being_saved_when_the_learner_died_is_saved_once(service):
    training = await new_run(service, LORA, MODEL)
    saves = []
    for i, (kind, args) in enumerate(script(8, 12)):
        getattr(training, kind)(*args)
        saves.append(training.save_state(f"save-{i}"))
    await saves[4]
    await asyncio.to_thread(kill_one)
    saved = await asyncio.wait_for(asyncio.gather(*saves), 120)  # none says that its name is taken
    there = [c.path for c in await service.list_checkpoints(training.run_id)]
    assert sorted(there) == sorted(response.path for response in saved)


BEGIN = """
import asyncio, sys

import tinsmith
from tests.actors.test_training import LORA, script

async def main(home):
    async with tinsmith.connect(home=home, num_cpus=2, learner_threads=1) as service:
        training = await service.create_lora_training_client("tiny-llama", rank=4, seed=1)
        ops = [getattr(training, kind)(*args) for kind, args in script(7, 12)]
        await asyncio.gather(*ops)
        print(training.run_id, flush=True)
        await asyncio.Event().wait()

asyncio.run(main(sys.argv[1]))
"""

GO_ON = """
import asyncio, json, sys

import tinsmith
from tests.actors.test_training import same_weights_logprobs, script

async def main(home, run_id):
    async with tinsmith.connect(home=home, num_cpus=2, learner_threads=1) as service:
        training = await service.resume_training_client(run_id)
        for kind, args in list(script(7, 18))[12:]:
            getattr(training, kind)(*args)
        logprobs = await same_weights_logprobs(training)
        print(json.dumps([row.tolist() for row in logprobs]))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_service_killed_as_a_whole_goes_on_where_its_logs_end(tiny_home):
    environment = {**os.environ, "PYTHONPATH": python_path()}
    command = [sys.executable, "-c", BEGIN, str(tiny_home)]
    service = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    run_id = service.stdout.readline().strip()
    family = psutil.Process(service.pid).children(recursive=True)
    for process in (service, *family):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    service.wait()
    told = json.loads(run_script(GO_ON, tiny_home, run_id).splitlines()[-1])

    engine = LearnerEngine(Backbone(str(tiny_home / "models" / "tiny-llama")))
    engine.create_run("run", LORA)
    with engine_threads():
        for kind, args in script(7, 18):
            getattr(engine, kind)("run", *args)
        data = [text_datum(np.random.default_rng(100 + i), 40) for i in range(2)]
        output = engine.forward("run", data, "cross_entropy")
    for got, wanted in zip(told, output.loss_fn_outputs, strict=True):
        np.testing.assert_array_equal(np.float32(got), wanted["logprobs"])
