"""Snapshots of a run: all that its next operations depend on, in a folder beside its log.

Written under a temporary name, fsynced, renamed: there whole or not at all. The tensors are
safetensors, the rest msgpack with their checksum, behind its own.
"""

from __future__ import annotations

import re
import shutil
import uuid
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ..primitives import codec
from ..primitives.errors import CorruptLog, StorageFailure
from ..primitives.types import LoraConfig
from . import durable
from .records import Record

_STATE, _ABOUT, _TEMPORARY = "state.safetensors", "about.msgpack", ".tmp-snapshot-"
_BLOCK_BYTES = 1 << 20
_NAME = re.compile(r"snapshot-\d{20}")


@dataclass(frozen=True, eq=False)
class About:
    """
    Attributes:
        run_key: of this opening of the run; saved checkpoints name it and their operation.
        publish_steps, published: whether every step publishes, and whether anything was published.
        next_seq_id: of the first operation that is not in the state.
        position: of the log from which on it is needed.
        results: the newest, of operations that are in the state.
        checksum: of the tensors' file.
    """

    run_key: str
    lora: LoraConfig
    version: int
    share: float
    publish_steps: bool
    published: bool
    next_seq_id: int
    position: int
    results: list[Record]
    checksum: int = 0


def write(folder: Path, about: About, state: dict[str, Tensor]) -> None:
    """Make this the newest snapshot in `folder`; of those before it one is kept.

    Raises:
        StorageFailure: it could not be written; those before it are still there.
    """
    # Zeros need no room: the gradient after a step, the moments before the first.
    kept = {name: tensor for name, tensor in state.items() if name == "step" or tensor.any()}
    staged = folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
    earlier = there(folder)
    number = 1 + (_number(earlier[-1]) if earlier else 0)
    try:
        for left in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        staged.mkdir(parents=True)
        # From where the tensors lie: their bytes would be as much memory again.
        save_file(kept, staged / _STATE)
        told = codec.encode(replace(about, checksum=_checksum(staged / _STATE)))
        (staged / _ABOUT).write_bytes(zlib.crc32(told).to_bytes(4, "little") + told)
        for written in (staged / _STATE, staged / _ABOUT, staged):
            durable.sync(written)
        staged.rename(folder / f"snapshot-{number:020d}")
        durable.sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise StorageFailure(f"no snapshot could be written to {folder}: {error}") from error
    for old in earlier[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def there(folder: Path) -> list[Path]:
    """Oldest first."""
    if not folder.exists():
        return []
    return sorted(entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name))


def read(snapshot: Path) -> tuple[About, dict[str, Tensor]]:
    """
    Raises:
        CorruptLog: it is damaged.
    """
    try:
        sealed = (snapshot / _ABOUT).read_bytes()
        if zlib.crc32(sealed[4:]) != int.from_bytes(sealed[:4], "little"):
            raise CorruptLog(f"{snapshot / _ABOUT} is damaged: its checksum is another")
        about = codec.decode(sealed[4:], About)
        data = (snapshot / _STATE).read_bytes()
        if zlib.crc32(data) != about.checksum:
            raise CorruptLog(f"{snapshot / _STATE} is damaged: its checksum is another")
        state = load(data)
        params = state["params"]
    except (OSError, msgspec.MsgspecError, SafetensorError, KeyError, ValueError) as error:
        raise CorruptLog(f"{snapshot} is damaged: {type(error).__name__}: {error}") from error
    for name in ("grad", "exp_avg", "exp_avg_sq"):
        state.setdefault(name, torch.zeros_like(params))
    return about, state


def set_aside(snapshot: Path) -> None:
    """Keep a damaged one for whoever wants to look at it, and read it no more."""
    snapshot.rename(snapshot.with_name(f"damaged-{snapshot.name}"))


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _number(snapshot: Path) -> int:
    return int(snapshot.name.removeprefix("snapshot-"))
