"""A model folder's files: shards of weights in safetensors, and what lies beside them."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch
from filelock import FileLock
from safetensors import safe_open

from ..primitives.errors import InvalidInput
from .models import new_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What makes up a model folder besides its weights: configs, tokenizer, chat template.
OTHER_SUFFIXES = (".json", ".jinja", ".model", ".txt")
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors'

logger = logging.getLogger(__name__)


def shards(folder: Path) -> list[str]:
    """Names of the files with weights.

    Raises:
        InvalidInput: there are none in safetensors.
    """
    if (folder / INDEX).exists():
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    raise InvalidInput(f"{folder} has no {WEIGHTS}: its weights must be in safetensors")


def stored_dtypes(folder: Path) -> Counter[str]:
    """How many tensors are stored in which dtype, as safetensors calls them ("F32", "BF16", ...).

    Raises:
        InvalidInput: none are in safetensors.
    """
    found: Counter[str] = Counter()
    for shard in shards(folder):
        with safe_open(folder / shard, framework="pt") as file:
            found.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
    return found


def copy_others(base: Path, folder: Path) -> None:
    """Copy all but the weights and their index."""
    for file in base.iterdir():
        if file.is_file() and file.suffix in OTHER_SUFFIXES and file.name != INDEX:
            shutil.copyfile(file, folder / file.name)


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def mappable(folder: Path, dtype: torch.dtype, copies: Path) -> Path:
    """A folder whose weights are stored in `dtype`: `folder` itself, or a copy below `copies`, made
    by whoever asks first. From either, transformers maps the files into memory, where all
    processes of a machine share them; weights that it has to convert are each process's own.

    Where no copy can be written, or the weights are not in safetensors, it is `folder`.
    """
    try:
        if set(stored_dtypes(folder)) == {NAMES[dtype]}:
            return folder
    except InvalidInput:
        return folder
    copy = copies / f"{folder.name}-{NAMES[dtype].lower()}-{_fingerprint(folder)}"
    try:
        copies.mkdir(parents=True, exist_ok=True)
        with FileLock(copies / f".{copy.name}.lock"):
            if not copy.exists():
                with new_folder(copy) as scratch:
                    _convert(folder, dtype, scratch)
    except OSError as error:
        logger.warning("%s: each process converts the weights for itself (%s)", folder, error)
        return folder
    return copy


def _fingerprint(folder: Path) -> str:
    """Another one when the weights are replaced."""
    stats = [(shard, (folder / shard).stat()) for shard in shards(folder)]
    facts = [str(folder), *(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _convert(base: Path, dtype: torch.dtype, folder: Path) -> None:
    """One shard is in memory at a time."""
    for shard in shards(base):
        tensors = safetensors.torch.load_file(base / shard)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(dtype)
        safetensors.torch.save_file(tensors, folder / shard, {"format": "pt"})
    copy_others(base, folder)
    if (base / INDEX).exists():
        shutil.copyfile(base / INDEX, folder / INDEX)
