"""Learners and whole services that are killed: runs go on as if nothing had happened."""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np
import psutil

import tinsmith
from tests.actors.test_training import LORA, new_run, same_weights_logprobs, script
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
