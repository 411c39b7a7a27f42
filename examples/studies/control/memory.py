"""Peak memory of the learner on transcripts that fill the context, against how many are in a batch.

Every batch size is measured in a process of its own: what the kernel says its peak was, less what it
held with the model, a run and the batch in memory:

    python -m examples.studies.control.memory

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
from typing import Annotated

import numpy as np
import psutil
import typer
from rich.console import Console

import tinsmith
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.envs import ChatRenderer

from .tiny_monitor import make_tiny_monitor
from .transcripts import ask, draw_transcript

console = Console(stderr=True)


def datum(renderer: ChatRenderer, rng: random.Random, length: int) -> tinsmith.Datum:
    """A transcript with an answer that was sampled, as reinforcement trains on."""
    steps, answer = draw_transcript(rng, length)
    prompt = renderer.tokens(renderer.text([{"role": "user", "content": ask(steps)}]))
    tokens = np.array([*prompt, *renderer.tokens(answer), renderer.tokenizer.eos_token_id])
    said = np.arange(1, len(tokens)) >= len(prompt)
    return tinsmith.Datum(
        tokens[:-1],
        {
            "target_tokens": tokens[1:],
            "logprobs": np.where(said, -1.0, 0.0),
            "advantages": np.where(said, 1.0, 0.0),
        },
    )


def measure(model: str, length: int, batch: int, results: multiprocessing.Queue) -> None:
    renderer = ChatRenderer.from_model(model)
    engine = LearnerEngine(Backbone(model))
    engine.create_run("run", tinsmith.LoraConfig(rank=16))
    rng = random.Random(0)
    # One short transcript first, so that what torch keeps for good is not counted.
    engine.forward_backward("run", [datum(renderer, rng, 4)], "cispo", logprobs="loss")
    data = [datum(renderer, rng, length) for _ in range(batch)]
    before = psutil.Process().memory_info().rss / 2**20
    engine.forward_backward("run", data, "cispo", logprobs="loss")
    engine.optim_step("run", tinsmith.AdamParams(1e-4))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
    results.put((sum(d.model_input.length for d in data), peak - before))


def main(
    model: Annotated[str | None, typer.Option(help="default: the tiny monitor")] = None,
    lengths: Annotated[list[int], typer.Option(help="in steps")] = [250, 500, 1000],  # noqa: B006
    batches: Annotated[list[int], typer.Option(help="transcripts")] = [1, 2, 4, 8, 16, 32],  # noqa: B006
) -> None:
    folder = model or make_tiny_monitor(
        tinsmith.default_home() / "models" / "tiny-monitor-500", console=console
    )
    path = str(tinsmith.resolve_model(folder, tinsmith.default_home()))
    context, rows = multiprocessing.get_context("spawn"), []
    for length in lengths:
        for batch in batches:
            results = context.Queue()
            process = context.Process(target=measure, args=(path, length, batch, results))
            process.start()
            tokens, mib = results.get()
            process.join()
            rows.append({"length": length, "batch": batch, "tokens": tokens, "mib": round(mib)})
            console.print(f"{length} steps, {batch} transcripts, {tokens} tokens: {mib:.0f} MiB")
    print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    typer.run(main)
