"""What our LoRA trains, vLLM serves; what it cannot serve is refused in a sentence."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from time import perf_counter

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoTokenizer

import tinsmith
from tests.actors.script import run_script
from tests.tiny import make_tiny_model
from tinsmith.engines.adapter_files import CONFIG, WEIGHTS, write_adapter
from tinsmith.engines.backbone import Backbone, targets_of_folder
from tinsmith.engines.learner import LearnerEngine
from tinsmith.engines.lora import AdapterLayout
from tinsmith.engines.vllm_coverage import Coverage
from tinsmith.engines.vllm_start import VllmOptions
from tinsmith.primitives.types import Datum, LoraConfig, PolicyRef, SampleRequest, SamplingParams

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
CLOSE = dict(atol=1e-4)  # float32, DESIGN.md, contract 6
FAMILIES = {"llama": False, "qwen2": True, "qwen3": True}  # whether the output matrix is tied
GROUPS = ("attn", "mlp", "unembed")


def trains(*groups: str, rank: int = 4) -> LoraConfig:
    return LoraConfig(rank=rank, **{f"train_{group}": group in groups for group in GROUPS})


# ---- before vLLM is started ----


def model_folder(path, **values) -> str:
    """A folder with the `config.json` of a small llama and no weights."""
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    (path / "config.json").write_text(json.dumps({**config, **values}))
    return str(path)


def check(path, lora: LoraConfig, more: Mapping[str, object] | None = None) -> None:
    Coverage.of(path, VllmOptions(more=more or {})).check(lora)


def test_every_group_of_the_three_families_is_served(tmp_path):
    for family, architecture in (
        ("llama", "LlamaForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
    ):
        folder = model_folder(
            tmp_path, model_type=family, architectures=[architecture], hidden_size=128
        )
        check(folder, trains(*GROUPS, rank=64))
    assert "lm_head" in Coverage.of(folder, VllmOptions()).modules()


def test_the_check_takes_a_fraction_of_a_second_for_a_large_model(tmp_path):
    large = model_folder(
        tmp_path,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        vocab_size=128256,
        head_dim=128,
    )
    check(large, trains(*GROUPS))  # the first also reads vLLM's source and transformers' model
    start = perf_counter()
    check(large, trains(*GROUPS))
    assert perf_counter() - start < 1


def test_a_vocabulary_too_large_for_an_adapted_output_layer_costs_only_that_layer(tmp_path):
    folder = model_folder(tmp_path, vocab_size=300_000)
    with pytest.raises(
        tinsmith.InvalidInput,
        match=r"output layer \(unembed\) that this run trains: the vocabulary of 300000 is above "
        r"its limit of \d+.*train_unembed=False.*engine='torch'",
    ):
        check(folder, trains("attn", "unembed"))
    check(folder, trains("attn", "mlp"))
    assert "lm_head" not in Coverage.of(folder, VllmOptions()).modules()


def test_a_model_that_vllm_does_not_run_with_adapters_is_refused_whatever_is_trained(tmp_path):
    unknown = model_folder(tmp_path, architectures=["NobodysForCausalLM"])
    with pytest.raises(
        tinsmith.InvalidInput, match=r"no model for the architecture Nobodys.*engine='torch'"
    ):
        check(unknown, trains("attn"))
    check(unknown, trains("attn"), {"hf_overrides": {"architectures": ["LlamaForCausalLM"]}})
    without = model_folder(tmp_path, architectures=["GPT2LMHeadModel"])
    with pytest.raises(tinsmith.InvalidInput, match="GPT2LMHeadModel takes no LoRA adapters"):
        check(without, trains("attn"))


def test_heads_for_which_vllm_has_no_attention_on_a_cpu_are_refused(tmp_path, monkeypatch):
    folder = model_folder(tmp_path, head_dim=16)
    with pytest.raises(tinsmith.InvalidInput, match=r"no attention for heads of 16, only of 32, "):
        check(folder, trains("attn"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check(folder, trains("attn"))


def test_experts_fall_under_the_check(tiny_moe, monkeypatch):
    folder, others = tiny_moe, ["gate", "k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]
    with pytest.raises(tinsmith.InvalidInput, match="on a CPU it runs no mixture of experts"):
        check(folder, trains("attn"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check(folder, trains("attn", "mlp"))
    assert Coverage.of(folder, VllmOptions()).modules() == sorted(["experts", *others])
    parallel = {"enable_expert_parallel": True}
    check(folder, trains("mlp"), parallel)
    for more, reason in (
        ({"fully_sharded_loras": True}, "fully_sharded_loras at once"),
        ({"all2all_backend": "deepep_low_latency"}, "only with all2all_backend='allgather"),
    ):
        with pytest.raises(
            tinsmith.InvalidInput, match=f"routed experts.*{reason}.*train_mlp=False"
        ):
            check(folder, trains("attn", "mlp"), {**parallel, **more})
        check(folder, trains("attn"), {**parallel, **more})
        assert Coverage.of(folder, VllmOptions(more={**parallel, **more})).modules() == others


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["each", "shared"])
def test_vllm_packs_the_experts_of_an_adapter(tiny_moe, experts):
    """By its own code, as far as it goes without a GPU; and each stack is what the learner holds."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    lora = LoraConfig(rank=3, alpha=8, train_router=True, experts=experts)
    layout = AdapterLayout.of(lora, targets_of_folder(tiny_moe))
    flat = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    files = write_adapter(layout, flat, tiny_moe)
    helper = PEFTHelper.from_dict(json.loads(files[CONFIG]))
    tensors = safetensors.torch.load(files[WEIGHTS])
    model = LoRAModel.from_lora_tensors(1, tensors, helper, "cpu", torch.float32)
    mapping = RoutedExperts.make_expert_params_mapping(
        torch.nn.Module(), "gate_proj", "down_proj", "up_proj", 8
    )
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        names = [f"{block}.{weight.rstrip('.')}" for _, weight, _, _ in mapping]
        packed = PackedLoRALayerWeights.pack_moe(
            [model.loras.pop(name) for name in names], f"{block}.experts"
        )
        views = layout.views(flat)
        for index, projection in enumerate(("gate_proj", "down_proj", "up_proj")):
            a, b = views[f"{block}.experts.{projection}"]
            for ours, theirs in ((a, packed.lora_a[index]), (b, packed.lora_b[index])):
                assert torch.equal(ours.expand(8, -1, -1), theirs)
        assert packed.scaling == [8 / 3] * 3
    left = {name.rpartition(".")[2] for name in model.loras}
    assert left == {"q_proj", "k_proj", "v_proj", "o_proj", "gate", "lm_head"}


def test_a_rank_that_no_vllm_serves_is_refused_without_advice_that_would_not_help(tmp_path):
    with pytest.raises(tinsmith.InvalidInput, match="a rank of at most 512, this one has 600"):
        check(model_folder(tmp_path), trains("attn", rank=600))


@pytest.mark.slow
def test_runs_are_refused_when_created_resumed_or_made_from_a_checkpoint(tmp_path):
    """One cluster by the torch engine makes them, another by vLLM refuses them."""
    model, home = make_tiny_model(tmp_path / "tiny"), tmp_path / "home"
    out = run_script(
        """
        import asyncio, json, sys
        import tinsmith

        async def main(home, model):
            async with tinsmith.connect(home=home, num_cpus=2, engine="torch") as service:
                training = await service.create_lora_training_client(model, rank=2)
                path = (await training.save_state("here")).path
            said = []
            async with tinsmith.connect(home=home, num_cpus=2, engine="vllm") as service:
                for attempt in (
                    lambda: service.create_lora_training_client(model, rank=2),
                    lambda: service.create_training_client_from_state(path),
                    lambda: service.resume_training_client(training.run_id),
                ):
                    try:
                        await attempt()
                    except tinsmith.InvalidInput as error:
                        said.append(str(error))
                runs = [run.run_id for run in await service.list_training_runs()]
            print(json.dumps([said, runs == [training.run_id]]))

        asyncio.run(main(*sys.argv[1:]))
        """,
        home,
        model,
        seconds=120,
    )
    said, nothing_new = json.loads(out.splitlines()[-1])
    assert len(said) == 3
    assert all("no attention for heads of 16" in message for message in said)
    assert nothing_new


# ---- vLLM itself ----


@pytest.fixture(scope="module", params=FAMILIES)
async def served(request, tmp_path_factory):
    """vLLM and a learner over one tiny model of a family."""
    from tinsmith.actors.vllm_engine import VllmEngine

    family = request.param
    path = make_tiny_model(
        tmp_path_factory.mktemp("models") / family, family, head_dim=32, tied=FAMILIES[family]
    )
    options = VllmOptions(max_adapters=4, max_rank=8, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = VllmEngine(path, tokenizer, kv_bytes=1 << 26, options=options)
    yield engine, LearnerEngine(Backbone(path))
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("groups", [*((group,) for group in GROUPS), GROUPS], ids="+".join)
async def test_logprobs_under_an_adapter_of_any_groups_are_the_learners(served, groups):
    engine, learner = served
    config, run = trains(*groups), "+".join(groups)
    flat = torch.randn(engine.layout(config).size, generator=torch.Generator().manual_seed(0)) * 0.1
    learner.create_run(run, config)
    learner.runs[run].params.data.copy_(flat)
    await engine.add_adapter(run, 1, config, flat.numpy())
    prompt = np.random.default_rng(0).integers(0, 336, 40)
    params = SamplingParams(max_tokens=20, seed=1, stop=[])
    request = SampleRequest(prompt, params, PolicyRef(run), prompt_logprobs=True)
    response = await engine.sample(request)
    (drawn,) = response.sequences
    tokens = np.concatenate([prompt, drawn.tokens])
    expected = scored(learner, run, tokens)
    np.testing.assert_allclose(drawn.logprobs, expected[39:], **CLOSE)
    np.testing.assert_allclose(response.prompt_logprobs[1:], expected[:39], **CLOSE)
    learner.runs[run].params.data.zero_()
    assert (
        np.abs(scored(learner, run, tokens) - expected).max() > 0.01
    )  # the adapter does something
    learner.drop_run(run)
    await engine.drop_run(run)


def scored(learner, run, tokens):
    datum = Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1)})
    return learner.forward(run, [datum], "cross_entropy").loss_fn_outputs[0]["logprobs"]


@pytest.mark.slow
async def test_a_layer_that_vllm_has_not_wrapped_is_refused_and_nothing_is_kept(
    served, monkeypatch
):
    engine, _ = served
    strange = {**engine.coverage.targets, "model.layers.0.mlp.nobodys.up_proj": (64, 96)}
    config = trains("mlp")
    with monkeypatch.context() as patch:
        patch.setitem(vars(engine.coverage), "targets", strange)
        flat = np.zeros(engine.layout(config).size, np.float32)
        with pytest.raises(
            tinsmith.InvalidInput,
            match=r"no layer model\.layers\.0\.mlp\.nobodys\.up_proj .*train_mlp=False",
        ):
            await engine.add_adapter("strange", 1, config, flat)
    assert await engine.newest("strange") is None
    with pytest.raises(tinsmith.NotFound, match="holds no weights of run 'strange'"):
        await engine.sample(SampleRequest([1, 2], SamplingParams(), PolicyRef("strange")))
    await engine.add_adapter("strange", 1, config, np.zeros(engine.layout(config).size, np.float32))
    assert await engine.newest("strange") == 1
    await engine.drop_run("strange")


@pytest.mark.slow
async def test_a_version_that_did_not_reach_the_workers_is_not_known(served, monkeypatch):
    engine, _ = served
    config = trains("attn")
    flat = np.ones(engine.layout(config).size, np.float32)
    with monkeypatch.context() as patch:
        patch.setattr("tinsmith.engines.shared_memory.SharedArray.path", "/nowhere")
        with pytest.raises(tinsmith.TinsmithError, match="stage_adapter failed in vLLM's workers"):
            await engine.add_adapter("late", 1, config, flat)
    assert await engine.newest("late") is None
    await engine.add_adapter("late", 1, config, flat)
    (drawn,) = (
        await engine.sample(SampleRequest([1, 2], SamplingParams(max_tokens=3), PolicyRef("late")))
    ).sequences
    assert (drawn.versions == 1).all()
    await engine.drop_run("late")
