"""A process that is killed leaves word of what it was doing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.data import text_datum
from tinsmith.actors.notes import SLOTS, Notes, read_notes
from tinsmith.cli import app

MODEL = "tiny-qwen3"  # whose actors only tests of faults use

NOTES = """
import os, signal, sys
from pathlib import Path
from tinsmith.actors.notes import Notes
notes = Notes(Path(sys.argv[1]), "learner of x")
over = notes.begin("forward", "run-0", 6, 1)
held = notes.begin("forward_backward", "run-1", 7, 900)
notes.begin("sample", "", "request-1", 3)
notes.end(over)
notes.in_pass([held], True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_notes_outlive_a_kill(tmp_path):
    path = tmp_path / "notes"
    killed = subprocess.run([sys.executable, "-c", NOTES, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    noted = read_notes(path)
    assert noted is not None
    owner, (first, second) = noted
    assert owner.process == "learner of x"
    assert (first.kind, first.run, first.op, first.tokens) == ("forward_backward", "run-1", 7, 900)
    assert (first.computing, second.computing) == (True, False)
    assert second.op == "request-1"
    path.write_bytes(b"something else")
    assert read_notes(path) is None


async def until(happened, seconds: float = 60) -> bool:
    for _ in range(int(seconds * 100)):
        if await asyncio.to_thread(happened):
            return True
        await asyncio.sleep(0.01)
    return False


async def test_a_learner_killed_in_the_middle_of_an_operation_is_reported_with_it(service):
    training = await service.create_lora_training_client(MODEL, rank=4, seed=0)
    await training.get_info()
    notes = training._grant.learner.notes
    owner, under_way = read_notes(notes)
    assert under_way == []
    rng = np.random.default_rng(0)
    batch = training.forward_backward([text_datum(rng, 200) for _ in range(400)])
    assert await until(lambda: any(doing.computing for doing in read_notes(notes)[1]))
    os.kill(owner.pid, signal.SIGKILL)
    await asyncio.wait_for(batch, 120)  # of the learner in its place
    told = [x for x in (await service.metrics()).splitlines() if f'run="{training.run_id}"' in x]
    (line,) = (x for x in told if x.startswith("tinsmith_crash_time_seconds{"))
    assert 'kind="forward_backward"' in line
    assert f'of="learner of {MODEL}"' in line
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["runs", training.run_id, "--home", str(service.home)]
    )
    assert f"learner of {MODEL} (pid {owner.pid}) died: killed by a signal" in shown.output
    assert f"forward_backward 2 of run {training.run_id}" in shown.output
    await service.delete_training_run(training.run_id)


async def test_an_actor_that_is_ended_on_purpose_is_no_crash(service):
    training = await service.create_lora_training_client("tiny-qwen3", rank=4, seed=0)
    before = _crashes(await service.metrics())
    await service.close_training_run(training.run_id)
    assert await service.unload_model("tiny-qwen3")
    await asyncio.sleep(1)
    assert _crashes(await service.metrics()) == before


def _crashes(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("tinsmith_crashes_total")]


def test_a_full_disk_costs_the_notes_and_not_the_process_that_makes_them(tmp_path):
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        notes = Notes(tmp_path / "first", "learner of x")
        (tmp_path / "rest").touch()
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "rest").write_bytes(bytes(1 << 20))
        for op in range(SLOTS):  # all of it was there before the disk was full
            notes.begin("forward", "run", op, 1)
        noted = read_notes(tmp_path / "first")
        assert noted is not None
        assert len(noted[1]) == SLOTS
        without = Notes(tmp_path / "second", "learner of x")
        without.end(without.begin("forward", "run", 1, 1))
        assert read_notes(tmp_path / "second") is None
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
