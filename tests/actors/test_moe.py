"""A mixture of experts through the API: sampled, replayed, trained, saved and resumed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import tinsmith
from tests.algorithms.test_train import CONFIG, groups, rows

PROMPT = np.random.default_rng(0).integers(0, 336, 20)


def replayed(sample) -> tinsmith.Datum:
    tokens = np.concatenate([PROMPT, sample.tokens])
    inputs = {
        "target_tokens": tokens[1:],
        "weights": (np.arange(1, len(tokens)) >= len(PROMPT)) * 1.0,
        "routed_experts": sample.routed_experts,
    }
    return tinsmith.Datum(tokens[:-1], inputs)


@pytest.mark.parametrize("experts", ["each", "shared"])
async def test_a_mixture_of_experts_from_sample_to_checkpoint(service, tiny_moe, experts):
    training = await service.create_lora_training_client(
        tiny_moe, rank=4, seed=0, train_router=True, experts=experts
    )
    for step in range(2):
        policy = await training.save_weights_and_get_sampling_client()
        params = tinsmith.SamplingParams(8, step, [], return_routed_experts=True)
        response = await policy.sample(PROMPT, 3, params)
        data = [replayed(s) for s in response.sequences]
        assert all(len(d.loss_fn_inputs["routed_experts"]) == d.model_input.length for d in data)
        output = await training.forward_backward(data, "cross_entropy")
        for sample, out in zip(response.sequences, output.loss_fn_outputs, strict=True):
            np.testing.assert_allclose(out["logprobs"][-8:], sample.logprobs, atol=1e-4)
        assert output.metrics["expert_load:max"] >= 1
        await training.optim_step(tinsmith.AdamParams(learning_rate=1e-2))
    custom = await training.forward_backward_custom(data, lambda _, p: (-p[0].sum(), {}))
    assert custom.metrics["routing_entropy:mean"] > 0
    saved = await training.save_state("s")
    resumed = await service.create_training_client_from_state(saved.path)
    before = (await training.forward(data, "cross_entropy")).loss_fn_outputs
    after = (await resumed.forward(data, "cross_entropy")).loss_fn_outputs
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a["logprobs"], b["logprobs"])
    inputs = {**data[0].loss_fn_inputs, "routed_experts": np.zeros((1, 2, 2), np.int64)}
    wrong = tinsmith.Datum(data[0].model_input, inputs)
    with pytest.raises(tinsmith.InvalidInput, match="datum 0: routed_experts has shape"):
        await training.forward([wrong], "cross_entropy")


async def test_the_training_loop_replays_what_its_episodes_recorded(service, tiny_moe):
    """Over two turns each; trainer and sampler agree to 1e-4."""
    config = replace(CONFIG, model=tiny_moe, steps=2, router_replay=True, train_router=True)
    result = await tinsmith.train(service, config)
    for row in rows(result.run_dir):
        assert row["mismatch_max"] < 1e-4
    for group in groups(result.run_dir, 2):
        for trajectory in group.trajectories:
            for segment in trajectory.segments:
                experts, last = segment.routed_experts, np.flatnonzero(segment.mask)[-1]
                assert experts.shape == (len(segment.tokens), 2, 2)
                assert (experts[:last] >= 0).all()
    config = json.loads((result.run_dir / "run.json").read_text())["config"]
    assert config["router_replay"] is True
