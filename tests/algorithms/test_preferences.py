"""Preference losses against the papers' formulas, and what they teach on real actors."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit

import tinsmith
from tinsmith.algorithms import preference_losses as losses
from tinsmith.algorithms.fit import FitWatcher
from tinsmith.algorithms.fit_config import PreferenceConfig
from tinsmith.algorithms.preferences import (
    answer_logprobs,
    judged_answer,
    judged_pair,
    resume_preferences,
    train_preferences,
)

CONFIG = PreferenceConfig(
    model="tiny-llama",
    rank=8,
    learning_rate=5e-3,
    epochs=5,
    batch_size=6,
    validation=0.25,
    checkpoint_every=100,
)
PAIRS = [
    {"prompt": f"What is {n}?", "chosen": f"{n}!", "rejected": f"the dog {n}"} for n in range(16)
]
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
    for pair in PAIRS
    for name in ("chosen", "rejected")
]


def random_logprobs(names: int, size: int = 50) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [torch.tensor(-rng.gamma(3, 4, size), dtype=torch.float64) for _ in range(names)]


def test_dpo_is_the_papers_formula():
    c, r, rc, rr = given = random_logprobs(4)
    h = 0.3 * (c - rc - r + rr).numpy()
    np.testing.assert_allclose(losses.dpo(*given, 0.3), -np.log(expit(h)), rtol=1e-9)
    smoothed = -0.8 * np.log(expit(h)) - 0.2 * np.log(expit(-h))
    np.testing.assert_allclose(losses.dpo(*given, 0.3, 0.2), smoothed, rtol=1e-9)


def test_dpos_gradient_weighs_a_pair_by_how_wrong_its_reward_is():
    """Rafailov et al., the gradient under eq. 7."""
    c, r, rc, rr = random_logprobs(4)
    c.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.dpo(c, r, rc, rr, 0.3).sum(), c)
    wrong = expit(0.3 * ((r - rr) - (c - rc)).detach().numpy())
    np.testing.assert_allclose(gradient, -0.3 * wrong, rtol=1e-9)


def test_ipo_is_the_papers_formula():
    given = random_logprobs(4)
    c, r, rc, rr = (values.numpy() for values in given)
    expected = (np.log(np.exp(c) * np.exp(rr) / (np.exp(r) * np.exp(rc))) - 1 / (2 * 0.3)) ** 2
    np.testing.assert_allclose(losses.ipo(*given, 0.3), expected, rtol=1e-6)


def test_kto_is_the_papers_formula():
    p, ref, m, ref_m = given = random_logprobs(4)
    desirable = torch.arange(50) % 3 == 0
    got = losses.kto(p, ref, desirable, m, ref_m, 0.3, 1.5, 0.5)
    z = max(0.0, float((m - ref_m).mean()))
    for i in range(50):
        reward = float(given[0][i] - given[1][i])
        value, weight = (
            (expit(0.3 * (reward - z)), 1.5) if desirable[i] else (expit(0.3 * (z - reward)), 0.5)
        )
        assert float(got[i]) == pytest.approx(weight * (1 - value), abs=1e-12)
    far = losses.kto(p, ref, desirable, m - 1000, ref_m, 0.3)
    torch.testing.assert_close(far, losses.kto(p, ref, desirable, m, m, 0.3))  # z is not negative


def test_bradley_terry_is_the_logistic_models_likelihood():
    better, worse = random_logprobs(2)
    expected = np.logaddexp(better.numpy(), worse.numpy()) - better.numpy()
    np.testing.assert_allclose(losses.bradley_terry(better, worse), expected, atol=1e-12)


# ---- on real actors ----


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
async def test_a_policy_learns_what_is_preferred(service, loss):
    config = replace(CONFIG, loss=loss, epochs=5 if loss != "kto" else 4)
    result = await train_preferences(service, config, LABELLED if loss == "kto" else PAIRS)
    first, *_, last = [
        row
        for row in map(json.loads, (result.run_dir / "metrics.jsonl").read_text().splitlines())
        if "eval" not in row
    ]
    assert last["loss"] < first["loss"]
    assert result.before["margin"] == pytest.approx(0, abs=1e-3)  # the reference is the start
    assert result.after["margin"] > 0.1
    assert result.after["accuracy"] > 0.9
    if loss == "dpo":
        assert result.before["loss"] == pytest.approx(math.log(2), abs=1e-4)


async def test_the_first_step_is_plain_dpo_of_the_samplers_logprobs(service):
    """Loss and gradient of the whole path, against DPO's closed form at the reference."""
    config = replace(CONFIG, epochs=1, batch_size=16, validation=0.0, grad_clip_norm=0.0)
    result = await train_preferences(service, config, PAIRS)
    (row,) = map(json.loads, (result.run_dir / "metrics.jsonl").read_text().splitlines())
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-4)
    # There it is half of beta times the gradient of the mean log ratio of rejected to chosen.
    training = await service.create_lora_training_client("tiny-llama", rank=8, seed=0)
    datums = []
    from tinsmith.algorithms.chat_data import AnswerRenderer, answer_datum

    renderer = AnswerRenderer.from_model((await training.get_info()).model_path)
    for pair in PAIRS:
        for name, sign in (("chosen", 1), ("rejected", -1)):
            datum = answer_datum(
                renderer,
                [{"role": "user", "content": pair["prompt"]}],
                {"role": "assistant", "content": pair[name]},
            )
            weights = datum.loss_fn_inputs["weights"] * np.float32(sign * 0.5 * 0.1 / 16)
            inputs = {**datum.loss_fn_inputs, "weights": weights}
            datums.append(tinsmith.Datum(datum.model_input, inputs))
    training.forward_backward(datums)
    stepped = await training.optim_step()
    assert row["grad_norm"] == pytest.approx(stepped.metrics["grad_norm"], rel=1e-3)
    # And the sampler's logprobs are the learner's.
    policy = await service.create_sampling_client(base_model="tiny-llama")
    fresh = await service.create_lora_training_client("tiny-llama", rank=8, seed=0)
    output = await fresh.forward(datums)
    expected = [
        out["logprobs"][datum.loss_fn_inputs["weights"] != 0].sum()
        for datum, out in zip(datums, output.loss_fn_outputs, strict=True)
    ]
    np.testing.assert_allclose(await answer_logprobs(policy, datums), expected, atol=1e-3)


async def test_a_stopped_run_goes_on_exactly(service, tmp_path):
    config = replace(CONFIG, epochs=2)
    whole = await train_preferences(service, config, PAIRS, run_dir=tmp_path / "whole")

    class CtrlC(FitWatcher):
        def step(self, metrics):
            if metrics["step"] == 1:
                os.kill(os.getpid(), signal.SIGINT)

    part = await train_preferences(service, config, PAIRS, run_dir=tmp_path / "part", watch=CtrlC())
    assert part.stopped
    await resume_preferences(service, part.run_dir, PAIRS)

    def adapter(result) -> bytes:
        folder = Path(service.home) / "runs" / result.run_id / "weights"
        return (folder / f"step-{whole.steps:06d}" / "adapter_model.safetensors").read_bytes()

    assert adapter(part) == adapter(whole)


# ---- rows ----


def test_pairs_may_be_whole_conversations():
    chosen = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "12"}]
    rejected = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "13"}]
    judged = judged_pair(1, {"chosen": chosen, "rejected": rejected})
    assert judged.prompt == chosen[:1]
    assert (judged.answer["content"], judged.other["content"]) == ("12", "13")


@pytest.mark.parametrize(
    ("make", "row", "complaint"),
    [
        (judged_pair, {"prompt": "x", "chosen": "y"}, "a row needs rejected; it has prompt"),
        (judged_pair, {"prompt": "x", "chosen": "y", "rejected": "y"}, "are the same"),
        (judged_pair, {"chosen": "y", "rejected": "z"}, "a row needs a prompt or messages"),
        (judged_pair, 3, "a row must be an object"),
        (judged_answer, {"prompt": "x", "completion": "y"}, "label must be true or false"),
        (judged_answer, {"prompt": "x", "completion": "y", "label": "yes"}, "got 'yes'"),
    ],
)
def test_a_bad_row_says_what_is_wrong(make, row, complaint):
    with pytest.raises(tinsmith.InvalidInput, match=complaint):
        make(1, row)
