"""Saving, loading and resuming: a checkpoint is immutable, and goes on bit for bit."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import tinsmith
from tests.actors.test_training import new_run, same_weights_logprobs, script
from tests.data import text_datum
from tinsmith.primitives.op import Op
from tinsmith.primitives.paths import CheckpointPath
from tinsmith.primitives.types import AdamParams

MODEL = "tiny-llama"


async def train(training, seed: int, count: int = 6) -> None:
    await asyncio.gather(*(getattr(training, kind)(*args) for kind, args in script(seed, count)))


async def trained_run(service, seed: int = 0):
    training = await new_run(service)
    await train(training, seed)
    return training


async def assert_same_weights(a, b) -> None:
    for x, y in zip(await same_weights_logprobs(a), await same_weights_logprobs(b), strict=True):
        np.testing.assert_array_equal(x, y)


async def differ(a, b) -> bool:
    return bool((await same_weights_logprobs(a))[0][3] != (await same_weights_logprobs(b))[0][3])


async def test_load_state_with_optimizer_goes_on_bitwise_and_without_starts_adam_afresh(service):
    original = await trained_run(service)
    path = (await original.save_state("mid")).path
    await train(original, 1)

    exact, fresh = await new_run(service), await new_run(service)
    exact.load_state_with_optimizer(path)
    fresh.load_state(path)
    await train(exact, 1)
    await train(fresh, 1)
    await assert_same_weights(original, exact)
    assert await differ(original, fresh)


async def test_a_new_run_starts_from_a_checkpoint_with_or_without_the_optimizer(service):
    original = await trained_run(service)
    path = (await original.save_state("mid", user_metadata={"note": [1, None]})).path
    exact = await service.create_training_client_from_state_with_optimizer(path)
    fresh = await service.create_training_client_from_state(path, user_metadata={"from": path})
    assert len({original.run_id, exact.run_id, fresh.run_id}) == 3
    await assert_same_weights(original, fresh)
    await train(original, 1)
    await train(exact, 1)
    await train(fresh, 1)
    await assert_same_weights(original, exact)
    assert await differ(original, fresh)
    assert (await exact.get_info()).lora == (await original.get_info()).lora
    assert (await service.get_training_run(fresh.run_id)).user_metadata == {"from": path}


async def test_loading_drops_what_had_accumulated(service):
    training = await trained_run(service)
    path = (await training.save_state("mid")).path
    training.forward_backward([text_datum(np.random.default_rng(0))])
    training.load_state_with_optimizer(path)
    assert (await training.optim_step()).metrics["grad_norm"] == 0


async def test_a_run_in_memory_is_resumed_where_its_log_stands(service):
    training = await trained_run(service)
    again = await service.resume_training_client(training.run_id)
    assert again.run_id == training.run_id
    assert again.base_model == MODEL
    assert (await again.optim_step()).version == 3


async def test_a_run_is_resumed_from_a_checkpoint_with_its_version(service):
    training = await trained_run(service)
    path = (await training.save_state("two-steps")).path
    reference = await service.create_training_client_from_state_with_optimizer(path)
    await train(training, 1)
    again = await service.resume_training_client(training.run_id, path=path)
    assert (await again.get_info()).version == 2
    await assert_same_weights(reference, again)
    await train(again, 1)
    await train(reference, 1)
    await assert_same_weights(reference, again)


async def test_a_resumed_client_does_not_wait_for_numbers_that_never_came(service):
    """A driver that died in the middle of a custom loss leaves a gap in the log."""
    training = await trained_run(service)
    missing = training._take_seq_ids()
    stuck = training.optim_step()
    await asyncio.sleep(0.1)
    again = await service.resume_training_client(training.run_id)
    assert (await asyncio.wait_for(again.get_info(), 20)).version == 3
    assert (await stuck).version == 3
    with pytest.raises(tinsmith.OpCancelled, match="another client took over"):
        await training._submit("optim_step", seq_id=missing, adam_params=AdamParams())


async def test_weights_go_back_in_time_and_samplers_notice(service):
    """Version 3 sampled before and after a resume from version 2 are different weights."""
    training = await trained_run(service)
    path = (await training.save_state("two-steps")).path
    prompt = np.arange(60)
    samples = []
    for seed in (1, 2):
        training = await service.resume_training_client(training.run_id, path=path)
        training.forward_backward([text_datum(np.random.default_rng(seed), 40)])
        training.optim_step(AdamParams(learning_rate=0.1))
        policy = await training.save_weights_and_get_sampling_client()
        assert policy.policy.version == 3
        params = tinsmith.SamplingParams(max_tokens=1, temperature=0, stop=[])
        got = await policy.sample(prompt, 1, params)
        logprobs = await policy.compute_logprobs([*prompt, *got.sequences[0].tokens])
        samples.append(got.sequences[0])
        assert logprobs[-1] == pytest.approx(samples[-1].logprobs[0], abs=1e-4)


async def test_unusable_checkpoints_are_refused_and_the_run_goes_on(service):
    training = await trained_run(service)
    weights = (await training.save_weights_for_sampler("for-sampling")).path
    for path, error, message in (
        ("step-1", tinsmith.InvalidInput, "is not a checkpoint path"),
        (f"tinker://{training.run_id}/weights/none", tinsmith.NotFound, "no checkpoint 'tinker:"),
        (weights, tinsmith.InvalidInput, "holds no optimizer state"),
    ):
        with pytest.raises(error, match=message):
            await training.load_state_with_optimizer(path)
        with pytest.raises(error, match=message):
            await service.create_training_client_from_state_with_optimizer(path)
    with pytest.raises(tinsmith.NotFound, match="no checkpoint"):
        await service.create_sampling_client(f"tinker://{training.run_id}/weights/none")
    other = await service.create_lora_training_client(MODEL, rank=2)
    with pytest.raises(tinsmith.InvalidInput, match="rank 4"):
        await other.load_state(weights)
    with pytest.raises(tinsmith.NotFound, match="no run 'none'"):
        await service.resume_training_client("none")
    with pytest.raises(tinsmith.InvalidInput, match="exactly one of"):
        await service.create_sampling_client()
    await training.load_state(weights)


async def test_a_name_is_given_once_also_when_two_saves_are_under_way(service):
    training = await trained_run(service)
    ops = [training.save_state("once"), training.save_state("once")]
    assert (await ops[0]).path.endswith("/weights/once")
    with pytest.raises(tinsmith.InvalidInput, match="exists already; take another name"):
        await ops[1]
    with pytest.raises(tinsmith.InvalidInput, match="exists already"):
        await training.save_state("once")
    with pytest.raises(tinsmith.InvalidInput, match=r"checkpoint name '\.\./x' must be"):
        await training.save_state("../x")
    await training.save_weights_for_sampler("once")


async def test_overwriting_keeps_the_last_one_written(service):
    training = await new_run(service)
    for kind, args in script(0, 12):
        getattr(training, kind)(*args)
        training.save_state("last", overwrite=True)
    path = (await training.save_state("last", overwrite=True)).path
    (checkpoint,) = await service.list_checkpoints(training.run_id)
    assert (checkpoint.path, checkpoint.version) == (path, 4)
    again = await service.create_training_client_from_state(path)
    await assert_same_weights(training, again)
    folder = Path(service.home) / "runs" / training.run_id / "weights"
    assert [p.name for p in folder.iterdir()] == ["last"]


async def test_a_saved_adapter_loads_in_peft_and_gives_the_same_logprobs(service):
    training = await trained_run(service)
    path = (await training.save_weights_for_sampler("peft")).path
    model = AutoModelForCausalLM.from_pretrained(f"{service.home}/models/{MODEL}")
    folder = Path(service.home) / CheckpointPath.parse(path).folder
    model = peft.PeftModel.from_pretrained(model.float(), folder)
    data = [text_datum(np.random.default_rng(100 + i), 40) for i in range(2)]
    for datum, got in zip(data, await same_weights_logprobs(training), strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(datum.model_input.tokens)[None]).logits[0]
        targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"])
        expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["save_state", "save_weights_for_sampler"])
async def test_a_saved_checkpoint_is_sampled_from_by_its_path(service, kind):
    training = await trained_run(service)
    path = (await getattr(training, kind)("a-name-that-is-longer-than-most-1")).path
    await train(training, 1)
    other = (await getattr(training, kind)("a-name-that-is-longer-than-most-2")).path
    prompt = np.arange(60)
    params = tinsmith.SamplingParams(max_tokens=12, temperature=0, stop=[])
    for saved in (path, other):
        policy = await service.create_sampling_client(saved)
        sequence = (await policy.sample(prompt, 1, params)).sequences[0]
        reference = await service.create_training_client_from_state(saved)
        tokens = np.concatenate([prompt, sequence.tokens])
        datum = tinsmith.Datum(
            tokens[:-1], {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1)}
        )
        logprobs = (await reference.forward([datum])).loss_fn_outputs[0]["logprobs"]
        np.testing.assert_allclose(sequence.logprobs, logprobs[-12:], atol=1e-4)


async def test_runs_and_checkpoints_are_listed_newest_first_and_deleted(service):
    training = await service.create_lora_training_client(
        MODEL, rank=2, seed=5, user_metadata={"purpose": "listing"}
    )
    before = [(await training.save_state("a", user_metadata={"x": 1})).path]
    await training.optim_step()
    second = await training.save_weights_for_sampler("b", user_metadata={"x": 2})
    before += [second.path]
    run = (await service.list_training_runs())[0]
    assert (run.run_id, run.base_model, run.user_metadata) == (
        training.run_id,
        MODEL,
        {"purpose": "listing"},
    )
    assert (run.lora.rank, run.lora.seed) == (2, 5)
    listed = await service.list_checkpoints(training.run_id)
    assert [c.path for c in listed] == before[::-1]
    assert [(c.kind, c.version) for c in listed] == [("sampler_weights", 1), ("weights", 0)]
    assert [c.user_metadata for c in listed] == [{"x": 2}, {"x": 1}]
    folder = Path(service.home) / "runs" / training.run_id
    assert listed[1].size_bytes == sum(f.stat().st_size for f in (folder / "weights/a").iterdir())
    assert set(before) <= {c.path for c in await service.list_checkpoints()}

    await service.delete_checkpoint(before[0])
    assert [c.path for c in await service.list_checkpoints(training.run_id)] == before[1:]
    assert not (folder / "weights/a").exists()
    with pytest.raises(tinsmith.NotFound, match="no checkpoint"):
        await service.delete_checkpoint(before[0])

    pending = Op(training._grant.learner.call("submit", training.run_id, 99, "get_info", {}))
    await pending.cancel()
    await service.delete_training_run(training.run_id)
    assert not folder.exists()
    for call in (
        service.get_training_run(training.run_id),
        service.list_checkpoints(training.run_id),
        service.delete_training_run(training.run_id),
        service.resume_training_client(training.run_id),
        training.get_info(),
        pending,
    ):
        with pytest.raises(tinsmith.NotFound, match=training.run_id):
            await call


async def test_deleting_a_run_with_withdrawn_operations_waiting(service):
    training = await new_run(service)
    training._take_seq_ids()  # a gap: what follows waits
    waiting, withdrawn = training.optim_step(), training.optim_step()
    await withdrawn.cancel()
    await service.delete_training_run(training.run_id)
    with pytest.raises(tinsmith.NotFound, match="was closed"):
        await waiting
    with pytest.raises(tinsmith.OpCancelled):
        await withdrawn


async def test_a_run_tells_about_itself_and_the_service_about_its_models(service):
    training = await trained_run(service)
    info = await training.get_info()
    assert (info.run_id, info.base_model, info.version) == (training.run_id, MODEL, 2)
    assert (info.max_context_length, info.vocab_size, info.lora.rank) == (512, 336, 4)
    assert info.num_parameters > 0
    tokenizer = training.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("the quick fox")) == "the quick fox"
    capabilities = await service.get_server_capabilities()
    assert {m.model_name for m in capabilities.supported_models} == {"tiny-llama", "tiny-qwen3"}
    assert {m.max_context_length for m in capabilities.supported_models} == {512}
    assert {"cross_entropy", "ppo", "cispo"} <= set(capabilities.losses)


async def test_a_model_is_the_same_by_name_and_by_path(service):
    by_name = await trained_run(service)
    by_path = await new_run(service, model=f"{service.home}/models/{MODEL}")
    assert by_path.base_model == by_name.base_model == MODEL
    saved = (await by_path.save_state("a")).path
    await by_name.load_state(saved)
