"""The learner with more runs than its memory holds, and runs of different shares."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

import tinsmith
from tests.conftest import THREADS
from tests.data import text_datum
from tinsmith.actors.learner import Learner
from tinsmith.engines.run_store import state_bytes
from tinsmith.primitives.types import AdamParams, LoraConfig

LORA = LoraConfig(rank=4, seed=1)
RUNS = [f"run-{i}" for i in range(4)]


async def started(path, folder, run_bytes=None) -> Learner:
    """The actor's class, in this process; it needs a controller only to publish and to save."""
    learner = Learner("tiny", path, str(folder), None, THREADS, run_bytes)
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
    size = state_bytes(roomy.engine.backbone.layout(LORA))
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
    await learner.open_run("run-0", LORA, None, False)
    assert learner.engine.queue.weights["run-0"] == 1.0
    learner._publication = lambda *_: asyncio.sleep(0)  # there is no sampler here
    await learner.unpark("run-0")
    assert learner.engine.queue.weights["run-0"] == 3.0


async def test_a_share_is_a_positive_number(service):
    training = await service.create_lora_training_client("tiny-llama", rank=2)
    for share in (0, -1, float("nan"), float("inf"), True, "2"):
        with pytest.raises(tinsmith.InvalidInput, match="share must be a positive number"):
            training.set_share(share)
    await training.set_share(2)
