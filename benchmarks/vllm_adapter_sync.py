"""Handing vLLM a new version of a rank-32 adapter: from memory, against a PEFT folder on disk.

Every target, unembedding included. Both sides run on one vLLM engine, float32 and otherwise idle,
begin with the learner's flat parameters and end with the new version in a slot of vLLM's, the one
before it gone. Ours: `VllmEngine.add_adapter` of a live run. Theirs: the parameters written as our
checkpoints are, vLLM's `add_lora` of that folder, and `remove_lora` of the version before.
`first_token_*` is the same until a new request has its first token, whose version is checked, and
both must give the same tokens with logprobs within 1e-4.

Beside it, of ours alone: `first_token_live_s`, with eight live requests under way, and
`live_gap_ratio`: the longest time between two tokens of any of them around a swap, over their
median one. Limits are 0.15 s (`first_token_ours_s`) and 2.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import options, report, require_vllm, say

import tinsmith
from tinsmith import SamplingParams, VllmOptions
from tinsmith.actors.storage import Storage
from tinsmith.engines.adapter_files import write_adapter
from tinsmith.primitives.client import load_tokenizer
from tinsmith.primitives.types import LoraConfig, PolicyRef, SampleRequest

RUN, CONFIG = PolicyRef("run"), LoraConfig(rank=32)
ON_DISK = 1_000_000  # integer ids of theirs, which our engine has no use for
PROMPT = list(range(100, 104))
STREAMS = 8


class Sides:
    """Both ways for versions to reach one engine."""

    def __init__(self, engine: Any, model: str, folder: str) -> None:
        self.engine, self.model, self.folder = engine, model, folder
        self.layout, self.storage = engine.layout(CONFIG), Storage(folder)
        self.names = (f"theirs-{number}" for number in itertools.count())
        self.on_disk: Any = None

    async def ours(self, version: int, flat: np.ndarray) -> None:
        await self.engine.add_adapter("run", version, CONFIG, flat, keep=False)

    async def sample_ours(self, max_tokens: int) -> tuple[list[int], list[float]]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, stop=[])
        (drawn,) = (await self.engine.sample(SampleRequest(PROMPT, params, RUN))).sequences
        assert set(drawn.versions.tolist()) == {await self.engine.newest("run")}
        return drawn.tokens.tolist(), drawn.logprobs.tolist()

    async def theirs(self, version: int, flat: np.ndarray) -> None:
        from vllm.lora.request import LoRARequest

        name, before = f"version-{version}", self.on_disk
        files = write_adapter(self.layout, torch.from_numpy(flat), self.model)
        self.storage.commit(self.storage.stage(name, files), name)
        self.on_disk = LoRARequest(name, ON_DISK + version, f"{self.folder}/{name}")
        await self.engine.vllm.add_lora(self.on_disk)
        if before is not None:
            await self.engine.vllm.remove_lora(before.lora_int_id)

    async def sample_theirs(self, max_tokens: int) -> tuple[list[int], list[float]]:
        from vllm.sampling_params import RequestOutputKind
        from vllm.sampling_params import SamplingParams as VllmParams

        params = VllmParams(
            max_tokens=max_tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": PROMPT}
        drawing = self.engine.vllm.generate(
            prompt, params, next(self.names), lora_request=self.on_disk
        )
        async for output in drawing:
            drawn = output.outputs[0]
        return list(drawn.token_ids), [
            drawn.logprobs.logprobs[i] for i in drawn.logprobs.start_indices
        ]


def versions(size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Version numbers and parameters that make a difference: those of a training run, about."""
    rng = np.random.default_rng(0)
    flat = rng.normal(0, 0.02, size).astype(np.float32)
    for version in itertools.count(1):
        yield version, flat
        flat = flat * np.float32(1 - 1e-3 * version)


async def timed(sync: Any, sample: Any, version: int, flat: np.ndarray) -> tuple[float, float]:
    """Seconds until the version is in place, and until a new request has a token of it."""
    started = time.perf_counter()
    await sync(version, flat)
    synced = time.perf_counter()
    await sample(1)
    return synced - started, time.perf_counter() - started


async def under_load(sides: Sides, numbered: Any, swaps: int) -> tuple[float, float, float]:
    """Swaps while eight live requests draw. Medians: seconds to a new request's first token, the
    longest gap around a swap, any gap."""
    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
    twenty_drawn = asyncio.Semaphore(0)  # by the first of them
    params = SamplingParams(max_tokens=40 * (swaps + 1), stop=[], seed=0)

    async def draw(times: list[float]) -> None:
        request = SampleRequest(PROMPT, params, RUN)
        async with aclosing(sides.engine.stream(request)) as tokens:
            async for _ in tokens:
                times.append(time.perf_counter())
                if times is arrivals[0] and len(times) % 20 == 0:
                    twenty_drawn.release()

    async with asyncio.TaskGroup() as group:
        running = [group.create_task(draw(times)) for times in arrivals]
        firsts, spans = [], []
        for _ in range(swaps):
            await twenty_drawn.acquire()
            started = time.perf_counter()
            await sides.ours(*next(numbered))
            spans.append((started, time.perf_counter()))
            await sides.sample_ours(1)
            firsts.append(time.perf_counter() - started)
        await twenty_drawn.acquire()
        for task in running:
            task.cancel()
    gaps = [pair for times in arrivals for pair in itertools.pairwise(times)]
    longest = [
        max(end - start for start, end in gaps if start < until and end > since)
        for since, until in spans
    ]
    usual = statistics.median(end - start for start, end in gaps)
    return statistics.median(firsts), statistics.median(longest), usual


async def main() -> None:
    chosen = options(__doc__)
    require_vllm()
    from tinsmith.actors.vllm_engine import VllmEngine

    setting = VllmOptions(max_rank=32, max_adapters=4, dtype="float32")
    rounds = 2 if chosen.quick else 4 * chosen.runs
    engine = VllmEngine(
        chosen.model, load_tokenizer(chosen.model), kv_bytes=1 << 29, options=setting
    )
    root = tinsmith.default_home()
    root.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(dir=root)
    times: dict[str, list[float]] = {"ours": [], "theirs": [], "ours first": [], "theirs first": []}
    off = 0.0
    try:
        sides = Sides(engine, chosen.model, folder)
        numbered = versions(sides.layout.size)
        for turn in range(rounds + 1):
            version, flat = next(numbered)
            for side, sync, sample in (
                ("ours", sides.ours, sides.sample_ours),
                ("theirs", sides.theirs, sides.sample_theirs),
            ):
                synced, first = await timed(sync, sample, version, flat)
                say(f"version {version}, {side}: {synced:.4f} s, first token {first:.4f} s")
                if turn > 0:
                    times[side].append(synced)
                    times[f"{side} first"].append(first)
            shutil.rmtree(Path(folder) / f"version-{version}")
            (tokens, logprobs), (expected, reference) = [
                await sample(8) for sample in (sides.sample_ours, sides.sample_theirs)
            ]
            assert tokens == expected
            off = max(off, *np.abs(np.subtract(logprobs, reference)).tolist())
        assert off < 1e-4, off
        live_first, live_gap, gap = await under_load(
            sides, numbered, 1 if chosen.quick else chosen.runs
        )
    finally:
        engine.close()
        shutil.rmtree(folder)
    medians = {name: statistics.median(values) for name, values in times.items()}
    report(
        "s",
        medians["ours"],
        medians["theirs"],
        medians["theirs"] / medians["ours"],
        rounds,
        adapter_mb=round(sides.layout.size * 4 / 1e6, 1),
        first_token_ours_s=round(medians["ours first"], 4),
        first_token_theirs_s=round(medians["theirs first"], 4),
        first_token_live_s=round(live_first, 4),
        live_gap_s=round(live_gap, 4),
        usual_gap_s=round(gap, 4),
        live_gap_ratio=round(live_gap / gap, 3),
        logprobs_off=float(f"{off:.2g}"),
    )


if __name__ == "__main__":
    asyncio.run(main())
