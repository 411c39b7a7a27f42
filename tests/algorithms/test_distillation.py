"""Distillation: the formulas, and students of real teachers on real actors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import tinsmith
from tinsmith.algorithms.distillation import (
    distill,
    resume_distill,
    reverse_kl_datum,
    sample_segment,
    soft_datum,
    teacher_logprobs,
)
from tinsmith.algorithms.fit_config import DistillConfig, SupervisedConfig
from tinsmith.algorithms.supervised import train_supervised
from tinsmith.primitives.types import SampledSequence, Segment, TokenLogprobs

PROMPTS = [{"prompt": f"What is {n}?"} for n in range(16)]
CONFIG = DistillConfig(
    model="tiny-llama",
    rank=8,
    learning_rate=1e-2,
    schedule="constant",
    batch_size=12,
    validation=0.25,
    max_tokens=8,
    seed=1,
)


def segment(size: int = 12) -> Segment:
    rng = np.random.default_rng(0)
    mask = np.arange(size) >= 3
    mask[6:8] = False
    mask[-1] = False
    logprobs = np.where(mask, -rng.exponential(size=size), 0).astype(np.float32)
    return Segment(rng.integers(3, 300, size), mask, logprobs, np.where(mask, 2, -1))


def test_the_advantage_is_minus_the_log_ratio_to_the_teacher():
    given = segment()
    teacher = np.where(given.mask, -np.arange(12), 0).astype(np.float32)
    datum = reverse_kl_datum(given, teacher, scale=0.5, rewards=2.0)
    assert datum.model_input.length == 10
    for t in range(10):
        expected = 0.0
        if given.mask[t + 1]:
            expected = 0.5 * (2.0 - (given.logprobs[t + 1] - teacher[t + 1]))
        assert datum.loss_fn_inputs["advantages"][t] == pytest.approx(expected, rel=1e-6)
    np.testing.assert_array_equal(datum.loss_fn_inputs["logprobs"], given.logprobs[1:11])
    np.testing.assert_array_equal(datum.loss_fn_inputs["target_tokens"], given.tokens[1:11])


def test_its_policy_gradient_is_the_gradient_of_the_reverse_kl():
    """Summed over all tokens of one position, in the mean over samples (here: exactly)."""
    torch.manual_seed(0)
    student = torch.randn(7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, dtype=torch.float64).log_softmax(0)
    p = student.log_softmax(0)
    (expected,) = torch.autograd.grad((p.exp() * (p - teacher)).sum(), student)
    p = student.log_softmax(0)
    advantages = -(p - teacher).detach()
    surrogate = -(p.exp().detach() * torch.exp(p - p.detach()) * advantages).sum()
    (gradient,) = torch.autograd.grad(surrogate, student)
    torch.testing.assert_close(gradient, expected)


def test_soft_targets_weigh_the_likeliest_tokens_by_their_renormalised_chances():
    rng = np.random.default_rng(0)
    logprobs = np.log(rng.dirichlet(np.ones(50), 4)[:, :5]).astype(np.float32)
    top = TokenLogprobs(rng.integers(0, 300, (4, 5)), logprobs)
    datum = soft_datum(np.array([5, 6, 7]), np.array([8, 9, 10, 11]), top)
    assert datum.model_input.to_ints() == [5, 6, 7, 8, 9, 10]
    weights = datum.loss_fn_inputs["weights"]
    assert weights.shape == (6, 5)
    assert (weights[:2] == 0).all()
    chances = np.exp(logprobs)
    np.testing.assert_allclose(weights[2:], chances / chances.sum(1)[:, None], rtol=1e-5)
    np.testing.assert_array_equal(datum.loss_fn_inputs["target_tokens"][2:], top.tokens)


# ---- on real actors ----


@pytest.fixture(scope="module")
async def teacher(service):
    """It answers with a letter."""
    rows = [{**row, "completion": "abc!"} for row in PROMPTS]
    config = SupervisedConfig(model="tiny-llama", rank=8, learning_rate=2e-2, steps=20)
    result = await train_supervised(service, config, rows)
    return await service.create_sampling_client(result.checkpoint)


async def test_a_teacher_scores_the_students_tokens_after_its_own_prompt(service, teacher):
    prompt, other = np.array([5, 6, 7]), np.array([30, 31, 32, 33, 34])
    sample = SampledSequence(
        np.array([8, 9, 10]), np.zeros(3, np.float32), np.zeros(3, np.int32), "stop"
    )
    given = sample_segment(prompt, sample)
    for seen in (prompt, other):
        scores = await teacher_logprobs(teacher, given, None if seen is prompt else seen)
        whole = await teacher.compute_logprobs(np.concatenate([seen, sample.tokens]))
        np.testing.assert_allclose(scores[3:], whole[-3:], atol=1e-5)
        assert (scores[:3] == 0).all()


@pytest.mark.parametrize(("method", "steps"), [("on_policy", 25), ("samples", 15), ("top_k", 15)])
async def test_a_student_comes_to_answer_as_its_teacher(service, teacher, method, steps):
    config = replace(CONFIG, method=method, steps=steps, samples_per_prompt=4)
    result = await distill(service, config, teacher, PROMPTS)
    name = "loss" if method == "on_policy" else "nll"
    assert result.after["high"] < result.before["low"]
    # On-policy it must first find what the teacher says.
    assert result.after[name] < (0.8 if method == "on_policy" else 0.5) * result.before[name]


async def test_each_prompt_has_its_own_teacher_and_a_prompt_can_be_distilled(service, teacher):
    base = await service.create_sampling_client(base_model="tiny-llama")
    rows = [{**row, "teacher": "ab"[i % 2]} for i, row in enumerate(PROMPTS)]
    config = replace(CONFIG, steps=2, teacher_system="the quick", checkpoint_every=1)
    result = await distill(service, config, {"a": teacher, "b": base}, rows)
    assert result.reports["train"].used == 16
    resumed = await resume_distill(
        service, result.run_dir, {"a": teacher, "b": base}, rows, steps=3
    )
    assert (resumed.steps, resumed.stopped) == (3, False)
    strict = replace(config, strict=True)
    with pytest.raises(tinsmith.InvalidInput, match="no teacher 'b'; there are a"):
        await distill(service, strict, {"a": teacher}, rows)
