"""An operation that kills the learner again and again costs its own run that operation, and others
nothing but the delay."""

from __future__ import annotations

import json

import numpy as np

from tests.actors.script import run_script
from tests.actors.test_many_runs import LORA
from tests.actors.test_training import engine_threads, script
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine

LIVES = """
import asyncio, json, os, sys
from dataclasses import replace
from pathlib import Path

import tinsmith
from tests.actors.test_many_runs import LORA
from tests.actors.test_replay import arguments, started, stop
from tests.actors.test_training import script
from tinsmith.algorithms.losses import get_loss, register_loss

path, home, when = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
deadly = home / "deadly"
plain = get_loss("cross_entropy")

def lethal(p, inputs, config):
    if when == "first" or deadly.exists():
        os._exit(9)
    return plain.function(p, inputs, config)

register_loss(replace(plain, name="lethal", function=lethal))
OPS = [(kind, arguments(kind, args)) for kind, args in script(0, 12)]
VICTIM = [(kind, {**args, "loss_fn": "lethal"} if i == 3 else args) for i, (kind, args) in enumerate(OPS)]

async def live(number):
    learner = await started(path, home, 1e9)
    told = {}
    for run_id in ("victim", "innocent"):
        if number == 0:
            await learner.open_run(run_id, LORA, None, False)
    if number:
        recovered = await asyncio.gather(*map(learner.recover, ("victim", "innocent")), return_exceptions=True)
        told["recovered"] = [str(r) for r in recovered]

    async def all_of(run_id, ops):
        results = await asyncio.gather(
            *(learner.submit(run_id, i, *op) for i, op in enumerate(ops, 1)), return_exceptions=True
        )
        told[run_id] = [
            f"{type(r).__name__}: {r}" if isinstance(r, Exception) else getattr(r, "version", 0) for r in results
        ]
    await asyncio.gather(all_of("victim", VICTIM), all_of("innocent", OPS))
    if when == "replayed" and number == 0:
        deadly.touch()
        os._exit(9)
    for run_id in ("victim", "innocent"):
        if run_id in learner.logs:
            told[run_id + " params"] = learner.engine.state(run_id)["params"].tolist()
    print(json.dumps(told), flush=True)
    await stop(learner)

for number in range(12):
    pid = os.fork()
    if not pid:
        asyncio.run(live(number))
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0:
        print(number)
        break
"""


def lives(path: str, home, when: str) -> tuple[dict, int]:
    """What the life that came through told, and its number."""
    *_, told, number = run_script(LIVES, path, home, when).splitlines()
    return json.loads(told), int(number)


def test_an_operation_that_kills_the_learner_is_refused_and_its_run_goes_on(tiny_llama, tmp_path):
    told, deaths = lives(tiny_llama, tmp_path, "first")
    assert deaths == 7  # one that did it first, three that replayed it, three that did it alone
    report = told["victim"][3]
    assert report.startswith("OperationCrashed: operation 4 (forward_backward, 'lethal', ")
    assert (
        "of run victim kills the learner: 7 have died of it, 3 of them when they did nothing"
        in report
    )
    assert told["innocent"] == [0, 0, 1, 0, 0, 2, 0, 0, 3, 0, 0, 4]
    assert told["victim"] == [0, 0, 1, report, 0, 2, 0, 0, 3, 0, 0, 4]
    engine = LearnerEngine(Backbone(tiny_llama))
    with engine_threads():
        for run_id in ("victim", "innocent"):
            engine.create_run(run_id, LORA)
            for number, (kind, args) in enumerate(script(0, 12), 1):
                if (run_id, number) != ("victim", 4):
                    getattr(engine, kind)(run_id, *args)
            got = np.float32(told[f"{run_id} params"])
            np.testing.assert_array_equal(got, engine.state(run_id)["params"].numpy())


def test_a_run_whose_replay_kills_the_learner_is_not_opened_any_more(tiny_llama, tmp_path):
    told, deaths = lives(tiny_llama, tmp_path, "replayed")
    assert deaths == 7
    report, following = told["recovered"]
    assert report.startswith("operation 4 (forward_backward, 'lethal', ")
    assert "cannot go on without it: resume it from a checkpoint" in report
    assert following == "13"
    assert told["innocent"] == [0, 0, 1, 0, 0, 2, 0, 0, 3, 0, 0, 4]
    assert all(result.startswith("NotFound: run 'victim' is not open") for result in told["victim"])
