"""A merged model against PEFT's adapter on its base, and against Tinsmith's own engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import tinsmith
from tests.engines.as_trained import as_trained
from tinsmith.engines.adapter_files import CONFIG, WEIGHTS, read_factors, write_adapter
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.engines.merge import INDEX, merge_adapter
from tinsmith.engines.sampler import SamplerEngine
from tinsmith.primitives.types import Datum, LoraConfig, PolicyRef, SampleRequest, SamplingParams

TOKENS = np.random.default_rng(0).integers(0, 336, 40)
GROUPS = {
    "all": LoraConfig(rank=4, seed=1),
    "attn": LoraConfig(rank=2, seed=1, train_mlp=False, train_unembed=False),
    "mlp and unembed": LoraConfig(rank=3, seed=1, alpha=8, train_attn=False),
    "unembed": LoraConfig(rank=4, seed=1, train_attn=False, train_mlp=False),
}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model_path(request, tiny_llama, tiny_qwen2, tiny_qwen3) -> Path:
    return Path({"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3}[request.param])


def trained(path: Path, lora: LoraConfig) -> tuple[Backbone, torch.Tensor, dict[str, bytes]]:
    """A backbone, an adapter as after some training, and the adapter's files."""
    backbone = Backbone(path)
    layout = backbone.layout(lora)
    flat = layout.initial()
    as_trained(layout, flat)
    return backbone, flat, write_adapter(layout, flat, str(path))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)[None]).logits[0].float()


def from_peft(path: Path, files: dict[str, bytes], tmp_path: Path) -> torch.Tensor:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(base, folder))


def logprobs(logits_TV: torch.Tensor) -> np.ndarray:
    targets = torch.from_numpy(TOKENS[1:, None])
    return logits_TV[:-1].log_softmax(-1).gather(1, targets)[:, 0].numpy()


def merge(base: Path, files: dict[str, bytes], tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    merge_adapter(base, files, folder)
    return folder


@pytest.mark.parametrize("groups", GROUPS)
def test_peft_the_merged_model_and_the_engines_agree(model_path, groups, tmp_path):
    lora = GROUPS[groups]
    backbone, flat, files = trained(model_path, lora)
    expected = from_peft(model_path, files, tmp_path)
    bare = logits(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32))
    assert (expected - bare).abs().max() > 0.1

    folder = merge(model_path, files, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)

    learner = LearnerEngine(backbone)
    learner.create_run("a", lora)
    learner.load("a", flat, None, 1)
    weights = np.ones(len(TOKENS) - 1)
    datum = Datum(TOKENS[:-1], {"target_tokens": TOKENS[1:], "weights": weights})
    output = learner.forward("a", [datum], "cross_entropy").loss_fn_outputs[0]["logprobs"]
    np.testing.assert_allclose(output, logprobs(expected), atol=1e-4)

    for engine, policy in (
        (sampler(backbone), PolicyRef("a", 1)),
        (sampler(Backbone(folder)), PolicyRef()),
    ):
        if policy.run_id is not None:
            engine.add_adapter("a", 1, lora, flat)
        request = SampleRequest(TOKENS, SamplingParams(max_tokens=1), policy, prompt_logprobs=True)
        number = engine.submit(request)
        events = []
        while engine.busy:
            events += engine.step()
        (response,) = [e.response for e in events if e.request == number and e.response]
        np.testing.assert_allclose(response.prompt_logprobs[1:], logprobs(expected), atol=1e-4)


def sampler(backbone: Backbone) -> SamplerEngine:
    tokenizer = AutoTokenizer.from_pretrained(backbone.path)
    return SamplerEngine(backbone, tokenizer, kv_bytes=1 << 24)


def test_an_adapter_on_a_tied_output_unties_it_and_leaves_the_embedding(tiny_llama, tmp_path):
    base = Path(tiny_llama)
    _, _, files = trained(base, GROUPS["unembed"])
    folder = merge(base, files, tmp_path)
    before = safetensors.torch.load_file(base / "model.safetensors")
    after = safetensors.torch.load_file(folder / "model.safetensors")
    assert set(after) - set(before) == {"lm_head.weight"}
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name
    assert not torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_adapter_beside_a_tied_output_leaves_it_tied(tiny_llama, tmp_path):
    _, _, files = trained(Path(tiny_llama), GROUPS["attn"])
    folder = merge(Path(tiny_llama), files, tmp_path)
    assert "lm_head.weight" not in safetensors.torch.load_file(folder / "model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(folder).config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_in_several_files_stays_so_in_its_own_dtype(
    family, tiny_llama, tiny_qwen3, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama if family == "llama" else tiny_qwen3)
    base = tmp_path / "base"
    model.to(torch.bfloat16).save_pretrained(base, max_shard_size="60KB")
    shards = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(shards) > 2
    _, _, files = trained(base, GROUPS["all"])
    folder = merge(base, files, tmp_path)
    assert sorted(p.name for p in folder.glob("*.safetensors")) == shards
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    scale, factors = read_factors(files)
    for name, (a, b) in factors.items():
        plain = "model.embed_tokens" if name == "lm_head" and family == "llama" else name
        weight = model.get_submodule(plain).weight.float() + scale * (b @ a)
        # To within one rounding: the sum was made in float32.
        torch.testing.assert_close(
            merged.get_submodule(name).weight, weight.bfloat16(), atol=1e-6, rtol=2**-7
        )
    index = json.loads((folder / INDEX).read_text())
    stored = [safetensors.torch.load_file(folder / shard) for shard in shards]
    assert index["metadata"]["total_size"] == sum(t.nbytes for s in stored for t in s.values())
    assert "lm_head.weight" in index["weight_map"]


def test_tokenizer_template_and_generation_config_come_along(tiny_llama, tmp_path):
    _, _, files = trained(Path(tiny_llama), GROUPS["all"])
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (base / "generation_config.json").unlink()
    folder = merge(base, files, tmp_path)
    messages = [{"role": "user", "content": "the quick fox"}]
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder, tiny_llama))
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == theirs.eos_token_id


def test_what_does_not_fit_is_refused(tiny_llama, tiny_qwen3, tmp_path):
    base = Path(tiny_llama)
    _, _, files = trained(base, GROUPS["attn"])
    tensors = safetensors.torch.load(files[WEIGHTS])
    first = min(tensors)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "fp8"}}
    (other / "config.json").write_text(json.dumps(quantized))
    empty = Path(shutil.copytree(base, tmp_path / "empty"))
    (empty / "model.safetensors").unlink()

    def weights(**changes: torch.Tensor) -> dict[str, bytes]:
        return files | {WEIGHTS: safetensors.torch.save({**tensors, **changes})}

    narrow = weights(**{first: tensors[first][:, :-1].contiguous()})
    half = {k: v for k, v in tensors.items() if k != first.replace("lora_A", "lora_B")}
    for where, wrong, message in (
        (base, {CONFIG: files[CONFIG]}, "has no adapter_model.safetensors"),
        (base, narrow, r"is for a .*q_proj|is for a .*k_proj|the model's is"),
        (base, weights(**{"x.lora_magnitude_vector": torch.ones(1)}), "is not LoRA's"),
        (base, files | {WEIGHTS: safetensors.torch.save(half)}, "has no tensor .*lora_B"),
        (
            base,
            weights(**{"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(4, 2)}),
            "trains x, which",
        ),
        (other, files, "is quantized"),
        (empty, files, "has no model.safetensors"),
    ):
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        with pytest.raises(tinsmith.InvalidInput, match=message):
            merge_adapter(where, wrong, folder)
