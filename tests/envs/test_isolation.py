from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from tinsmith.envs.fork_server import EnvSource
from tinsmith.envs.isolation import EnvPool
from tinsmith.primitives.errors import EnvironmentFailure, InvalidInput, NotFound

MISBEHAVING = EnvSource("tests.envs.misbehaving:Misbehaving")


@pytest.fixture
async def pool():
    async with EnvPool(max_processes=8) as pool:
        yield pool


async def play(pool: EnvPool, actions: list[str], **options) -> str:
    """Play the actions; the last observation."""
    text = ""
    async with pool.open(MISBEHAVING, {}, **options) as env:
        await env.reset(0, None)
        for action in actions:
            text = (await env.step(action)).messages[-1]["content"]
    return text


@pytest.mark.parametrize(
    ("action", "told"),
    [
        ("raise", r"raised in step 2:\n(.|\n)*in act\n(.|\n)*ValueError: this environment is brok"),
        ("hang", r"hung in step 2: no answer within 1 s, killed"),
        ("exit", r"exited with code 7 in step 2"),
        ("abort", r"was killed by signal 6 \(SIGABRT\) in step 2"),
        ("hog", r"ran out of its memory limit of 256 MiB in step 2:\n(.|\n)*MemoryError"),
    ],
)
async def test_a_misbehaving_environment_costs_only_its_own_episode(pool, action, told):
    limits = {"step_seconds": 1.0, "memory_bytes": 256 << 20}
    # A busy machine may take more than a second to fill 256 MiB.
    its_own = limits | {"step_seconds": 60.0} if action == "hog" else limits
    await play(pool, [])  # the module is imported: from here on time limits are a step's
    outcomes = await asyncio.gather(
        play(pool, ["hello", "more"], **limits),
        play(pool, ["hello", action], **its_own),
        play(pool, ["hello", "more"], **limits),
        return_exceptions=True,
    )
    assert outcomes[0] == outcomes[2] == "you said more"
    assert isinstance(outcomes[1], EnvironmentFailure)
    assert "environment 'tests.envs.misbehaving:Misbehaving'" in str(outcomes[1])
    with pytest.raises(EnvironmentFailure, match=told):
        raise outcomes[1]
    assert await play(pool, ["again"]) == "you said again"


async def test_a_process_that_dies_before_it_is_told_what_to_import_is_reported(pool, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    too_much_to_be_buffered = EnvSource("mine", factory=bytes(8 << 20))
    with pytest.raises(EnvironmentFailure, match=r"'mine': .* imports it exited with code 1"):
        async with pool.open(too_much_to_be_buffered, {}):
            pass


async def test_every_episode_has_a_process_of_its_own_that_ends_with_it(pool):
    pids = []
    for _ in range(2):
        async with pool.open(MISBEHAVING, {}) as env:
            messages, _ = await env.reset(0, None)
            pids.append(int(messages[0]["content"].split()[1]))
            assert pids[-1] != os.getpid()
    assert pids[0] != pids[1]
    await gone(pids[1])


async def test_what_an_environment_started_ends_with_its_episode(pool):
    async with pool.open(MISBEHAVING, {}) as env:
        messages, _ = await env.reset(0, None)
        await env.step("spawn")
        parent = int(messages[0]["content"].split()[1])
        children = children_of(parent)
        assert len(children) == 1
    await gone(int(children[0]))


async def test_cancelling_an_episode_kills_a_hanging_environment(pool):
    async with pool.open(MISBEHAVING, {}) as env:
        messages, _ = await env.reset(0, None)
        pid = int(messages[0]["content"].split()[1])
        task = asyncio.create_task(env.step("hang"))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        env.kill()
        await gone(pid)


async def test_environments_die_with_their_pool():
    async with EnvPool() as pool, pool.open(MISBEHAVING, {}) as env:
        messages, _ = await env.reset(0, None)
        await pool.close()
        await gone(int(messages[0]["content"].split()[1]))
        with pytest.raises(EnvironmentFailure):
            await env.step("hello")


async def test_more_episodes_than_processes_wait_for_their_turn():
    async with EnvPool(max_processes=2) as pool:
        texts = await asyncio.gather(*(play(pool, ["hello"]) for _ in range(6)))
    assert texts == ["you said hello"] * 6


async def test_resets_with_the_same_seed_are_the_same_and_options_arrive(pool):
    draws = []
    for seed in (1, 1, 2):
        async with pool.open(MISBEHAVING, {}) as env:
            messages, info = await env.reset(seed, {"level": 3})
            draws.append(messages[0]["content"].split()[3])
            assert info == {"options": {"level": 3}}
    assert draws[0] == draws[1] != draws[2]


async def test_an_environment_that_cannot_be_made_says_why(pool):
    with pytest.raises(EnvironmentFailure, match=r"raised in make:\n(.|\n)*ValueError"):
        async with pool.open(MISBEHAVING, {"made": "raise"}):
            pass
    with pytest.raises(InvalidInput, match="unexpected keyword argument 'colour'"):
        async with pool.open(MISBEHAVING, {"colour": "red"}):
            pass
    with pytest.raises(NotFound, match="no environment 'nonsense'; known are calculator"):
        async with pool.open(EnvSource("nonsense"), {}):
            pass
    with pytest.raises(EnvironmentFailure, match=r"cannot be imported:\n(.|\n)*ZeroDivisionError"):
        async with pool.open(EnvSource("tests.envs.broken_import:Broken"), {}):
            pass
    with pytest.raises(EnvironmentFailure, match="the process that imports it exited with code 3"):
        async with pool.open(EnvSource("tests.envs.exiting_import:Gone"), {}):
            pass


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def gone(pid: int) -> None:
    """Wait until the process has ended; a test's time limit is what bounds it."""
    deadline = time.monotonic() + 10
    while runs(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        await asyncio.sleep(0.01)


async def test_many_failing_episodes_leave_their_neighbours_alone(pool):
    turns = {"exit": ["exit"], "raise": ["raise"], "fine": ["hello"]}
    names = list(turns) * 20
    outcomes = await asyncio.gather(
        *(play(pool, turns[name]) for name in names), return_exceptions=True
    )
    for name, outcome in zip(names, outcomes, strict=True):
        if name == "fine":
            assert outcome == "you said hello"
        else:
            told = {"exit": "exited with code 7 in step 1", "raise": "raised in step 1"}[name]
            assert isinstance(outcome, EnvironmentFailure)
            assert told in str(outcome)
