"""What an SDK user does from start to end, against what the native API says."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tinker
from tinker import types

from tests.data import policy_datum, text_datum, untimed
from tests.gateway.sdk import outputs, prompt, sdk_datum
from tinsmith.primitives.types import AdamParams, SamplingParams

ADAM = types.AdamParams(learning_rate=1e-2)


def batch(seed: int, count: int = 3, make=text_datum):
    rng = np.random.default_rng(seed)
    return [make(rng, int(rng.integers(6, 24))) for _ in range(count)]


def native_run(service, **lora):
    return service.create_lora_training_client("tiny-llama", rank=4, seed=1, **lora).result()


def test_a_run_equals_the_native_one_bitwise(service, training):
    """Ten operations sent without waiting: same numbers, in order."""
    data = [batch(i, make=policy_datum) for i in range(5)]
    native = native_run(service)
    expected, got = [], []
    for datums in data:
        expected.append(native.forward_backward(datums, "ppo"))
        expected.append(native.optim_step(AdamParams(learning_rate=1e-2)))
        got.append(training.forward_backward([sdk_datum(d) for d in datums], "ppo"))
        got.append(training.optim_step(ADAM))
    for theirs, ours in zip(got, expected, strict=True):
        theirs, ours = theirs.result(), ours.result()
        assert untimed(theirs.metrics) == pytest.approx(untimed(ours.metrics), rel=1e-12)
        if hasattr(ours, "loss_fn_outputs"):
            for a, b in zip(outputs(theirs), ours.loss_fn_outputs, strict=True):
                np.testing.assert_array_equal(a, b["logprobs"])


def test_trainer_and_sampler_agree(training):
    """DESIGN.md, contract 6: to 1e-4 in float32, after some training."""
    datums = [sdk_datum(d) for d in batch(0)]
    for _ in range(3):
        training.forward_backward(datums, "cross_entropy")
        training.optim_step(ADAM)
    sampler = training.save_weights_and_get_sampling_client().result()
    start = prompt(range(10, 18))
    params = types.SamplingParams(max_tokens=24, stop=[], seed=5)
    response = sampler.sample(start, 4, params, include_prompt_logprobs=True).result()
    for sequence in response.sequences:
        tokens = [*start.to_ints(), *sequence.tokens]
        whole = types.Datum(
            model_input=prompt(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )
        (trained,) = outputs(training.forward([whole], "cross_entropy").result())
        np.testing.assert_allclose(trained[7:], sequence.logprobs, atol=1e-4)
        np.testing.assert_allclose(trained[:7], response.prompt_logprobs[1:], atol=1e-4)
        scored = sampler.compute_logprobs(prompt(tokens)).result()
        assert scored[0] is None
        np.testing.assert_allclose(trained, scored[1:], atol=1e-4)


def test_sampling_equals_the_native_one(service, client):
    native = service.create_sampling_client(base_model="tiny-llama").result()
    sampler = client.create_sampling_client(base_model="tiny-llama").result()
    for temperature, top_k, top_p in [
        (1.0, -1, 1.0),
        (0.0, -1, 1.0),
        (0.7, 5, 1.0),
        (1.3, -1, 0.8),
    ]:
        settings = dict(
            max_tokens=12, seed=3, temperature=temperature, top_k=top_k, top_p=top_p, stop=[7, 8]
        )
        expected = native.sample(range(5, 15), 3, SamplingParams(**settings)).result()
        got = sampler.sample(prompt(range(5, 15)), 3, types.SamplingParams(**settings)).result()
        for a, b in zip(got.sequences, expected.sequences, strict=True):
            assert list(a.tokens) == b.tokens.tolist()
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-6)
            assert a.stop_reason == b.stop_reason


def test_cached_prompts_are_counted(client):
    sampler = client.create_sampling_client(base_model="tiny-llama").result()
    tokens, params = prompt(range(100, 164)), types.SamplingParams(max_tokens=1)
    sampler.sample(tokens, 1, params).result()
    assert sampler.sample(tokens, 1, params).result().prompt_cache_hit_tokens >= 48


def test_save_and_load(service, client, training):
    training.forward_backward([sdk_datum(d) for d in batch(1)], "cross_entropy")
    training.optim_step(ADAM)
    saved = training.save_state("one", user_metadata={"step": "1"}).result().path
    assert saved == f"tinker://{training.model_id}/weights/one"
    again = client.create_training_client_from_state_with_optimizer(saved).result()
    assert again.model_id != training.model_id
    assert again.get_info().model_data.model_name == "tiny-llama"
    data = [sdk_datum(d) for d in batch(2)]
    for run in (training, again):
        run.forward_backward(data, "cross_entropy").result()
        run.optim_step(ADAM).result()
    after = [outputs(run.forward(data, "cross_entropy").result()) for run in (training, again)]
    for a, b in zip(*after, strict=True):
        np.testing.assert_array_equal(a, b)
    # Weights alone: the optimizer starts afresh, so the same step leads elsewhere.
    bare = client.create_training_client_from_state(saved).result()
    bare.forward_backward(data, "cross_entropy").result()
    bare.optim_step(ADAM).result()
    there = outputs(bare.forward(data, "cross_entropy").result())
    assert not np.array_equal(there[0], after[0][0])


def test_a_sampler_checkpoint_is_sampled_by_path(client, training):
    training.forward_backward([sdk_datum(d) for d in batch(1)], "cross_entropy")
    training.optim_step(ADAM)
    pinned = training.save_weights_and_get_sampling_client().result()
    path = training.save_weights_for_sampler("s").result().path
    assert path == f"tinker://{training.model_id}/sampler_weights/s"
    by_path = client.create_sampling_client(model_path=path).result()
    assert by_path.get_base_model() == "tiny-llama"
    params = types.SamplingParams(max_tokens=8, seed=2)
    a, b = (s.sample(prompt(range(9)), 2, params).result() for s in (pinned, by_path))
    assert [s.tokens for s in a.sequences] == [s.tokens for s in b.sequences]


def test_snapshot_stays_and_inflight_moves(training):
    params, start = types.SamplingParams(max_tokens=1), prompt(range(20, 40))
    snapshot = training.save_weights_and_get_sampling_client().result()
    moving = training.save_weights_and_get_sampling_client(kind="inflight").result()
    before = snapshot.compute_logprobs(start).result()
    np.testing.assert_array_equal(before[1:], moving.compute_logprobs(start).result()[1:])
    training.forward_backward([sdk_datum(d) for d in batch(1)], "cross_entropy")
    training.optim_step(ADAM).result()
    newer = training.save_weights_and_get_sampling_client(kind="inflight").result()
    after = newer.compute_logprobs(start).result()
    assert after[1:] != before[1:]
    assert moving.compute_logprobs(start).result()[1:] == after[1:]
    assert snapshot.compute_logprobs(start).result()[1:] == before[1:]
    assert snapshot.sample(start, 1, params).result().sequences


def test_two_clients_train_at_once_without_touching_each_other(url, service):
    data = [[sdk_datum(d) for d in batch(i)] for i in range(4)]

    def steps(run):
        results = []
        for datums in data:
            results.append(run.forward_backward(datums, "cross_entropy"))
            run.optim_step(ADAM)
        return results

    with tinker.ServiceClient(base_url=url) as a, tinker.ServiceClient(base_url=url) as b:
        runs = [
            c.create_lora_training_client(base_model="tiny-llama", rank=4, seed=1).result()
            for c in (a, b)
        ]
        together = [steps(run) for run in runs]
        losses = [[r.result().metrics["loss:sum"] for r in results] for results in together]
    native = native_run(service)
    alone = []
    for i in range(4):
        alone.append(native.forward_backward(batch(i), "cross_entropy"))
        native.optim_step(AdamParams(learning_rate=1e-2))
    expected = [r.result().metrics["loss:sum"] for r in alone]
    # DESIGN.md, contract 3: to 1e-5 relative across packings.
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)
    np.testing.assert_allclose(losses[1], expected, rtol=1e-5)


async def test_the_async_names_work(url):
    client = tinker.ServiceClient(base_url=url)
    training = await client.create_lora_training_client(base_model="tiny-llama", rank=4)
    step = training.forward_backward([sdk_datum(d) for d in batch(0)], "cross_entropy")
    optim = training.optim_step(ADAM)
    result, _ = await asyncio.gather(step.result_async(), optim.result_async())
    assert np.isfinite(result.metrics["loss:sum"])
    sampler = await training.save_weights_and_get_sampling_client()
    samples = [
        sampler.sample(prompt([i + 3]), 1, types.SamplingParams(max_tokens=4)) for i in range(16)
    ]
    responses = await asyncio.gather(*(s.result_async() for s in samples))
    ids = [s.sequence_id for r in responses for s in r.sequences]
    assert len(set(ids)) == 16
    await client.close("success").result_async()


def test_a_pickled_sampler_works_in_another_process(training, tmp_path):
    sampler = training.save_weights_and_get_sampling_client().result()
    here = sampler.sample(prompt(range(6)), 1, types.SamplingParams(max_tokens=6, seed=9)).result()
    (tmp_path / "sampler.pickle").write_bytes(pickle.dumps(sampler))
    script = f"""
import pickle
from tinker import types
sampler = pickle.loads(open({str(tmp_path / "sampler.pickle")!r}, "rb").read())
params = types.SamplingParams(max_tokens=6, seed=9)
response = sampler.sample(types.ModelInput.from_ints(list(range(6))), 1, params).result()
print(response.sequences[0].tokens)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == str(list(here.sequences[0].tokens)), done.stderr


def test_forward_backward_custom(service, training):
    data = batch(3)
    rng = np.random.default_rng(0)
    targets = [rng.normal(size=d.model_input.length).astype(np.float32) for d in data]

    def loss(datums, logprobs):
        import torch

        parts = [((p - torch.tensor(t)) ** 2).sum() for p, t in zip(logprobs, targets, strict=True)]
        return sum(parts), {"parts:sum": float(len(parts))}

    native = native_run(service)
    expected = native.forward_backward_custom(data, loss).result()
    native.optim_step(AdamParams(learning_rate=1e-2))
    got = training.forward_backward_custom([sdk_datum(d) for d in data], loss).result()
    training.optim_step(ADAM)
    assert got.metrics["parts:sum"] == 3
    np.testing.assert_allclose(
        got.metrics["loss:sum"], expected.metrics["custom_loss:sum"], rtol=1e-6
    )
    a = outputs(training.forward([sdk_datum(d) for d in data], "cross_entropy").result())
    b = native.forward(data).result().loss_fn_outputs
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y["logprobs"], atol=1e-5)


def test_many_datums_go_in_several_requests(training, monkeypatch):
    """Chunks of one call arrive out of order, the first one last."""
    config = training.holder._client_config.model_copy(update={"fwdbwd_max_chunk_len": 3})
    monkeypatch.setattr(training.holder, "_client_config", config)
    data = [sdk_datum(d) for d in batch(4, 20)]
    whole = training.forward_backward(data, "cross_entropy")
    step = training.optim_step(ADAM)
    result = whole.result()
    assert len(result.loss_fn_outputs) == 20
    assert step.result().metrics["grad_norm"] > 0
    assert result.metrics["tokens:sum"] == sum(d.model_input.length for d in data)


def test_get_tokenizer_is_the_models_own(client, training):
    tokenizer = training.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("the quick fox")) == "the quick fox"


def test_capabilities(client):
    with pytest.warns(FutureWarning):
        models = client.get_server_capabilities().supported_models
    assert {"tiny-llama", "tiny-qwen3"} <= {m.model_name for m in models}
    assert all(m.max_context_length == 512 for m in models)
