"""The learner with more runs than its memory holds, and runs of different shares."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import torch

import tinsmith
from tests.actors.script import run_script
from tests.actors.test_training import engine_threads
from tests.conftest import THREADS
from tests.data import text_datum
from tinsmith.actors.learner import Learner
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.engines.memory import state_bytes
from tinsmith.primitives.types import AdamParams, LoraConfig

LORA = LoraConfig(rank=4, seed=1)
RUNS = [f"run-{i}" for i in range(4)]


async def started(path, folder, run_bytes=None) -> Learner:
    """The actor's class, in this process; it needs a controller only to publish and to save."""
    learner = Learner("tiny", path, str(folder), None, THREADS, run_bytes=run_bytes)
    await learner.start()
    for run_id in RUNS:
        await learner.open_run(run_id, LORA, None, False)
    return learner


async def train(learner: Learner, run_id: str, steps: int) -> list[dict[str, float]]:
    rng, metrics = np.random.default_rng(RUNS.index(run_id)), []
    for step in range(steps):
        data = [text_datum(rng) for _ in range(2)]
        batch = dict(data=data, loss_fn="cross_entropy")
        adam = dict(adam_params=AdamParams(learning_rate=1e-2))
        first = 2 * step + 1
        output, stepped = await asyncio.gather(
            learner.submit(run_id, first, "forward_backward", batch),
            learner.submit(run_id, first + 1, "optim_step", adam),
        )
        metrics.append({**output.metrics, **stepped.metrics})
    return metrics


async def test_idle_runs_wait_on_disk_and_lose_nothing(tiny_llama, tmp_path):
    roomy = await started(tiny_llama, tmp_path / "roomy")
    size = state_bytes([roomy.engine.backbone.layout(LORA)])
    tight = await started(tiny_llama, tmp_path / "tight", run_bytes=2 * size)
    for learner in (roomy, tight):
        metrics = await asyncio.gather(*(train(learner, run_id, 3) for run_id in RUNS))
        for row in metrics[0]:
            assert {"queue_s:max", "pack_s:sum", "forward_s:sum", "backward_s:sum"} < row.keys()
            assert row["optimizer_s"] > 0
    assert len(tight.engine.runs.set_aside()) == 2
    assert roomy.engine.runs.set_aside() == {}
    for run_id in RUNS:
        ours, wanted = tight.engine.state(run_id), roomy.engine.state(run_id)
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


async def test_a_run_too_large_is_refused(tiny_llama, tmp_path):
    with pytest.raises(tinsmith.OutOfCapacity, match=r"needs .* bytes .* has 1,000 for runs"):
        await started(tiny_llama, tmp_path, run_bytes=1000)


async def test_shares_are_set_and_survive_parking(tiny_llama, tmp_path):
    learner = await started(tiny_llama, tmp_path)
    await learner.submit("run-0", 1, "set_share", dict(share=3.0))
    assert learner.engine.queue.weights["run-0"] == 3.0
    await learner.park("run-0")
    log = learner.logs["run-0"]
    await learner._close(log)  # its memory is gone
    log.journal.close()
    assert await learner.recover("run-0") == 2
    assert learner.engine.queue.weights["run-0"] == 3.0


async def test_a_share_is_a_positive_number(service):
    training = await service.create_lora_training_client("tiny-llama", rank=2)
    for share in (0, -1, float("nan"), float("inf"), True, "2"):
        with pytest.raises(tinsmith.InvalidInput, match="share must be a positive number"):
            training.set_share(share)
    await training.set_share(2)


def batches_of_six() -> list[list[tinsmith.Datum]]:
    rng = np.random.default_rng(2)
    return [[text_datum(rng, 100) for _ in range(6)] for _ in range(6)]


SCRIPT = """
import asyncio, json, sys

import ray
import tinsmith
from tests.actors.test_many_runs import batches_of_six
from tinsmith.primitives.op import Op

async def main(home):
    batches = batches_of_six()
    async with tinsmith.connect(home=home, num_cpus=2, learner_threads=1, learners=2) as service:
        find = lambda: Op(service.controller.call("learner_helper", "tiny-llama", 1))
        training = await service.create_lora_training_client("tiny-llama", rank=4, seed=0)
        for step, batch in enumerate(batches):
            if step == 3:
                killed = await find()
                ray.kill(killed.actor)
            training.forward_backward(batch)
            await training.optim_step(tinsmith.AdamParams(learning_rate=1e-2))
        output = await training.forward(batches[0])
        replaced = (await find()).actor != killed.actor
        logprobs = [out["logprobs"].tolist() for out in output.loss_fn_outputs]
        print(json.dumps({"replaced": replaced, "logprobs": logprobs}))

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.slow
def test_two_learners_give_what_one_gives_and_one_may_die(tiny_home):
    """A Ray actor helps; it is killed half-way, and replaced."""
    told = json.loads(run_script(SCRIPT, tiny_home).splitlines()[-1])
    assert told["replaced"]
    engine = LearnerEngine(Backbone(str(tiny_home / "models" / "tiny-llama")), learners=2)
    engine.create_run("run", LoraConfig(rank=4, seed=0))
    with engine_threads():
        for batch in batches_of_six():
            engine.forward_backward("run", batch, "cross_entropy")
            engine.optim_step("run", AdamParams(learning_rate=1e-2))
        output = engine.forward("run", batches_of_six()[0], "cross_entropy")
    for got, wanted in zip(told["logprobs"], output.loss_fn_outputs, strict=True):
        np.testing.assert_array_equal(np.float32(got), wanted["logprobs"])


def test_learners_is_a_number_above_zero():
    for learners in (0, True, 1.5):
        with pytest.raises(tinsmith.InvalidInput, match="learners must be an integer"):
            tinsmith.connect(learners=learners)
