"""Which experts each token in the sampler's cache went through, beside its keys and values: what
requests share of a prefix they share of this too."""

from __future__ import annotations

import numpy as np
import torch

from .backbone import Backbone
from .kv_cache import KVCache


class RouteStore:
    """By cache slot (block * block_size + offset) the choices of a mixture of experts, `[slots, L, K]`;
    a hundredth of what the cache takes, and less."""

    def __init__(self, backbone: Backbone, cache: KVCache) -> None:
        assert backbone.routing is not None
        self.routing, self.block_size, self.device = (
            backbone.routing,
            cache.block_size,
            cache.device,
        )
        slots = cache.num_blocks * cache.block_size
        shape = (slots, self.routing.layers, self.routing.per_token)
        # By numpy, whose zeros are pages that the system provides when they are first written to.
        self.experts = torch.from_numpy(np.zeros(shape, self.routing.dtype)).to(cache.device)

    def write(self, slots: np.ndarray) -> None:
        """Keep the choices of the pass just done, whose rows are the tokens in these slots."""
        chosen_TLK = torch.stack(self.routing.chosen_L, 1).to(self.experts.dtype)
        self.experts[torch.from_numpy(slots).to(self.device)] = chosen_TLK

    def copy_block(self, source: int, target: int) -> None:
        size = self.block_size
        self.experts[target * size : (target + 1) * size] = self.experts[
            source * size : (source + 1) * size
        ]

    def read(self, blocks: list[int], tokens: int) -> np.ndarray:
        """Of the first tokens of a sequence in these blocks, `[tokens, L, K]`."""
        places = torch.tensor(blocks)[:, None] * self.block_size + torch.arange(self.block_size)
        rows = places.reshape(-1)[:tokens].to(self.device)
        return self.experts[rows].cpu().numpy()
