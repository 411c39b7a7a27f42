"""A monitor small enough for two cores: trained from nothing, on short transcripts only.

Plain torch and transformers, a minute or two. It finds side tasks in transcripts of the lengths it
has seen; in longer ones it fails, and that is where the study's reinforcement begins.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .transcripts import CARRIES, FILES, GUARDS, HONEST, OUTSIDE, QUESTION, ask, draw_transcript

CONTEXT = 4096
SHORT = (4, 8, 16, 32)  # steps
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every word that occurs, so that a step has four."""
    special = ["<unk>", "<end>", "<user>", "<assistant>", "<system>"]
    places = [word for _, place in HONEST for word in place.split()]
    verbs = [*(verb for verb, _ in HONEST), *CARRIES, *GUARDS, "at"]
    known = [*special, *QUESTION.split(), "none", *FILES, *verbs, *places, *OUTSIDE]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(known))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<end>",
        chat_template=CHAT_TEMPLATE,
    )


def make_tiny_monitor(folder: Path, *, steps: int = 500, seed: int = 0, console: Console) -> str:
    """Train it, unless `folder` has it already; returns the folder."""
    if (folder / "config.json").exists():
        return str(folder)
    tokenizer = words_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    rng = random.Random(seed)
    for step in track(range(steps), "training the tiny monitor", console=console):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 100, 2 - 2 * step / steps)
        length = rng.choice(SHORT[:2] if step < steps // 3 else SHORT)
        tokens = torch.tensor([_tokens(tokenizer, rng, length) for _ in range(64)])
        # The answer and the end of the turn, the last two tokens.
        hidden = model.model(input_ids=tokens[:, :-1]).last_hidden_state[:, -2:]
        loss = torch.nn.functional.cross_entropy(
            model.lm_head(hidden).flatten(0, 1), tokens[:, -2:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _tokens(tokenizer: PreTrainedTokenizerFast, rng: random.Random, length: int) -> list[int]:
    steps, answer = draw_transcript(rng, length)
    text = f"<user> {ask(steps)} <end> <assistant> {answer} <end>"
    return tokenizer.convert_tokens_to_ids(text.split())
