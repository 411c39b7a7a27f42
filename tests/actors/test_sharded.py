"""A learner whose ranks are actors: started unseen, and started again when one is killed."""

from __future__ import annotations

import json

import numpy as np
import pytest

import tinsmith
from tests.actors.script import run_script
from tests.actors.test_training import engine_threads
from tests.data import text_datum
from tinsmith.actors.learner import Learner
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.layout import Layout
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

def processes(kind):
    children = psutil.Process().children(recursive=True)
    named = [(child, " ".join(child.cmdline()).partition(".")[0]) for child in children]
    return [child for child, name in named if name.strip() == f"ray::{kind}"]

def ranks():
    return processes("LearnerRank")

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
        await training.save_state("end")
        (learner,) = processes("Learner")
        learner.kill()
        learner.wait()
        again = await service.resume_training_client(training.run_id)
        output = await again.forward(batches[0])
        print(json.dumps({
            "ranks": [len(first), len(second), len(ranks())],
            "new": all(old.pid not in [new.pid for new in second] for old in first),
            "losses": [*losses, output.metrics["loss:sum"]],
        }))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("layout", "others"),
    [("shard=2", 1), pytest.param("data=2,tensor=2", 3, marks=pytest.mark.slow)],
)
def test_a_killed_rank_costs_a_pass_and_a_killed_learner_goes_on_from_a_checkpoint(
    tiny_home, layout, others
):
    told = json.loads(run_script(SCRIPT, tiny_home, layout, seconds=200).splitlines()[-1])
    assert told["ranks"] == [others] * 3
    assert told["new"]
    engine = LearnerEngine(Backbone(str(tiny_home / "models" / "tiny-llama")))
    engine.create_run("run", LoraConfig(rank=4, seed=0))
    with engine_threads():
        first, *_ = batches = batches_of_many()
        for batch, loss in zip(batches, told["losses"], strict=False):
            output = engine.forward_backward("run", batch, "cross_entropy")
            assert loss == pytest.approx(output.metrics["loss:sum"], rel=1e-5)
            engine.optim_step("run", ADAM)
        output = engine.forward("run", first, "cross_entropy")
        assert told["losses"][-1] == pytest.approx(output.metrics["loss:sum"], rel=1e-5)


async def test_a_model_that_cannot_be_laid_out_so_is_refused_with_the_reason(tiny_llama, tmp_path):
    learner = Learner("tiny", tiny_llama, str(tmp_path), None, 1, layout=Layout(tensor=4))
    with pytest.raises(tinsmith.InvalidInput, match="tensor=4 does not divide"):
        await learner.start()


def test_what_is_no_layout_is_refused_at_once():
    with pytest.raises(tinsmith.InvalidInput, match="layout must read like"):
        tinsmith.connect(layout="pipeline=2")
    with pytest.raises(tinsmith.InvalidInput, match="say data=2 in the layout"):
        tinsmith.connect(layout="shard=2", learners=2)
