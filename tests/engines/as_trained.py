from __future__ import annotations

import torch

from tinsmith.engines.lora import AdapterLayout


def as_trained(layout: AdapterLayout, params: torch.Tensor, seed: int = 0) -> None:
    """Fill the B's of a fresh adapter with random values, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for _, b in layout.views(params).values():
        b.normal_(0, 0.05, generator=generator)
