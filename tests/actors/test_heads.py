"""A cluster that loses its head is lost; its service goes on in another one, from the same home."""

from __future__ import annotations

import json

import pytest

from tests.actors.script import run_script
from tests.actors.test_nodes import what_the_engine_gives

BEGIN = """
import asyncio, sys
import tinsmith
from tests.actors.test_nodes import operations

async def main(home, address):
    placement = tinsmith.Placement(learner_cpus=1)
    async with tinsmith.connect(
        address, home=home, learner_threads=1, placement=placement
    ) as service:
        training = await service.create_lora_training_client("tiny-llama", rank=4, seed=1)
        ops = [getattr(training, kind)(*args) for kind, args in operations()[:13]]
        for op in ops[:12]:
            await op
        print(training.run_id, flush=True)
        await ops[12]  # the head is lost meanwhile, or soon
        while True:
            await training.get_info()

asyncio.run(main(*sys.argv[1:]))
"""

GO_ON = """
import asyncio, json, sys
import tinsmith
from tests.actors.test_nodes import operations
from tests.actors.test_training import same_weights_logprobs

async def main(home, address, run_id):
    refused = ""
    placement = tinsmith.Placement(learner_cpus=1)
    async with tinsmith.connect(
        address, home=home, learner_threads=1, placement=placement
    ) as service:
        async with asyncio.timeout(200):
            while True:
                try:
                    training = await service.resume_training_client(run_id)
                    break
                except tinsmith.Unavailable as error:  # a learner of the old cluster still lives
                    refused = str(error)
        version = (await training.get_info()).version
        for kind, args in operations()[13:]:
            getattr(training, kind)(*args)
        logprobs = await same_weights_logprobs(training)
        print(json.dumps([version, refused, [row.tolist() for row in logprobs]]))

asyncio.run(main(*sys.argv[1:]))
"""

HEADS = """
import json, subprocess, sys
import psutil
from tests.actors.nodes import family, lose, new_cluster
from tests.actors.test_heads import BEGIN, GO_ON

def run(script, *args):
    command = [sys.executable, "-c", script, home, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

home = sys.argv[1]
old = new_cluster()
node = old.add_node(num_cpus=2)
first = run(BEGIN, old.address)
run_id = first.stdout.readline().strip()
lose(old.head_node)
there = len(family(node))
new = new_cluster()
new.add_node(num_cpus=2)
second = run(GO_ON, new.address, run_id)
told = second.communicate()[0].splitlines()[-1]
assert second.returncode == 0
first.kill()
# Ray's own agents stay longer; they hold nothing of ours.
ours = [process for process in family(node) if not process.name().endswith("Agent")]
left = psutil.wait_procs(ours, timeout=60)[1]
print(json.dumps([there, [str(p) for p in left], json.loads(told)]))
new.shutdown()
old.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_after_its_head_is_lost_a_service_with_the_same_home_goes_on_in_a_new_cluster(tiny_home):
    out = run_script(HEADS, tiny_home, seconds=480)
    before, left, (version, refused, logprobs) = json.loads(out.splitlines()[-1])
    assert before > 1  # the node that the learner was on outlived its head
    assert left == []  # and ended, missing it
    assert version == 4
    assert refused == "" or "is open in another process" in refused
    assert logprobs == what_the_engine_gives(str(tiny_home / "models" / "tiny-llama"))
