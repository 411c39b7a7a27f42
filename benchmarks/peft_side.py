"""The other side of the learner's benchmarks: PEFT on the Hugging Face model, same adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tinsmith import LoraConfig
from tinsmith.engines.adapter_files import write_adapter
from tinsmith.engines.learner import LearnerEngine


def add_run(engine: LearnerEngine, run_id: str, lora: LoraConfig) -> None:
    """A new run with B away from zero, so that every factor has a gradient."""
    engine.create_run(run_id, lora)
    params = engine.runs[run_id].params
    rng = np.random.default_rng(0)
    params.add_(torch.from_numpy(rng.normal(0, 0.01, len(params)).astype(np.float32)))


def peft_model(path: str, engine: LearnerEngine, run_ids: Sequence[str]) -> Any:
    """The same base model with the runs' adapters, by way of PEFT's files, under the same names."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for run_id in run_ids:
        with tempfile.TemporaryDirectory() as folder:
            run = engine.runs[run_id]
            for name, data in write_adapter(run.layout, run.params, path).items():
                (Path(folder) / name).write_bytes(data)
            if isinstance(model, PeftModel):
                model.load_adapter(folder, run_id, is_trainable=True)
            else:
                model = PeftModel.from_pretrained(model, folder, run_id, is_trainable=True)
    return model


def gradient_difference(engine: LearnerEngine, run_id: str, peft: Any) -> float:
    """Largest difference of any factor's gradient, relative to the largest gradient."""
    run, theirs = engine.runs[run_id], dict(peft.named_parameters())
    worst = 0.0
    for name, factors in run.layout.views(run.grad).items():
        for part, ours in zip(("lora_A", "lora_B"), factors, strict=True):
            grad = theirs[f"base_model.model.{name}.{part}.{run_id}.weight"].grad
            worst = max(worst, float((ours - grad).abs().max()))
    return worst / float(run.grad.abs().max())


def target_logprobs(logits_BSV: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
    """`[B, S]`."""
    chosen = logits_BSV.gather(-1, targets_BS[..., None])[..., 0]
    return chosen - logits_BSV.logsumexp(-1)
