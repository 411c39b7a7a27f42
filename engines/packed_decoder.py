"""A decoder's layers laid out for passes without gradient on a CPU.

Products of a few rows with a matrix spend a third of their time on rearranging the matrix for the
processor. oneDNN can keep it rearranged; then a batch of 32 rows runs at the rate of large
products. Layers that read the same input are one matrix. Adapters go on top, each row under its
own, as in `LoraLinear`, whose weights stay where they are and are not read any more.

Dimension names: T packed tokens, D hidden size, I and O a linear layer's inputs and outputs,
H query heads, G key/value heads, E size of a head, F size of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .lora import UNEMBED, LoraContext, LoraLinear

Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""`(layer, q [H, T, E], k [G, T, E], v [G, T, E], scale) -> [T, H, E]`."""

_USUAL_ROWS = 32  # the layout is oneDNN's choice for products with so many
_FEWEST_ROWS = 4  # with fewer the processor waits for one sum to end before it goes on with it


def can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _enough_rows(x_TI: Tensor) -> Tensor:
    """With rows of zeros after it, should it have too few for the processor."""
    missing = _FEWEST_ROWS - x_TI.shape[0]
    return pad(x_TI, (0, 0, 0, missing)) if missing > 0 else x_TI


class PackedLinear:
    """Linear layers of the same input as one product; their outputs stand side by side."""

    def __init__(self, parts: Sequence[LoraLinear]) -> None:
        weights: list[Tensor] = [part.weight.detach() for part in parts]
        weight_OI = torch.cat(weights) if len(parts) > 1 else weights[0]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _USUAL_ROWS)
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.context: LoraContext = parts[0].context
        self.columns: list[tuple[str, slice]] = []
        stop = 0
        for part in parts:
            self.columns.append((part.name, slice(stop, stop + part.out_features)))
            stop += part.out_features

    def __call__(self, x_TI: Tensor) -> Tensor:
        y_TO = torch.ops.mkldnn._linear_pointwise(x_TI, self.packed, self.bias, "none", [], "")
        for span in self.context.spans:
            here = slice(span.start, span.stop)
            for name, columns in self.columns:
                factors = span.adapter.weights.get(name)
                if factors is not None:
                    a_RI, b_OR = factors
                    xa_SR = x_TI[here] @ a_RI.T
                    y_TO[here, columns].addmm_(xa_SR, b_OR.T, alpha=span.adapter.layout.scale)
        return y_TO


class _Norm:
    def __init__(self, module: Any) -> None:
        self.weight = module.weight.detach()
        size = self.weight.shape[0]
        self.mean = torch.full((size, 1), 1 / size)
        self.eps = torch.tensor([[module.variance_epsilon]])

    def __call__(self, x: Tensor) -> Tensor:
        # torch's own rms_norm is made of twice as many operations on a CPU.
        flat = x.reshape(-1, x.shape[-1])
        norm = torch.addmm(self.eps, flat * flat, self.mean).rsqrt_()
        return (flat * norm).mul_(self.weight).view(x.shape)


class _Layer:
    """One layer of the Llama kind: Qwen2 adds biases, Qwen3 norms of queries and keys."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = PackedLinear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = PackedLinear([attention.o_proj])
        self.gate_up = PackedLinear([mlp.gate_proj, mlp.up_proj])
        self.down = PackedLinear([mlp.down_proj])
        self.activation = mlp.act_fn
        self.attention_norm = _Norm(layer.input_layernorm)
        self.mlp_norm = _Norm(layer.post_attention_layernorm)
        self.scale: float = attention.scaling
        self.index: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.q_norm = _Norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.k_norm = _Norm(attention.k_norm) if hasattr(attention, "k_norm") else None

    def add_to(self, x_TD: Tensor, cos_T1E: Tensor, sin_T1E: Tensor, attention: Attention) -> None:
        """`x_TD` may have more rows than the positions: what becomes of those does not matter."""
        rows, queries = cos_T1E.shape[0], self.heads
        qkv = self.qkv(self.attention_norm(x_TD))[:rows].view(rows, -1, self.head_dim)
        qk, v_TGE = qkv[:, : queries + self.kv_heads], qkv[:, queries + self.kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :queries]), self.k_norm(qk[:, queries:])), 1)
        qk = torch.addcmul(qk * cos_T1E, qk.roll(self.head_dim // 2, -1), sin_T1E)
        q_HTE, k_GTE = qk[:, :queries].transpose(0, 1), qk[:, queries:].transpose(0, 1)
        out_THE = attention(self.index, q_HTE, k_GTE, v_TGE.transpose(0, 1), self.scale)
        x_TD += self.o(_enough_rows(out_THE.reshape(rows, -1)))
        gate_TF, up_TF = self.gate_up(self.mlp_norm(x_TD)).chunk(2, -1)
        x_TD += self.down(self.activation(gate_TF).mul_(up_TF))


class PackedDecoder:
    def __init__(self, model: nn.Module) -> None:
        decoder: Any = model.get_submodule("model")
        unembed: Any = model.get_submodule(UNEMBED)
        self.embedding: Any = decoder.embed_tokens
        self.rotary: Any = decoder.rotary_emb
        self.layers = [_Layer(layer) for layer in decoder.layers]
        self.norm = _Norm(decoder.norm)
        self.unembed = PackedLinear([unembed])

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, attention: Attention) -> Tensor:
        """Final normed hidden states `[T, D]`."""
        x_TD = _enough_rows(self.embedding(tokens_T))
        cos_1TE, sin_1TE = self.rotary(x_TD, positions_T[None])
        # x cos + (-second half, first half) sin, by way of exchanging the halves.
        half = sin_1TE.shape[-1] // 2
        sin_1TE[..., :half].neg_()
        cos_T1E, sin_T1E = cos_1TE[0, :, None], sin_1TE[0, :, None]
        for layer in self.layers:
            layer.add_to(x_TD, cos_T1E, sin_T1E, attention)
        return self.norm(x_TD[: tokens_T.shape[0]])

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return self.unembed(_enough_rows(hidden_ND))[: hidden_ND.shape[0]]
