"""Key/value memory of the torch sampler: blocks of tokens, counted, shared and reused.

`BlockPool` keeps the books: which blocks are free, who uses the others, which finished blocks
may be reused by a request that starts with the same tokens under the same weights. `KVCache`
holds the numbers. Dimension names: G key/value heads, E size of a head.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def root_key(weights: object) -> bytes:
    """Name of the beginning of all blocks computed with `weights` (whose `repr` names them)."""
    return blake2b(repr(weights).encode(), digest_size=16).digest()


def chain_key(parent: bytes, tokens: np.ndarray) -> bytes:
    """Name of the block that holds `tokens` after the block named `parent`."""
    return blake2b(tokens.astype(np.int64).tobytes(), key=parent, digest_size=16).digest()


class BlockPool:
    """Blocks by number. Memory is promised at admission (`reserve`) and taken as it is needed, so
    that a request once admitted always finds its blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.reserved = 0
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # unused but reusable, oldest first

    @property
    def available(self) -> int:
        """Blocks that may still be promised."""
        return len(self._free) + len(self._idle) - self.reserved

    @property
    def in_use(self) -> int:
        return self.num_blocks - len(self._free) - len(self._idle)

    def reserve(self, count: int) -> None:
        self.reserved += count

    def take_new(self) -> int:
        """A block for writing, out of what was reserved."""
        if not self._free:
            oldest, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(oldest)]
            self._free.append(oldest)
        block = self._free.pop()
        self._users[block] = 1
        self.reserved -= 1
        return block

    def find(self, key: bytes) -> int | None:
        return self._block_of.get(key)

    def share(self, block: int) -> None:
        """One more user of a finished block."""
        self._idle.pop(block, None)
        self._users[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """Make a finished block findable, unless an equal one is already."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block] == 0:
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)


def _zeros(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Pages that the system provides, zeroed, when they are first written to.
    pages = mmap.mmap(-1, shape[0] * shape[1] * dtype.itemsize, flags=mmap.MAP_PRIVATE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class KVCache:
    """Per layer `[2 * G * blocks, block_size * E]`, the keys of all heads and then the values,
    head-major, so that the blocks of a sequence are gathered per head by one row selection."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.dtype, self.device = dtype, device
        shape = (2 * num_kv_heads * num_blocks, block_size * head_dim)
        # Zeros: what is masked out still goes through the products, and must be finite.
        self.layers = [_zeros(shape, dtype, device) for _ in range(num_layers)]

    def block_rows(self, blocks: np.ndarray) -> Tensor:
        """Rows of a layer for blocks `[...]`, keys first, heads next: int64 `[2 G * size]`."""
        heads = np.arange(2 * self.num_kv_heads)[:, None] * self.num_blocks
        return torch.from_numpy((heads + blocks.reshape(1, -1)).reshape(-1)).to(self.device)

    def slot_rows(self, slots: np.ndarray) -> Tensor:
        """Rows of a layer viewed as single tokens, likewise: int64 `[2 G * len(slots)]`."""
        heads = np.arange(2 * self.num_kv_heads)[:, None] * (self.num_blocks * self.block_size)
        return torch.from_numpy((heads + slots[None]).reshape(-1)).to(self.device)

    def write(self, layer: int, rows: Tensor, k_GTE: Tensor, v_GTE: Tensor) -> None:
        flat = self.layers[layer].view(-1, self.head_dim)
        flat.index_copy_(0, rows, torch.cat((k_GTE, v_GTE)).view(-1, self.head_dim))

    def gather(self, layer: int, rows: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks given by `block_rows`, each `[G * tokens, E]`; in the memory
        of `out`, should it be given, a `room`."""
        both = torch.index_select(self.layers[layer], 0, rows, out=out)
        k, v = both.view(2, -1, self.head_dim)
        return k, v

    def room(self, rows: Tensor) -> Tensor:
        """Memory for what `gather` brings for these rows, of one layer after the other."""
        return self.layers[0].new_empty(rows.shape[0], self.layers[0].shape[1])

    def copy_block(self, source: int, target: int) -> None:
        heads = torch.arange(2 * self.num_kv_heads, device=self.device) * self.num_blocks
        for layer in self.layers:
            layer[heads + target] = layer[heads + source]
