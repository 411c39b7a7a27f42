"""forward_backward on 8 groups of 8 completions (prompt 128, completion 32) against PEFT.

Ours: the learner's engine, each group's prompt computed once. Theirs: PEFT on the Hugging Face
model, a group at a time as one padded batch, logits only at the completion (`logits_to_keep`, as
TRL does). Same adapter, same `importance_sampling` loss; losses and gradients are compared.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness import alternate, options, report, say
from peft_side import PeftSide, add_run, target_logprobs

from tinsmith import Datum, LoraConfig
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine

LORA = LoraConfig(rank=32, seed=0, train_unembed=False)


@dataclass(frozen=True)
class Shape:
    """`together`: sequences that PEFT computes at once."""

    groups: int
    size: int
    prompt: int
    completion: int
    together: int


def main() -> None:
    chosen = options(__doc__)
    compare(chosen, Shape(2 if chosen.quick else 8, 8, 128, 32, 8))


def compare(chosen: argparse.Namespace, shape: Shape) -> None:
    """Measure both sides, and report."""
    engine = LearnerEngine(Backbone(chosen.model))
    add_run(engine, "run", LORA)
    peft = PeftSide(chosen.model, engine, ["run"])
    rng = np.random.default_rng(0)
    groups, size, prompt, completion = shape.groups, shape.size, shape.prompt, shape.completion
    tokens_GSL = rng.integers(0, engine.backbone.vocab_size, (groups, size, prompt + completion))
    tokens_GSL[:, :, :prompt] = tokens_GSL[:, :1, :prompt]
    tokens_BL = tokens_GSL.reshape(groups * size, -1)
    advantages_B = rng.normal(size=len(tokens_BL)).astype(np.float32)
    q_BC = rng.normal(-10, 0.1, (len(tokens_BL), completion)).astype(np.float32)
    datums = [
        _datum(tokens, q, advantage, prompt)
        for tokens, q, advantage in zip(tokens_BL, q_BC, advantages_B, strict=True)
    ]
    losses: dict[str, float] = {}

    def ours() -> None:
        engine.runs["run"].grad.zero_()
        output = engine.forward_backward("run", datums, "importance_sampling", logprobs="loss")
        losses["ours"] = output.metrics["loss:sum"]

    def theirs() -> None:
        losses["theirs"] = peft.call(
            learn_by_peft, tokens_BL, q_BC, advantages_B, prompt, shape.together
        )

    ours_s, theirs_s = alternate(ours, theirs, chosen.runs)
    loss_difference = abs(losses["ours"] - losses["theirs"]) / abs(losses["theirs"])
    difference = peft.gradient_difference(engine, "run")
    peft.close()
    say(f"relative differences: loss {loss_difference:.1e}, gradient {difference:.1e}")
    assert loss_difference < 1e-3, loss_difference
    assert difference < 1e-3, difference
    report(
        "tokens/s",
        tokens_BL.size / ours_s,
        tokens_BL.size / theirs_s,
        theirs_s / ours_s,
        chosen.runs,
        gradient_difference=float(f"{difference:.1e}"),
    )


def learn_by_peft(
    peft: Any,
    tokens_BL: np.ndarray,
    q_BC: np.ndarray,
    advantages_B: np.ndarray,
    prompt: int,
    together: int,
) -> float:
    """The loss; `together` sequences at once."""
    peft.zero_grad()
    completion, total = q_BC.shape[1], 0.0
    for first in range(0, len(tokens_BL), together):
        here = slice(first, first + together)
        ids = torch.from_numpy(tokens_BL[here])
        # One position more than the completion: each predicts the token after it.
        logits = peft(
            input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=completion + 1
        ).logits[:, :-1]
        p = target_logprobs(logits, ids[:, prompt:])
        r = torch.exp(p - torch.from_numpy(q_BC[here]))
        loss = -(r * torch.from_numpy(advantages_B[here])[:, None]).sum()
        loss.backward()
        total += float(loss.detach())
    return total


def _datum(tokens: np.ndarray, q: np.ndarray, advantage: float, prompt: int) -> Datum:
    completion = slice(prompt - 1, None)
    logprobs = np.zeros(len(tokens) - 1, np.float32)
    advantages = np.zeros(len(tokens) - 1, np.float32)
    logprobs[completion], advantages[completion] = q, advantage
    return Datum(
        tokens[:-1],
        {"target_tokens": tokens[1:], "logprobs": logprobs, "advantages": advantages},
    )


if __name__ == "__main__":
    main()
