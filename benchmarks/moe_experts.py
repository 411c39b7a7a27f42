"""A layer of 64 routed experts, 4 to a row, against a dense MLP of the same active size.

Forward and backward of 2,048 rows (of hidden size 1,024, through experts of inner size 384, half of
Qwen3-30B-A3B's, or a dense MLP of 1,536) with LoRA on every projection, in float32, both as the learner
computes them: frozen weights, gradients of the input and of A and B. The routed layer has its router too, and adapters on each expert
of a quarter of the dense one's rank 32, as four of them work on a row. `theirs` is the goal: 1.5 times
the dense layer's time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import alternate, options_without_model, report
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeConfig,
    Qwen3MoeSparseMoeBlock,
)

from tinsmith import LoraConfig
from tinsmith.engines.backbone import adapter_targets
from tinsmith.engines.experts import replace_routed
from tinsmith.engines.lora import Adapter, AdapterLayout, LoraContext, LoraLinear, Span
from tinsmith.engines.routing import Routing

ROWS, HIDDEN, INNER, EXPERTS, CHOSEN, RANK = 2048, 1024, 384, 64, 4, 32
GOAL = 1.5


class DenseMLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


def adapted(block: nn.Module, context: LoraContext, rank: int, rows: int) -> list[Tensor]:
    """Put all rows under one adapter of the block's projections; its A and B."""
    layout = AdapterLayout.of(LoraConfig(rank=rank, seed=0), adapter_targets(block))
    flat = torch.randn(layout.size) * 0.02
    weights = {
        name: (a.requires_grad_(), b.requires_grad_())
        for name, (a, b) in layout.views(flat).items()
    }
    context.spans = [Span(0, rows, Adapter(layout, weights))]
    return [leaf for pair in weights.values() for leaf in pair]


def dense(hidden: int, inner: int, rank: int, rows: int) -> Callable[[Tensor, Tensor], object]:
    block, context = nn.Sequential(DenseMLP(hidden, inner)).requires_grad_(False), LoraContext()
    leaves = adapted(block, context, rank, rows)
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = block.get_submodule(f"0.{name}")
        assert isinstance(linear, nn.Linear)
        setattr(block[0], name, LoraLinear(linear, f"0.{name}", context))
    return lambda x, dy: torch.autograd.grad(block(x), [x, *leaves], dy)


def routed(
    hidden: int, inner: int, experts: int, chosen: int, rank: int, rows: int
) -> Callable[[Tensor, Tensor], object]:
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
    )
    block, context = (
        nn.Sequential(Qwen3MoeSparseMoeBlock(config)).requires_grad_(False),
        LoraContext(),
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=hidden**-0.5)
    leaves = adapted(block, context, rank, rows)
    replace_routed(block, config, context, Routing(1, experts, chosen))
    return lambda x, dy: torch.autograd.grad(block(x[None]), [x, *leaves], dy[None])


def main() -> None:
    chosen = options_without_model(__doc__)
    rows, hidden, inner = (64, 64, 16) if chosen.quick else (ROWS, HIDDEN, INNER)
    torch.manual_seed(0)
    x, dy = torch.randn(rows, hidden, requires_grad=True), torch.randn(rows, hidden)
    ours = routed(hidden, inner, EXPERTS, CHOSEN, RANK // CHOSEN, rows)
    theirs = dense(hidden, CHOSEN * inner, RANK, rows)
    by_routed, by_dense = alternate(lambda: ours(x, dy), lambda: theirs(x, dy), chosen.runs)
    report(
        "us/token",
        1e6 * by_routed / rows,
        1e6 * GOAL * by_dense / rows,
        GOAL * by_dense / by_routed,
        chosen.runs,
        dense=round(1e6 * by_dense / rows, 2),
        times_dense=round(by_routed / by_dense, 3),
    )


if __name__ == "__main__":
    main()
