"""A learner whose ranks are actors: started unseen, and started again when one is killed."""

from __future__ import annotations

import json

import numpy as np
import pytest

import tinsmith
from tests.actors.script import run_script
from tests.actors.test_training import engine_threads
from tests.data import text_datum
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.primitives.types import AdamParams, LoraConfig

ADAM = AdamParams(1e-2, 0.9, 0.95, 1e-3)


def batches_of_many() -> list[list[tinsmith.Datum]]:
    """Large enough that there is time to kill a rank meanwhile."""
    rng = np.random.default_rng(2)
    return [[text_datum(rng, 400) for _ in range(40)] for _ in range(3)]


SCRIPT = """
import asyncio, json, os, signal, sys

import psutil
import tinsmith
from tests.actors.test_sharded import ADAM, batches_of_many

def ranks():
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "LearnerRank" in " ".join(child.cmdline())]

async def main(home, layout):
    batches = batches_of_many()
    async with tinsmith.connect(
        home=home, num_cpus=2, learner_threads=1, sampler_threads=1, layout=layout
    ) as service:
        training = await service.create_lora_training_client("tiny-llama", rank=4, seed=0)
        first = ranks()
        losses = []
        for step, batch in enumerate(batches):
            computing = training.forward_backward(batch)
            if step == 1:
                await asyncio.sleep(0.4)
                assert not computing.done()
                os.kill(first[-1].pid, signal.SIGKILL)
            output = await computing
            losses.append(output.metrics["loss:sum"])
            await training.optim_step(ADAM)
        second = ranks()
        path = (await training.save_state("end")).path
        print(json.dumps({
            "ranks": [len(first), len(second)],
            "new": all(old.pid not in [new.pid for new in second] for old in first),
            "losses": losses,
            "path": path,
        }))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize(("layout", "others"), [("shard=2", 1), ("data=2,tensor=2", 3)])
def test_a_rank_killed_in_mid_pass_costs_that_pass(tiny_home, layout, others):
    told = json.loads(run_script(SCRIPT, tiny_home, layout, seconds=200).splitlines()[-1])
    assert told["ranks"] == [others, others]
    assert told["new"]
    engine = LearnerEngine(Backbone(str(tiny_home / "models" / "tiny-llama")))
    engine.create_run("run", LoraConfig(rank=4, seed=0))
    with engine_threads():
        for batch, loss in zip(batches_of_many(), told["losses"], strict=True):
            output = engine.forward_backward("run", batch, "cross_entropy")
            assert loss == pytest.approx(output.metrics["loss:sum"], rel=1e-5)
            engine.optim_step("run", ADAM)


def test_what_is_no_layout_is_refused_at_once():
    with pytest.raises(tinsmith.InvalidInput, match="layout must read like"):
        tinsmith.connect(layout="pipeline=2")
    with pytest.raises(tinsmith.InvalidInput, match="say data=2 in the layout"):
        tinsmith.connect(layout="shard=2", learners=2)
