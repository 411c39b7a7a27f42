"""Batches of random tokens with a loss on every one of them, for the learner's benchmarks.

Dimension names: R runs, B sequences of a run, S tokens of a sequence.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from harness import alternate, report
from peft_side import PeftSide, add_run, target_logprobs

from tinsmith import Datum, LoraConfig
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine

MICRO_BATCH = 8  # sequences that PEFT computes at once


def datums(tokens_BS: np.ndarray) -> list[Datum]:
    """For cross-entropy; S + 1 tokens are S inputs and their targets."""
    weights = np.ones(tokens_BS.shape[1] - 1, np.float32)
    return [Datum(row[:-1], {"target_tokens": row[1:], "weights": weights}) for row in tokens_BS]


def lora(rank: int) -> LoraConfig:
    """PEFT's usual targets: attention and MLP."""
    return LoraConfig(rank=rank, seed=0, train_unembed=False)


class Tenants:
    """Runs of a new engine, each with a batch of its own.

    Args:
        ranks: of the runs' adapters.
    """

    def __init__(self, model: str, ranks: Sequence[int], sequences: int, length: int) -> None:
        self.engine = LearnerEngine(Backbone(model))
        vocabulary = self.engine.backbone.vocab_size
        shape = (len(ranks), sequences, length + 1)
        self.tokens_RBS = np.random.default_rng(0).integers(0, vocabulary, shape)
        self.batches: dict[str, Sequence[Datum]] = {}
        for index, rank in enumerate(ranks):
            add_run(self.engine, f"run{index}", lora(rank))
            self.batches[f"run{index}"] = datums(self.tokens_RBS[index])

    @property
    def tokens(self) -> int:
        return sum(datum.model_input.length for data in self.batches.values() for datum in data)

    def learn(self) -> float:
        return learn_together(self.engine, self.batches)


def compare_with_peft(chosen: argparse.Namespace, tenants: Tenants) -> None:
    """Measure both sides, check that losses and gradients are equal, and report."""
    runs = list(tenants.batches)
    peft = PeftSide(chosen.model, tenants.engine, runs)
    losses: dict[str, float] = {}

    def ours() -> None:
        losses["ours"] = tenants.learn()

    def theirs() -> None:
        losses["theirs"] = sum(
            peft.call(learn_by_peft, run_id, tokens_BS)
            for run_id, tokens_BS in zip(runs, tenants.tokens_RBS, strict=True)
        )

    ours_s, theirs_s = alternate(ours, theirs, chosen.runs)
    assert abs(losses["ours"] / losses["theirs"] - 1) < 1e-3, losses
    difference = peft.gradient_difference(tenants.engine, runs[-1])
    peft.close()
    assert difference < 1e-3, difference
    report(
        "tokens/s",
        tenants.tokens / ours_s,
        tenants.tokens / theirs_s,
        theirs_s / ours_s,
        chosen.runs,
        gradient_difference=float(f"{difference:.1e}"),
    )


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
