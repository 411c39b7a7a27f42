"""Tiny random models with a small trained tokenizer, made in a moment, the same every time."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "system user assistant tool message content answer question number",
    "the quick brown fox jumps over the lazy dog 0 1 2 3 4 5 6 7 8 9",
    "CALC(12+34) = 46. What is 3 times 4? The answer is: 12!",
] * 4


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens: any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_tiny_model(
    path: str | Path,
    family: str = "llama",
    seed: int = 0,
    head_dim: int = 16,
    tied: bool | None = None,
    intermediate: int = 96,
    **more: object,
) -> str:
    """Write a seeded random model (`llama`, `qwen2`, `qwen3` or `qwen3_moe`) with its tokenizer to
    `path`.

    Two layers, hidden size 64 (qwen2: four times `head_dim`), four query heads over two key/value
    heads; about 0.1M parameters. `qwen3_moe` has eight experts of a third of `intermediate`, of which
    a token takes two; `more` goes into its config. `tied`: whether the output matrix is the embedding
    (None: yes, in qwen3 no).
    """
    tokenizer = tiny_tokenizer()
    shape = dict(
        vocab_size=336,  # padded above the tokenizer, as real models are
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.2,  # wide, so that distributions are far from uniform
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    if family == "qwen2":
        shape["hidden_size"] = 4 * shape.pop("head_dim")
    shape["tie_word_embeddings"] = not family.startswith("qwen3") if tied is None else tied
    torch.manual_seed(seed)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape)),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **shape,
                moe_intermediate_size=intermediate // 3,
                num_experts=8,
                num_experts_per_tok=2,
                norm_topk_prob=True,
                **more,
            )
        ),
    }[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


if __name__ == "__main__":
    make_tiny_model(sys.argv[1])
