from __future__ import annotations

import asyncio
import dataclasses

import pytest

from tests.envs.misbehaving import Misbehaving
from tests.envs.scripted import Scripted
from tests.tiny import tiny_tokenizer
from tinsmith.envs import EpisodeSpec, register
from tinsmith.primitives.errors import (
    EnvironmentFailure,
    InvalidInput,
    NotFound,
    OpCancelled,
    Unavailable,
)

ENV = "tests.envs.misbehaving:Misbehaving"


@pytest.fixture(scope="module")
async def client(service):
    return await service.create_env_client("tiny-llama")


def spec(turns: list[str], env: str = ENV, seed: int = 0) -> EpisodeSpec:
    return EpisodeSpec(env, Scripted(tiny_tokenizer(), turns), seed=seed)


async def test_a_worker_plays_episodes_at_once_and_faults_stay_where_they_happen(client):
    outcomes = await asyncio.gather(
        *(client.run_episode(spec(["one", "two", "three"], seed=seed)) for seed in range(6)),
        client.run_episode(spec(["one", "exit"])),
        return_exceptions=True,
    )
    assert [t.reward for t in outcomes[:6]] == [3.0] * 6
    assert [t.seed for t in outcomes[:6]] == list(range(6))
    assert isinstance(outcomes[6], EnvironmentFailure)
    assert "exited with code 7 in step 2" in str(outcomes[6])


async def test_an_environment_registered_in_the_driver_plays_in_the_worker(client):
    class Local(Misbehaving):
        async def step(self, action):
            return "done", 7.0, True, False, {}

    register("local-to-the-driver", Local)
    trajectory = await client.run_episode(spec(["one"], "local-to-the-driver"))
    assert trajectory.reward == 7.0


async def test_an_unknown_environment_or_argument_is_a_typed_error_of_its_episode(client):
    with pytest.raises(NotFound, match="no environment 'chess-3d'"):
        await client.run_episode(spec(["one"], "chess-3d"))
    with pytest.raises(NotFound, match="there is no module 'no_such_module'"):
        await client.run_episode(spec(["one"], "no_such_module:Env"))
    bad = dataclasses.replace(spec(["one"]), env_kwargs={"size": 3})
    with pytest.raises(InvalidInput, match="cannot be made with"):
        await client.run_episode(bad)
    assert (await client.run_episode(spec(["one", "two", "three"]))).reward == 3.0


async def test_a_pool_needs_a_worker(service):
    with pytest.raises(InvalidInput, match="num_workers must be at least 1"):
        await service.create_env_client("tiny-llama", num_workers=0)


async def test_an_episode_withdrawn_ends_with_its_environment(client):
    op = client.run_episode(spec(["hang"]))
    await asyncio.sleep(0.5)
    assert await op.cancel() is True
    with pytest.raises(OpCancelled):
        await asyncio.wait_for(op, 20)
    done = client.run_episode(spec(["one", "two", "three"]))
    await done
    assert await done.cancel() is False


async def test_a_closed_pool_leaves_no_worker(service):
    client = await service.create_env_client("tiny-llama", num_workers=2)
    await client.close()
    with pytest.raises(Unavailable, match="the environment worker actor is gone"):
        await asyncio.wait_for(client.run_episode(spec(["one"])), 30)
