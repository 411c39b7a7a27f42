"""Sampling through Ray actors by vLLM, with adapters that come from the learner in memory."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

import tinsmith
from tests.actors.script import run_script, wait_until_gone
from tests.tiny import make_tiny_model
from tinsmith.actors import sampler
from tinsmith.actors.vllm_draw import likeliest

INSTALLED = importlib.util.find_spec("vllm") is not None


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed")
def test_a_run_trains_and_is_sampled_by_vllm(tmp_path):
    model = make_tiny_model(tmp_path / "tiny", "qwen3", head_dim=32)
    out = run_script(
        """
        import asyncio, json, sys
        import numpy as np
        import psutil
        import tinsmith
        from tests.actors.script import children_settled, descendants
        from tests.data import text_datum

        async def main(home, model):
            options = tinsmith.VllmOptions(max_rank=8)
            rng = np.random.default_rng(0)
            async with tinsmith.connect(
                home=home, num_cpus=2, engine="vllm", vllm=options, kv_bytes=1 << 26
            ) as service:
                try:
                    await service.create_lora_training_client(model, rank=16)
                except tinsmith.InvalidInput as error:
                    refused = str(error)
                training = await service.create_lora_training_client(model, rank=4, seed=0)
                live = await training.live_sampling_client().ready()
                params = tinsmith.SamplingParams(max_tokens=300, seed=0, stop=[])
                under_way = live.sample_stream(np.arange(40), 1, params)
                versions = [(await anext(under_way)).version]
                for _ in range(3):
                    training.forward_backward([text_datum(rng, 40)])
                    await training.optim_step(tinsmith.AdamParams(learning_rate=0.01))
                versions += [token.version async for token in under_way]
                pinned = await training.save_weights_and_get_sampling_client()
                short = tinsmith.SamplingParams(max_tokens=20, seed=1, stop=[])
                (sampled,) = (await pinned.sample(np.arange(40), 1, short)).sequences
                tokens = np.concatenate([np.arange(40), sampled.tokens])
                datum = tinsmith.Datum(
                    tokens[:-1], {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1)}
                )
                (scored,) = (await training.forward([datum])).loss_fn_outputs
                off = np.abs(scored["logprobs"][39:] - sampled.logprobs).max()
                streamed = [t.token async for t in pinned.sample_stream(np.arange(40), 1, short)]
                assert streamed == sampled.tokens.tolist()
                path = (await training.save_weights_for_sampler("end")).path
                saved = await service.create_sampling_client(path)
                (again,) = (await saved.sample(np.arange(40), 1, short)).sequences
                np.testing.assert_array_equal(again.tokens, sampled.tokens)
                pids = descendants()

                (core,) = (p for p in map(psutil.Process, pids) if p.name().startswith("VLLM::EngineCor"))
                core.kill()
                # Its successor is given all adapters again: the checkpoint's, the pinned and the live.
                for policy in (saved, pinned, live):
                    (again,) = (await policy.sample(np.arange(40), 1, short)).sequences
                    np.testing.assert_array_equal(again.tokens, sampled.tokens)
                pids += descendants()
            print(json.dumps({
                "refused": refused, "versions": sorted(set(versions)),
                "version": sorted({int(v) for v in sampled.versions}), "off": float(off),
                "pids": pids, "settled": children_settled(90),
            }))

        asyncio.run(main(*sys.argv[1:]))
        """,
        tmp_path / "home",
        model,
        seconds=240,
    )
    told = json.loads(out.splitlines()[-1])
    assert "rank 16 is above max_rank=8" in told["refused"]
    assert told["versions"][0] == 0
    assert told["versions"][-1] > 0
    assert told["version"] == [3]
    assert told["off"] < 1e-4
    assert told["settled"]
    assert wait_until_gone(told["pids"]) == []


def test_an_engine_that_is_not_there_is_refused_in_a_sentence(monkeypatch):
    with pytest.raises(tinsmith.InvalidInput, match="engine must be one of auto, vllm, torch"):
        tinsmith.connect(engine="sglang")
    with pytest.raises(tinsmith.InvalidInput, match="engine is 'torch'"):
        tinsmith.connect(engine="torch", vllm=tinsmith.VllmOptions())
    with pytest.raises(tinsmith.InvalidInput, match=r"max_rank must be one of 8, .*, got 12"):
        tinsmith.VllmOptions(max_rank=12)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(tinsmith.Unavailable, match="pip install 'tinsmith\\[vllm\\]'"):
        tinsmith.connect(engine="vllm")


@pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed")
def test_the_likeliest_tokens_are_the_same_where_vllm_joins_outputs():
    """It drops the drawn token from among the likeliest when a reader is late."""
    from vllm.logprobs import FlatLogprobs

    rng = np.random.default_rng(0)
    once, parts, wanted = FlatLogprobs(), [], []
    for rank in (1, 3, 4, 9):
        ids, logprobs = rng.permutation(20)[:9].tolist(), sorted(rng.normal(size=9).tolist())[::-1]
        row = ([ids[rank - 1], *ids[:4]], [logprobs[rank - 1], *logprobs[:4]], [rank, 1, 2, 3, 4])
        part = FlatLogprobs()
        for flat in (once, part):
            flat.append_fast(*row, [None] * 5)
        parts.append(part)
        wanted.append((ids[:4], logprobs[:4]))
    joined, *rest = parts
    for part in rest:
        joined.extend(part)
    for flat in (once, joined):
        places = zip(flat.start_indices, flat.end_indices, strict=True)
        assert [likeliest(flat, start, end, 4) for start, end in places] == wanted
    assert len(joined.token_ids) < len(once.token_ids)


def test_the_hosts_memory_does_not_say_how_much_of_a_gpu_vllm_may_take(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sampler._vllm_kv_bytes(None) is None
    assert sampler._vllm_kv_bytes(5) == 5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sampler._vllm_kv_bytes(None) > 0
