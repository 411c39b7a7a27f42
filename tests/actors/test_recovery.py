"""Learners and whole services that are killed: runs go on as if nothing had happened."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
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


def kill_learners() -> int:
    """kill -9 to those of this test's service, also while they start; returns how many."""
    killed = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::Learner"):
                process.kill()
                killed += 1
    return killed


def kill_one() -> None:
    while not kill_learners():
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
