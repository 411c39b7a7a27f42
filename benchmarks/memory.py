"""Peak memory of a learner and a torch sampler on one node, against 1.3 times what must be there.

What must be there (`engines/memory.py`): one copy of the base weights in fp32, a rank-32 run's
parameters, gradient and moments, the activations of a pass over a group of 8 (prompt 128, completion
16), the sampler's copy of the adapter, its cache, the activations of its largest step and the logits of
32 requests. `theirs` is 1.3 times the sum.

Ours is the largest sum of both actors' PSS (pages that processes share are counted once between
them) while they train, publish and sample at the same time. Python, torch, transformers and Ray take
some 300 to 600 MB in each process, whatever the model: that is measured at the same moment in two
actors that have imported the same and hold a model of next to nothing, and subtracted. It is reported as
`runtime_mb`; `with_runtime_mb` is what is not subtracted from.
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import psutil
import ray
import torch
from harness import options, report, say
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import tinsmith
from tinsmith import AdamParams, Datum, SamplingParams
from tinsmith.actors.threads import ENGINE_ENV
from tinsmith.engines.backbone import targets_of_folder
from tinsmith.engines.lora import AdapterLayout
from tinsmith.engines.memory import MemoryModel, PassShape, state_bytes, weights_bytes

LIMIT = 1.3
KV_BYTES = 1 << 27
GROUP, PROMPT, COMPLETION = 8, 128, 16
REQUESTS, STEP_ROWS = 32, 768  # the sampler's
LORA = tinsmith.LoraConfig(rank=32, seed=0)
MODEL_ACTOR, IDLE_ACTOR = re.compile(r"ray::(Learner|Sampler)\b"), re.compile(r"ray::Idle\b")


class Idle:
    """What a learner or sampler is without a model to speak of."""

    def start(self, tiny: str) -> None:
        from tinsmith.actors import learner, sampler  # noqa: F401
        from tinsmith.actors.threads import set_engine_threads
        from tinsmith.engines.backbone import Backbone

        set_engine_threads(None)
        Backbone(tiny)  # what is imported for it is imported for any
        x = torch.rand(256, 256, requires_grad=True)
        (x @ x).logsumexp(1).sum().backward()


def save_tiny(folder: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(num_attention_heads=1, num_key_value_heads=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def pss(which: re.Pattern[str]) -> int:
    """Bytes of this process's descendants whose title begins so."""
    total = 0
    for child in psutil.Process().children(recursive=True):
        try:
            if which.match(child.cmdline()[0]):
                rollup = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
                match = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
                total += 1024 * int(match[1]) if match else 0
        except (psutil.Error, OSError, IndexError):  # it has just ended
            continue
    return total


def counted(model: str) -> dict[str, int]:
    """Bytes that must be there, by what for."""
    layouts = [AdapterLayout.of(LORA, targets_of_folder(model))]
    config = AutoConfig.from_pretrained(model)
    count = MemoryModel(config, torch.float32.itemsize)
    trained = PassShape(
        [PROMPT] + GROUP * [COMPLETION], [()] + GROUP * [(0,)], 1 + GROUP * COMPLETION
    )
    drawn = PassShape([STEP_ROWS], [()], 0)
    return {
        "weights": weights_bytes(model, "fp32"),
        "run": state_bytes(layouts),
        "pass": count.pass_(trained, layouts, checkpointing=False),
        "cache": KV_BYTES,
        "adapter": 4 * layouts[0].size,
        "step": count.forward(drawn, layouts) + 4 * REQUESTS * config.vocab_size,
    }


def group(rng: np.random.Generator, vocab: int) -> list[Datum]:
    prompt = rng.integers(0, vocab, PROMPT)
    datums = []
    for _ in range(GROUP):
        tokens = np.concatenate([prompt, rng.integers(0, vocab, COMPLETION + 1)])
        weights = np.where(np.arange(1, len(tokens)) >= PROMPT, 1.0, 0.0)
        datums.append(Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights}))
    return datums


async def watch(done: asyncio.Event) -> tuple[int, int]:
    """The largest memory that both actors held at once, and what two without a model held then."""
    most = (0, 0)
    while not done.is_set():
        most = max(most, (pss(MODEL_ACTOR), pss(IDLE_ACTOR)))
        await asyncio.sleep(0.5)  # reading it costs the kernel some 20 ms
    return most


async def work(service: tinsmith.ServiceClient, model: str, rounds: int) -> None:
    training = await service.create_lora_training_client(model, rank=LORA.rank, seed=LORA.seed)
    vocab = (await training.get_info()).vocab_size
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=32, stop=[])
    for turn in range(rounds):
        policy = await training.save_weights_and_get_sampling_client()
        training.forward_backward(group(rng, vocab), "cross_entropy", logprobs="loss")
        stepped = training.optim_step(AdamParams())
        prompts = rng.integers(0, vocab, (REQUESTS, PROMPT))
        await asyncio.gather(stepped, *(policy.sample(p, 1, params) for p in prompts))
        say(f"round {turn}: {pss(MODEL_ACTOR) / 1e6:.0f} MB")


async def main() -> None:
    chosen = options(__doc__)
    needed = counted(chosen.model)
    done = asyncio.Event()
    async with tinsmith.connect(num_cpus=os.cpu_count(), kv_bytes=KV_BYTES) as service:
        idle = [
            ray.remote(Idle).options(num_cpus=0, runtime_env=ENGINE_ENV).remote() for _ in range(2)
        ]
        with tempfile.TemporaryDirectory() as tiny:
            save_tiny(tiny)
            await asyncio.gather(*(actor.start.remote(tiny) for actor in idle))
        watching = asyncio.create_task(watch(done))
        try:
            await work(service, chosen.model, chosen.runs)
        finally:
            done.set()
        peak, runtime = await watching
    limit, ours = LIMIT * sum(needed.values()), max(peak - runtime, 1)
    report(
        "MB",
        ours / 1e6,
        limit / 1e6,
        limit / ours,
        chosen.runs,
        with_runtime_mb=round(peak / 1e6),
        runtime_mb=round(runtime / 1e6),
        **{f"{name}_mb": round(value / 1e6) for name, value in needed.items()},
    )


if __name__ == "__main__":
    asyncio.run(main())
