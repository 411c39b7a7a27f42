"""A model's weights from safetensors, of which a process reads what is its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..primitives.errors import InvalidInput
from .model_folder import INDEX, shards


def skeleton(config: Any, dtype: torch.dtype, attention: str) -> nn.Module:
    """The model with parameters that take no memory."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()  # which making them empty undid
    return model


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give the parameters and buffers of a skeleton (or of what is left of it as one) memory; a
    parameter of two modules stays one."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)


class WeightFiles:
    """A model folder's tensors by name.

    Attributes:
        bytes_read: so far.

    Raises:
        InvalidInput: its weights are not in safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).exists():
            index = json.loads((folder / INDEX).read_text())
            self.files: Mapping[str, str] = index["weight_map"]
        else:
            (only,) = shards(folder)
            with safe_open(folder / only, framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), only)
        self.opened: dict[str, Any] = {}
        self.bytes_read = 0

    def read_into(self, parameter: Tensor, name: str, where: tuple[slice, ...]) -> None:
        """Fill `parameter` with a box of the tensor `name`, in the parameter's dtype.

        Raises:
            InvalidInput: there is no such tensor, or its box has another shape.
        """
        file = self.files.get(name)
        if file is None:
            raise InvalidInput(f"{self.folder} has no tensor {name!r}")
        if file not in self.opened:
            self.opened[file] = safe_open(self.folder / file, framework="pt").__enter__()
        stored = self.opened[file].get_slice(name)
        own = stored[where] if where else stored[:]
        if own.shape != parameter.shape:
            raise InvalidInput(
                f"tensor {name!r} of {self.folder} has shape {tuple(stored.get_shape())}, of which "
                f"{tuple(parameter.shape)} was expected at {where}"
            )
        self.bytes_read += own.nbytes
        parameter.copy_(own)

    def close(self) -> None:
        for file in self.opened.values():
            file.__exit__(None, None, None)
        self.opened = {}
