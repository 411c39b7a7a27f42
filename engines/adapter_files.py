"""Adapters on disk, in PEFT's format: what PEFT saves is read here, and the other way round.

A layer's routed experts are there one by one, as `experts.<e>.gate_proj`, `up_proj` and `down_proj`:
the names of a mixture of experts' own weights on disk, under which vLLM takes adapters for it, and
which PEFT fuses when it loads them onto transformers' fused experts. A and B that all experts share
are therefore written once for each; neither knows them in another way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from ..primitives.errors import InvalidInput
from .lora import AdapterLayout
from .tensor_files import read_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PARTS = ("lora_A", "lora_B")
_PREFIX = "base_model.model."


def write_adapter(layout: AdapterLayout, params: Tensor, base_model: str) -> dict[str, bytes]:
    """The two files of a PEFT LoRA adapter, by name. `params` is the flat buffer."""
    tensors = {
        name: params[start : start + rows * columns].view(rows, columns)
        for name, (start, rows, columns) in tensor_places(layout).items()
    }
    if layout.config.experts == "shared":  # safetensors refuses tensors that share their memory
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
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


def tensor_places(layout: AdapterLayout) -> dict[str, tuple[int, int, int]]:
    """PEFT's names of an adapter's tensors; where each starts in the flat buffer, its rows and
    columns."""
    places = {}
    for name, shapes in layout.shapes.items():
        for part, start, shape in zip(PARTS, layout.offsets[name], shapes, strict=True):
            *stack, rows, columns = shape
            for index, module in enumerate(_modules(name, layout)):
                offset = index % stack[0] * rows * columns if stack else 0
                places[f"{_PREFIX}{module}.{part}.weight"] = (start + offset, rows, columns)
    return places


def peft_modules(layout: AdapterLayout) -> list[str]:
    """The modules that an adapter trains, as they are called on disk."""
    return [module for name in layout.targets for module in _modules(name, layout)]


def _modules(name: str, layout: AdapterLayout) -> list[str]:
    _, _, *experts = layout.targets[name]
    if not experts:
        return [name]
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{expert}.{leaf}" for expert in range(experts[0])]


def read_adapter(files: Mapping[str, bytes], layout: AdapterLayout) -> Tensor:
    """The flat float32 buffer `[layout.size]` of a PEFT adapter's files.

    Raises:
        InvalidInput: files or tensors missing, other shapes, another scale, NaN or inf.
    """
    rank, scale = _read_config(files)
    if rank != layout.config.rank or not math.isclose(scale, layout.scale):
        raise InvalidInput(
            f"the adapter has rank {rank} and scale {scale:g}, "
            f"this run rank {layout.config.rank} and scale {layout.scale:g}"
        )
    tensors = read_tensors(files[WEIGHTS], f"the adapter's {WEIGHTS}")
    flat, filled = torch.empty(layout.size), set()
    for key, (start, rows, columns) in tensor_places(layout).items():
        tensor = tensors.pop(key, None)
        if tensor is None:
            raise InvalidInput(f"the adapter has no tensor {key}")
        if tensor.shape != (rows, columns):
            raise InvalidInput(
                f"the adapter's {key} has shape {tuple(tensor.shape)}, expected {(rows, columns)}"
            )
        if not tensor.is_floating_point():
            raise InvalidInput(f"the adapter's {key} is of {tensor.dtype}, expected a float")
        if not torch.isfinite(tensor.float()).all():
            raise InvalidInput(f"the adapter's {key} holds NaN or inf")
        place = flat[start : start + rows * columns].view(rows, columns)
        if start in filled and not torch.equal(place, tensor.float()):
            raise InvalidInput(
                f"the adapter's {key} differs from another expert's, and this run's experts share "
                'theirs: create the run with experts="each"'
            )
        filled.add(start)
        place.copy_(tensor)
    if tensors:
        raise InvalidInput(f"the adapter trains {min(tensors)}, which this run does not")
    return flat


def read_factors(files: Mapping[str, bytes]) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """The scale of a PEFT adapter, and A `[R, I]` and B `[O, R]` of every module that it trains.

    Raises:
        InvalidInput: files or tensors missing, or others than LoRA's.
    """
    _, scale = _read_config(files)
    tensors, factors = read_tensors(files[WEIGHTS], f"the adapter's {WEIGHTS}"), {}
    ending = ".lora_A.weight"
    for name in [key.removesuffix(ending) for key in tensors if key.endswith(ending)]:
        pair = [tensors.pop(f"{name}.{part}.weight", None) for part in PARTS]
        if pair[0] is None or pair[1] is None:
            raise InvalidInput(f"the adapter has no tensor {name}.lora_B.weight")
        factors[name.removeprefix(_PREFIX)] = (pair[0], pair[1])
    if tensors:
        raise InvalidInput(f"the adapter holds {min(tensors)}, which is not LoRA's")
    return scale, factors


class _Config(msgspec.Struct):
    """What we read of an `adapter_config.json`."""

    r: Annotated[int, msgspec.Meta(ge=1)]
    lora_alpha: Annotated[float, msgspec.Meta(gt=0)]
    use_rslora: bool | None = None


def _read_config(files: Mapping[str, bytes]) -> tuple[int, float]:
    """The adapter's rank, and what it multiplies B A by."""
    for file in (WEIGHTS, CONFIG):
        if file not in files:
            raise InvalidInput(f"the adapter has no {file}: is it a PEFT LoRA folder?")
    try:
        config = msgspec.json.decode(files[CONFIG], type=_Config)
        rank = config.r
        return rank, config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)
    except (msgspec.MsgspecError, RecursionError, ValueError, OverflowError) as error:
        raise InvalidInput(f"the adapter's {CONFIG} is damaged: {error}") from error
