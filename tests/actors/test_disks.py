"""Disks that fail, and files that are damaged: what was refused is not done, what was given is not lost."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import subprocess
from dataclasses import asdict

import numpy as np
import pytest
import safetensors.torch
import torch

import tinsmith
from tests.actors.test_many_runs import LORA
from tests.actors.test_recovery import assert_same
from tests.actors.test_replay import arguments, started, stop
from tests.actors.test_training import engine_threads, script
from tinsmith.actors import learner as learner_module
from tinsmith.actors.storage import MANIFEST, Storage
from tinsmith.engines import adapter_files
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine

OPS = list(script(0, 30))


async def submit(learner, seq_id: int, answered: int = 1):
    kind, args = OPS[seq_id - 1]
    return await learner.submit("run", seq_id, kind, arguments(kind, args), answered)


async def mended(learner) -> None:
    while learner.mending:
        await asyncio.wait(list(learner.mending.values()), timeout=60)


async def settled(learner) -> None:
    """Mended, also of what was on its way to the disk when that was still broken."""
    await mended(learner)
    with contextlib.suppress(tinsmith.StorageFailure):
        await asyncio.wrap_future(learner.logs["run"].journal.on_disk())
    await mended(learner)


def copy_of_a_moment(home, to) -> None:
    """What a crash leaves: files as they all were at one time, though threads still change them."""

    def listing() -> dict:
        names = [path for path in home.rglob("*") if ".tmp-" not in str(path)]
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in names}

    while True:
        with contextlib.suppress(FileNotFoundError, shutil.Error):
            before = listing()
            shutil.copytree(home, to, ignore=shutil.ignore_patterns(".tmp-*"))
            if listing() == before:
                return
        shutil.rmtree(to, ignore_errors=True)


@pytest.fixture
def engine(tiny_llama):
    engine = LearnerEngine(Backbone(tiny_llama))
    engine.create_run("run", LORA)
    with engine_threads():
        yield engine


def assert_same_state(learner, engine) -> None:
    wanted = engine.state("run", True)
    for name, tensor in learner.engine.state("run", True).items():
        assert torch.equal(tensor, wanted[name]), name


def fail_fsync(monkeypatch, fails, code: int = errno.EIO) -> None:
    real = os.fsync

    def fsync(file: int) -> None:
        if fails():
            raise OSError(code, os.strerror(code))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("replay_seconds", [0.0, 1e9])
async def test_with_a_disk_that_fails_now_and_then_what_was_refused_was_not_done(
    tiny_llama, tmp_path, engine, monkeypatch, seed, replay_seconds
):
    rng, home = np.random.default_rng(seed), tmp_path / "0"
    monkeypatch.setattr(learner_module, "MEND_SECONDS", 0.01)
    learner = await started(tiny_llama, home, replay_seconds)
    await learner.open_run("run", LORA, None, False)
    broken = False
    fail_fsync(
        monkeypatch, lambda: broken and rng.random() < 0.4, [errno.EIO, errno.ENOSPC][seed % 2]
    )
    given, refused, seq_id = {}, [], 1
    while seq_id <= len(OPS):
        if seq_id in (11, 21):  # a crash: what is on disk now, and nothing more of this life
            broken = False
            home, crashed = tmp_path / str(seq_id), home
            copy_of_a_moment(crashed, home)
            await stop(learner)
            learner = await started(tiny_llama, home, replay_seconds)
            await learner.recover("run")
        broken = True
        numbers = range(seq_id, min(seq_id + int(rng.integers(1, 4)), len(OPS) + 1))
        if seq_id <= 10:
            numbers = [n for n in numbers if n <= 10]
        elif seq_id <= 20:
            numbers = [n for n in numbers if n <= 20]
        results = await asyncio.wait_for(
            asyncio.gather(
                *(submit(learner, n, answered=numbers[0]) for n in numbers), return_exceptions=True
            ),
            60,
        )
        for n, result in zip(numbers, results, strict=True):
            if isinstance(result, Exception):
                assert isinstance(result, tinsmith.StorageFailure), result
                refused.append(n)
            else:
                given[n] = result
        seq_id = numbers[-1] + 1
        if rng.random() < 0.8:
            await mended(learner)
    broken = False
    assert refused
    assert len(given) > 5
    for n, (kind, args) in enumerate(OPS, 1):
        if n in given:
            assert_same(given[n], getattr(engine, kind)("run", *args))
    await settled(learner)
    assert_same_state(learner, engine)
    await stop(learner)
    learner = await started(tiny_llama, home, replay_seconds)
    await learner.recover("run")
    assert_same_state(learner, engine)
    await stop(learner)


async def test_a_disk_that_stays_broken_refuses_until_it_is_mended(
    tiny_llama, tmp_path, engine, monkeypatch
):
    monkeypatch.setattr(learner_module, "MEND_SECONDS", 0.01)
    learner = await started(tiny_llama, tmp_path, 1e9)
    await learner.open_run("run", LORA, None, False)
    await learner.open_run("other", LORA, None, False)
    first = await submit(learner, 1)
    broken = True
    fail_fsync(monkeypatch, lambda: broken, errno.ENOSPC)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.wal"))
    for seq_id in (2, 3, 4):
        with pytest.raises(tinsmith.StorageFailure, match=r"No space left|cannot be written"):
            await asyncio.wait_for(submit(learner, seq_id, answered=seq_id), 60)
    with pytest.raises(tinsmith.StorageFailure):
        await learner.recover("run")
    # What was done is not said to have been refused: a client would do it again.
    assert_same(await submit(learner, 1), first)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.wal")) == size
    broken = False
    await mended(learner)
    kind, args = OPS[2]
    await learner.submit("other", 1, kind, arguments(kind, args))
    stepped = await submit(learner, 6, answered=6)
    for n in (1, 6):
        kind, args = OPS[n - 1]
        result = getattr(engine, kind)("run", *args)
    assert_same(stepped, result)
    assert_same_state(learner, engine)
    await stop(learner)


async def test_an_operation_refused_before_a_crash_leaves_no_gap(tiny_llama, tmp_path, engine):
    learner = await started(tiny_llama, tmp_path / "a", 1e9)
    await learner.open_run("run", LORA, None, False)
    await submit(learner, 1)
    log = learner.logs["run"].journal.log
    real, log._file = log._file, -1  # as a disk that takes nothing
    for seq_id in (2, 3):
        with pytest.raises(tinsmith.StorageFailure, match="cannot be written"):
            await submit(learner, seq_id, answered=seq_id)
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # while it is still full
    log._file = real
    await stop(learner)
    learner = await started(tiny_llama, tmp_path / "b", 1e9)
    assert await learner.recover("run") == 2
    stepped = await asyncio.wait_for(submit(learner, 6, answered=6), 60)
    for n in (1, 6):
        kind, args = OPS[n - 1]
        result = getattr(engine, kind)("run", *args)
    assert_same(stepped, result)
    for seq_id in (2, 5):
        with pytest.raises(tinsmith.StorageFailure, match="refused"):
            await submit(learner, seq_id)
    await stop(learner)
    learner = await started(tiny_llama, tmp_path / "b", 1e9)
    assert await learner.recover("run") == 7
    assert_same_state(learner, engine)
    await stop(learner)


async def test_what_was_refused_before_a_crash_is_known_though_what_came_before_it_is_not(
    tiny_llama, tmp_path, engine
):
    learner = await started(tiny_llama, tmp_path, 1e9)
    await learner.open_run("run", LORA, None, False)
    log = learner.logs["run"].journal.log
    real, log._file = log._file, -1  # as a disk that takes nothing
    with pytest.raises(tinsmith.StorageFailure, match="cannot be written"):
        await submit(learner, 2)
    log._file = real
    await stop(learner)
    learner = await started(tiny_llama, tmp_path, 1e9)
    assert await learner.recover("run") == 1
    # The client sends again what it has no answer of; 2 has one, and is missing for good.
    kind, args = OPS[2]
    third = asyncio.create_task(learner.submit("run", 3, kind, arguments(kind, args), 1, [2]))
    await submit(learner, 1)
    stepped = await asyncio.wait_for(third, 60)
    for n in (1, 3):
        kind, args = OPS[n - 1]
        result = getattr(engine, kind)("run", *args)
    assert_same(stepped, result)
    await stop(learner)


async def test_what_is_refused_while_a_disk_fails_is_not_waited_for_when_it_is_mended(
    tiny_llama, tmp_path, engine, monkeypatch
):
    monkeypatch.setattr(learner_module, "MEND_SECONDS", 0.01)
    learner = await started(tiny_llama, tmp_path, 1e9)
    await learner.open_run("run", LORA, None, False)
    early = asyncio.create_task(submit(learner, 6))  # waits for its turn
    await asyncio.sleep(0)
    await asyncio.wrap_future(learner.logs["run"].journal.on_disk())
    broken = True
    fail_fsync(monkeypatch, lambda: broken, errno.ENOSPC)
    for seq_id in (1, 2):  # the one is cut off the log, the other does not come into it
        with pytest.raises(tinsmith.StorageFailure):
            await asyncio.wait_for(submit(learner, seq_id), 60)
    broken = False
    await mended(learner)
    rest = [submit(learner, seq_id) for seq_id in (3, 4, 5)]  # sent before the answers were there
    *_, stepped = await asyncio.wait_for(asyncio.gather(*rest, early), 60)
    for n in (3, 4, 5, 6):
        kind, args = OPS[n - 1]
        result = getattr(engine, kind)("run", *args)
    assert_same(stepped, result)
    await stop(learner)


async def test_of_two_snapshots_one_may_be_damaged(tiny_llama, tmp_path, engine, caplog):
    learner = await started(tiny_llama, tmp_path, 0.0)
    await learner.open_run("run", LORA, None, False)
    for seq_id in range(1, 10):
        await submit(learner, seq_id)
        await learner.park("run")
        kind, args = OPS[seq_id - 1]
        getattr(engine, kind)("run", *args)
    await stop(learner)

    def damage(snapshot) -> None:
        data = bytearray((snapshot / "state.safetensors").read_bytes())
        data[len(data) // 2] ^= 1
        (snapshot / "state.safetensors").write_bytes(data)

    older, newest = sorted((tmp_path / "runs/run/log").glob("snapshot-*"))
    damage(newest)
    learner = await started(tiny_llama, tmp_path, 1e9)
    assert await learner.recover("run") == 10
    assert f"{newest}/state.safetensors is damaged" in caplog.text
    assert_same_state(learner, engine)
    with pytest.raises(tinsmith.InvalidInput, match="unknown operation"):
        await learner.submit("run", 10, "nothing", {})
    await learner.park("run")  # the next takes another number, and the damaged one is no candidate
    await stop(learner)
    older, newest = sorted((tmp_path / "runs/run/log").glob("snapshot-*"))
    damage(older)
    damage(newest)
    learner = await started(tiny_llama, tmp_path, 1e9)
    with pytest.raises(tinsmith.CorruptLog, match=rf"{newest}.*{older}.*path="):
        await learner.recover("run")
    await stop(learner)


def save(learner, run_id: str, name: str) -> str:
    """A checkpoint of the run as it is; nobody needs to know of it."""
    state, run = learner.engine.state(run_id), learner.engine.runs[run_id]
    files = adapter_files.write_adapter(run.layout, state.pop("params"), "tiny")
    manifest = {"base_model": "tiny", "lora": asdict(run.config), "version": run.version}
    files[MANIFEST] = json.dumps(manifest).encode()
    storage = Storage(learner.storage.root)
    storage.commit(
        storage.stage(f"runs/{run_id}/weights/{name}", files), f"runs/{run_id}/weights/{name}"
    )
    return f"tinker://{run_id}/weights/{name}"


async def test_what_was_loaded_is_loaded_again_or_it_is_said_that_it_is_gone(tiny_llama, tmp_path):
    learner = await started(tiny_llama, tmp_path / "a", 1e9)
    await learner.open_run("run", LORA, None, False)
    for seq_id in range(1, 7):
        await submit(learner, seq_id)
    path = save(learner, "run", "saved")
    for seq_id in range(7, 10):
        await submit(learner, seq_id)
    await learner.submit("run", 10, "load_state", dict(path=path, optimizer=False))
    before = {s.name for s in (tmp_path / "a/runs/run/log").glob("snapshot-*")}
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # a crash; most likely before the snapshot
    loaded = learner.engine.state("run", True)
    # The next operation waits for the snapshot, and so rests on no checkpoint that may be deleted.
    await learner.submit("run", 11, "optim_step", dict(adam_params=tinsmith.AdamParams()))
    assert {s.name for s in (tmp_path / "a/runs/run/log").glob("snapshot-*")} > before
    shutil.rmtree(tmp_path / "a/runs/run/weights")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    stepped = learner.engine.state("run", True)
    await stop(learner)

    for home, wanted in (("b", loaded), ("c", stepped)):
        learner = await started(tiny_llama, tmp_path / home, 1e9)
        await learner.recover("run")
        for name, tensor in learner.engine.state("run", True).items():
            assert torch.equal(tensor, wanted[name])
        await stop(learner)

    learner = await started(tiny_llama, tmp_path / "d", 1e9)
    await learner.open_run("run", LORA, None, False)
    path = save(learner, "run", "saved")
    await learner.submit("run", 1, "load_state", dict(path=path, optimizer=False))
    log = learner.logs["run"]
    await asyncio.wait(
        {log.snapshot} if log.snapshot else {asyncio.ensure_future(asyncio.sleep(0))}
    )
    await stop(learner)
    # As if the learner had died before it could write the snapshot.
    _, newest = sorted((tmp_path / "d/runs/run/log").glob("snapshot-*"))
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "d/runs/run/weights")
    learner = await started(tiny_llama, tmp_path / "d", 1e9)
    for _ in range(2):
        with pytest.raises(
            tinsmith.CorruptLog, match=r"wal at byte 0: operation 1 \(load_state\).*path="
        ):
            await learner.recover("run")
    await stop(learner)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        (MANIFEST, b"{}", "manifest.json"),
        (MANIFEST, b"[" * 100_000, "manifest.json"),
        (MANIFEST, b'{"base_model": "tiny", "lora": {"rank": 0}, "version": 1}', "rank"),
        (MANIFEST, b'{"base_model": "tiny", "lora": {}, "version": -1}', "version"),
        (adapter_files.CONFIG, b'{"r": 4, "lora_alpha": "32"}', "adapter_config.json is damaged"),
        (adapter_files.CONFIG, b"\xff", "adapter_config.json is damaged"),
        (adapter_files.WEIGHTS, b"\xff" * 8, "adapter_model.safetensors is damaged"),
        ("optimizer.safetensors", b"", "optimizer state of .* is damaged"),
        # One number for all, which could be taken for a whole moment.
        ("optimizer.safetensors", {"exp_avg": torch.ones(1)}, "no exp_avg of"),
        ("optimizer.safetensors", {"exp_avg_sq": -1}, "exp_avg_sq that no optimizer can have"),
        ("optimizer.safetensors", {"step": torch.tensor(-1)}, "how many steps"),
    ],
)
async def test_a_damaged_checkpoint_is_refused_with_what_is_wrong_and_changes_nothing(
    tiny_llama, tmp_path, file, content, told
):
    learner = await started(tiny_llama, tmp_path, 1e9)
    await learner.open_run("run", LORA, None, False)
    for seq_id in (1, 2, 3):
        await submit(learner, seq_id)
    path, before = save(learner, "run", "saved"), learner.engine.state("run", True)
    state = learner.engine.state("run")
    del state["params"]
    folder = tmp_path / "runs/run/weights/saved"
    (folder / "optimizer.safetensors").write_bytes(safetensors.torch.save(state))
    if isinstance(content, dict):
        for name, value in content.items():
            state[name] = torch.full_like(state[name], value) if isinstance(value, int) else value
        content = safetensors.torch.save(state)
    (folder / file).write_bytes(content)
    with pytest.raises(tinsmith.InvalidInput, match=told):
        await learner.submit("run", 4, "load_state", dict(path=path, optimizer=True))
    for name, tensor in learner.engine.state("run", True).items():
        assert torch.equal(tensor, before[name])
    await stop(learner)


def test_a_home_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(tinsmith.StorageFailure, match=r"home .*/file/home.* cannot be written"):
        tinsmith.connect(home=tmp_path / "file" / "home").sync  # noqa: B018
    (tmp_path / "read-only").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path / "read-only")]
    if subprocess.run(command, capture_output=True).returncode == 0:
        try:
            with pytest.raises(tinsmith.StorageFailure, match="Read-only file system"):
                tinsmith.connect(home=tmp_path / "read-only").sync  # noqa: B018
        finally:
            subprocess.run(["umount", str(tmp_path / "read-only")], check=True)
