"""A transformers decoder run over packed tokens, with attention and LoRA supplied from outside.

The model's own code computes embeddings, norms, rotary positions and projections; what Tinsmith
replaces is the attention function (through transformers' `AttentionInterface`, so that a pass may
be a packed forest of prefixes or a step of a paged decoder) and the linear layers (by
`LoraLinear`). Any family that follows transformers' conventions therefore works unchanged. A
sampler on a CPU runs layers of its own instead (`packed_decoder.py`).

Dimension names: T packed tokens, D hidden size, V vocabulary, H query heads, G key/value heads,
E size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from ..primitives.errors import InvalidInput
from ..primitives.types import LoraConfig
from .lora import (
    ATTN_TARGETS,
    MLP_TARGETS,
    UNEMBED,
    AdapterLayout,
    LoraContext,
    LoraLinear,
    Span,
)
from .packed_decoder import Attention, PackedDecoder, can_pack

SUPPORTED_FAMILIES = ("llama", "qwen2", "qwen3")


def _call_attention(module, query, key, value, attention_mask, scaling, **kwargs):  # type: ignore[no-untyped-def]
    attention: Attention = kwargs["tinsmith_attention"]
    out_THE = attention(module.layer_idx, query[0], key[0], value[0], scaling)
    return out_THE[None], None


AttentionInterface.register("tinsmith", _call_attention)


def adapter_targets(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The linear layers that an adapter may train: name -> (inputs, outputs)."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in (*ATTN_TARGETS, *MLP_TARGETS, UNEMBED)
    }


def targets_of_folder(path: str | Path) -> dict[str, tuple[int, int]]:
    """`adapter_targets` of a model folder, without its weights."""
    with torch.device("meta"):
        return adapter_targets(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)))


class Backbone:
    """A frozen base model. Not thread-safe: one pass at a time."""

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        config = AutoConfig.from_pretrained(path)
        if config.model_type not in SUPPORTED_FAMILIES:
            raise InvalidInput(
                f"base model {str(path)!r} is of family {config.model_type!r}; "
                f"supported here: {', '.join(SUPPORTED_FAMILIES)}"
            )
        self.path = str(path)
        self.device = torch.device(device)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="tinsmith"
        )
        self.model: nn.Module = model.to(self.device)
        self.model.eval().requires_grad_(False)
        self.layers: list[Any] = [
            m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        for layer in self.layers:
            layer.gradient_checkpointing = True  # takes effect while layer.training is set
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self.config = config
        self.dtype = dtype
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.max_context: int = config.max_position_embeddings
        self.lora = LoraContext()
        self.packed: PackedDecoder | None = None
        self.targets = adapter_targets(self.model)
        for name in self.targets:
            parent, _, leaf = name.rpartition(".")
            linear: Any = self.model.get_submodule(name)
            setattr(self.model.get_submodule(parent), leaf, LoraLinear(linear, name, self.lora))

    def pack(self) -> None:
        """Make passes without gradient quick on a CPU, for the price of as much memory again as
        the weights take (which are mapped from their file, and shared with other processes).
        Changes nothing where oneDNN can't do it, or the copy would take half of the free memory.
        """
        if self.packed is not None or not can_pack(self.unembedding):
            return
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        if 2 * size < psutil.virtual_memory().available:
            self.packed = PackedDecoder(self.model)

    def layout(self, config: LoraConfig) -> AdapterLayout:
        """Where an adapter of this model under `config` keeps its parameters."""
        return AdapterLayout.of(config, self.targets)

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attention: Attention,
        spans: Sequence[Span],
        *,
        checkpointing: bool = False,
    ) -> Tensor:
        """Final normed hidden states `[T, D]` of the packed tokens (int64 `[T]`).

        `checkpointing` keeps only each layer's input for the backward pass and recomputes the
        rest. The spans stay in force until the next call, so that it sees the same adapters.
        """
        self.lora.spans = spans
        if self.packed is not None and not torch.is_grad_enabled():
            return self.packed.hidden(tokens_T, positions_T, attention)
        for layer in self.layers:
            layer.training = checkpointing
        output = self.model.get_submodule("model")(
            input_ids=tokens_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            tinsmith_attention=attention,
        )
        return output.last_hidden_state[0]

    def logits(self, hidden_ND: Tensor, spans: Sequence[Span]) -> Tensor:
        """Logits `[N, V]` of final hidden states; the spans are over these rows."""
        self.lora.spans = spans
        if self.packed is not None and not torch.is_grad_enabled():
            return self.packed.logits(hidden_ND)
        return self.model.get_submodule(UNEMBED)(hidden_ND)

    @property
    def unembedding(self) -> Tensor:
        """The frozen output matrix `[V, D]`."""
        return self.model.get_parameter(f"{UNEMBED}.weight")
