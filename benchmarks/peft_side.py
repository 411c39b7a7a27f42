"""The other side of the learner's benchmarks: PEFT on the Hugging Face model, same adapters.

In a process of its own, as its users have it: in one, either side's speed depends on what the other frees.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tinsmith import LoraConfig
from tinsmith.engines.adapter_files import write_adapter
from tinsmith.engines.learner import LearnerEngine

_model: Any = None  # in that process


class PeftSide:
    """The same base model with the runs' adapters, by way of PEFT's files, under the same names."""

    def __init__(self, path: str, engine: LearnerEngine, run_ids: Sequence[str]) -> None:
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with tempfile.TemporaryDirectory() as folder:
            for run_id in run_ids:
                run, place = engine.runs[run_id], Path(folder) / run_id
                place.mkdir()
                for name, data in write_adapter(run.layout, run.params, path).items():
                    (place / name).write_bytes(data)
            places = {run_id: str(Path(folder) / run_id) for run_id in run_ids}
            self._process.submit(_load, path, places).result()

    def call(self, function: Callable[..., Any], *args: object) -> Any:
        """`function(model, *args)` there; it is one of a module."""
        return self._process.submit(_called, function, args).result()

    def close(self) -> None:
        self._process.shutdown()

    def gradient_difference(self, engine: LearnerEngine, run_id: str) -> float:
        """Largest difference of any factor's gradient, relative to the largest gradient."""
        run, theirs = engine.runs[run_id], self.call(_gradients, run_id)
        worst = 0.0
        for name, factors in run.layout.views(run.grad).items():
            for part, ours in zip(("lora_A", "lora_B"), factors, strict=True):
                grad = torch.from_numpy(theirs[f"base_model.model.{name}.{part}.{run_id}.weight"])
                worst = max(worst, float((ours - grad).abs().max()))
        return worst / float(run.grad.abs().max())


def _load(path: str, adapters: dict[str, str]) -> None:
    global _model
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for run_id, folder in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(folder, run_id, is_trainable=True)
        else:
            model = PeftModel.from_pretrained(model, folder, run_id, is_trainable=True)
    _model = model


def _called(function: Callable[..., Any], args: Sequence[object]) -> Any:
    return function(_model, *args)


def _gradients(peft: Any, run_id: str) -> dict[str, np.ndarray]:
    named = peft.named_parameters()
    return {n: p.grad.numpy() for n, p in named if f".{run_id}." in n and p.grad is not None}


def add_run(engine: LearnerEngine, run_id: str, lora: LoraConfig) -> None:
    """A new run with B away from zero, so that every factor has a gradient."""
    engine.create_run(run_id, lora)
    params = engine.runs[run_id].params
    rng = np.random.default_rng(0)
    params.add_(torch.from_numpy(rng.normal(0, 0.01, len(params)).astype(np.float32)))


def target_logprobs(logits_BSV: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
    """`[B, S]`."""
    chosen = logits_BSV.gather(-1, targets_BS[..., None])[..., 0]
    return chosen - logits_BSV.logsumexp(-1)
