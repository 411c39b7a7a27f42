"""Training on stale samples, through the real engines: where `importance_sampling` collapses and
`stable_reinforce` does not. `pytest -s` prints the numbers of docs/stable_reinforce.md.

The task is a bandit of 336 arms: the policy writes one token after either of two prompts, and token
v is paid 1 with probability `VALUES[v]`. A batch is 16 tokens after each prompt. While one is
played, eight steps are taken on the one before: it is trained on 8 to 15 versions after it was
sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.engines.sampler import SamplerEngine
from tinsmith.primitives.types import (
    AdamParams,
    Datum,
    LoraConfig,
    PolicyRef,
    SampleRequest,
    SamplingParams,
)

VOCAB, GROUP, PROMPTS = 336, 16, 2
VALUES = np.random.default_rng(99).uniform(0, 1, VOCAB)
STALENESS, BATCHES, SEEDS = 8, 60, 5
LEARNING_RATE = 5e-3


@pytest.fixture(scope="module")
def llama(tiny_llama):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # passes are too small to share out
    yield Backbone(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    torch.set_num_threads(threads)


@dataclass
class Course:
    """Of one run: the mean value of the tokens of each batch, and each step's largest ratio."""

    returns: list[float]
    ratios: list[float]

    @property
    def final(self) -> float:
        return float(np.mean(self.returns[-10:]))


class Bandit:
    """A policy that plays and learns."""

    def __init__(self, llama, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.lora = LoraConfig(rank=8, seed=seed)
        self.learner = LearnerEngine(llama[0])
        self.learner.create_run("a", self.lora)
        self.sampler = SamplerEngine(*llama, kv_bytes=1 << 22)
        self.prompts = self.rng.integers(0, VOCAB, (PROMPTS, 5))

    def play(self) -> tuple[list[Datum], float]:
        """A batch under the current weights, and the mean value of its tokens."""
        version = self.learner.runs["a"].version
        weights = self.learner.export("a")
        self.sampler.add_adapter("a", version, self.lora, weights, keep=False)
        for prompt in self.prompts:
            seed = int(self.rng.integers(1 << 30))
            params = SamplingParams(max_tokens=1, stop=[], seed=seed)
            self.sampler.submit(SampleRequest(prompt, params, PolicyRef("a"), GROUP))
        responses = {}
        while self.sampler.busy:
            responses |= {e.request: e.response for e in self.sampler.step()}
        batch, values = [], []
        for prompt, (_, response) in zip(self.prompts, sorted(responses.items()), strict=True):
            tokens = np.array([s.tokens[0] for s in response.sequences])
            rewards = self.rng.random(GROUP) < VALUES[tokens]
            values.append(VALUES[tokens].mean())
            for sequence, advantage in zip(
                response.sequences, rewards - rewards.mean(), strict=True
            ):
                batch.append(_datum(prompt, sequence, advantage))
        return batch, float(np.mean(values))

    def learn(self, batch: list[Datum], loss_fn: str) -> float:
        """One step; returns the batch's largest ratio."""
        output = self.learner.forward_backward("a", batch, loss_fn, logprobs="loss")
        self.learner.optim_step("a", AdamParams(LEARNING_RATE))
        return output.metrics.get("ratio:max", 1.0)  # none without an advantage

    def train(self, loss_fn: str) -> Course:
        course, before = Course([], []), None
        for _ in range(BATCHES):
            batch, value = self.play()
            course.returns.append(value)
            if before is not None:
                course.ratios += [self.learn(before, loss_fn) for _ in range(STALENESS)]
            before = batch
        return course


def _datum(prompt, sequence, advantage) -> Datum:
    before = np.zeros(len(prompt) - 1)
    inputs = {
        "target_tokens": np.append(prompt[1:], sequence.tokens),
        "logprobs": np.append(before, sequence.logprobs),
        "advantages": np.append(before, advantage),
    }
    return Datum(prompt, inputs)


def courses(llama, loss_fn: str) -> list[Course]:
    runs = [Bandit(llama, seed).train(loss_fn) for seed in range(SEEDS)]
    finals = ", ".join(f"{run.final:.2f}" for run in runs)
    ratios = ", ".join(f"{max(run.ratios):.0f}" for run in runs)
    mean = np.mean([run.final for run in runs])
    print(f"\n{loss_fn}: return {mean:.2f} ({finals}), largest ratio {ratios}")
    return runs


def test_stable_reinforce_learns_from_stale_data_that_importance_sampling_collapses_on(llama):
    plain, stable = courses(llama, "importance_sampling"), courses(llama, "stable_reinforce")
    finals, collapsed = [run.final for run in stable], [run.final for run in plain]
    assert np.mean(finals) > 0.8  # 0.5 is a policy that plays all tokens alike
    assert np.mean(finals) > np.mean(collapsed)
    assert min(finals) > min(collapsed)
    assert max(max(run.ratios) for run in stable) < min(max(run.ratios) for run in plain)


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "stable_reinforce"])
def test_steps_without_end_on_one_batch_stop_at_the_fixed_point(llama, loss_fn):
    bandit = Bandit(llama, 0)
    batch, _ = bandit.play()
    for _ in range(200):
        bandit.learn(batch, loss_fn)
    outputs = bandit.learner.forward("a", batch, loss_fn).loss_fn_outputs
    gaps = np.array(
        [
            o["logprobs"][-1] - d.loss_fn_inputs["logprobs"][-1]
            for o, d in zip(outputs, batch, strict=True)
        ]
    )
    bounds = np.array([abs(d.loss_fn_inputs["advantages"][-1]) / 0.3 for d in batch])
    print(f"\n{loss_fn}: ratios from {np.exp(gaps.min()):.2g} to {np.exp(gaps.max()):.2g}")
    if loss_fn == "stable_reinforce":
        assert (np.abs(gaps) < bounds + 0.3).all()
    else:
        assert np.exp(gaps.max()) > 30
        assert np.exp(gaps.min()) < 1e-3
