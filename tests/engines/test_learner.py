"""The learner's engine against PEFT and transformers, on padded batches, in fp32."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import tinsmith
from tests.engines.as_trained import as_trained
from tinsmith.algorithms.losses import get_loss
from tinsmith.engines import backbone as backbone_module
from tinsmith.engines.adapter_files import CONFIG, WEIGHTS, read_adapter, write_adapter
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.primitives.types import AdamParams, Datum, LoraConfig

FAMILIES = ("llama", "qwen2", "qwen3")
LORA = LoraConfig(rank=4, seed=1)


@pytest.fixture(scope="module", params=FAMILIES)
def model_path(request, tiny_llama, tiny_qwen2, tiny_qwen3) -> str:
    return {"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3}[request.param]


@pytest.fixture(scope="module")
def llama(tiny_llama) -> Backbone:
    return Backbone(tiny_llama)


def engine_with_run(backbone, config=LORA, run_id="a", seed=0, **options) -> LearnerEngine:
    """A run whose B is random too, as after some training."""
    engine = LearnerEngine(backbone, **options)
    engine.create_run(run_id, config)
    run = engine.runs[run_id]
    as_trained(run.layout, run.params, seed)
    return engine


def group_batch(rng, groups=3, size=3, prompt=20, completion=12, vocab=336) -> list[Datum]:
    """Groups that share a prompt, with completions of different lengths, in shuffled order."""
    datums = []
    for _ in range(groups):
        shared = rng.integers(0, vocab, prompt)
        for _ in range(size):
            tokens = np.concatenate([shared, rng.integers(0, vocab, rng.integers(1, completion))])
            used = np.arange(1, len(tokens)) >= prompt
            datums.append(
                Datum(
                    tokens[:-1],
                    {
                        "target_tokens": tokens[1:],
                        "logprobs": rng.uniform(-3, -1, len(tokens) - 1),
                        "advantages": np.where(used, rng.normal(size=len(tokens) - 1), 0),
                    },
                )
            )
    rng.shuffle(datums)
    return datums


def peft_model(path, engine, run_id, tmp_path):
    run = engine.runs[run_id]
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, data in write_adapter(run.layout, run.params, path).items():
        (folder / name).write_bytes(data)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


def padded_reference(model, datums, loss_fn, config):
    """Logprobs and loss by the model's own forward over a right-padded batch."""
    length = max(d.model_input.length for d in datums)
    tokens = torch.zeros(len(datums), length, dtype=torch.long)
    mask = torch.zeros(len(datums), length, dtype=torch.long)
    for i, d in enumerate(datums):
        tokens[i, : d.model_input.length] = torch.from_numpy(d.model_input.tokens)
        mask[i, : d.model_input.length] = 1
    logprobs = model(input_ids=tokens, attention_mask=mask).logits.log_softmax(-1)
    loss, outputs = torch.zeros(()), []
    for i, d in enumerate(datums):
        targets = torch.from_numpy(d.loss_fn_inputs["target_tokens"])
        p = logprobs[i, : len(targets)].gather(-1, targets.reshape(len(targets), -1))
        p = p.reshape(targets.shape)
        inputs = {
            name: torch.tensor(value, dtype=torch.float32)
            for name, value in d.loss_fn_inputs.items()
            if name != "target_tokens"
        }
        inputs["datum"] = torch.zeros_like(targets)
        function = get_loss(loss_fn)
        config = function.fill_config(config)
        filled = function.fill_inputs(inputs, config)
        loss = loss + function.function(p, filled, config).sum()
        outputs.append(p.detach().float().numpy())
    return loss, outputs


def assert_gradients_equal(engine, model):
    run = engine.runs["a"]
    grads = run.layout.views(run.grad)
    reference = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(reference) == 2 * len(grads)
    for name, pair in grads.items():
        for part, got in zip(("lora_A", "lora_B"), pair, strict=True):
            want = reference[f"base_model.model.{name}.{part}.default.weight"]
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("wanted", ["all", "loss"])
@pytest.mark.parametrize("max_pack_tokens", [40, 2048])
def test_outputs_and_gradients_equal_pefts(model_path, tmp_path, wanted, max_pack_tokens):
    engine = engine_with_run(Backbone(model_path), max_pack_tokens=max_pack_tokens)
    datums = group_batch(np.random.default_rng(0))
    output = engine.forward_backward("a", datums, "importance_sampling", logprobs=wanted)

    model = peft_model(model_path, engine, "a", tmp_path)
    loss, expected = padded_reference(model, datums, "importance_sampling", {})
    loss.backward()
    for datum, got, want in zip(datums, output.loss_fn_outputs, expected, strict=True):
        used = (datum.loss_fn_inputs["advantages"] != 0) | (wanted == "all")
        np.testing.assert_allclose(got["logprobs"][used], want[used], atol=1e-4)
        assert np.isnan(got["logprobs"][~used]).all()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-4)

    assert_gradients_equal(engine, model)


@pytest.mark.parametrize("loss_fn", ["gspo", "stable_reinforce"])
@pytest.mark.parametrize("max_pack_tokens", [40, 2048])
def test_losses_with_masks_equal_the_reference(
    tiny_llama, llama, tmp_path, loss_fn, max_pack_tokens
):
    """Some datums carry optional inputs, some do not."""
    mask = {"gspo": "sequence_ratio_mask", "stable_reinforce": "sampled_mask"}[loss_fn]
    engine = engine_with_run(llama, max_pack_tokens=max_pack_tokens)
    rng = np.random.default_rng(11)
    datums = group_batch(rng)
    outputs = engine.forward("a", datums, "ppo").loss_fn_outputs
    for i, (datum, output) in enumerate(zip(datums, outputs, strict=True)):
        length = datum.model_input.length
        near = output["logprobs"] + rng.normal(0, 0.5, length)  # ratios on both sides of 1
        inputs = {**datum.loss_fn_inputs, "logprobs": near}
        if i % 2:
            inputs[mask] = (rng.random(length) < 0.5) * 1.0
        if i % 2 and loss_fn == "gspo":
            inputs["clip_high_threshold"] = rng.uniform(0, 3, length)
        datums[i] = Datum(datum.model_input, inputs)
    output = engine.forward_backward("a", datums, loss_fn, logprobs="loss")

    model = peft_model(tiny_llama, engine, "a", tmp_path)
    loss, _ = padded_reference(model, datums, loss_fn, {})
    loss.backward()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-4)
    assert 0 < output.metrics["clip_fraction:mean"] < 1
    assert_gradients_equal(engine, model)


def soft_targets(rng, length, count, vocab=336) -> Datum:
    """`count` weighted targets per position, a third of the cells padding; a shared beginning."""
    weights = rng.uniform(0, 1, (length, count)) * (rng.random((length, count)) < 0.67)
    targets = np.where(weights != 0, rng.integers(0, vocab, (length, count)), 0)
    tokens = np.concatenate([np.arange(6), rng.integers(0, vocab, length - 6)])
    return Datum(tokens, {"target_tokens": targets, "weights": weights})


@pytest.mark.parametrize("wanted", ["all", "loss"])
@pytest.mark.parametrize("max_pack_tokens", [20, 2048])
def test_soft_targets_equal_dense_cross_entropy(model_path, tmp_path, wanted, max_pack_tokens):
    engine = engine_with_run(Backbone(model_path), max_pack_tokens=max_pack_tokens)
    rng = np.random.default_rng(12)
    datums = [soft_targets(rng, 10 + k, k) for k in (1, 3, 8, 40)]
    plain = rng.integers(0, 336, 15)
    datums.insert(1, Datum(plain[:-1], {"target_tokens": plain[1:], "weights": np.ones(14)}))
    output = engine.forward_backward("a", datums, "cross_entropy", logprobs=wanted)

    model = peft_model(model_path, engine, "a", tmp_path)
    loss = torch.zeros(())
    for datum, got in zip(datums, output.loss_fn_outputs, strict=True):
        logits = model(torch.from_numpy(datum.model_input.tokens)[None]).logits[0]
        targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"])
        weights = torch.from_numpy(datum.loss_fn_inputs["weights"])
        flat = targets.reshape(len(logits), -1)
        dense = torch.zeros_like(logits)  # the target distributions, over the whole vocabulary
        dense.scatter_add_(1, flat, weights.reshape(flat.shape))
        loss = loss - (dense * logits.log_softmax(-1)).sum()
        expected = logits.log_softmax(-1).gather(1, flat).reshape(targets.shape).detach()
        assert got["logprobs"].shape == targets.shape
        used = (datum.loss_fn_inputs["weights"] != 0) | (wanted == "all")
        np.testing.assert_allclose(got["logprobs"][used], expected.numpy()[used], atol=1e-4)
        assert np.isnan(got["logprobs"][~used]).all()
    loss.backward()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4)
    assert_gradients_equal(engine, model)


def test_a_positions_targets_share_its_logits(llama, monkeypatch):
    engine = engine_with_run(llama)
    datum = soft_targets(np.random.default_rng(13), 30, 20)
    shapes = []
    real = backbone_module.target_logprobs

    def spy(hidden, rows, *rest):
        shapes.append((len(hidden), len(rows)))
        return real(hidden, rows, *rest)

    monkeypatch.setattr(backbone_module, "target_logprobs", spy)
    engine.forward_backward("a", [datum], "cross_entropy")
    assert shapes == [(30, 600)]


def test_a_shared_prompt_is_computed_once(llama):
    engine = engine_with_run(llama)
    datums = group_batch(np.random.default_rng(1), groups=1, size=8, prompt=50, completion=10)
    output = engine.forward_backward("a", datums, "importance_sampling", logprobs="loss")
    assert output.metrics["packed_rows:sum"] <= 50 + 8 * 9
    assert output.metrics["tokens:sum"] >= 8 * 50


def test_results_do_not_depend_on_packing(llama):
    datums = group_batch(np.random.default_rng(2))
    grads = []
    for max_pack_tokens in (1, 64, 4096):
        engine = engine_with_run(llama, max_pack_tokens=max_pack_tokens)
        engine.forward_backward("a", datums, "ppo")
        grads.append(engine.runs["a"].grad)
    for grad in grads[1:]:
        error = torch.linalg.vector_norm(grad - grads[0]) / torch.linalg.vector_norm(grads[0])
        assert error < 1e-5


def test_activation_checkpointing_changes_no_gradient(llama, monkeypatch):
    datums = group_batch(np.random.default_rng(3))
    plain, checkpointed = engine_with_run(llama), engine_with_run(llama)
    plain.forward_backward("a", datums, "ppo")
    always = lambda passes, *_, **__: [True for _ in passes]  # noqa: E731
    monkeypatch.setattr(checkpointed.budget, "checkpointing", always)
    passes = []
    hook = llama.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    checkpointed.forward_backward("a", datums, "ppo")
    hook.remove()
    assert len(passes) == 2
    assert torch.equal(plain.runs["a"].grad, checkpointed.runs["a"].grad)


def test_one_run_is_bitwise_unchanged_by_another(llama):
    datums = group_batch(np.random.default_rng(4))
    alone, together = engine_with_run(llama), engine_with_run(llama)
    together.create_run("b", LoraConfig(rank=7, seed=3, train_mlp=False))
    for _ in range(2):
        alone.forward_backward("a", datums, "cispo")
        alone.optim_step("a", AdamParams())
        together.forward_backward("b", datums[:4], "ppo")
        together.forward_backward("a", datums, "cispo")
        together.optim_step("b", AdamParams(learning_rate=1e-2))
        together.optim_step("a", AdamParams())
    assert torch.equal(alone.export("a"), together.export("a"))


@pytest.mark.parametrize(
    "groups", [dict(train_attn=False), dict(train_mlp=False), dict(train_unembed=False)]
)
def test_only_the_chosen_groups_are_trained(llama, groups):
    engine = engine_with_run(llama, LoraConfig(rank=3, **groups))
    engine.forward_backward("a", group_batch(np.random.default_rng(5)), "importance_sampling")
    run = engine.runs["a"]
    leaves = {name.rpartition(".")[2] for name in run.layout.targets}
    assert ("q_proj" in leaves) == run.config.train_attn
    assert ("up_proj" in leaves) == run.config.train_mlp
    assert ("lm_head" in leaves) == run.config.train_unembed
    for a, b in run.layout.views(run.grad).values():
        assert a.abs().sum() > 0
        assert b.abs().sum() > 0


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adam_equals_torchs_adamw(llama, clip):
    engine = engine_with_run(llama)
    run = engine.runs["a"]
    reference = torch.nn.Parameter(run.params.clone())
    optimizer = torch.optim.AdamW(
        [reference], lr=3e-3, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        grad = torch.randn(run.layout.size, generator=generator)
        run.grad.copy_(grad)
        reference.grad = grad.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_([reference], clip)
        optimizer.step()
        engine.optim_step("a", AdamParams(3e-3, 0.8, 0.9, 1e-8, 0.1, clip))
        torch.testing.assert_close(run.params, reference.detach(), rtol=1e-5, atol=1e-6)
    assert run.version == 5


def test_state_and_load_resume_bitwise(llama):
    datums = group_batch(np.random.default_rng(6))
    engine = engine_with_run(llama)

    def step(run_id):
        engine.forward_backward(run_id, datums, "ppo")
        engine.optim_step(run_id, AdamParams())

    step("a")
    state = engine.state("a")
    step("a")
    engine.create_run("b", LORA)
    engine.load("b", state["params"], state, 1)
    step("b")
    assert torch.equal(engine.export("a"), engine.export("b"))
    assert engine.runs["b"].version == 2


def test_pefts_own_adapter_is_read(tiny_llama, llama, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    layout = llama.layout(LoraConfig(rank=4, train_unembed=False))
    files = {name: (tmp_path / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    flat = read_adapter(files, layout)
    for name, (a, b) in layout.views(flat).items():
        module = model.get_submodule(f"base_model.model.{name}")
        assert torch.equal(a, module.lora_A["default"].weight)
        assert torch.equal(b, module.lora_B["default"].weight)


def test_bad_adapters_are_refused(llama):
    layout = llama.layout(LORA)
    files = write_adapter(layout, layout.initial(), "m")
    with pytest.raises(tinsmith.InvalidInput, match=r"adapter_model\.safetensors"):
        read_adapter({CONFIG: files[CONFIG]}, layout)
    with pytest.raises(tinsmith.InvalidInput, match="rank 4 and scale 8"):
        read_adapter(files, llama.layout(LoraConfig(rank=8)))
    tensors = safetensors.torch.load(files[WEIGHTS])
    key = next(iter(tensors))
    tensors[key][0, 0] = float("nan")
    with pytest.raises(tinsmith.InvalidInput, match="NaN or inf"):
        read_adapter(files | {WEIGHTS: safetensors.torch.save(tensors)}, layout)
    del tensors[key]
    with pytest.raises(tinsmith.InvalidInput, match=f"no tensor {key}"):
        read_adapter(files | {WEIGHTS: safetensors.torch.save(tensors)}, layout)


def _bad(**changes):
    datum = group_batch(np.random.default_rng(7), 1, 1)[0]
    inputs = dict(datum.loss_fn_inputs)
    tokens = changes.pop("tokens", datum.model_input.tokens)
    return Datum(tokens, {k: v for k, v in (inputs | changes).items() if v is not None})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: _bad(tokens=np.array([], np.int64)), "datum 1: model_input is empty"),
        (lambda: _bad(tokens=np.full(600, 3)), "datum 1: model_input has 600 tokens"),
        (lambda: _bad(tokens=np.full(20, 336)), "datum 1: model_input holds token 336"),
        (lambda: _bad(advantages=np.ones(3)), r"datum 1: .*advantages.* has shape \(3,\)"),
        (lambda: _bad(logprobs=None), r"datum 1: .*logprobs.* is missing"),
        (lambda: _bad(weights=np.ones(4)), r"datum 1: .*weights.* is not an input"),
        (
            lambda: _bad(tokens=np.arange(3), target_tokens=np.ones((3, 2), int)),
            r"datum 1: .*target_tokens.* shape \(3, 2\): this loss takes one target",
        ),
    ],
)
def test_bad_datums_are_named_and_change_nothing(llama, bad, message):
    engine = engine_with_run(llama)
    good = group_batch(np.random.default_rng(8), 1, 1)
    engine.forward_backward("a", good, "ppo")
    before = engine.runs["a"].grad.clone()
    with pytest.raises(tinsmith.InvalidInput, match=message):
        engine.forward_backward("a", [*good, bad()], "ppo")
    assert torch.equal(engine.runs["a"].grad, before)


def test_nan_inputs_and_overflowing_ratios_change_nothing(llama):
    engine = engine_with_run(llama)
    datums = group_batch(np.random.default_rng(9), 1, 2)
    engine.forward_backward("a", datums, "ppo")
    before = engine.runs["a"].grad.clone()
    for field, value, message in (
        ("advantages", np.nan, "advantages.* is nan at position 0"),
        ("logprobs", -np.inf, "logprobs.* is -inf at position 0"),
        ("logprobs", -1e5, "gradient .* is not finite"),
    ):
        inputs = dict(datums[0].loss_fn_inputs)
        inputs[field] = np.full(datums[0].model_input.length, value)
        bad = Datum(datums[0].model_input, inputs)
        with pytest.raises(tinsmith.InvalidInput, match=message):
            engine.forward_backward("a", [datums[1], bad], "importance_sampling")
        assert torch.equal(engine.runs["a"].grad, before)


def test_unknown_losses_settings_and_empty_batches_are_refused(llama):
    engine = engine_with_run(llama)
    datums = group_batch(np.random.default_rng(10), 1, 1)
    with pytest.raises(tinsmith.NotFound, match="no loss 'reinforce'"):
        engine.forward_backward("a", datums, "reinforce")
    with pytest.raises(tinsmith.InvalidInput, match="no setting 'beta'"):
        engine.forward_backward("a", datums, "ppo", {"beta": 1.0})
    with pytest.raises(tinsmith.InvalidInput, match=r"needs loss_fn_config\['beta'\]"):
        engine.forward_backward("a", datums, "dro")
    with pytest.raises(tinsmith.InvalidInput, match="the batch is empty"):
        engine.forward_backward("a", [], "ppo")
    with pytest.raises(tinsmith.NotFound, match="run 'z'"):
        engine.forward_backward("z", datums, "ppo")
    with pytest.raises(tinsmith.InvalidInput, match="rank must be"):
        LoraConfig(rank=0)
