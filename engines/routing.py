"""Which experts the rows of a pass go to: chosen by the routers, or replayed; and how evenly.

A choice depends on the last bits of a router's logits wherever two experts are nearly equal, so that a
trainer and a sampler, which add up in other orders, choose differently now and then, and their
logprobs part. Replaying the sampler's choice in training closes that (Ma et al., "Stabilizing MoE
Reinforcement Learning by Aligning Training and Inference Routers", 2025); the routing weights are the
trainer's own, so that gradients reach the router. The choice is called `routed_experts` in samples and
datums, as in vLLM and verl.

Dimension names: T packed rows, L layers with routers, K experts of a row, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .exchange import concatenated


class Routing:
    """Of the pass under way, or the last one; shared by a model's routers.

    Attributes:
        layers, experts, per_token: how many there are.
        replayed_TLK: int64, -1 where the router chooses; None: everywhere.
        chosen_L: by layer, int64 `[T, K]`.
        entropy_L: by layer, float32 `[T]`, of the router's distribution over all experts, in nats.
    """

    def __init__(self, layers: int, experts: int, per_token: int) -> None:
        self.layers, self.experts, self.per_token = layers, experts, per_token
        self.replayed_TLK: Tensor | None = None
        self.chosen_L: list[Tensor] = [torch.empty(0)] * layers
        self.entropy_L: list[Tensor] = [torch.empty(0)] * layers

    @property
    def dtype(self) -> type[np.integer]:
        """In which choices are kept."""
        return np.uint8 if self.experts <= 256 else np.int16

    def chosen(self, layer: int, p_TE: Tensor, k: int) -> Tensor:
        """Int64 `[T, K]`, most probable first where the router chooses."""
        ids_TK = p_TE.topk(k).indices
        if self.replayed_TLK is not None:
            replayed_TK = self.replayed_TLK[:, layer]
            ids_TK = torch.where(replayed_TK >= 0, replayed_TK, ids_TK)
        self.chosen_L[layer] = ids_TK
        self.entropy_L[layer] = -torch.special.xlogy(p_TE, p_TE).sum(-1)
        return ids_TK

    def gather(self, sizes: list[int], group: Any) -> None:
        """What was chosen for the rows of all ranks that share a pass's, of which rank r of the group
        has `sizes[r]`."""
        chosen, entropy = (
            concatenated(torch.stack(of_layers, 1), sizes, group)
            for of_layers in (self.chosen_L, self.entropy_L)
        )
        self.chosen_L, self.entropy_L = list(chosen.unbind(1)), list(entropy.unbind(1))

    def load(self, start: int, stop: int) -> RouterLoad:
        """Of rows `[start, stop)`."""
        counts = [
            torch.bincount(ids[start:stop].reshape(-1), minlength=self.experts)
            for ids in self.chosen_L
        ]
        entropy = sum(float(e[start:stop].sum()) for e in self.entropy_L)
        return RouterLoad(torch.stack(counts).cpu().numpy(), entropy, (stop - start) * self.layers)


@dataclass(frozen=True, eq=False)
class RouterLoad:
    """How rows were spread over experts.

    Attributes:
        counts_LE: pairs of each expert.
        entropy: of the routers' distributions, summed over `choices` (row, layer).
    """

    counts_LE: np.ndarray
    entropy: float
    choices: int

    def __add__(self, other: RouterLoad) -> RouterLoad:
        return RouterLoad(
            self.counts_LE + other.counts_LE,
            self.entropy + other.entropy,
            self.choices + other.choices,
        )

    def metrics(self) -> dict[str, float]:
        """`expert_load`: a layer's busiest expert's rows over the mean of its experts, in the
        unevenest layer and on average; `routing_entropy` in nats; `dropped_tokens`, of which there
        are none."""
        load_L = self.counts_LE.max(1) / self.counts_LE.mean(1)
        return {
            "expert_load:max": float(load_L.max()),
            "expert_load:mean": float(load_L.mean()),
            "routing_entropy:mean": self.entropy / self.choices,
            "dropped_tokens:sum": 0.0,
        }
