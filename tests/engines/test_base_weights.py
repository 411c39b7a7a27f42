"""The frozen base in bfloat16, 8 and 4 bits, against PEFT over what transformers makes of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import tinsmith
from tests.engines.test_learner import (
    LORA,
    assert_gradients_equal,
    engine_with_run,
    group_batch,
    padded_reference,
)
from tests.tiny import make_tiny_model
from tinsmith.engines.adapter_files import write_adapter
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.base_weights import check_base_weights, resolved
from tinsmith.engines.learner import LearnerEngine
from tinsmith.engines.sampler import SamplerEngine
from tinsmith.engines.vllm_start import VllmOptions, chosen_engine
from tinsmith.primitives.types import Datum, PolicyRef, SampleRequest, SamplingParams

QUANTIZED = {
    "int8": dict(load_in_8bit=True),
    "nf4": dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model_path(request, tiny_llama, tiny_qwen2, tiny_qwen3) -> str:
    return {"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3}[request.param]


def with_peft(base, path: str, engine: LearnerEngine, folder: Path):
    run = engine.runs["a"]
    for name, data in write_adapter(run.layout, run.params, path).items():
        (folder / name).write_bytes(data)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


def logprobs(output) -> np.ndarray:
    return np.concatenate([o["logprobs"] for o in output.loss_fn_outputs])


@needs_bitsandbytes
@pytest.mark.parametrize("weights", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_quantised_equals_peft_over_transformers_quantised_model(family, weights, tmp_path):
    """To 1e-4, as unquantised: the same rounded weights, multiplied in float32. (Rows are whole
    blocks here; from others bitsandbytes' own layers compute something else on a CPU.)"""
    model_path = make_tiny_model(tmp_path / "model", family, intermediate=128)
    engine = engine_with_run(Backbone(model_path, weights))
    datums = group_batch(np.random.default_rng(0))
    output = engine.forward_backward("a", datums, "ppo")

    base = AutoModelForCausalLM.from_pretrained(
        model_path,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(**QUANTIZED[weights]),
    )
    model = with_peft(base, model_path, engine, tmp_path)
    model.train()  # in evaluation bitsandbytes rounds the activations too
    loss, expected = padded_reference(model, datums, "ppo", None)
    loss.backward()
    np.testing.assert_allclose(logprobs(output), np.concatenate(expected), atol=1e-4)
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-4)
    assert_gradients_equal(engine, model)


@needs_bitsandbytes
@pytest.mark.parametrize(("weights", "bits", "error"), [("int8", 8.6, 0.01), ("nf4", 4.2, 0.16)])
def test_only_decoder_layers_are_rounded_and_to_few_bits(tiny_qwen3, weights, bits, error):
    """Also rows (of 96 here) that are no whole number of nf4's blocks."""
    full, quantized = Backbone(tiny_qwen3), Backbone(tiny_qwen3, weights)
    for name in quantized.targets:
        layer, exact = quantized.model.get_submodule(name), full.model.get_submodule(name)
        if name == "lm_head":
            assert torch.equal(layer.weight, exact.weight)
            continue
        assert layer.weight is None
        assert 8 * layer.packed.nbytes < bits * exact.weight.numel()
        off = (layer.dense() - exact.weight).abs().max()
        assert 0 < off < error * exact.weight.abs().max()
    assert quantized.unembedding.shape == (336, 64)


@needs_bitsandbytes
def test_a_layer_without_adapter_passes_the_gradient_on(tiny_llama):
    datums = group_batch(np.random.default_rng(1))
    lora = tinsmith.LoraConfig(rank=4, seed=1, train_mlp=False)
    engine = engine_with_run(Backbone(tiny_llama, "nf4"), lora)
    engine.forward_backward("a", datums, "ppo")
    run = engine.runs["a"]
    assert all(a.abs().sum() > 0 for a, _ in run.layout.views(run.grad).values())


def test_bf16_equals_pefts_bf16(model_path, tmp_path):
    """Both round to 8 bits, at different points (PEFT multiplies adapters in float32): less than 8%
    of the gradient's norm and 0.05 nats a token on average apart."""
    engine = engine_with_run(Backbone(model_path, "bf16"))
    datums = group_batch(np.random.default_rng(0))
    output = engine.forward_backward("a", datums, "importance_sampling")
    run = engine.runs["a"]
    assert {run.params.dtype, run.grad.dtype, run.adam.exp_avg.dtype} == {torch.float32}

    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    model = with_peft(base, model_path, engine, tmp_path)
    loss, expected = padded_reference(model, datums, "importance_sampling", None)
    loss.backward()
    difference = np.abs(logprobs(output) - np.concatenate(expected))
    assert difference.mean() < 0.05
    theirs = dict(model.named_parameters())
    reference = torch.zeros_like(run.grad)
    for name, pair in run.layout.views(reference).items():
        for part, view in zip(("lora_A", "lora_B"), pair, strict=True):
            view.copy_(theirs[f"base_model.model.{name}.{part}.default.weight"].grad)
    error = torch.linalg.vector_norm(run.grad - reference) / torch.linalg.vector_norm(reference)
    assert error < 0.08


@pytest.mark.parametrize("weights", ["bf16", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_the_sampler_draws_from_the_learners_weights(tiny_llama, weights):
    learner = engine_with_run(Backbone(tiny_llama, weights))
    backbone = Backbone(tiny_llama, weights)
    sampler = SamplerEngine(
        backbone, AutoTokenizer.from_pretrained(tiny_llama), kv_bytes=1 << 24, max_step_rows=48
    )
    sampler.add_adapter("a", 1, LORA, learner.export("a"))
    prompts = [np.arange(n) for n in (5, 30, 70)]
    params = SamplingParams(max_tokens=20, stop=[], seed=0)
    for prompt in prompts:
        sampler.submit(SampleRequest(prompt, params, PolicyRef("a", 1), 2))
    worst = 0.0
    while sampler.busy:
        for event in sampler.step():
            assert event.error is None
            prompt = event.request
            for drawn in event.response.sequences:
                tokens = np.concatenate([prompts[event.request], drawn.tokens])
                inputs = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1)}
                output = learner.forward("a", [Datum(tokens[:-1], inputs)], "cross_entropy")
                scored = output.loss_fn_outputs[0]["logprobs"][-len(drawn.tokens) :]
                worst = max(worst, float(np.abs(scored - drawn.logprobs).max()))
    assert worst < (0.25 if weights == "bf16" else 1e-4)


def test_auto_is_bf16_only_on_a_gpu_and_for_a_model_stored_in_it():
    assert resolved("auto", "BF16", "cpu") == ("fp32", "fp32")
    assert resolved("auto", "BF16", "cuda") == ("bf16", "bf16")
    assert resolved("auto", "F32", "cuda") == ("fp32", "fp32")
    assert resolved("nf4", "BF16", "cuda") == ("nf4", "bf16")
    assert resolved("int8", "BF16", "cpu") == ("int8", "fp32")
    assert resolved("bf16", "F32", "cpu") == ("bf16", "bf16")


def test_a_wrong_setting_is_refused_before_anything_starts(monkeypatch):
    with pytest.raises(tinsmith.InvalidInput, match="base_weights must be one of auto, fp32"):
        tinsmith.connect(base_weights="int4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tinsmith.Unavailable, match=r"pip install 'tinsmith\[quantized\]'"):
        tinsmith.connect(base_weights="nf4")
    check_base_weights("bf16")


def test_vllm_samples_only_from_weights_that_the_learner_has_too(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for engine, options in (("vllm", None), ("auto", VllmOptions())):
        with pytest.raises(tinsmith.InvalidInput, match="connect with engine='torch'"):
            chosen_engine(engine, options, "nf4")
    assert chosen_engine("auto", None, "int8") is None
    assert chosen_engine("vllm", None, "bf16").dtype == "bfloat16"
    assert chosen_engine("vllm", VllmOptions(dtype="half"), "bf16").dtype == "half"
    assert chosen_engine("vllm", None).dtype == "auto"


def test_a_model_that_is_stored_quantised_is_refused(tiny_llama, tmp_path):
    for file in Path(tiny_llama).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(tinsmith.InvalidInput, match="stored quantised"):
        Backbone(tmp_path)
