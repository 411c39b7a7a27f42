from __future__ import annotations

import asyncio

import pytest
import ray

from tests.envs.misbehaving import Misbehaving
from tests.envs.scripted import Scripted
from tests.tiny import tiny_tokenizer
from tinsmith.actors.env_worker import EnvWorker
from tinsmith.actors.handle import RayHandle
from tinsmith.envs import EpisodeSpec, register
from tinsmith.primitives.client import EnvClient
from tinsmith.primitives.errors import EnvironmentFailure

ENV = "tests.envs.misbehaving:Misbehaving"


@pytest.fixture(scope="module")
def worker(tiny_llama):
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    actor = ray.remote(EnvWorker).options(num_cpus=0, max_concurrency=1000).remote(tiny_llama)
    yield RayHandle(actor, "environment worker")
    ray.shutdown()


def spec(turns: list[str], env: str = ENV, seed: int = 0) -> EpisodeSpec:
    return EpisodeSpec(env, Scripted(tiny_tokenizer(), turns), seed=seed)


async def test_a_worker_plays_episodes_at_once_and_faults_stay_where_they_happen(worker):
    client = EnvClient([worker])
    outcomes = await asyncio.gather(
        *(client.run_episode(spec(["one", "two", "three"], seed=seed)) for seed in range(6)),
        client.run_episode(spec(["one", "exit"])),
        return_exceptions=True,
    )
    assert [t.reward for t in outcomes[:6]] == [3.0] * 6
    assert [t.seed for t in outcomes[:6]] == list(range(6))
    assert isinstance(outcomes[6], EnvironmentFailure)
    assert "exited with code 7 in step 2" in str(outcomes[6])


async def test_an_environment_registered_in_the_driver_plays_in_the_worker(worker):
    class Local(Misbehaving):
        async def step(self, action):
            return "done", 7.0, True, False, {}

    register("local-to-the-driver", Local)
    trajectory = await EnvClient([worker]).run_episode(spec(["one"], "local-to-the-driver"))
    assert trajectory.reward == 7.0
