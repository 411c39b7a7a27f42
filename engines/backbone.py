"""A transformers decoder run over packed tokens, with attention and LoRA supplied from outside.

The model's own code computes embeddings, rotary positions and what joins the parts; what Tinsmith
replaces is the attention function (through transformers' `AttentionInterface`, so that a pass may
be a packed forest of prefixes or a step of a paged decoder), the linear layers (by `LoraLinear`) and the
norms (by `RmsNorm`). Any family that follows transformers' conventions therefore works unchanged.

Dimension names: T packed tokens, D hidden size, V vocabulary, H query heads, G key/value heads,
E size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..primitives.errors import InvalidInput
from ..primitives.types import LoraConfig
from .base_weights import QUANTIZED, BaseWeights, check_base_weights, resolved
from .experts import is_routed, replace_routed, routed_targets
from .lora import (
    ATTN_TARGETS,
    MLP_TARGETS,
    UNEMBED,
    AdapterLayout,
    LoraContext,
    LoraLinear,
    Shape,
    Span,
    reorder,
)
from .model_folder import NAMES, mappable, stored_dtypes
from .norms import RmsNorm, is_rms_norm
from .quantized import PackedWeight, pack
from .routing import Routing
from .target_logprobs import UnembedSpan, target_logprobs

if TYPE_CHECKING:
    from .spread_experts import Spread

Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""`(layer, q [H, T, E], k [G, T, E], v [G, T, E], scale) -> [T, H, E]`."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAME_ROWS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SUPPORTED_FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")


def _call_attention(module, query, key, value, attention_mask, scaling, **kwargs):  # type: ignore[no-untyped-def]
    attention: Attention = kwargs["tinsmith_attention"]
    out_THE = attention(module.layer_idx, query[0], key[0], value[0], scaling)
    return out_THE[None], None


def adapter_targets(model: nn.Module) -> dict[str, Shape]:
    """What an adapter may train: linear layers by name, `(inputs, outputs)`, and as one a layer's
    routed experts, `(inputs, outputs, experts)`."""
    targets: dict[str, Shape] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _is_target(name):
            targets[name] = (module.in_features, module.out_features)
        elif is_routed(module):
            targets |= routed_targets(name, module)
    return targets


def _is_target(name: str) -> bool:
    return name.rpartition(".")[2] in (*ATTN_TARGETS, *MLP_TARGETS, UNEMBED)


def targets_of_folder(path: str | Path) -> dict[str, Shape]:
    """`adapter_targets` of a model folder, without its weights."""
    with torch.device("meta"):
        return adapter_targets(
            transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.from_pretrained(path)
            )
        )


def stored_dtype(path: str | Path, config: Any) -> str:
    """The dtype that most of a model's tensors are stored in, as safetensors calls it."""
    try:
        return stored_dtypes(Path(path)).most_common(1)[0][0]
    except InvalidInput:  # weights in another format
        return NAMES.get(config.dtype, "F32")


class Backbone:
    """A frozen base model. Not thread-safe: one pass at a time.

    Args:
        weights: what they are kept in.
        copies: a folder for weights converted to it, which the processes of a machine then share
            (None: each converts them for itself).

    Attributes:
        weights: as chosen, never "auto".
        dtype: what is computed in, float32 or bfloat16.
        routing: of a mixture of experts.
        lockstep: every backward pass goes through all layers, down to `bottom`, whatever its losses
            depend on: other ranks go through them too.
        bottom: the embedded tokens of the pass under way, in lockstep.
        tensor_ranks: how many compute each product together.
        context_ranks: how many share the rows of a pass.
        expert_ranks: how many send their rows to each other's experts.
        gathered_bytes: of layers that are together only while they compute.
        spread: what ranks know that have a mixture's experts together.

    Raises:
        InvalidInput: the model's family is not supported, it is stored quantised, or it is a mixture
            of experts, whose weights are not quantised.
        Unavailable: quantised weights are asked for, and the library for them is not installed.
    """

    lockstep = False
    bottom: Tensor
    tensor_ranks = 1
    context_ranks = 1
    expert_ranks = 1
    gathered_bytes = 0
    spread: Spread | None = None

    def __init__(
        self,
        path: str | Path,
        weights: BaseWeights = "auto",
        device: str = "cpu",
        *,
        copies: Path | None = None,
    ) -> None:
        # What makes importing transformers slow: those that hold no model are spared it.
        from transformers.modeling_layers import GradientCheckpointingLayer

        transformers.AttentionInterface.register("tinsmith", _call_attention)
        check_base_weights(weights)
        config = transformers.AutoConfig.from_pretrained(path)
        if config.model_type not in SUPPORTED_FAMILIES:
            raise InvalidInput(
                f"base model {str(path)!r} is of family {config.model_type!r}; "
                f"supported here: {', '.join(SUPPORTED_FAMILIES)}"
            )
        if getattr(config, "quantization_config", None) is not None:
            raise InvalidInput(
                f"base model {str(path)!r} is stored quantised; give the one it was made from, and "
                "base_weights to quantise it"
            )
        experts: int = getattr(config, "num_experts", 0)
        if experts and weights in QUANTIZED:
            raise InvalidInput(
                f"base model {str(path)!r} is a mixture of experts, which is kept in fp32 or bf16, "
                f"not in {weights}"
            )
        self.path = str(path)
        self.device = torch.device(device)
        self.weights, computing = resolved(weights, stored_dtype(path, config), self.device.type)
        self.dtype = DTYPES[computing]
        self.model: nn.Module = self._load(config, copies)
        self.model.eval().requires_grad_(False)
        self.layers: list[Any] = [
            m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        for layer in self.layers:
            layer.gradient_checkpointing = True  # takes effect while layer.training is set
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        for name, module in list(self.model.named_modules()):
            if is_rms_norm(module):
                self.model.set_submodule(name, RmsNorm(module))
        self.config = config
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
        self.targets = adapter_targets(self.model)
        self.routing: Routing | None = None
        if experts:
            layers = sum(is_routed(module) for module in self.model.modules())
            self.routing = Routing(layers, experts, config.num_experts_per_tok)
            replace_routed(self.model, config, self.lora, self.routing)
        linears = [
            (n, m) for n, m in self.model.named_modules() if n in self.targets and _is_target(n)
        ]
        for name, linear in linears:
            parent, _, leaf = name.rpartition(".")
            # The output matrix stays as it is: it is often the embedding too.
            quantized = self.weights in QUANTIZED and name != UNEMBED
            weight = linear.weight.detach()
            packed = pack(weight.to(self.device, self.dtype), self.weights) if quantized else None
            layer = self._wrapped(linear, name, packed)
            setattr(self.model.get_submodule(parent), leaf, layer)
        self._place()

    def _wrapped(self, linear: nn.Linear, name: str, packed: PackedWeight | None) -> LoraLinear:
        return LoraLinear(linear, name, self.lora, packed)

    def _place(self) -> None:
        """Bring the weights to the device."""
        if self.weights in QUANTIZED:
            for parameter in self.model.parameters():
                # A copy: a view would keep all of the file's pages mapped.
                parameter.data = parameter.data.to(self.device, self.dtype, copy=True)
        self.model.to(self.device)

    def _load(self, config: Any, copies: Path | None) -> nn.Module:
        """The model's own modules: weights to be quantised as they are stored, others in `dtype`."""
        path, dtype = Path(self.path), self.dtype if self.weights not in QUANTIZED else "auto"
        if copies is not None and self.device.type == "cpu" and self.weights not in QUANTIZED:
            path = mappable(path, self.dtype, copies)
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="tinsmith"
        )

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
        routed_TLK: Tensor | None = None,
    ) -> Tensor:
        """Final normed hidden states `[T, D]` of the packed tokens (int64 `[T]`), those of a mixture
        of experts through the experts `routed_TLK` where it is not -1 (see `Routing`).

        `checkpointing` keeps only each layer's input for the backward pass and recomputes the
        rest. The spans stay in force until the next call, so that it sees the same adapters.
        """
        self.lora.spans = spans
        if self.routing is not None:
            self.routing.replayed_TLK = routed_TLK
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
        return self.model.get_submodule(UNEMBED)(hidden_ND)

    def reorder(self) -> None:
        """Keep a second copy of the linear layers' weights: see `lora.reorder`."""
        for module in self.model.modules():
            layers = {n: m for n, m in module.named_children() if isinstance(m, LoraLinear)}
            for names in SAME_ROWS:
                together = [layers.pop(name) for name in names if name in layers]
                if together:
                    reorder(together)
            for layer in layers.values():
                reorder([layer])

    @property
    def unembedding(self) -> Tensor:
        """The frozen output matrix `[V, D]`."""
        return self.model.get_parameter(f"{UNEMBED}.weight")

    def target_logprobs(
        self,
        hidden_ND: Tensor,
        pair_rows_M: Tensor,
        targets_M: Tensor,
        spans: Sequence[UnembedSpan],
    ) -> Tensor:
        """As `target_logprobs.target_logprobs`, through the frozen output matrix."""
        return target_logprobs(hidden_ND, pair_rows_M, targets_M, self.unembedding, spans)
