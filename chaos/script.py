"""What the tenants do: the same operations every time, from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from ..primitives.types import AdamParams, Datum, ModelInput

VOCABULARY = 256  # tokens that every model has
LOSSES = ("ppo", "cross_entropy", "cispo")
ADAM = AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)
SAMPLED_TOKENS = 12
PROMPT = list(range(5, 25))
# Of a round: all of it is under way at once, then something is sampled.
ROUND = (
    "forward_backward",
    "forward_backward",
    "optim_step",
    "forward",
    "forward_backward",
    "optim_step",
)


@dataclass(frozen=True)
class Step:
    """`data` and `loss_fn` are of a batch."""

    kind: str
    data: tuple[Datum, ...] = ()
    loss_fn: str = ""


def steps(seed: int, tenant: int, number: int) -> list[Step]:
    """Round `number` of a tenant."""
    rng = np.random.default_rng((seed, tenant, number))
    return [_step(rng, kind) for kind in ROUND]


def _step(rng: np.random.Generator, kind: str) -> Step:
    if kind == "optim_step":
        return Step(kind)
    loss_fn = LOSSES[int(rng.integers(len(LOSSES)))]
    return Step(kind, tuple(_datum(rng, loss_fn) for _ in range(2)), loss_fn)


def _datum(rng: np.random.Generator, loss_fn: str) -> Datum:
    length = int(rng.integers(4, 16))
    tokens = rng.integers(0, VOCABULARY, length + 1)
    inputs = {"target_tokens": tokens[1:]}
    if loss_fn == "cross_entropy":
        inputs["weights"] = np.ones(length, np.float32)
    else:
        inputs["logprobs"] = rng.uniform(-8, -4, length).astype(np.float32)
        inputs["advantages"] = rng.normal(size=length).astype(np.float32)
    return Datum(ModelInput(tokens[:-1]), inputs)


def sampling_seed(seed: int, tenant: int, number: int) -> int:
    return random.Random(f"{seed} {tenant} {number}").getrandbits(31)
