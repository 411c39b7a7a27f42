"""The sizes of some models, so that they can be planned for without their files. From the `config.json`
of each, at https://huggingface.co/<name>, as of August 2026."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

_QWEN3 = dict(model_type="qwen3", vocab_size=151936, head_dim=128, max_position_embeddings=40960)
_QWEN3_MOE = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}
_QWEN25 = dict(model_type="qwen2", vocab_size=152064, max_position_embeddings=32768)
_LLAMA31 = dict(
    model_type="llama", vocab_size=128256, max_position_embeddings=131072, num_key_value_heads=8
)


def _sizes(hidden: int, inner: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return dict(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=False,
        **others,
    )


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-8B": {**_QWEN3, **_sizes(4096, 12288, 36, 32, num_key_value_heads=8)},
    "Qwen/Qwen3-32B": {**_QWEN3, **_sizes(5120, 25600, 64, 64, num_key_value_heads=8)},
    "Qwen/Qwen3-30B-A3B": {
        **_QWEN3_MOE,
        **_sizes(2048, 6144, 48, 32, moe_intermediate_size=768),
    },
    "Qwen/Qwen3-235B-A22B": {
        **_QWEN3_MOE,
        **_sizes(4096, 12288, 94, 64, moe_intermediate_size=1536),
    },
    "Qwen/Qwen2.5-7B": {**_QWEN25, **_sizes(3584, 18944, 28, 28, num_key_value_heads=4)},
    "Qwen/Qwen2.5-72B": {**_QWEN25, **_sizes(8192, 29568, 80, 64, num_key_value_heads=8)},
    "meta-llama/Llama-3.1-8B": {**_LLAMA31, **_sizes(4096, 14336, 32, 32)},
    "meta-llama/Llama-3.1-70B": {**_LLAMA31, **_sizes(8192, 28672, 80, 64)},
}


def published_config(name: str) -> Any | None:
    """transformers' config of a model listed here, by its name or the last part of it."""
    for known, values in PUBLISHED.items():
        if name.lower() in (known.lower(), known.partition("/")[2].lower()):
            return AutoConfig.for_model(**values)
    return None
