"""How many bytes training takes, before it takes them.

Counted is what autograd keeps of a pass of packed rows, layer by layer as a llama or qwen decoder
computes it with our `LoraLinear`, `RoutedExperts` and `TreeAttention`, and the most that is needed beside
it at once. How evenly rows are spread over experts is not known before: the busiest is taken to have
twice the mean, and ranks that have experts as much to do as each other.
Kernels' own scratch space is not, nor what the C library's allocator wastes. `tests/engines/test_memory.py` holds it against measured peaks.

Dimension names: T packed rows, S rows of a segment, K keys it sees, N rows with a target, D hidden
size, F the MLP's inner size, H query heads, G key/value heads, E size of a head, V vocabulary; of routed
experts, K chosen and I their inner size; U rows that a rank's experts have to do with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .backbone import DTYPES, Backbone
from .base_weights import QUANTIZED, BaseWeights
from .lora import UNEMBED, AdapterLayout
from .target_logprobs import BLOCK_ROWS, BLOCK_TOKENS
from .tree_attention import alike, cut_forest, cuts, own_segments, row_edges

INDEX = 8  # bytes of an index
FLOAT = 4  # bytes; adapters, gradients, moments, norms and logprobs are float32 in any case
# Decoder layers that `fully_shard` has at once: the gathered one, and the buffer that it arrives in.
GATHERED_LAYERS = 2


@dataclass(frozen=True)
class PassShape:
    """What a pass computes.

    Attributes:
        segments, paths: as `packing.Pack` has them.
        targets: rows whose logprobs are wanted.
        own: segments `[first, last)` that the rank in question computes (None: all).
    """

    segments: Sequence[int]
    paths: Sequence[tuple[int, ...]]
    targets: int
    own: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        first, last = self.own or (0, len(self.segments))
        return sum(self.segments[first:last])

    @property
    def others(self) -> int:
        """Rows that other ranks compute."""
        return sum(self.segments) - self.rows

    def masked(self, device: str) -> list[tuple[int, int, int, bool]]:
        """`(how many, rows, keys, gathered)` of what is attended to together under a mask: rows of each,
        keys that each of them sees, and whether those lie apart. What needs no mask copies nothing."""
        found = []
        for i, count in alike(self.segments, self.paths, self.own):
            rows, before = self.segments[i], sum(self.segments[j] for j in self.paths[i])
            if before:
                found.append((count, rows, before + rows, True))
            else:
                pieces = cuts(rows, device)[1:]
                found += [(count, stop - start, stop, False) for start, stop in pieces]
        return found

    def share(self, ranks: int) -> PassShape:
        """Of the last of several ranks that share its rows, whose rows see the most keys."""
        if ranks == 1:
            return self
        edges = row_edges(sum(self.segments), ranks)
        segments, paths = cut_forest(self.segments, self.paths, edges)
        return PassShape(segments, paths, self.targets, own_segments(segments, edges, ranks - 1))


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of a model's training.

    Args:
        config: of transformers.
        item: bytes of a number of what is computed in (4 in float32, 2 in bfloat16).
        scratch: bytes of weights that are there only while they are computed with: what a packed one
            is unpacked to, or layers gathered from several ranks.
        tensor: ranks that compute each product together, of which this one has its share.
        context: ranks that share a pass's rows.
        expert: ranks that send their rows to each other's experts; each is taken to have as many rows.
        device: its type.
    """

    config: Any
    item: int
    scratch: int = 0
    tensor: int = 1
    context: int = 1
    expert: int = 1
    device: str = "cpu"

    @classmethod
    def of(cls, backbone: Backbone) -> MemoryModel:
        sizes = [math.prod(shape) for shape in backbone.targets.values()]
        scratch = backbone.dtype.itemsize * max(sizes) if backbone.weights in QUANTIZED else 0
        scratch += backbone.gathered_bytes
        ranks = (backbone.tensor_ranks, backbone.context_ranks, backbone.expert_ranks)
        return cls(backbone.config, backbone.dtype.itemsize, scratch, *ranks, backbone.device.type)

    def pass_(
        self, shape: PassShape, layouts: Sequence[AdapterLayout], *, checkpointing: bool
    ) -> int:
        """Of a forward and backward pass at its peak; the state of its runs, whose `layouts` are
        given, is not included."""
        c, layers, shape = self.config, self.config.num_hidden_layers, shape.share(self.context)
        whole = FLOAT * sum(layout.size for layout in layouts)
        own, of_layer = self._expert_gradients(layouts)
        beside = own // 2 if self.expert > 1 else 0  # of a layer's experts here, by others' rows
        gradient = whole + layers * beside
        end = self._final(shape) + self.logits(shape, layouts)
        inner = self._inner(shape, layouts) + own
        if self._parts > 1:  # when that is through, the gradient of the experts here is one of all
            inner = max(inner, own + of_layer)
        if checkpointing:
            stream = self.item * c.hidden_size * shape.rows  # a layer's input, or output's gradient
            # The gradient is nearly whole when the first layer is computed again.
            inside = self._layer(shape, layouts) + stream + inner + gradient - of_layer - beside
            peak = layers * stream + max(end, inside)
        else:
            peak = layers * self._layer(shape, layouts) + max(end, inner)
        # At the end it is there twice: by factors, and as one buffer.
        return max(peak, gradient + whole) + self._all_along(shape)

    def forward(self, shape: PassShape, layouts: Sequence[AdapterLayout]) -> int:
        """Of a pass without gradient at its peak: in a layer's MLP, where queries are rotated, or
        after the last layer."""
        c, shape = self.config, shape.share(self.context)
        q, kv = self._heads()
        attention = self.item * (
            (2 * c.hidden_size + 5 * q + 2 * kv) * shape.rows + max(self._copies(shape), default=0)
        )
        if self._routed:
            mlp = (3 * self.item * c.hidden_size + self._routing()) * shape.rows
            mlp += self._visits(shape) * (self._visit() + self._answer())
            mlp += self._block(shape, 2 * c.hidden_size + 4 * c.moe_intermediate_size)
            mlp += self.item * self._expert_factors(layouts)
        else:
            mlp = self.item * (2 * c.hidden_size + 3 * self._inner_size) * shape.rows
        inside = max(attention, mlp)
        end = self._final(shape) + self.logits(shape, layouts)
        return max(inside, end) + self._all_along(shape)

    def _layer(self, shape: PassShape, layouts: Sequence[AdapterLayout]) -> int:
        """What autograd keeps of one decoder layer."""
        c, item = self.config, self.item
        q, kv = self._heads()
        row = 2 * (item * c.hidden_size + FLOAT)  # the rows that the norms scaled, and their scales
        # What comes out of them; queries, keys, values; the attention's output, as it comes and in
        # the order of rows.
        row += item * (2 * c.hidden_size + q + 2 * kv + 2 * q)
        if self._routed:  # gate and up
            inner = c.num_experts_per_tok * c.moe_intermediate_size // self.tensor
            row += item * 2 * inner + self._routing()
        else:  # gate, its activation, up and their product
            row += item * 4 * self._inner_size
        row += FLOAT * c.num_attention_heads // self.tensor
        if c.model_type in ("qwen3", "qwen3_moe"):  # which norms queries and keys too
            heads = (c.num_attention_heads + c.num_key_value_heads) // self.tensor
            row += item * (q + kv) + FLOAT * heads
        row += item * max(map(self._ranks, layouts))
        kept = row * shape.rows + item * sum(self._copies(shape))
        if self._routed:
            kept += self._visits(shape) * self._visit()
        # Of the last of several ranks, keys and values are kept among what its attention copies.
        return kept - (2 * item * kv * shape.rows if shape.others else 0)

    def _copies(self, shape: PassShape) -> list[int]:
        """Numbers that attention under a mask copies: queries, and keys and values that lie apart."""
        q, kv = self._heads()
        return [
            count * (q * rows + 2 * kv * keys * gathered)
            for count, rows, keys, gathered in shape.masked(self.device)
        ]

    def _heads(self) -> tuple[int, int]:
        """Numbers of a row's queries, and of its keys."""
        c, size = self.config, _head_size(self.config)
        return (
            c.num_attention_heads // self.tensor * size,
            c.num_key_value_heads // self.tensor * size,
        )

    @property
    def _inner_size(self) -> int:
        return self.config.intermediate_size // self.tensor

    @property
    def _routed(self) -> bool:
        """Whether MLPs are of routed experts (all are counted so, if any is)."""
        return getattr(self.config, "num_experts", 0) > 0

    def _routing(self) -> int:
        """Bytes of a row: the router's distribution; of each choice, the weight three times (as a sum's
        part, normed, and in the dtype that is computed in) and two indices."""
        c = self.config
        choice = 2 * FLOAT + (self.item if self.item != FLOAT else 0) + 2 * INDEX
        return FLOAT * (c.num_experts + 2) + c.num_experts_per_tok * choice

    def _visits(self, shape: PassShape) -> int:
        """U: all rows of this rank; or, if ranks send theirs to each other, those of all of them that
        choose an expert of this one."""
        if self.expert == 1:
            return shape.rows
        c = self.config
        elsewhere = c.num_experts - c.num_experts // self._parts
        none_here = math.comb(elsewhere, c.num_experts_per_tok) / math.comb(
            c.num_experts, c.num_experts_per_tok
        )
        return int(self.expert * shape.rows * (1 - none_here))

    def _visit(self) -> int:
        """Bytes kept of one of these: three indices of each choice; of a row that was sent, also where it
        came from, the row and its weights."""
        c = self.config
        sent = self.item * (c.hidden_size + c.num_experts_per_tok) + 2 * INDEX
        return 3 * INDEX * c.num_experts_per_tok + (sent if self.expert > 1 else 0)

    def _answer(self) -> int:
        """Bytes of what is sent back of a row, or what its gradient is."""
        return self.item * self.config.hidden_size if self.expert > 1 else 0

    @property
    def _parts(self) -> int:
        """That a layer's experts are in."""
        return self.tensor * self.expert

    def _block(self, shape: PassShape, numbers: int) -> int:
        """Of pairs that go through experts at once, with that many numbers each."""
        c = self.config
        rows = self.expert * shape.rows
        pairs = c.num_experts_per_tok * rows
        if self.device == "cuda" and self.item == torch.bfloat16.itemsize:  # all experts at once
            pairs //= self._parts
        else:
            pairs = min(-(-2 * pairs // c.num_experts), rows)
        return self.item * numbers * pairs

    def _experts(self, layouts: Sequence[AdapterLayout]) -> tuple[int, int]:
        """Numbers of A and of B of one layer's experts, in all adapters."""
        of_experts = [
            [math.prod(factor) for factor in shapes]
            for layout in layouts
            for name, shapes in layout.shapes.items()
            if len(layout.targets[name]) == 3
        ]
        layers = self.config.num_hidden_layers
        return sum(a for a, _ in of_experts) // layers, sum(b for _, b in of_experts) // layers

    def _expert_factors(self, layouts: Sequence[AdapterLayout]) -> int:
        """Numbers of what is copied of them for a product: A side by side, and in another dtype B
        too."""
        a, b = self._experts(layouts)
        return self._owners * (a if self.item == FLOAT else a + b) // self._parts

    def _expert_gradients(self, layouts: Sequence[AdapterLayout]) -> tuple[int, int]:
        """Bytes of one layer's: as they are computed, of the experts here; and of all."""
        of_all = FLOAT * sum(self._experts(layouts))
        return self._owners * of_all // self._parts, of_all

    @property
    def _owners(self) -> int:
        """Of rows under an adapter: this rank, and all others that send it theirs."""
        return 2 if self.expert > 1 else 1

    def _ranks(self, layout: AdapterLayout) -> int:
        """Numbers `x A'` of a row in one layer."""
        k = getattr(self.config, "num_experts_per_tok", 1) / self.tensor
        inside = sum(
            k if len(shape) == 3 else 1 for name, shape in layout.targets.items() if name != UNEMBED
        )
        return int(layout.config.rank * inside) // self.config.num_hidden_layers

    def _all_along(self, shape: PassShape) -> int:
        """Rotary positions, masks, and what a packed weight is unpacked to."""
        q, kv = self._heads()
        sizes = {(rows, keys) for _, rows, keys, _ in shape.masked(self.device)}
        masks = self.item * q // kv * sum(rows * keys for rows, keys in sizes)
        return masks + 2 * self.item * _head_size(self.config) * shape.rows + self.scratch

    def _final(self, shape: PassShape) -> int:
        """The final norm's input and output, and where rows are shared that of all; rows with a target, and
        what is kept of their logits."""
        size = self.config.hidden_size
        gathered = 2 * self.item * size * (shape.others and shape.others + shape.rows)
        own = -(-shape.targets // (self.tensor * self.context))
        kept = self.item * size * (shape.targets + own)
        return (FLOAT + self.item) * size * shape.rows + gathered + kept

    def _inner(self, shape: PassShape, layouts: Sequence[AdapterLayout]) -> int:
        """Gradients of the MLP's inner activations, of which two are there at once; of experts, those
        of a block, and of all rows the input's."""
        c = self.config
        if not self._routed:
            return 2 * self.item * self._inner_size * shape.rows
        row = self.item * c.hidden_size + 2 * FLOAT * c.num_experts_per_tok + self._answer()
        rows = row * self._visits(shape)
        factors = self.item * self._expert_factors(layouts)
        return rows + factors + self._block(shape, 3 * c.hidden_size + 7 * c.moe_intermediate_size)

    def logits(self, shape: PassShape, layouts: Sequence[AdapterLayout]) -> int:
        """A block of them and what is summed over blocks; or the targets' rows of the unembedding; and
        gradients of the rows' hidden states."""
        c = self.config
        own = -(-shape.targets // (self.tensor * self.context))
        rows, tokens = min(own, BLOCK_ROWS), min(c.vocab_size, BLOCK_TOKENS)
        block = (
            rows * tokens * (1 if tokens == c.vocab_size else 2)
        )  # the one before is there still
        sums = 2 * FLOAT * rows * c.hidden_size
        if self.item != FLOAT:  # sums, and a trained unembedding's gradient, are float32
            block *= 3 + 2 * any(UNEMBED in layout.targets for layout in layouts)
        rows_of_targets = 2 * self.item * c.hidden_size * own
        inside = max(self.item * block + sums, rows_of_targets)
        return inside + self.item * c.hidden_size * shape.targets


def state_bytes(layouts: Iterable[AdapterLayout]) -> int:
    """Of runs' states: parameters, gradient and Adam's two moments."""
    return sum(4 * FLOAT * layout.size for layout in layouts)


def weights_bytes(path: str | Path, weights: BaseWeights) -> int:
    """Of a model folder's base weights kept in `weights` ("fp32" or "bf16"), a matrix that is both
    embedding and output counted once."""
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return numbers * DTYPES[weights].itemsize


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
