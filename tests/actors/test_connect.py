"""Coming in and leaving: scripts as users write them, each in a process of its own."""

from __future__ import annotations

import json

import pytest
import ray

import tinsmith
from tests.actors.script import run_script, wait_until_gone
from tinsmith.actors.cluster import _start_ray


def test_a_blocking_script_trains_samples_plays_and_leaves_no_process(tiny_home):
    out = run_script(
        """
        import json, sys
        import numpy as np
        import tinsmith
        from tests.actors.script import children_settled, descendants
        from tests.data import text_datum

        with tinsmith.connect(home=sys.argv[1], num_cpus=2, sampler_threads=1).sync as service:
            training = service.create_lora_training_client("tiny-llama", rank=4, seed=0)
            for step in range(2):
                fb = training.forward_backward([text_datum(np.random.default_rng(0), 40)])
                training.optim_step(tinsmith.AdamParams(learning_rate=0.01))
            custom = training.forward_backward_custom(
                [text_datum(np.random.default_rng(0), 40)], lambda d, p: (-p[0].sum(), {"m": 1.0})
            )
            policy = training.save_weights_and_get_sampling_client()
            params = tinsmith.SamplingParams(max_tokens=8, seed=0, stop=[])
            sample = policy.sample([1, 2, 3], 1, params)
            stream = [t.token for t in policy.sample_stream([1, 2, 3], 1, params)]
            live = training.live_sampling_client()
            path = training.save_state("end").path
            exact = service.create_training_client_from_state_with_optimizer(path)
            envs = service.create_env_client("tiny-llama")
            trajectory = envs.run_episode(
                tinsmith.EpisodeSpec("calculator", policy, tinsmith.SamplingParams(max_tokens=4))
            )
            pids = descendants()
            print(json.dumps({
                "loss": fb.metrics["loss:sum"], "custom": custom.metrics["m"],
                "same": sample.sequences[0].tokens.tolist() == stream,
                "live": live.policy.version, "versions": [training.get_info().version,
                exact.get_info().version], "turns": len(trajectory.rewards), "pids": pids,
                "runs": len(service.list_training_runs()) > 1,
            }))
        try:
            training.get_info()
        except tinsmith.Unavailable as error:
            print(json.dumps({"closed": str(error), "settled": children_settled()}))
        """,
        tiny_home,
    )
    first, last = map(json.loads, out.splitlines()[-2:])
    assert first.pop("loss") > 0
    assert first.pop("turns") > 0
    pids = first.pop("pids")
    assert first == {"custom": 1.0, "same": True, "live": None, "versions": [2, 2], "runs": True}
    assert "closed" in last["closed"]
    assert last["settled"]
    assert len(pids) > 3
    assert wait_until_gone(pids) == []


def test_asyncio_scripts_connect_share_and_close(tiny_home, tmp_path):
    out = run_script(
        """
        import asyncio, json, sys
        import tinsmith
        from tests.actors.script import children_settled

        async def main(home, other_home):
            async with tinsmith.connect(home=home, num_cpus=2, learner_threads=1) as service:
                again = await tinsmith.connect(home=home)
                assert (await again.list_training_runs()) == (await service.list_training_runs())
                again.close()
                try:
                    await tinsmith.connect(home=other_home)
                except tinsmith.Unavailable as error:
                    print(json.dumps(str(error)))
                await service.list_training_runs()  # neither closed the first one's cluster
                pending = [asyncio.ensure_future(wait(service)), asyncio.ensure_future(drain(service))]
                await asyncio.sleep(0.5)
            for call in pending:
                try:
                    await asyncio.wait_for(call, 20)
                except tinsmith.Unavailable as error:
                    print(json.dumps(str(error)))
            async with await tinsmith.connect(home=other_home, num_cpus=2) as service:
                print(json.dumps(await service.list_training_runs()))
            print(json.dumps(children_settled()))

        async def wait(service):
            training = await service.create_lora_training_client("tiny-llama", rank=2)
            training._take_seq_ids()
            await training.get_info()

        async def drain(service):
            policy = await service.create_sampling_client(base_model="tiny-llama")
            async for _ in policy.sample_stream([1], 64, tinsmith.SamplingParams(500, stop=[])):
                pass

        asyncio.run(main(*sys.argv[1:]))
        """,
        tiny_home,
        tmp_path,
    )
    other_home, *pending, runs, settled = map(json.loads, out.splitlines()[-5:])
    assert f"home {str(tiny_home)!r} runs in this cluster already" in other_home
    assert all("closed" in call for call in pending), pending
    assert runs == []
    assert settled is True


def test_a_cluster_that_does_not_answer_is_named(tmp_path):
    """In a process that starts none of its own afterwards: Ray's client takes leave in the
    background, and may take a new cluster with it."""
    out = run_script(
        """
        import sys
        import tinsmith

        try:
            tinsmith.connect("ray://127.0.0.1:1", home=sys.argv[1]).sync
        except tinsmith.Unavailable as error:
            print(error)
        """,
        tmp_path,
    )
    assert "ray://127.0.0.1:1" in out


@pytest.mark.parametrize("address", ["http//x", ""])
def test_an_address_of_no_known_form_is_refused(address):
    with pytest.raises(tinsmith.InvalidInput, match="address must be None"):
        tinsmith.connect(address)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_cluster_that_a_busy_machine_did_not_start_in_time_is_started_again(
    monkeypatch, failures
):
    tries = []

    def init(**_):
        tries.append(1)
        if len(tries) <= failures:
            raise Exception("The current node timed out during startup. This could happen ...")

    monkeypatch.setattr(ray, "init", init)
    if failures == 1:
        _start_ray(2, {})
    else:
        with pytest.raises(tinsmith.Unavailable, match="is this machine overloaded"):
            _start_ray(2, {})
    assert len(tries) == 2
