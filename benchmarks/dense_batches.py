"""Batches of random tokens with a loss on every one of them, for the learner's benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft_side import target_logprobs

from tinsmith import Datum, LoraConfig
from tinsmith.engines.learner import LearnerEngine

MICRO_BATCH = 8  # sequences that PEFT computes at once


def datums(tokens_BS: np.ndarray) -> list[Datum]:
    """For cross-entropy; S + 1 tokens are S inputs and their targets."""
    weights = np.ones(tokens_BS.shape[1] - 1, np.float32)
    return [Datum(row[:-1], {"target_tokens": row[1:], "weights": weights}) for row in tokens_BS]


def lora(rank: int) -> LoraConfig:
    """PEFT's usual targets: attention and MLP."""
    return LoraConfig(rank=rank, seed=0, train_unembed=False)


def learn_together(engine: LearnerEngine, batches: dict[str, Sequence[Datum]]) -> float:
    """`forward_backward` of all runs' batches as they come to the learner at once; the loss."""
    for run_id, data in batches.items():
        engine.runs[run_id].grad.zero_()
        engine.submit(run_id, data, "cross_entropy", logprobs="loss", backward=True)
    loss = 0.0
    while engine.busy:
        for finished in engine.step():
            assert finished.output is not None, finished.error
            loss += finished.output.metrics["loss:sum"]
    return loss


def learn_by_peft(peft: Any, run_id: str, tokens_BS: np.ndarray) -> float:
    """The same of one run, its adapter switched on first."""
    peft.set_adapter(run_id)
    peft.zero_grad()
    total = 0.0
    for first in range(0, len(tokens_BS), MICRO_BATCH):
        ids = torch.from_numpy(tokens_BS[first : first + MICRO_BATCH])
        logits = peft(input_ids=ids[:, :-1]).logits
        loss = -target_logprobs(logits, ids[:, 1:]).sum()
        loss.backward()
        total += float(loss.detach())
    return total
