"""Every loss through the SDK: its value against the formula written out here, its gradient against
the native run's (whose losses have references of their own)."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
import torch
from tinker import types

import tinsmith
from tests.data import changed, policy_datum, text_datum
from tests.gateway.sdk import outputs, prompt, sdk_datum, sparse_datum
from tinsmith.primitives.types import AdamParams

STEP = dict(learning_rate=1e-2)


def policy_batch(seed: int, near: bool = True):
    """Datums whose recorded logprobs lie near the policy's, so that clips bind for some only."""
    rng = np.random.default_rng(seed)
    return [policy_datum(rng, int(rng.integers(6, 20))) for _ in range(4)]


def near_policy(training, datums, seed: int):
    """The datums with `logprobs` near what the model says now."""
    rng = np.random.default_rng(seed)
    bare = [
        changed(d, logprobs=None, advantages=None, weights=np.zeros(d.model_input.length))
        for d in datums
    ]
    now = outputs(training.forward([sdk_datum(d) for d in bare], "cross_entropy").result())
    return [
        changed(d, logprobs=p + rng.normal(scale=0.4, size=len(p)))
        for d, p in zip(datums, now, strict=True)
    ]


def importance_sampling(r, a, p, q, config):
    return -(r * a)


def ppo(r, a, p, q, config):
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    return -np.minimum(r * a, np.clip(r, low, high) * a)


def cispo(r, a, p, q, config):
    low, high = config.get("clip_low_threshold", 0.0), config.get("clip_high_threshold", 4.0)
    return -np.clip(r, low, high) * a * p


def dro(r, a, p, q, config):
    return -(p * a - 0.5 * config["beta"] * (p - q) ** 2)


def gspo(r, a, p, q, config):
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    s = np.exp(np.mean((p - q)[a != 0]))
    return -np.minimum(s * a, np.clip(s, low, high) * a)


CASES = [
    ("importance_sampling", importance_sampling, {}),
    ("ppo", ppo, {}),
    ("ppo", ppo, {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05}),
    ("cispo", cispo, {}),
    ("cispo", cispo, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
    ("dro", dro, {"beta": 0.3}),
    ("gspo", gspo, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
]


@pytest.mark.parametrize(("name", "formula", "config"), CASES)
def test_a_policy_loss(service, training, name, formula, config):
    datums = near_policy(training, policy_batch(0), 1)
    result = training.forward_backward([sdk_datum(d) for d in datums], name, config).result()
    expected = 0.0
    for datum, p in zip(datums, outputs(result), strict=True):
        given = datum.loss_fn_inputs
        p, q, a = (x.astype(np.float64) for x in (p, given["logprobs"], given["advantages"]))
        per_token = formula(np.exp(p - q), a, p, q, config)
        expected += per_token[(a != 0) | (name == "dro")].sum()
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)
    training.optim_step(types.AdamParams(**STEP)).result()

    native = service.create_lora_training_client("tiny-llama", rank=4, seed=1).result()
    native.forward_backward(datums, name, config).result()
    native.optim_step(AdamParams(**STEP)).result()
    assert_same_weights(training, native)


def assert_same_weights(training, native) -> None:
    probe = [text_datum(np.random.default_rng(9), 30)]
    ours = outputs(training.forward([sdk_datum(d) for d in probe], "cross_entropy").result())
    theirs = native.forward(probe).result().loss_fn_outputs
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b["logprobs"])


@pytest.mark.parametrize("write", [sdk_datum, sparse_datum])
def test_soft_targets_dense_and_sparse(service, training, write):
    """Several targets a position, as distillation sends them; rows and widths differ."""
    rng = np.random.default_rng(3)
    datums = []
    for width in (4, 7):
        tokens = rng.integers(0, 336, 11)
        weights = rng.uniform(size=(10, width)) * (rng.uniform(size=(10, width)) < 0.3)
        targets = np.where(weights > 0, rng.integers(0, 336, (10, width)), 0)
        datums.append(tinsmith.Datum(tokens[:-1], {"target_tokens": targets, "weights": weights}))
    result = training.forward_backward([write(d) for d in datums], "cross_entropy").result()
    total = sum(
        -(d.loss_fn_inputs["weights"].astype(np.float64) * p).sum()
        for d, p in zip(datums, outputs(result), strict=True)
    )
    assert result.metrics["loss:sum"] == pytest.approx(total, rel=1e-5)
    assert [p.shape for p in outputs(result)] == [(10, 4), (10, 7)]
    training.optim_step(types.AdamParams(**STEP)).result()
    native = service.create_lora_training_client("tiny-llama", rank=4, seed=1).result()
    native.forward_backward(datums, "cross_entropy").result()
    native.optim_step(AdamParams(**STEP)).result()
    assert_same_weights(training, native)


def test_thresholds_per_token(training):
    datums = near_policy(training, policy_batch(2), 3)
    rng = np.random.default_rng(4)
    datums = [
        changed(
            d,
            clip_low_threshold=rng.uniform(0.5, 1.0, d.model_input.length),
            clip_high_threshold=rng.uniform(1.0, 1.5, d.model_input.length),
        )
        for d in datums
    ]
    result = training.forward_backward([sdk_datum(d) for d in datums], "ppo").result()
    expected = sum(
        ppo(
            np.exp(p - d.loss_fn_inputs["logprobs"]),
            d.loss_fn_inputs["advantages"],
            p,
            None,
            d.loss_fn_inputs,
        ).sum()
        for d, p in zip(datums, outputs(result), strict=True)
    )
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)


def test_gspo_with_a_mask_of_its_own(training):
    datums = near_policy(training, policy_batch(5), 6)
    masked = [
        changed(d, sequence_ratio_mask=(np.arange(d.model_input.length) >= 2)) for d in datums
    ]
    masked = [
        changed(d, sequence_ratio_mask=d.loss_fn_inputs["sequence_ratio_mask"].astype(np.float32))
        for d in masked
    ]
    config = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    result = training.forward_backward([sdk_datum(d) for d in masked], "gspo", config).result()
    expected = 0.0
    for datum, p in zip(datums, outputs(result), strict=True):
        q, a = datum.loss_fn_inputs["logprobs"], datum.loss_fn_inputs["advantages"]
        s = np.exp((p - q)[2:].mean())
        expected += -np.minimum(s * a, np.clip(s, 0.9, 1.1) * a).sum()
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)


def test_a_custom_loss_runs_as_the_sdk_expects(client, training):
    def squares(logprobs, weights):
        return (weights * logprobs**2).sum(), {"custom/tokens:sum": weights.sum()}

    handle = client.create_custom_loss(squares, {"logprobs": 1, "weights": 1}).result()
    datums = [sdk_datum(text_datum(np.random.default_rng(i), 9)) for i in range(3)]
    before = outputs(training.forward(datums, "cross_entropy").result())
    result = training.forward_backward_custom(datums, handle).result()
    expected = sum((p.astype(np.float64) ** 2).sum() for p in before)
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    assert result.metrics["custom/tokens:sum"] == 27
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    after = outputs(training.forward(datums, "cross_entropy").result())
    assert sum((p**2).sum() for p in after) < expected


# ---- stable_reinforce ----


def sampled_datums(sampler, starts, advantages):
    """Datums of one sampled sequence each, with the provenance of every token."""
    params = types.SamplingParams(max_tokens=8, stop=[], seed=1)
    datums, recorded = [], []
    for start, advantage in zip(starts, advantages, strict=True):
        (sequence,) = sampler.sample(prompt(start), 1, params).result().sequences
        tokens, sampled = [*start, *sequence.tokens], len(sequence.tokens)
        datum = types.Datum(
            model_input=prompt(tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": tokens[1:],
                "logprobs": [0.0] * (len(start) - 1) + list(sequence.logprobs),
                "advantages": [0.0] * (len(start) - 1) + [advantage] * sampled,
            },
        )
        name = sequence.sequence_id
        datums.append(
            datum.with_provenance(
                model_input=[
                    types.PromptProvenanceSpan(sequence_id=name, length=len(start)),
                    types.SampledProvenanceSpan(sequence_id=name, length=sampled - 1),
                ],
                loss_fn_inputs=[
                    types.PromptProvenanceSpan(sequence_id=name, offset=1, length=len(start) - 1),
                    types.SampledProvenanceSpan(sequence_id=name, length=sampled),
                ],
            )
        )
        recorded.append(np.array(sequence.logprobs))
    return datums, recorded


STARTS = [[3, 4, 5], [9, 8, 7, 6]]


@pytest.fixture
def recording(training):
    return training.save_weights_and_get_sampling_client(record_stability_info=True).result()


def test_stable_reinforce_uses_what_the_sampler_recorded(training, recording):
    datums, recorded = sampled_datums(recording, STARTS, [1.0, -0.5])
    # Move the policy, so that ratios are not 1.
    text = [sdk_datum(text_datum(np.random.default_rng(0), 20))]
    training.forward_backward(text, "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=3e-3)).result()
    config = {"kl_coeff": 0.4, "ratio_cap": 3.0}
    result = training.forward_backward(datums, "stable_reinforce", config).result()
    expected = 0.0
    for p, q, start, a in zip(outputs(result), recorded, STARTS, [1.0, -0.5], strict=True):
        p = p[len(start) - 1 :].astype(np.float64)
        gap = p - q
        assert np.abs(gap).max() > 1e-3
        weight = np.clip(np.exp(gap), 1 / 3, 3)
        expected += -(weight * (a - 0.4 * gap) * p).sum()
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)


def test_stable_reinforce_takes_any_targets_before_the_sampled_ones(training, recording):
    """The cookbook's rl_loop writes zeros."""
    datums, _ = sampled_datums(recording, STARTS, [1.0, -0.5])
    zeroed = []
    for datum, start in zip(datums, STARTS, strict=True):
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy().copy()
        targets[: len(start) - 1] = 0
        inputs = {**datum.loss_fn_inputs, "target_tokens": types.TensorData.from_numpy(targets)}
        spans = datum.model_input_spans, datum.loss_fn_input_spans
        zeroed.append(types.Datum(datum.model_input, inputs, *spans))
    losses = [
        training.forward_backward(data, "stable_reinforce").result().metrics["loss:sum"]
        for data in (datums, zeroed)
    ]
    assert losses[0] == losses[1]


def refused(training, datums, match):
    with pytest.raises(tinker.RequestFailedError, match=match) as caught:
        training.forward_backward(datums, "stable_reinforce").result()
    assert caught.value.category == types.RequestErrorCategory.User


def test_stable_reinforce_refuses_what_it_cannot_trust(url, training, recording):
    datums, _ = sampled_datums(recording, STARTS, [1.0, 1.0])
    plain = types.Datum(datums[0].model_input, datums[0].loss_fn_inputs)
    refused(training, [plain], "with_provenance")

    tokens = datums[0].model_input.to_ints()
    tokens[-1] = (tokens[-1] + 1) % 300
    forged = types.Datum(
        prompt(tokens),
        datums[0].loss_fn_inputs,
        datums[0].model_input_spans,
        datums[0].loss_fn_input_spans,
    )
    refused(training, [datums[1], forged], "datum 1: model_input.* are not tokens")

    advantages = datums[0].loss_fn_inputs["advantages"].to_numpy().copy()
    advantages[0] = 1.0
    inputs = {**datums[0].loss_fn_inputs, "advantages": types.TensorData.from_numpy(advantages)}
    spans = datums[0].model_input_spans, datums[0].loss_fn_input_spans
    refused(training, [types.Datum(datums[0].model_input, inputs, *spans)], "was not sampled")

    with tinker.ServiceClient(base_url=url) as other:
        stranger = other.create_lora_training_client(base_model="tiny-llama", rank=4).result()
        refused(stranger, datums, "not recorded in this session")

    unrecorded = training.save_weights_and_get_sampling_client().result()
    datums, _ = sampled_datums(unrecorded, STARTS, [1.0, 1.0])
    refused(training, datums, "record_stability_info=True")


async def test_records_live_a_day_after_their_last_use(gateway):
    import time

    store = gateway.store
    await store.add_sequences("a session", {"x": b"1", "y": b"2"})
    before_use = time.time()
    assert await store.use_sequences("a session", ["x"]) == {"x": b"1"}
    assert await store.use_sequences("another", ["x"]) == {}
    await store.forget_sequences(before_use)
    assert await store.use_sequences("a session", ["x", "y"]) == {"x": b"1"}


def test_torch_tensors_are_taken_as_they_are(training):
    datum = types.Datum(
        model_input=prompt([5, 6, 7]),
        loss_fn_inputs={
            "target_tokens": torch.tensor([6, 7, 8]),
            "weights": torch.tensor([1.0, 0.0, 1.0]),
        },
    )
    result = training.forward_backward([datum], "cross_entropy").result()
    (p,) = outputs(result)
    assert result.metrics["loss:sum"] == pytest.approx(-(p[0] + p[2]), rel=1e-5)
