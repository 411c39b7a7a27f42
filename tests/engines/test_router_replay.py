"""The experts that a sampler chose, replayed by a trainer; and how evenly rows are spread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tinsmith
from tests.data import VOCAB, changed, text_datum
from tests.engines.test_learner import padded_reference
from tests.engines.test_many_runs import add_run, together
from tests.tiny import make_tiny_model
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.engines.sampler import SamplerEngine
from tinsmith.primitives.types import (
    Datum,
    LoraConfig,
    PolicyRef,
    SampleRequest,
    SamplingParams,
)

LAYERS, EXPERTS, CHOSEN = 2, 8, 2
BASE = PolicyRef()


@pytest.fixture(scope="module")
def moe(tiny_moe) -> Backbone:
    return Backbone(tiny_moe)


def own_choice(path: str, tokens: np.ndarray) -> np.ndarray:
    """What transformers' routers choose, `[T, L, K]`, sorted."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        output = model(torch.from_numpy(tokens)[None], output_router_logits=True)
    ids = [logits.topk(CHOSEN).indices.sort().values for logits in output.router_logits]
    return torch.stack(ids, 1).numpy()


def sampler(backbone: Backbone, **options) -> SamplerEngine:
    tokenizer = AutoTokenizer.from_pretrained(backbone.path)
    return SamplerEngine(backbone, tokenizer, kv_bytes=1 << 24, **options)


def sample(engine: SamplerEngine, requests: list[SampleRequest]):
    """Their responses."""
    numbers, responses = [engine.submit(request) for request in requests], {}
    while engine.busy:
        responses |= {e.request: e.response for e in engine.step() if e.response}
    return [responses[number] for number in numbers]


def request(
    prompt: np.ndarray, policy: PolicyRef = BASE, num_samples: int = 1, told: bool = False
) -> SampleRequest:
    params = SamplingParams(max_tokens=9, stop=[], seed=int(prompt[0]), return_routed_experts=told)
    return SampleRequest(prompt, params, policy, num_samples)


def datum_of(prompt: np.ndarray, sampled, replay: bool) -> Datum:
    tokens = np.concatenate([prompt, sampled.tokens])
    weights = np.where(np.arange(1, len(tokens)) >= len(prompt), 1.0, 0.0)
    inputs = {"target_tokens": tokens[1:], "weights": weights}
    if replay:
        inputs["routed_experts"] = sampled.routed_experts
    return Datum(tokens[:-1], inputs)


def test_a_sample_tells_each_tokens_experts_also_from_the_cache(tiny_moe, moe):
    engine, rng = sampler(moe, max_step_rows=24), np.random.default_rng(0)
    shared = rng.integers(0, VOCAB, 40)
    prompts = [shared, np.concatenate([shared[:35], rng.integers(0, VOCAB, 9)]), shared]
    sample(engine, [request(shared)])  # which does not ask, and leaves its blocks
    asked = [request(p, num_samples=3, told=True) for p in prompts]
    responses = sample(engine, asked)
    assert any(r.prompt_cache_hit_tokens for r in responses)
    for prompt, response in zip(prompts, responses, strict=True):
        for sampled in response.sequences:
            routed = sampled.routed_experts
            assert routed.shape == (len(prompt) + 9 - 1, LAYERS, CHOSEN)
            assert routed.dtype == np.uint8
            tokens = np.concatenate([prompt, sampled.tokens])[:-1]
            np.testing.assert_array_equal(np.sort(routed, -1), own_choice(tiny_moe, tokens))
    (silent,) = sample(engine, [request(shared)])
    assert silent.sequences[0].routed_experts is None


@pytest.fixture(scope="module")
def undecided(tmp_path_factory) -> Backbone:
    """A model whose experts come in two groups of four, which a router can hardly tell apart."""
    path = make_tiny_model(tmp_path_factory.mktemp("models") / "undecided", "qwen3_moe")
    file = Path(path) / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name, weight in tensors.items():
        if name.endswith("mlp.gate.weight"):
            noise = 1e-5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            tensors[name] = weight[[0, 0, 0, 0, 1, 1, 1, 1]] + noise
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    return Backbone(path)


def test_replay_makes_trainer_and_sampler_agree_where_their_routers_do_not(undecided):
    """The trainer's routers are a hair's breadth off the sampler's."""
    lora = LoraConfig(
        rank=4, seed=0, train_attn=False, train_mlp=False, train_unembed=False, train_router=True
    )
    learner = LearnerEngine(undecided)
    learner.create_run("a", lora)
    run = learner.runs["a"]
    drawing = sampler(undecided)
    drawing.add_adapter("a", 0, lora, run.params.clone())
    for _, b in run.layout.views(run.params).values():
        b.normal_(0, 1e-6, generator=torch.Generator().manual_seed(1))
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCAB, 20) for _ in range(6)]
    asked = [request(p, PolicyRef("a", 0), num_samples=2, told=True) for p in prompts]
    responses = sample(drawing, asked)
    worst = {}
    for replay in (False, True):
        pairs = [
            (s, datum_of(p, s, replay))
            for p, response in zip(prompts, responses, strict=True)
            for s in response.sequences
        ]
        output = learner.forward_backward("a", [d for _, d in pairs], "cross_entropy")
        worst[replay] = max(
            np.abs(out["logprobs"][-len(s.tokens) :] - s.logprobs).max()
            for (s, _), out in zip(pairs, output.loss_fn_outputs, strict=True)
        )
        assert run.grad.any()  # of the routers, also where their choice is replayed
        run.grad.zero_()
    assert worst[False] > 1e-2
    assert worst[True] < 1e-4


def routed(rng: np.random.Generator, length: int) -> np.ndarray:
    """Any experts, and none at a third of the places."""
    ids = np.argsort(rng.random((length, LAYERS, EXPERTS)), -1)[..., :CHOSEN]
    return np.where(rng.random((length, LAYERS, 1)) < 1 / 3, -1, ids)


def with_choice(model, choice_TLK: np.ndarray):
    """Transformers' model, whose routers take these experts where they are not -1."""
    for layer, block in enumerate(model.base_model.layers):
        gate = block.mlp.gate

        def forward(x, gate=gate, layer=layer):
            logits = x.reshape(-1, x.shape[-1]) @ gate.weight.T
            p = logits.softmax(-1)
            want = torch.from_numpy(choice_TLK[:, layer])
            ids = torch.where(want >= 0, want, p.topk(CHOSEN).indices)
            weights = p.gather(1, ids)
            return logits, weights / weights.sum(-1, keepdim=True), ids

        gate.forward = forward
    return model


def test_replayed_experts_equal_transformers_sent_to_them(tiny_moe, moe):
    """Logprobs to 1e-4; the gradient of the output layer's B to 1e-4 of its largest."""
    rng = np.random.default_rng(2)
    datums = [changed(text_datum(rng, n), routed_experts=routed(rng, n)) for n in (12, 20, 7)]
    datums.append(text_datum(rng, 9))  # beside one that replays nothing
    engine = LearnerEngine(moe)
    add_run(engine, "a", LoraConfig(rank=2, seed=0, train_attn=False, train_mlp=False))
    for _, b in engine.runs["a"].layout.views(engine.runs["a"].params).values():
        b.zero_()
    output = engine.forward_backward("a", datums, "cross_entropy")
    total = torch.zeros(336, 64)
    for datum, got in zip(datums, output.loss_fn_outputs, strict=True):
        model = AutoModelForCausalLM.from_pretrained(
            tiny_moe, dtype=torch.float32, experts_implementation="eager"
        )
        given = datum.loss_fn_inputs.get("routed_experts")
        if given is not None:
            model = with_choice(model, given)
        loss, (want,) = padded_reference(
            model, [changed(datum, routed_experts=None)], "cross_entropy", {}
        )
        np.testing.assert_allclose(got["logprobs"], want, atol=1e-4)
        total += torch.autograd.grad(loss, model.lm_head.weight)[0]
    run = engine.runs["a"]
    (a, _), (_, db) = (run.layout.views(x)["lm_head"] for x in (run.params, run.grad))
    want = run.layout.scale * total @ a.T
    torch.testing.assert_close(db, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_a_prefix_is_shared_only_where_it_is_routed_alike(moe):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, VOCAB, 12)
    datum = Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": np.ones(11)})
    one, other = routed(rng, 11), routed(rng, 11)
    other[:4] = one[:4]
    other[4] = [[0, 1], [0, 1]]
    one[4] = [[2, 1], [0, 1]]

    def rows(*choices):
        datums = [changed(datum, routed_experts=c) for c in choices]
        engine, alone = LearnerEngine(moe), LearnerEngine(moe)
        for e in (engine, alone):
            add_run(e, "a", LoraConfig(rank=2, seed=0, train_router=True))
        output = engine.forward_backward("a", datums, "cross_entropy")
        for got, d in zip(output.loss_fn_outputs, datums, strict=True):
            by_itself = alone.forward_backward("a", [d], "cross_entropy").loss_fn_outputs[0]
            np.testing.assert_allclose(got["logprobs"], by_itself["logprobs"], atol=1e-5)
        grad = alone.runs["a"].grad
        torch.testing.assert_close(
            engine.runs["a"].grad, grad, rtol=0, atol=1e-5 * float(grad.abs().max())
        )
        return output.metrics["packed_rows:sum"]

    assert rows(one, one) == 11
    assert rows(one, other) == 11 + 7
    assert rows(one, None) == 22 - np.cumprod((one == -1).all((1, 2))).sum()
    assert rows(None, None) == 11


def test_a_run_that_replays_changes_no_bit_of_another(moe):
    rng, engine, alone = np.random.default_rng(4), LearnerEngine(moe), LearnerEngine(moe)
    for e in (engine, alone):
        add_run(e, "a", LoraConfig(rank=2, seed=0))
    add_run(engine, "b", LoraConfig(rank=3, seed=1, train_router=True))
    datums = [text_datum(rng, 15) for _ in range(3)]
    replayed = [changed(text_datum(rng, 10), routed_experts=routed(rng, 10))]
    together(engine, {"a": (datums, "cross_entropy"), "b": (replayed, "cross_entropy")})
    alone.forward_backward("a", datums, "cross_entropy")
    assert torch.equal(engine.runs["a"].grad, alone.runs["a"].grad)


def test_bad_routing_is_named_by_datum_and_field(moe, tiny_llama):
    rng = np.random.default_rng(5)
    good = text_datum(rng, 6)
    choice = np.tile([[3, 5]], (6, LAYERS, 1))
    outside, twice, half = (choice.copy() for _ in range(3))
    outside[2, 1, 0], twice[4, 0] = EXPERTS, [3, 3]
    half[1, 1, 0] = -1
    engine = LearnerEngine(moe)
    engine.create_run("a", LoraConfig(rank=2))
    for wrong, message in (
        (choice[:5], r"datum 1: routed_experts has shape \(5, 2, 2\), expected \(6, 2, 2\)"),
        (choice * 1.0, "datum 1: routed_experts must be integers, got dtype float32"),
        (outside, r"datum 1: routed_experts is 8 at position \[2, 1, 0\]: experts are 0 to 7"),
        (twice, r"datum 1: routed_experts is \[3, 3\] at position \[4, 0\]: give 2 different"),
        (half, r"datum 1: routed_experts is \[-1, 5\] at position \[1, 1\]"),
    ):
        with pytest.raises(tinsmith.InvalidInput, match=message):
            engine.forward("a", [good, changed(good, routed_experts=wrong)], "cross_entropy")
    dense = LearnerEngine(Backbone(tiny_llama))
    dense.create_run("a", LoraConfig(rank=2))
    with pytest.raises(
        tinsmith.InvalidInput, match="datum 0: routed_experts is there, but the model"
    ):
        dense.forward("a", [changed(good, routed_experts=choice)], "cross_entropy")
    with pytest.raises(tinsmith.InvalidInput, match="the model has no routed experts"):
        sampler(dense.backbone).submit(request(np.arange(5), told=True))


@pytest.mark.parametrize("rows", [20, 2048])
def test_the_metrics_of_a_batch_say_how_evenly_experts_are_used(tiny_moe, moe, rows):
    """Against transformers' router logits; over all passes of the batch."""
    rng = np.random.default_rng(6)
    datums = [text_datum(rng, n) for n in (12, 15, 9)]
    engine = LearnerEngine(moe, max_pack_tokens=rows)
    engine.create_run("a", LoraConfig(rank=2))
    metrics = engine.forward_backward("a", datums, "cross_entropy").metrics
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    with torch.no_grad():
        outputs = [
            model(torch.from_numpy(d.model_input.tokens)[None], output_router_logits=True)
            for d in datums
        ]
    counts, entropy = [], []
    for layer in range(LAYERS):
        logits = torch.cat([o.router_logits[layer] for o in outputs])
        p = logits.softmax(-1)
        entropy.append(-(p * p.log()).sum(-1).mean())
        counts.append(torch.bincount(logits.topk(CHOSEN).indices.flatten(), minlength=EXPERTS))
    load = [c.max() / c.float().mean() for c in counts]
    assert metrics["expert_load:max"] == pytest.approx(float(max(load)))
    assert metrics["expert_load:mean"] == pytest.approx(float(sum(load)) / LAYERS)
    assert metrics["routing_entropy:mean"] == pytest.approx(float(sum(entropy)) / LAYERS, rel=1e-4)
    assert metrics["dropped_tokens:sum"] == 0.0
