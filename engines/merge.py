"""A base model with an adapter merged into it, `W + scale B A`, as a model folder of its own.

One file of weights is in memory at a time, so that a model larger than memory can be merged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import transformers
from torch import Tensor

from ..primitives.errors import InvalidInput
from .adapter_files import read_factors
from .lora import UNEMBED
from .model_folder import INDEX, copy_others, shards, write_json

EMBED = "model.embed_tokens"


def merge_adapter(
    base: Path,
    files: Mapping[str, bytes],
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the model in `base`, with the PEFT adapter `files` merged in, to `folder`.

    Every weight keeps the base's dtype; the sums are made in float32. An adapter on the output
    matrix of a model that shares it with its embedding unties the two: only the output changes.

    Args:
        progress: told how many of the adapter's layers are done, of how many.

    Raises:
        InvalidInput: the adapter does not fit the model, or the model is quantized.
    """
    scale, factors = read_factors(files)
    config = json.loads((base / "config.json").read_text())
    if "quantization_config" in config:
        raise InvalidInput(f"{base} is quantized: merge into the model it was made from")
    untie = UNEMBED in factors and transformers.AutoConfig.from_pretrained(base).tie_word_embeddings
    if untie:
        config["tie_word_embeddings"] = False
    total, size = len(factors), 0
    where: dict[str, str] = {}
    for shard in shards(base):
        tensors = safetensors.torch.load_file(base / shard)
        if untie:
            tensors.pop(f"{UNEMBED}.weight", None)  # stored all the same, and never read
            if f"{EMBED}.weight" in tensors:
                tensors[f"{UNEMBED}.weight"] = tensors[f"{EMBED}.weight"]
        for name, weight in tensors.items():
            pair = factors.pop(name.removesuffix(".weight"), None)
            if pair is not None:
                tensors[name] = _merged(name, weight, scale, *pair)
                progress(total - len(factors), total)
        safetensors.torch.save_file(tensors, folder / shard, {"format": "pt"})
        where |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if factors:
        raise InvalidInput(f"the adapter trains {min(factors)}, which {base} does not have")
    copy_others(base, folder)
    write_json(folder / "config.json", config)
    if len(set(where.values())) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    if not (folder / "generation_config.json").exists():
        transformers.GenerationConfig.from_model_config(
            transformers.AutoConfig.from_pretrained(folder)
        ).save_pretrained(folder)


def _merged(name: str, weight_OI: Tensor, scale: float, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    if weight_OI.shape != (b_OR.shape[0], a_RI.shape[1]):
        raise InvalidInput(
            f"the adapter is for a {name} of shape {(b_OR.shape[0], a_RI.shape[1])}, "
            f"the model's is {tuple(weight_OI.shape)}"
        )
    return weight_OI.float().addmm(b_OR.float(), a_RI.float(), alpha=scale).to(weight_OI.dtype)
