"""KL to a reference: the penalties' formulas, and the real logprobs of a real reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tinsmith
from tests.data import changed, policy_datum
from tinsmith.algorithms.reference import (
    penalise_kl,
    reference_logprobs,
    reference_metrics,
    with_reference,
)
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_the_penalty_in_the_reward_is_k1_with_a_baseline_and_what_follows(discount):
    rng = np.random.default_rng(0)
    datums = [policy_datum(rng, length) for length in (5, 9)]
    masks = [rng.random(len(d.model_input)) < 0.6 for d in datums]
    reference = [rng.uniform(-8, -4, len(m)) for m in masks]
    got = penalise_kl(datums, reference, masks, [0.3, 0.1], discount=discount)

    every = [
        datum.loss_fn_inputs["logprobs"][t] - q[t]
        for datum, q, mask in zip(datums, reference, masks, strict=True)
        for t in np.flatnonzero(mask)
    ]
    mean = sum(every) / len(every)
    for datum, q, mask, coeff, new in zip(datums, reference, masks, (0.3, 0.1), got, strict=True):
        expected = datum.loss_fn_inputs["advantages"].astype(float)
        sampled = np.flatnonzero(mask).tolist()
        for place, t in enumerate(sampled):
            for later, u in enumerate(sampled[place:]):
                k1 = datum.loss_fn_inputs["logprobs"][u] - q[u]
                expected[t] -= coeff * discount**later * (k1 - mean)
        np.testing.assert_allclose(new.loss_fn_inputs["advantages"], expected, atol=1e-5)
        assert new.loss_fn_inputs["logprobs"] is datum.loss_fn_inputs["logprobs"]
    measured = reference_metrics(datums, reference, masks)["reference_kl"]
    assert measured == pytest.approx(mean, abs=1e-6)


async def test_a_reference_scores_the_sampled_tokens_as_the_learner_does(service):
    training = await service.create_lora_training_client("tiny-llama", rank=2, seed=0)
    reference = await service.create_sampling_client(base_model="tiny-llama")
    rng = np.random.default_rng(1)
    datums = [policy_datum(rng, length) for length in (4, 11)]
    masks = [d.loss_fn_inputs["advantages"] != 0 for d in datums]
    masks.append(np.zeros(6, bool))
    datums.append(policy_datum(rng, 6))
    got = await reference_logprobs(reference, datums, masks)
    learner = (await training.forward(datums, "importance_sampling")).loss_fn_outputs
    for logprobs, output, mask in zip(got, learner, masks, strict=True):
        np.testing.assert_allclose(logprobs[mask], output["logprobs"][mask], atol=1e-4)
        assert not logprobs[~mask].any()


@pytest.fixture(scope="module")
def engine(tiny_llama):
    return LearnerEngine(Backbone(tiny_llama))


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_the_penalty_in_the_loss_is_computed_by_the_learner(engine, loss_fn):
    """The same value and gradient as by autograd over the learner's logprobs."""
    rng = np.random.default_rng(2)
    datums = [
        changed(datum, advantages=np.zeros(12))  # the penalty alone
        for datum in (policy_datum(rng), policy_datum(rng))
    ]
    weights = [np.where(np.arange(12) < 4, 0, rng.random(12)).astype(np.float32) for _ in datums]
    reference = [rng.uniform(-7, -5, 12).astype(np.float32) for _ in datums]
    engine.create_run(loss_fn, tinsmith.LoraConfig(rank=2, seed=3))
    run = engine.runs[loss_fn]

    output = engine.forward_backward(
        loss_fn,
        with_reference(datums, reference, weights),
        loss_fn,
        {"kl_k3_coeff": 0.2, "kl_k2_coeff": 0.3},
        logprobs="loss",
    )
    gradient = run.grad.clone()
    run.grad.zero_()

    total, pulled = 0.0, []
    plain = engine.forward(loss_fn, datums, "importance_sampling").loss_fn_outputs
    for datum, out, seen, q, w in zip(
        datums, plain, output.loss_fn_outputs, reference, weights, strict=True
    ):
        p = torch.tensor(out["logprobs"], dtype=torch.float64, requires_grad=True)
        d = torch.tensor(q) - p
        loss = (torch.tensor(w) * (0.2 * (d.exp() - 1 - d) + 0.3 * d**2 / 2)).sum()
        loss.backward()
        total += float(loss.detach())
        targets = datum.loss_fn_inputs["target_tokens"]
        inputs = {"target_tokens": targets, "weights": -p.grad.numpy()}
        pulled.append(tinsmith.Datum(datum.model_input, inputs))
        assert np.isnan(seen["logprobs"][w == 0]).all()  # no logits that the loss does not need
    engine.forward_backward(loss_fn, pulled, "cross_entropy")
    assert output.metrics["loss:sum"] == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(gradient, run.grad, rtol=1e-4, atol=1e-5)
    assert gradient.abs().max() > 1e-2


def test_a_penalty_without_a_reference_is_refused_by_the_learner(engine):
    engine.create_run("other", tinsmith.LoraConfig(rank=2, seed=0))
    datum = policy_datum(np.random.default_rng(0))
    with pytest.raises(tinsmith.InvalidInput, match="need loss_fn_inputs"):
        engine.forward_backward("other", [datum], "ppo", {"kl_k3_coeff": 0.1})
