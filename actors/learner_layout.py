"""The layout of a model's learner on this cluster, and what its ranks are expected to take."""

from __future__ import annotations

from typing import Any

import ray
import torch
from transformers import AutoConfig

from ..engines.backbone import stored_dtype
from ..engines.base_weights import QUANTIZED, BaseWeights, resolved
from ..engines.layout import Layout
from ..engines.memory_budget import available_bytes
from ..engines.plan import Demand, Planner


def gpu_memory() -> int:
    """Bytes of this process's GPU; 0 if torch sees none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def _demand(path: str, config: Any, weights: BaseWeights, device: str) -> Demand:
    kept, computed = resolved(weights, stored_dtype(path, config), device)
    return Demand(weights=computed if kept in QUANTIZED else kept)


def chosen_layout(path: str, weights: BaseWeights, devices: int) -> Layout:
    """For that many GPUs of the cluster, by the plan; one rank where there are no two."""
    if devices < 2:
        return Layout()
    if weights in QUANTIZED:  # which are not cut
        return Layout(data=devices)
    memory = ray.get(ray.remote(num_gpus=0.01)(gpu_memory).remote())
    if not memory:
        return Layout()
    config = AutoConfig.from_pretrained(path)
    return Planner(config, _demand(path, config, weights, "cuda"), memory).choose(devices).layout


def expected(path: str, weights: BaseWeights, layout: Layout, device: str) -> str:
    """A line on what each rank takes, where this one has its device to itself; weights that are
    quantised counted as if they were not.

    Raises:
        InvalidInput: the model cannot be laid out so.
    """
    memory = gpu_memory() or available_bytes(torch.device("cpu"))
    config = AutoConfig.from_pretrained(path)
    planner = Planner(config, _demand(path, config, weights, device), memory)
    return str(planner.estimate(layout))
