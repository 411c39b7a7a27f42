"""The scheduler and its log: any interleaving of submits, retries, crashes and recoveries gives
what the operations give one after the other."""

from __future__ import annotations

import asyncio
import os
import shutil

import numpy as np
import pytest
import torch

import tinsmith
from tests.actors.test_many_runs import LORA
from tests.actors.test_recovery import assert_same
from tests.actors.test_training import engine_threads, script
from tests.conftest import THREADS
from tinsmith.actors.learner import Learner
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine

COUNT = 24


def arguments(kind: str, args: tuple) -> dict:
    if kind == "optim_step":
        return {"adam_params": args[0]}
    return {"data": args[0], "loss_fn": args[1]}


async def started(path: str, home, replay_seconds: float) -> Learner:
    """The actor's class, in this process."""
    learner = Learner("tiny", path, str(home), None, THREADS, replay_seconds=replay_seconds)
    await learner.start()
    return learner


async def stop(learner: Learner) -> None:
    learner.pump.cancel()
    await asyncio.wait({learner.pump})
    learner.engine_thread.shutdown()
    for log in learner.logs.values():
        log.journal.close()


@pytest.fixture(scope="module")
def sequential(tiny_llama):
    """Results and final state, by the script's seed."""
    backbone, known = Backbone(tiny_llama), {}

    def run(seed: int):
        if seed not in known:
            engine = LearnerEngine(backbone)
            engine.create_run("run", LORA)
            results = [getattr(engine, kind)("run", *args) for kind, args in script(seed, COUNT)]
            known[seed] = (results, engine.state("run", True))
        return known[seed]

    with engine_threads():
        yield run


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("replay_seconds", [0.0, 0.05, 1e9])
async def test_any_interleaving_gives_the_sequential_result(
    tiny_llama, tmp_path, sequential, seed, replay_seconds
):
    rng, home = np.random.default_rng(seed), tmp_path / "0"
    ops = [(kind, arguments(kind, args)) for kind, args in script(seed % 2, COUNT)]
    learner = await started(tiny_llama, home, replay_seconds)
    await learner.open_run("run", LORA, None, False)
    given: dict[int, object] = {}

    def submit(seq_id: int) -> asyncio.Task:
        async def one() -> None:
            result = await learner.submit("run", seq_id, *ops[seq_id - 1])
            earlier = given.setdefault(seq_id, result)
            encode = tinsmith.primitives.codec.encode
            assert encode(earlier) == encode(result)

        return asyncio.create_task(one())

    for life in range(4):
        # All that was not given, some of it twice, some that was, in any order.
        again = [i for i in range(1, COUNT + 1) if i not in given or rng.random() < 0.2]
        again += [i for i in again if rng.random() < 0.2]
        rng.shuffle(again)
        tasks = [submit(seq_id) for seq_id in again]
        if life == 3:
            await asyncio.gather(*tasks)
            break
        enough = int(rng.integers(0, COUNT // 2)) + len(given)
        for done in asyncio.as_completed(tasks):
            await done
            if len(given) >= enough:
                break
        # A crash: the disk as it is now, and nothing of this life comes after it.
        log = learner.logs["run"]
        while log.snapshot is not None:  # no disk is copied all at once
            await asyncio.wait({log.snapshot})
        crashed, home = home, tmp_path / str(life + 1)
        shutil.copytree(crashed, home)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await stop(learner)
        learner = await started(tiny_llama, home, replay_seconds)
        await learner.recover("run")

    results, state = sequential(seed % 2)
    for seq_id, expected in enumerate(results, 1):
        assert_same(given[seq_id], expected)
    for name, tensor in learner.engine.state("run", True).items():
        assert torch.equal(tensor, state[name]), name
    snapshots = list((home / "runs" / "run" / "log").glob("snapshot-*"))
    assert len(snapshots) <= 2  # the last, and one under way
    await stop(learner)


async def test_withdrawn_operations_stay_withdrawn(tiny_llama, tmp_path, sequential):
    learner = await started(tiny_llama, tmp_path / "a", 1e9)
    await learner.open_run("run", LORA, None, False)
    ops = [(kind, arguments(kind, args)) for kind, args in script(0, COUNT)]
    waiting = asyncio.create_task(learner.submit("run", 2, *ops[0]))
    await asyncio.sleep(0)
    assert await learner.withdraw("run", 2)
    with pytest.raises(tinsmith.OpCancelled, match="withdrawn"):
        await waiting
    await stop(learner)
    learner = await started(tiny_llama, tmp_path / "a", 1e9)
    assert await learner.recover("run") == 1
    with pytest.raises(tinsmith.OpCancelled, match="withdrawn"):
        await learner.submit("run", 2, *ops[0])
    assert await learner.take_over("run") == 3
    with pytest.raises(tinsmith.OpCancelled, match="another client took over"):
        await learner.submit("run", 1, *ops[0])
    assert (await learner.submit("run", 3, *ops[2])).version == 1
    assert not (learner.engine.runs["run"].adam.exp_avg).any()  # it had no gradient
    await stop(learner)
    # The same place in memory and on disk: a third life has it too.
    learner = await started(tiny_llama, tmp_path / "a", 1e9)
    assert await learner.recover("run") == 4
    await stop(learner)


@pytest.mark.parametrize("came_before", [False, True])
async def test_what_is_being_withdrawn_when_the_learner_dies_is_withdrawn_or_done(
    tiny_llama, tmp_path, came_before
):
    ops = [(kind, arguments(kind, args)) for kind, args in script(0, COUNT)]
    learner = await started(tiny_llama, tmp_path / "a", 1e9)
    await learner.open_run("run", LORA, None, False)
    log = learner.logs["run"].journal.log
    if came_before:
        early = asyncio.create_task(learner.submit("run", 2, *ops[0]))
        await asyncio.sleep(0)
        assert not early.done()
    ends = [log.end]
    real, write = log.append, lambda payload: (real(payload), ends.append(log.end))[0]
    log.append = write
    assert await learner.withdraw("run", 2)
    log.append = real
    if came_before:
        with pytest.raises(tinsmith.OpCancelled):
            await early
    await stop(learner)
    for end in ends:  # a crash after each of what was written
        home = tmp_path / str(end)
        shutil.copytree(tmp_path / "a", home)
        (segment,) = (home / "runs/run/log").glob("*.wal")
        os.truncate(segment, end)
        learner = await started(tiny_llama, home, 1e9)
        await learner.recover("run")
        second = asyncio.create_task(learner.submit("run", 2, *ops[0]))
        await learner.submit("run", 1, *ops[1])
        if end == ends[0]:
            assert (await second).loss_fn_outputs
        else:
            with pytest.raises(tinsmith.OpCancelled, match="withdrawn"):
                await second
        await stop(learner)


async def test_a_log_that_cannot_be_written_refuses_and_goes_on(tiny_llama, tmp_path, monkeypatch):
    learner = await started(tiny_llama, tmp_path, 1e9)
    await learner.open_run("run", LORA, None, False)
    ops = [(kind, arguments(kind, args)) for kind, args in script(0, COUNT)]
    await learner.submit("run", 1, *ops[0])
    log = learner.logs["run"].journal.log
    real, log._file = log._file, -1  # as a disk that takes nothing
    with pytest.raises(tinsmith.StorageFailure, match="cannot be written"):
        await learner.submit("run", 2, *ops[1])
    log._file = real
    assert (await learner.submit("run", 3, *ops[2])).version == 1
    state = learner.engine.state("run", True)
    await stop(learner)
    learner = await started(tiny_llama, tmp_path, 1e9)
    assert await learner.recover("run") == 4
    with pytest.raises(tinsmith.StorageFailure, match="cannot be written"):
        await learner.submit("run", 2, *ops[1])
    for name, tensor in learner.engine.state("run", True).items():
        assert torch.equal(tensor, state[name])
    await stop(learner)


async def test_results_that_the_client_has_are_kept_no_longer(tiny_llama, tmp_path):
    ops = [(kind, arguments(kind, args)) for kind, args in script(0, 7)]
    learner = await started(tiny_llama, tmp_path, 1e9)
    await learner.open_run("run", LORA, None, False)
    given = [await learner.submit("run", n, *ops[n - 1]) for n in range(1, 7)]
    await learner.submit("run", 7, *ops[6], delivered=(2, 5))
    log = learner.logs["run"]
    assert list(log.results) == list(log.kinds) == [1, 5, 6, 7]
    assert [record.seq_id for record in log.journal.results(8)] == [1, 5, 6, 7]
    assert await learner.submit("run", 6, *ops[5]) is given[5]
    with pytest.raises(tinsmith.InvalidInput, match="no longer kept"):
        await learner.submit("run", 4, *ops[3])
    await stop(learner)
