"""A learner that is cut off lives on when another has taken its runs: nothing it does counts any more."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinsmith
from tests.actors.script import ROOT, python_path
from tests.actors.test_many_runs import LORA
from tests.actors.test_recovery import assert_same
from tests.actors.test_replay import arguments, stop
from tests.actors.test_training import engine_threads, script
from tests.actors.test_wal import opened, payloads, segments
from tests.conftest import THREADS
from tinsmith.actors import snapshots
from tinsmith.actors.learner import Learner
from tinsmith.actors.wal import Log, SyncThread
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine

SERVICE = "a service"
OPS = list(script(0, 24))


@pytest.fixture(scope="module")
def thread():
    thread = SyncThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def wanted(tiny_llama):
    """What the operations give, one after the other."""
    engine = LearnerEngine(Backbone(tiny_llama))
    engine.create_run("run", LORA)
    with engine_threads():
        return [getattr(engine, kind)("run", *args) for kind, args in OPS]


WRITER = """
import sys
from pathlib import Path
from tinsmith import Unavailable
from tinsmith.actors.wal import Log, SyncThread

log = Log(Path(sys.argv[1]), SyncThread(), service=sys.argv[2], segment_bytes=5000)
number = 0
try:
    while True:
        log.append(b"old %d" % number)
        log.synced().result()
        print(number, flush=True)
        number += 1
except Unavailable as error:
    print(error, flush=True)
"""


def test_a_stopped_process_whose_log_was_taken_over_is_refused_when_it_goes_on(thread, tmp_path):
    old = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), SERVICE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path()},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert [int(old.stdout.readline()) for _ in range(300)] == list(range(300))
        os.kill(old.pid, signal.SIGSTOP)
        with opened(tmp_path, thread, service=SERVICE) as log:
            taken = payloads(log)
            log.append(b"new")
            log.synced().result()
            os.kill(old.pid, signal.SIGCONT)
            *acknowledged, refused = old.communicate(timeout=60)[0].splitlines()
            assert "another learner has taken over the log" in refused
            assert len(taken) >= 300 + len(acknowledged)
            log.append(b"newer")
    finally:
        old.kill()
    with opened(tmp_path, thread) as log:
        assert payloads(log) == [b"old %d" % i for i in range(len(taken))] + [b"new", b"newer"]


@given(
    st.lists(
        st.one_of(
            st.just((0, "open")),
            st.tuples(st.integers(0, 3), st.sampled_from(["append", "append", "sync", "close"])),
        ),
        max_size=40,
    )
)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_whoever_takes_over_when_what_was_acknowledged_is_there_once_and_in_order(
    thread, tmp_path_factory, steps
):
    """Several processes of a service, each of which thinks that the log is its own."""
    folder = tmp_path_factory.mktemp("log")
    logs: list[Log] = []
    closed: set[Log] = set()
    acknowledged: list[bytes] = []
    waiting: list[bytes] = []  # written by the newest, not yet known to be on disk
    for number, (back, step) in enumerate([(0, "open"), *steps, (0, "open")]):
        log = logs[-1 - back % len(logs)] if logs else None
        if step == "open":
            log = Log(folder, thread, service=SERVICE, segment_bytes=60)
            logs.append(log)
            there = payloads(log)
            assert there[: len(acknowledged)] == acknowledged
            assert there[len(acknowledged) :] == waiting[: len(there) - len(acknowledged)]
            acknowledged, waiting = there, []
            continue
        assert log is not None
        try:
            if step == "append":
                log.append(b"%d" % number * 4)
                if log is logs[-1]:
                    waiting.append(b"%d" % number * 4)
            elif step == "sync":
                end, known = log.end, log.synced_end
                log.synced().result()
                assert log is logs[-1] or end == known  # nothing that is new
                if log is logs[-1]:
                    acknowledged, waiting = acknowledged + waiting, []
            elif log not in closed:
                log.close()
                closed.add(log)
        except (tinsmith.Unavailable, tinsmith.StorageFailure):
            assert log is not logs[-1] or "is closed" in str(log.failure)
    for log in set(logs) - closed:
        log.close()


async def of_the_service(path: str, home: Path) -> Learner:
    learner = Learner("tiny", path, str(home), None, THREADS, replay_seconds=1e9, service=SERVICE)
    await learner.start()
    return learner


def submit(learner: Learner, seq_id: int):
    kind, args = OPS[seq_id - 1]
    return learner.submit("run", seq_id, kind, arguments(kind, args))


async def test_what_a_replaced_learner_still_does_is_acknowledged_by_the_other_alone(
    tiny_llama, tmp_path, wanted
):
    old, new = [await of_the_service(tiny_llama, tmp_path) for _ in range(2)]
    await old.open_run("run", LORA, None, False)
    for seq_id in range(1, 7):
        await submit(old, seq_id)

    assert await new.recover("run") == 7
    under_way = [asyncio.create_task(submit(old, i)) for i in (7, 8, 9)]
    for refused in await asyncio.gather(*under_way, return_exceptions=True):
        assert isinstance(refused, tinsmith.Unavailable)
    with pytest.raises(tinsmith.Unavailable, match="another learner has taken over run run"):
        await submit(old, 10)
    await asyncio.wait(old.taken.values())
    assert "run" not in await old.open_runs()
    with pytest.raises(tinsmith.Unavailable):
        await old.park("run")  # no snapshot either
    for seq_id in range(7, 13):
        assert_same(await submit(new, seq_id), wanted[seq_id - 1])

    # Told to, it takes the run back.
    assert await old.recover("run") == 13
    with pytest.raises(tinsmith.Unavailable):
        await submit(new, 13)
    for seq_id in range(13, 19):
        assert_same(await submit(old, seq_id), wanted[seq_id - 1])
    await stop(old)
    await stop(new)
    third = await of_the_service(tiny_llama, tmp_path)
    assert await third.recover("run") == 19
    assert_same(await submit(third, 19), wanted[18])
    await stop(third)


async def test_a_snapshot_under_way_when_the_run_is_taken_harms_nobody(
    tiny_llama, tmp_path, wanted, monkeypatch
):
    old, new = [await of_the_service(tiny_llama, tmp_path) for _ in range(2)]
    await old.open_run("run", LORA, None, False)
    for seq_id in range(1, 7):
        await submit(old, seq_id)

    write, writing, go_on = snapshots.write, asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(*args):
        loop.call_soon_threadsafe(writing.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
        write(*args)

    monkeypatch.setattr(snapshots, "write", slow)
    parked = asyncio.create_task(old.park("run"))
    await writing.wait()
    monkeypatch.undo()
    await new.recover("run")
    for seq_id in range(7, 13):
        await submit(new, seq_id)
    go_on.set()
    await parked
    for seq_id in range(13, 16):
        assert_same(await submit(new, seq_id), wanted[seq_id - 1])
    await stop(new)
    third = await of_the_service(tiny_llama, tmp_path)
    assert await third.recover("run") == 16
    assert_same(await submit(third, 16), wanted[15])
    for learner in (old, third):
        await stop(learner)


def test_a_log_of_another_service_is_left_alone(thread, tmp_path):
    with opened(tmp_path, thread, service=SERVICE) as log:
        with pytest.raises(tinsmith.Unavailable, match=f"pid {os.getpid()} on"):
            Log(tmp_path, thread, service="another", lock_seconds=0.1)
        log.append(b"mine")
        log.synced().result()
    with opened(tmp_path, SyncThread(), service="another") as log:
        assert payloads(log) == [b"mine"]
    assert len(segments(tmp_path)) == 2
