"""Adapters on disk, in PEFT's format: what PEFT saves is read here, and the other way round."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..primitives.errors import InvalidInput
from .lora import AdapterLayout

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def write_adapter(layout: AdapterLayout, params: Tensor, base_model: str) -> dict[str, bytes]:
    """The two files of a PEFT LoRA adapter, by name. `params` is the flat buffer."""
    tensors = {}
    for name, (a, b) in layout.views(params).items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.contiguous()
    config = adapter_config(layout, base_model)
    return {
        WEIGHTS: safetensors.torch.save(tensors, {"format": "pt"}),
        CONFIG: json.dumps(config, indent=2).encode(),
    }


def adapter_config(layout: AdapterLayout, base_model: str) -> dict[str, Any]:
    """What PEFT's `adapter_config.json` says of such an adapter."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": layout.config.rank,
        "lora_alpha": layout.config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({name.rpartition(".")[2] for name in layout.targets}),
    }


def tensor_shapes(layout: AdapterLayout) -> dict[str, list[int]]:
    """PEFT's names of an adapter's tensors with their shapes, in the order of the flat buffer."""
    shapes = {}
    for name, (inputs, outputs) in layout.targets.items():
        shapes[f"{_PREFIX}{name}.lora_A.weight"] = [layout.config.rank, inputs]
        shapes[f"{_PREFIX}{name}.lora_B.weight"] = [outputs, layout.config.rank]
    return shapes


def read_adapter(files: Mapping[str, bytes], layout: AdapterLayout) -> Tensor:
    """The flat float32 buffer `[layout.size]` of a PEFT adapter's files.

    Raises:
        InvalidInput: files or tensors missing, other shapes, another scale, NaN or inf.
    """
    config, scale = _read_config(files)
    if config["r"] != layout.config.rank or not math.isclose(scale, layout.scale):
        raise InvalidInput(
            f"the adapter has rank {config['r']} and scale {scale:g}, "
            f"this run rank {layout.config.rank} and scale {layout.scale:g}"
        )
    tensors = safetensors.torch.load(files[WEIGHTS])
    flat = torch.empty(layout.size)
    for name, views in layout.views(flat).items():
        for part, view in zip(("lora_A", "lora_B"), views, strict=True):
            key = f"{_PREFIX}{name}.{part}.weight"
            tensor = tensors.pop(key, None)
            if tensor is None:
                raise InvalidInput(f"the adapter has no tensor {key}")
            if tensor.shape != view.shape:
                raise InvalidInput(
                    f"the adapter's {key} has shape {tuple(tensor.shape)}, "
                    f"expected {tuple(view.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise InvalidInput(f"the adapter's {key} holds NaN or inf")
            view.copy_(tensor)
    if tensors:
        raise InvalidInput(f"the adapter trains {min(tensors)}, which this run does not")
    return flat


def read_factors(files: Mapping[str, bytes]) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """The scale of a PEFT adapter, and A `[R, I]` and B `[O, R]` of every module that it trains.

    Raises:
        InvalidInput: files or tensors missing, or others than LoRA's.
    """
    _, scale = _read_config(files)
    tensors, factors = safetensors.torch.load(files[WEIGHTS]), {}
    ending = ".lora_A.weight"
    for name in [key.removesuffix(ending) for key in tensors if key.endswith(ending)]:
        pair = [tensors.pop(f"{name}.{part}.weight", None) for part in ("lora_A", "lora_B")]
        if pair[0] is None or pair[1] is None:
            raise InvalidInput(f"the adapter has no tensor {name}.lora_B.weight")
        factors[name.removeprefix(_PREFIX)] = (pair[0], pair[1])
    if tensors:
        raise InvalidInput(f"the adapter holds {min(tensors)}, which is not LoRA's")
    return scale, factors


def _read_config(files: Mapping[str, bytes]) -> tuple[dict[str, Any], float]:
    """The adapter's config, and what it multiplies B A by."""
    for file in (WEIGHTS, CONFIG):
        if file not in files:
            raise InvalidInput(f"the adapter has no {file}: is it a PEFT LoRA folder?")
    config = json.loads(files[CONFIG])
    rank = config["r"]
    return config, config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
