"""Clusters of several nodes, of which some are lost or cut off."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.actors.script import run_script
from tests.actors.test_training import LORA, engine_threads, script
from tests.data import text_datum
from tinsmith import Datum
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine


def long_batch() -> list[Datum]:
    """It is being computed for a while."""
    rng = np.random.default_rng(5)
    return [text_datum(rng, 400) for _ in range(24)]


def operations():
    """12 short ones, a long one, 11 short ones."""
    short = list(script(7, 24))
    return [*short[:12], ("forward_backward", (long_batch(), "cross_entropy")), *short[13:]]


def what_the_engine_gives(model: str) -> list[list[float]]:
    """The logprobs of a fixed text under the weights that the operations end with."""
    engine = LearnerEngine(Backbone(model))
    engine.create_run("run", LORA)
    with engine_threads():
        for kind, args in operations():
            getattr(engine, kind)("run", *args)
        data = [text_datum(np.random.default_rng(100 + i), 40) for i in range(2)]
        output = engine.forward("run", data, "cross_entropy")
    return [each["logprobs"].tolist() for each in output.loss_fn_outputs]


LOST_AND_CUT_OFF = """
import asyncio, json, signal, sys
import numpy as np
import ray
import tinsmith
from tests.actors.nodes import family, logged, lose, new_cluster, send
from tests.actors.script import children_settled
from tests.actors.test_nodes import operations
from tests.actors.test_training import same_weights_logprobs

async def main(home):
    told = {}
    cluster = new_cluster()
    first = cluster.add_node(num_cpus=2)
    placement = tinsmith.Placement(learner_cpus=1, sampler_cpus=1, wait_s=1)
    async with tinsmith.connect(
        cluster.address, home=home, learner_threads=1, sampler_threads=1, kv_bytes=1 << 24,
        placement=placement,
    ) as service:
        training = await service.create_lora_training_client("tiny-llama", rank=4, seed=1)
        todo = operations()
        live = await training.live_sampling_client().ready()
        params = tinsmith.SamplingParams(max_tokens=8, seed=3)

        def submit(count):
            ops = [getattr(training, kind)(*args) for kind, args in todo[:count]]
            del todo[:count]
            return ops

        async def sampled():
            (sequence,) = (await live.sample(np.arange(20), 1, params)).sequences
            return sequence.tokens.tolist(), set(sequence.versions.tolist())

        for op in submit(6):
            await op
        before, _ = await sampled()

        # The node of learner and sampler fails, and there is no other.
        waiting = submit(5)
        await waiting[0]
        lose(first)
        told["refused"] = ""
        while "what was reserved" not in told["refused"]:  # at first it says that the learner died
            try:
                await service.create_lora_training_client("tiny-llama", rank=2)
            except tinsmith.Unavailable as error:
                told["refused"] = str(error)
        told["waited"] = not waiting[-1].done()
        second = cluster.add_node(num_cpus=2)
        async with asyncio.timeout(120):
            await asyncio.gather(*waiting)
            told["versions"] = sorted((await sampled())[1])

        # That node is cut off, while it computes.
        waiting = submit(4)
        await waiting[0]
        await asyncio.sleep(0.3)
        told["computing"] = not waiting[1].done()
        cut_off = family(second)
        send(cut_off, signal.SIGSTOP)
        third = cluster.add_node(num_cpus=2)
        async with asyncio.timeout(120):
            await asyncio.gather(*waiting)
            await asyncio.gather(*submit(3))
        # Its processes go on; that the others have given it up they learn last.
        send(cut_off[1:], signal.SIGCONT)
        told["zombie"] = await logged(second, "another learner has taken over")
        await asyncio.gather(*submit(3))
        send(cut_off, signal.SIGCONT)
        await asyncio.gather(*submit(3))
        told["left"] = len(todo)
        told["logprobs"] = [row.tolist() for row in await same_weights_logprobs(training)]
        told["version"] = (await training.get_info()).version
    cluster.shutdown()
    print(json.dumps(dict(told, settled=children_settled(90))))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_node_lost_and_a_node_cut_off_cost_a_run_nothing_but_time(tiny_home):
    told = json.loads(run_script(LOST_AND_CUT_OFF, tiny_home, seconds=480).splitlines()[-1])
    assert (
        "what was reserved for the learner of tiny-llama and 1 of its samplers is lost"
        in (told["refused"])
    )
    assert "2 CPU needed" in told["refused"]
    assert told["waited"]
    assert told["versions"] == [3]
    assert told["computing"]
    assert "another learner has taken over" in told["zombie"]
    assert (told["left"], told["version"]) == (0, 8)
    assert told["logprobs"] == what_the_engine_gives(str(tiny_home / "models" / "tiny-llama"))
    assert told["settled"]
