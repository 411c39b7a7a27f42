"""Small random batches for the tiny models."""

from __future__ import annotations

import numpy as np

import tinsmith

VOCAB = 336


def policy_datum(rng: np.random.Generator, length: int = 12) -> tinsmith.Datum:
    """For the policy-gradient losses; the first few tokens are a prompt."""
    tokens = rng.integers(0, VOCAB, length + 1)
    advantages = rng.normal(size=length)
    advantages[:3] = 0
    return tinsmith.Datum(
        tokens[:-1],
        {
            "target_tokens": tokens[1:],
            "logprobs": rng.uniform(-8, -4, length),
            "advantages": advantages,
        },
    )


def text_datum(rng: np.random.Generator, length: int = 12) -> tinsmith.Datum:
    """For cross-entropy."""
    tokens = rng.integers(0, VOCAB, length + 1)
    weights = np.ones(length)
    return tinsmith.Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights})


def changed(datum: tinsmith.Datum, **inputs) -> tinsmith.Datum:
    """The datum with other inputs; None leaves one out."""
    merged = {**datum.loss_fn_inputs, **inputs}
    return tinsmith.Datum(datum.model_input, {k: v for k, v in merged.items() if v is not None})


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    """Without the seconds that it took, which differ every time."""
    return {k: v for k, v in metrics.items() if not k.partition(":")[0].endswith("_s")}
