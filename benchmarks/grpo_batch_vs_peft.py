"""forward_backward on 8 groups of 8 completions (prompt 128, completion 32) against PEFT.

Ours: the learner's engine, each group's prompt computed once. Theirs: PEFT on the Hugging Face
model, a group at a time as one padded batch, logits only at the completion (`logits_to_keep`, as
TRL does). Same adapter, same `importance_sampling` loss; losses and gradients are compared.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import alternate, options, report, say
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tinsmith import Datum, LoraConfig
from tinsmith.engines.adapter_files import write_adapter
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine

GROUPS, GROUP_SIZE, PROMPT, COMPLETION = 8, 8, 128, 32
LORA = LoraConfig(rank=32, seed=0, train_unembed=False)


def main() -> None:
    chosen = options(__doc__)
    groups = 2 if chosen.quick else GROUPS
    engine = LearnerEngine(Backbone(chosen.model))
    engine.create_run("run", LORA)
    run = engine.runs["run"]
    rng = np.random.default_rng(0)
    # B away from zero, so that every factor has a gradient.
    run.params.add_(torch.from_numpy(rng.normal(0, 0.01, len(run.params)).astype(np.float32)))
    peft = _peft_model(chosen.model, engine)
    tokens_GSL = rng.integers(
        0, engine.backbone.vocab_size, (groups, GROUP_SIZE, PROMPT + COMPLETION)
    )
    tokens_GSL[:, :, :PROMPT] = tokens_GSL[:, :1, :PROMPT]
    advantages_GS = rng.normal(size=(groups, GROUP_SIZE)).astype(np.float32)
    q_GSC = rng.normal(-10, 0.1, (groups, GROUP_SIZE, COMPLETION)).astype(np.float32)
    datums = [
        _datum(tokens_GSL[g, s], q_GSC[g, s], advantages_GS[g, s])
        for g in range(groups)
        for s in range(GROUP_SIZE)
    ]
    losses: dict[str, float] = {}

    def ours() -> None:
        run.grad.zero_()
        output = engine.forward_backward("run", datums, "importance_sampling", logprobs="loss")
        losses["ours"] = output.metrics["loss:sum"]

    def theirs() -> None:
        peft.zero_grad()
        losses["theirs"] = 0.0
        for group in range(groups):
            ids = torch.from_numpy(tokens_GSL[group])
            # One position more than the completion: each predicts the token after it.
            logits = peft(
                input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=COMPLETION + 1
            ).logits[:, :-1]
            targets = ids[:, PROMPT:, None]
            p = logits.gather(-1, targets)[..., 0] - logits.logsumexp(-1)
            r = torch.exp(p - torch.from_numpy(q_GSC[group]))
            loss = -(r * torch.from_numpy(advantages_GS[group])[:, None]).sum()
            loss.backward()
            losses["theirs"] += float(loss.detach())

    ours_s, theirs_s = alternate(ours, theirs, chosen.runs)
    loss_difference = abs(losses["ours"] - losses["theirs"]) / abs(losses["theirs"])
    difference = _gradient_difference(engine, peft)
    say(f"relative differences: loss {loss_difference:.1e}, gradient {difference:.1e}")
    assert loss_difference < 1e-3, loss_difference
    assert difference < 1e-3, difference
    report(
        "tokens/s",
        tokens_GSL.size / ours_s,
        tokens_GSL.size / theirs_s,
        theirs_s / ours_s,
        chosen.runs,
        gradient_difference=float(f"{difference:.1e}"),
    )


def _datum(tokens: np.ndarray, q: np.ndarray, advantage: float) -> Datum:
    completion = slice(PROMPT - 1, None)
    logprobs = np.zeros(len(tokens) - 1, np.float32)
    advantages = np.zeros(len(tokens) - 1, np.float32)
    logprobs[completion], advantages[completion] = q, advantage
    return Datum(
        tokens[:-1],
        {"target_tokens": tokens[1:], "logprobs": logprobs, "advantages": advantages},
    )


def _peft_model(path: str, engine: LearnerEngine) -> Any:
    """The same base model under the same adapter, by way of PEFT's files."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        run = engine.runs["run"]
        for name, data in write_adapter(run.layout, run.params, path).items():
            (Path(folder) / name).write_bytes(data)
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


def _gradient_difference(engine: LearnerEngine, peft: Any) -> float:
    """Largest difference of any factor's gradient, relative to the largest gradient."""
    run, theirs = engine.runs["run"], dict(peft.named_parameters())
    worst = 0.0
    for name, factors in run.layout.views(run.grad).items():
        for part, ours in zip(("lora_A", "lora_B"), factors, strict=True):
            grad = theirs[f"base_model.model.{name}.{part}.default.weight"].grad
            worst = max(worst, float((ours - grad).abs().max()))
    return worst / float(run.grad.abs().max())


if __name__ == "__main__":
    main()
