"""What the study compares with: full-parameter fine-tuning in plain torch and transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer


def train_all_parameters(
    model_path: str,
    examples: Sequence[tuple[list[int], list[int]]],
    folder: Path,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> str:
    """Fine-tune every parameter on (prompt, completion) token pairs, the loss on the completions'
    tokens; AdamW without weight decay, linear decay to 0. Returns the folder with the new model."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
    generator = random.Random(seed)
    batches = []
    for _ in range(epochs):
        order = generator.sample(range(len(examples)), len(examples))
        batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for step, batch in enumerate(track(batches, "full-parameter SFT")):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / len(batches))
        rows = [examples[index] for index in batch]
        width = max(len(prompt) + len(completion) for prompt, completion in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for row, (prompt, completion) in enumerate(rows):
            length = len(prompt) + len(completion)
            tokens[row, :length] = torch.tensor(prompt + completion)
            labels[row, len(prompt) : length] = torch.tensor(completion)
            mask[row, :length] = 1
        loss = model(
            input_ids=tokens.to(device), attention_mask=mask.to(device), labels=labels.to(device)
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
    return str(folder)
