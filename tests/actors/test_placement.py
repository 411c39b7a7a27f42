"""What actors reserve, as planned and as a Ray cluster gives it."""

from __future__ import annotations

import json

import pytest

from tests.actors.script import run_script
from tinsmith import InvalidInput, Placement
from tinsmith.actors.placement import Plan, Seat, plan


def test_without_gpus_and_cpus_asked_for_nothing_is_reserved():
    assert plan(Placement(), 0, 1, 2) == Plan([], Seat(), [Seat(), Seat()], Seat())


def test_a_single_gpu_is_shared():
    assert plan(Placement(), 1, 1, 1) == Plan(
        [{"GPU": 1.0}], Seat(0, 0.5, 0), [Seat(0, 0.5, 0)], Seat(0, 0.5)
    )
    three = plan(Placement(), 1, 1, 3)
    assert three.samplers == [Seat(0, 0.1666, 0)] * 3
    assert 0.99 < three.bundles[0]["GPU"] <= 1


def test_enough_gpus_are_one_each():
    assert plan(Placement(sampler_cpus=2), 4, 1, 2) == Plan(
        [{"GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}],
        Seat(0, 1.0, 0),
        [Seat(2, 1.0, 1), Seat(2, 1.0, 2)],
        Seat(2, 1.0),
    )
    assert plan(Placement(), 8, 4, 1).bundles == [{"GPU": 1.0}, {"GPU": 4.0}]
    # Less than that is not split over samplers that need several: the cluster will say so.
    assert plan(Placement(), 4, 4, 1).bundles == [{"GPU": 1.0}, {"GPU": 4.0}]


def test_what_is_asked_for_is_taken():
    placement = Placement(learner_gpus=0.25, sampler_gpus=0.75)
    assert plan(placement, 8, 1, 1).bundles == [{"GPU": 1.0}]
    assert plan(placement, 8, 1, 2).bundles == [{"GPU": 0.25}, {"GPU": 0.75}, {"GPU": 0.75}]
    assert plan(Placement(learner_gpus=0), 1, 1, 1).learner == Seat()
    assert plan(Placement(learner_cpus=1, sampler_cpus=2), 0, 1, 1).bundles == [
        {"CPU": 1.0},
        {"CPU": 2.0},
    ]


def test_what_cannot_be_is_refused():
    for wrong, match in (
        (dict(strategy="NEAR"), "strategy must be one of PACK, SPREAD"),
        (dict(learner_gpus=2), "learner_gpus must be from 0 to 1"),
        (dict(sampler_gpus=1.5), "a part of one, or whole ones"),
        (dict(sampler_cpus=-1), "sampler_cpus must not be negative"),
    ):
        with pytest.raises(InvalidInput, match=match):
            Placement(**wrong)
    with pytest.raises(InvalidInput, match="tensor_parallel=2 needs as many"):
        plan(Placement(sampler_gpus=1), 8, 2, 1)


@pytest.mark.slow
def test_actors_sit_where_the_cluster_was_asked_to_put_them(tiny_home):
    """Two nodes with a logical GPU and two CPUs each; the engines compute on the CPU."""
    out = run_script(
        """
        import asyncio, json, sys
        import numpy as np
        import ray
        from ray.cluster_utils import Cluster
        from ray.util import placement_group_table
        import tinsmith
        from tests.actors.script import children_settled
        from tinsmith import Op, Placement

        def groups():
            table = placement_group_table().values()
            return [g for g in table if g["state"] == "CREATED"]

        def nodes(group):
            return len(set(group["bundles_to_node_id"].values()))

        async def trained(home, address, **how):
            told = {}
            async with tinsmith.connect(
                address, home=home, learner_threads=1, sampler_threads=1, kv_bytes=1 << 24, **how
            ) as service:
                try:
                    training = await service.create_lora_training_client("tiny-llama", rank=4)
                except tinsmith.TinsmithError as error:
                    return {"refused": f"{type(error).__name__}: {error}"}
                live = await training.live_sampling_client().ready()
                await live.sample(np.arange(20), 1, tinsmith.SamplingParams(max_tokens=4))
                (group,) = groups()
                told["bundles"], told["nodes"] = list(group["bundles"].values()), nodes(group)
                free = ray.available_resources()
                told["free"] = [free.get("GPU", 0), free.get("CPU", 0)]
                workers = await service.create_env_client("tiny-llama", num_workers=2)
                told["workers"] = [nodes(g) for g in groups() if g["bundles"] != group["bundles"]]
                await workers.close()
                await service.close_training_run(training.run_id)
                assert await Op(service.controller.call("unload", "tiny-llama"))
                async with asyncio.timeout(30):
                    while groups() or ray.available_resources().get("GPU") != 2:
                        await asyncio.sleep(0.1)
                ray.kill(service.controller.actor)
            return told

        async def main(home):
            cluster = Cluster(
                initialize_head=True,
                head_node_args=dict(num_cpus=2, num_gpus=1, include_dashboard=False),
            )
            cluster.add_node(num_cpus=2, num_gpus=1)
            cluster.wait_for_nodes()
            told = []
            for how in (
                dict(placement=Placement(env_worker_cpus=1)),
                dict(placement=Placement(learner_gpus=0.5, sampler_gpus=0.5)),
                dict(placement=Placement(0, 0, 1, 1, 0, "STRICT_SPREAD")),
                dict(samplers=2, placement=Placement(sampler_gpus=1, learner_gpus=1, wait_s=2)),
            ):
                told.append(await trained(home, cluster.address, **how))
            ray.shutdown()
            cluster.shutdown()
            print(json.dumps(dict(told=told, settled=children_settled())))

        asyncio.run(main(*sys.argv[1:]))
        """,
        tiny_home,
        seconds=180,
    )
    result = json.loads(out.splitlines()[-1])
    each, shared, spread, refused = result["told"]
    assert each == {"bundles": [{"GPU": 1.0}] * 2, "nodes": 2, "free": [0, 4], "workers": [2]}
    assert (shared["bundles"], shared["free"]) == ([{"GPU": 1.0}], [1, 4])
    assert (spread["bundles"], spread["nodes"]) == ([{"CPU": 1.0}] * 2, 2)
    assert refused["refused"].startswith(
        "OutOfCapacity: no room for the learner of tiny-llama and 2"
    )
    assert "3 GPU needed" in refused["refused"]
    assert "has 2 GPU, 4 CPU" in refused["refused"]
    assert result["settled"]
