"""A frozen base model of which this process holds its rank's share.

Decoder layers are cut over the `shard` ranks by torch's `fully_shard`, and over the `tensor` ranks
by transformers' plan. Embedding, output matrix and final norm are whole on every rank. `context` ranks share
a pass's rows; of those whose logprobs are wanted each rank that computes a part has its share.

Dimension names as in `backbone.py`; N rows with a target, M (row, target) pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..primitives.errors import InvalidInput
from .backbone import Attention, Backbone
from .base_weights import QUANTIZED, BaseWeights
from .context_parallel import ContextAttention, own_spans
from .exchange import concatenated, copied
from .experts import RoutedExperts, Router
from .lora import UNEMBED, LoraLinear, Span
from .memory import GATHERED_LAYERS
from .quantized import PackedWeight
from .ranks import Ranks
from .sharded_weights import WeightFiles, materialize, skeleton
from .spread_experts import Spread, SpreadExperts
from .target_logprobs import UnembedSpan
from .tensor_parallel import (
    ColumnParallel,
    Replicated,
    RowParallel,
    Style,
    copy_inputs,
    share,
    style_of,
)
from .tree_attention import TreeAttention, row_edges


class ShardedBackbone(Backbone):
    """
    Attributes:
        bytes_read: of the model's files, by this rank.

    Raises:
        InvalidInput: the model cannot be laid out so; or as `Backbone`.
    """

    def __init__(
        self,
        path: str | Path,
        weights: BaseWeights,
        ranks: Ranks,
        *,
        copies: Path | None = None,
    ) -> None:
        self.ranks, self.asked, self.copies = ranks, weights, copies
        self.cut = max(ranks.layout.shard, ranks.layout.tensor, ranks.layout.expert) > 1
        if self.cut and weights in QUANTIZED:
            raise InvalidInput(
                f"base_weights={weights!r} cannot be cut over ranks (layout {ranks.layout}): take "
                "bf16 or fp32, or a layout of data alone"
            )
        self.styles: dict[str, Style] = {}
        self.bytes_read = 0
        self.bottom = torch.empty(0)
        super().__init__(path, weights, str(ranks.device), copies=copies)
        self.lockstep = self.cut or ranks.layout.context > 1
        self.tensor_ranks, self.context_ranks = ranks.layout.tensor, ranks.layout.context
        self.expert_ranks = ranks.layout.expert
        if self.lockstep:
            self.model.get_submodule("model.embed_tokens").register_forward_hook(self._embedded)

    def join(self, ranks: Ranks) -> None:
        """Load again, as one of other ranks; what belongs to the ones before is freed first."""
        del self.model, self.layers, self.bottom
        type(self).__init__(self, self.path, self.asked, ranks, copies=self.copies)

    def _load(self, config: Any, copies: Path | None) -> nn.Module:
        self.ranks.layout.check(config)
        if not self.cut:
            return super()._load(config, copies)
        return skeleton(config, self.dtype, "tinsmith")

    def _wrapped(self, linear: nn.Linear, name: str, packed: PackedWeight | None) -> LoraLinear:
        if self.ranks.layout.tensor == 1 or name == UNEMBED:
            return super()._wrapped(linear, name, packed)
        self.styles[name] = style_of(self.config, name)
        kind = ColumnParallel if self.styles[name] == "colwise" else RowParallel
        return kind(linear, name, self.lora, self.ranks)

    def _place(self) -> None:
        if not self.cut:
            super()._place()
            return
        if self.routing is not None:
            self._spread_experts()
        columns = {n.rpartition(".")[0] for n, style in self.styles.items() if style == "colwise"}
        for name in columns:
            copy_inputs(self.model.get_submodule(name), self.ranks)
        if self.ranks.layout.shard > 1:
            self._shard_layers()
        materialize(self.model, self.device)
        self._read()

    def _spread_experts(self) -> None:
        ranks, spread = self.ranks, Spread(self.ranks)
        self.spread = spread if ranks.layout.expert > 1 else None
        for name, module in list(self.model.named_modules()):
            if isinstance(module, RoutedExperts) and ranks.layout.expert * ranks.layout.tensor > 1:
                parent, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, SpreadExperts(module, spread))
            elif isinstance(module, Router) and ranks.layout.tensor > 1:
                module.linear = Replicated(module.linear, ranks)

    def _shard_layers(self) -> None:
        spread = {
            parameter
            for module in self.model.modules()
            if isinstance(module, SpreadExperts) and self.spread is not None
            for parameter in module.parameters()
        }
        sizes = [sum(p.nbytes for p in set(layer.parameters()) - spread) for layer in self.layers]
        self.gathered_bytes = GATHERED_LAYERS * max(sizes)
        for layer in self.layers:
            fully_shard(
                layer, mesh=self.ranks.shard, reshard_after_forward=True, ignored_params=spread
            )
        decoder = self.model.get_submodule("model")
        outside = {p for p in self.model.parameters() if not isinstance(p, DTensor)}
        fully_shard(decoder, mesh=self.ranks.shard, ignored_params=outside)
        for layer in self.layers:
            layer.to_empty(device=self.device)

    @torch.no_grad()
    def _read(self) -> None:
        files = WeightFiles(Path(self.path))
        for name, parameter in self.model.named_parameters():
            module, _, leaf = name.rpartition(".")
            layer = self.model.get_submodule(module)
            where: tuple[slice, ...] | None = ()
            if isinstance(layer, ColumnParallel | RowParallel):
                where = layer.stored(leaf)
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if where is None:
                own.zero_()
                continue
            rows = slice(0, parameter.shape[0])
            if isinstance(parameter, DTensor):
                rows = share(parameter.shape[0], self.ranks.shard_rank, self.ranks.layout.shard)
                first = where[0].start or 0 if where else 0
                where = (slice(first + rows.start, first + rows.stop), *where[1:])
            if not own.numel():
                continue
            if isinstance(layer, RoutedExperts):
                for row, matrix in zip(range(rows.start, rows.stop), own, strict=True):
                    expert = layer.first + row
                    for stored, own_part in layer.stored(leaf, expert, matrix):
                        files.read_into(own_part, f"{module}.{stored}", ())
            else:
                # A router's linear layer goes by the router's name.
                stored = f"{layer.name}.{leaf}" if isinstance(layer, LoraLinear) else name
                files.read_into(own, stored, where)
        self.bytes_read = files.bytes_read
        files.close()

    def _embedded(self, module: nn.Module, args: Any, output_TD: Tensor) -> Tensor:
        """The leaf that every backward pass goes down to."""
        self.bottom = output_TD.detach().requires_grad_(torch.is_grad_enabled())
        return self.bottom

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attention: Attention,
        spans: Sequence[Span],
        *,
        checkpointing: bool = False,
        routed_TLK: Tensor | None = None,
    ) -> Tensor:
        count = self.ranks.layout.context
        if count == 1:
            return super().hidden(
                tokens_T,
                positions_T,
                attention,
                spans,
                checkpointing=checkpointing,
                routed_TLK=routed_TLK,
            )
        assert isinstance(attention, TreeAttention)
        edges = row_edges(len(tokens_T), count)
        cut = ContextAttention(attention, edges, self.ranks)
        start, stop = edges[self.ranks.context_rank :][:2]
        hidden_SD = super().hidden(
            tokens_T[start:stop],
            positions_T[start:stop],
            cut,
            own_spans(spans, start, stop),
            checkpointing=checkpointing,
            routed_TLK=None if routed_TLK is None else routed_TLK[start:stop],
        )
        if self.routing is not None:
            self.routing.gather(cut.sizes, self.ranks.context)
        return concatenated(hidden_SD, cut.sizes, self.ranks.context)

    def target_logprobs(
        self,
        hidden_ND: Tensor,
        pair_rows_M: Tensor,
        targets_M: Tensor,
        spans: Sequence[UnembedSpan],
    ) -> Tensor:
        count = self.ranks.layout.together
        if count == 1:
            return super().target_logprobs(hidden_ND, pair_rows_M, targets_M, spans)
        cuts = [share(len(hidden_ND), rank, count) for rank in range(count)]
        edges = [*(cut.start for cut in cuts), len(hidden_ND)]
        first = torch.searchsorted(pair_rows_M, pair_rows_M.new_tensor(edges)).tolist()
        sizes = [stop - start for start, stop in itertools.pairwise(first)]
        cut, pairs = cuts[self.ranks.place], slice(*first[self.ranks.place :][:2])
        own_ND = copied(hidden_ND, self.ranks.together)[cut]
        if len(own_ND):
            own_M = super().target_logprobs(
                own_ND,
                pair_rows_M[pairs] - cut.start,
                targets_M[pairs],
                [UnembedSpan(0, len(own_ND), span.scale, span.a, span.b) for span in spans],
            )
        else:
            own_M = own_ND[:, 0].float()
        return concatenated(own_M, sizes, self.ranks.together)
