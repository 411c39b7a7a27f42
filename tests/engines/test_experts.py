"""A tiny Qwen3-MoE against transformers' own eager experts, with adapters merged into its weights or
by PEFT; and what company does to a run on it."""

from __future__ import annotations

import pickle
from concurrent.futures import Future
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import cloudpickle
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeConfig,
    Qwen3MoeExperts,
    Qwen3MoeTopKRouter,
)

import tinsmith
from tests.data import untimed
from tests.engines.as_trained import as_trained
from tests.engines.test_learner import padded_reference
from tests.engines.test_many_runs import ADAM, add_run, datums_of, together
from tests.tiny import make_tiny_model
from tinsmith.engines import experts as experts_module
from tinsmith.engines.adapter_files import (
    WEIGHTS,
    peft_modules,
    read_adapter,
    tensor_places,
    write_adapter,
)
from tinsmith.engines.backbone import Backbone, targets_of_folder
from tinsmith.engines.experts import FILLED, Pairs, RoutedExperts, Router
from tinsmith.engines.learner import LearnerEngine
from tinsmith.engines.lora import AdapterLayout, LoraContext
from tinsmith.engines.merge import merge_adapter
from tinsmith.engines.passes import run_pass
from tinsmith.engines.routing import Routing
from tinsmith.engines.sampler import SamplerEngine
from tinsmith.primitives.types import LoraConfig, PolicyRef, SampleRequest, SamplingParams

GATE, UP, DOWN = (f"experts.{name}_proj" for name in ("gate", "up", "down"))


@pytest.fixture(scope="module")
def moe(tiny_moe) -> Backbone:
    return Backbone(tiny_moe)


# ---- one layer ----


def layer(experts: int, k: int, hidden: int, inner: int, normed: bool = True, seed: int = 0):
    """Transformers' router and experts with random weights, and ours over the same weights."""
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=k,
        norm_topk_prob=normed,
        experts_implementation="eager",
    )
    torch.manual_seed(seed)
    gate, plain = Qwen3MoeTopKRouter(config), Qwen3MoeExperts(config)
    for parameter in (*gate.parameters(), *plain.parameters()):
        torch.nn.init.normal_(parameter, std=hidden**-0.5)
        parameter.requires_grad_(False)
    context = LoraContext()
    router = Router(gate, "mlp.gate", 0, context, Routing(1, experts, k))
    routed = RoutedExperts(plain.gate_up_proj, plain.down_proj, "mlp.experts", context)
    return (gate, plain), (router, routed), context


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 90),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([(32, 16), (64, 48), (40, 24)]),
    st.booleans(),
)
def test_a_layer_equals_transformers_eager_experts(rows, experts, k, sizes, normed):
    """Output and gradient of the input, relative to the largest: 1e-5."""
    k = min(k, experts)
    (gate, plain), (router, routed), _ = layer(experts, k, *sizes, normed)
    x = torch.randn(rows, sizes[0])
    dy = torch.randn_like(x)
    results = []
    for theirs in (True, False):
        leaf = x.clone().requires_grad_()
        _, weights, ids = (gate if theirs else router)(leaf)
        y = (plain if theirs else routed)(leaf, ids, weights)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_work_follows_the_pairs(monkeypatch):
    """Of 64 experts, those that no row chooses are not touched, and the others by their rows."""
    _, (router, routed), _ = layer(64, 4, 64, 32)
    sizes: list[int] = []
    times = experts_module.rows_times

    def counting(x, weight, *bias):
        sizes.append(len(x))
        return times(x, weight, *bias)

    monkeypatch.setattr(experts_module, "rows_times", counting)
    x = torch.randn(5, 64)
    with torch.no_grad():
        _, weights, ids = router(x)
        routed(x, ids, weights)
    chosen = ids.unique(return_counts=True)[1].tolist()
    assert sizes == [-(-count // FILLED) * FILLED for count in chosen for _ in range(2)]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 60),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sets(st.integers(0, 60), max_size=6),
)
def test_pairs_are_sorted_by_expert_and_cut_by_span(rows, experts, k, edges):
    k = min(k, experts)
    edges = sorted(edge for edge in edges if edge <= rows)
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    ids_TK = torch.rand(rows, experts).topk(k).indices
    pairs = Pairs.of(ids_TK, experts, spans)
    expert_P = ids_TK.reshape(-1)[pairs.order_P]
    assert (expert_P.diff() >= 0).all()
    assert torch.equal(pairs.rows_P[pairs.places_TK], torch.arange(rows)[:, None].expand(-1, k))
    assert torch.equal(expert_P[pairs.places_TK], ids_TK)
    assert torch.equal(pairs.ends_E, torch.bincount(expert_P, minlength=experts).cumsum(0).int())
    seen = torch.cat([torch.full((b.stop - b.start,), b.expert) for b in pairs.blocks])
    assert torch.equal(seen, expert_P)
    assert [b.start for b in pairs.blocks] == [0, *(b.stop for b in pairs.blocks[:-1])]
    (whole,) = Pairs.of(ids_TK, experts, spans, whole=True).blocks
    assert (whole.start, whole.stop, whole.expert) == (0, rows * k, None)
    cut = [
        replace(c, start=c.start + b.start, stop=c.stop + b.start)
        for b in pairs.blocks
        for c in b.cells
    ]
    assert cut == whole.cells
    for number, (start, stop) in enumerate(spans):
        cells = [cell for cell in cut if cell.span == number]
        mine = [i for cell in cells for i in range(cell.start, cell.stop)]
        inside = (pairs.rows_P >= start) & (pairs.rows_P < stop)
        assert mine == inside.nonzero()[:, 0].tolist()
        assert pairs.sizes[number] == len(mine)
        sizes = [cell.stop - cell.start for cell in cells]
        assert [cell.place for cell in cells] == [0, *accumulate(sizes)][: len(cells)]
        assert all((expert_P[c.start : c.stop] == c.expert).all() for c in cells)


def test_one_block_of_all_gives_the_same(moe, monkeypatch):
    """As on a GPU, by `grouped_mm`; to 1e-5 of the largest gradient."""
    mix = [
        {
            "rank": r,
            "alpha": 8.0,
            "groups": "mlp router",
            "experts": e,
            "loss_fn": "ppo",
            "leaves": 4,
            "seed": r,
        }
        for r, e in ((4, "each"), (3, "shared"))
    ]
    runs = []
    for whole in (False, True):
        monkeypatch.setattr(experts_module, "_grouped", lambda *_, w=whole: w)
        engine = LearnerEngine(moe)
        outcomes = together(engine, batches_of(engine, mix))
        runs.append((engine, outcomes))
    (loop, ours), (grouped, theirs) = runs
    for run_id in ours:
        for a, b in zip(ours[run_id].loss_fn_outputs, theirs[run_id].loss_fn_outputs, strict=True):
            np.testing.assert_allclose(a["logprobs"], b["logprobs"], atol=1e-5)
        grad = loop.runs[run_id].grad
        torch.testing.assert_close(
            grouped.runs[run_id].grad, grad, rtol=0, atol=1e-5 * float(grad.abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 32), (512, 256), (40, 24)])
def test_a_rows_result_does_not_depend_on_the_others(sizes, dtype):
    """Bitwise, forward and backward, down to experts with one row."""
    _, (_, routed), _ = layer(8, 2, *sizes)
    routed.to(dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, sizes[0], generator=generator).to(dtype)
    ids = torch.rand(200, 8, generator=generator).topk(2).indices
    weights = torch.rand(200, 2, generator=generator).to(dtype)
    dy = torch.randn(200, sizes[0], generator=generator).to(dtype)

    def results(rows: slice):
        leaves = [x[rows].clone().requires_grad_(), weights[rows].clone().requires_grad_()]
        y = routed(leaves[0], ids[rows], leaves[1])
        return y.detach(), *torch.autograd.grad(y, leaves, dy[rows])

    whole = results(slice(0, 200))
    for start, stop in ((0, 16), (30, 47), (3, 103), (150, 200), (20, 21)):
        for got, want in zip(results(slice(start, stop)), whole, strict=True):
            assert torch.equal(got, want[start:stop])


# ---- models ----


def merged_model(path: str, layout: AdapterLayout, factors: dict[str, list[torch.Tensor]]):
    """Transformers' eager model as a function of the adapter's A and B."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    )
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def call(**inputs):
        merged = dict(weights)
        for name, (a, b) in factors.items():
            delta, parent = layout.scale * (b @ a), name.rpartition(".")[0]
            if not name.endswith((GATE, UP, DOWN)):
                merged[f"{name}.weight"] = merged[f"{name}.weight"] + delta
                continue
            fused = f"{parent}.down_proj" if name.endswith(DOWN) else f"{parent}.gate_up_proj"
            whole = merged[fused]
            if name.endswith(GATE):
                delta = torch.cat([delta, torch.zeros_like(delta)], 1)
            elif name.endswith(UP):
                delta = torch.cat([torch.zeros_like(delta), delta], 1)
            merged[fused] = whole + delta
        return functional_call(model, merged, (), inputs)

    return call


tenants = st.lists(
    st.fixed_dictionaries(
        {
            "rank": st.integers(1, 9),
            "alpha": st.sampled_from([4.0, 32.0]),
            "groups": st.sampled_from(
                ["mlp", "router", "attn", "mlp router", "attn mlp router unembed"]
            ),
            "experts": st.sampled_from(["each", "shared"]),
            "loss_fn": st.sampled_from(["cross_entropy", "ppo", "importance_sampling"]),
            "leaves": st.integers(1, 6),
            "seed": st.integers(0, 999),
        }
    ),
    min_size=1,
    max_size=4,
)


def lora_of(tenant) -> LoraConfig:
    groups = ("attn", "mlp", "router", "unembed")
    trained = {f"train_{g}": g in tenant["groups"].split() for g in groups}
    return LoraConfig(
        rank=tenant["rank"],
        alpha=tenant["alpha"],
        seed=tenant["seed"],
        experts=tenant["experts"],
        **trained,
    )


def batches_of(engine: LearnerEngine, mix):
    batches = {}
    for i, tenant in enumerate(mix):
        add_run(engine, f"run-{i}", lora_of(tenant))
        data = datums_of(np.random.default_rng(tenant["seed"]), tenant["loss_fn"], tenant["leaves"])
        batches[f"run-{i}"] = (data, tenant["loss_fn"])
    return batches


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(tenants, st.sampled_from([12, 60, 2048]))
def test_any_mix_of_runs_equals_each_merged_into_transformers(tiny_moe, moe, mix, rows):
    """Outputs, gradients, and adapters after a step; relative to the largest, 1e-4."""
    engine = LearnerEngine(moe, max_pack_tokens=rows)
    batches = batches_of(engine, mix)
    references = {}
    for run_id in batches:
        run = engine.runs[run_id]
        references[run_id] = {
            name: [x.clone().requires_grad_() for x in pair]
            for name, pair in run.layout.views(run.params).items()
        }
    outcomes = together(engine, batches)
    for run_id, (data, loss_fn) in batches.items():
        factors, run = references[run_id], engine.runs[run_id]
        model = merged_model(tiny_moe, run.layout, factors)
        loss, logprobs = padded_reference(model, data, loss_fn, {})
        loss.backward()
        for got, want in zip(outcomes[run_id].loss_fn_outputs, logprobs, strict=True):
            np.testing.assert_allclose(got["logprobs"], want, atol=1e-4)
        assert outcomes[run_id].metrics["loss:sum"] == pytest.approx(
            loss.item(), rel=1e-4, abs=1e-4
        )
        ours = [
            (view, leaf)
            for name, pair in run.layout.views(run.grad).items()
            for view, leaf in zip(pair, factors[name], strict=True)
        ]
        largest = max(float(leaf.grad.abs().max()) for _, leaf in ours)
        for got, leaf in ours:
            torch.testing.assert_close(got, leaf.grad, rtol=0, atol=1e-4 * largest + 1e-7)
        trained = [leaf for _, leaf in ours]
        torch.nn.utils.clip_grad_norm_(trained, ADAM.grad_clip_norm)
        torch.optim.AdamW(
            trained, ADAM.learning_rate, (ADAM.beta1, ADAM.beta2), ADAM.eps, ADAM.weight_decay
        ).step()
    engine.optim_steps(dict.fromkeys(batches, ADAM))
    for run_id, factors in references.items():
        run = engine.runs[run_id]
        for name, pair in run.layout.views(run.params).items():
            for got, leaf in zip(pair, factors[name], strict=True):
                torch.testing.assert_close(
                    got, leaf.detach(), rtol=0, atol=1e-2 * ADAM.learning_rate
                )


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(tenants, st.sampled_from([12, 60, 2048]))
def test_company_changes_no_bit(moe, mix, rows):
    shared = LearnerEngine(moe, max_pack_tokens=rows)
    batches = batches_of(shared, mix)
    outcomes = together(shared, batches)
    for i, tenant in enumerate(mix):
        run_id, alone = f"run-{i}", LearnerEngine(moe, max_pack_tokens=rows)
        add_run(alone, run_id, lora_of(tenant))
        output = alone.forward_backward(run_id, *batches[run_id])
        assert torch.equal(alone.runs[run_id].grad, shared.runs[run_id].grad)
        assert untimed(output.metrics) == untimed(outcomes[run_id].metrics)
        for a, b in zip(output.loss_fn_outputs, outcomes[run_id].loss_fn_outputs, strict=True):
            np.testing.assert_array_equal(a["logprobs"], b["logprobs"])


def test_a_checkpointed_pass_gives_the_same(moe, monkeypatch):
    grads = []
    for checkpointing in (False, True):
        engine = LearnerEngine(moe)
        monkeypatch.setattr(engine.budget, "checkpointing", lambda *_, c=checkpointing, **__: [c])
        add_run(engine, "a", LoraConfig(rank=4, seed=0, train_router=True))
        engine.forward_backward("a", datums_of(np.random.default_rng(0), "ppo", 5), "ppo")
        grads.append(engine.runs["a"].grad)
    assert torch.equal(*grads)


def test_bf16_weights_stay_close_to_fp32(tiny_moe, moe):
    """Logprobs by their mean, as a token now and then goes to another expert: 0.1 nats of 6."""
    data, outputs = datums_of(np.random.default_rng(3), "cross_entropy", 5), []
    for backbone in (moe, Backbone(tiny_moe, "bf16")):
        engine = LearnerEngine(backbone)
        add_run(engine, "a", LoraConfig(rank=4, seed=0, train_router=True))
        output = engine.forward_backward("a", data, "cross_entropy")
        outputs.append(np.concatenate([o["logprobs"] for o in output.loss_fn_outputs]))
        assert engine.runs["a"].grad.isfinite().all()
    assert np.abs(outputs[0] - outputs[1]).mean() < 0.1


# ---- files ----

CONFIGS = {
    "each": LoraConfig(rank=3, seed=1, alpha=8),
    "shared": LoraConfig(rank=3, seed=1, alpha=8, experts="shared"),
    "all, with routers": LoraConfig(rank=2, seed=1, alpha=8, train_router=True),
    "routers": LoraConfig(
        rank=4, seed=1, train_attn=False, train_mlp=False, train_unembed=False, train_router=True
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 336, 40)


def trained(backbone: Backbone, lora: LoraConfig) -> tuple[AdapterLayout, torch.Tensor]:
    """An adapter as after some training."""
    layout = backbone.layout(lora)
    flat = layout.initial()
    as_trained(layout, flat)
    return layout, flat


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)[None]).logits[0]


def peft_model(path: str, files: dict[str, bytes], folder: Path):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    base = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    )
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_the_merged_model_and_the_engines_agree(tiny_moe, moe, kind, tmp_path):
    """Logits of PEFT and of the merged model relative to the largest: 1e-5; logprobs: 1e-4."""
    layout, flat = trained(moe, CONFIGS[kind])
    files = write_adapter(layout, flat, tiny_moe)
    assert torch.equal(read_adapter(files, layout), flat)

    factors = {name: list(pair) for name, pair in layout.views(flat).items()}
    call = merged_model(tiny_moe, layout, factors)
    want = logits(lambda tokens: call(input_ids=tokens))
    bare = logits(AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32))
    assert (want - bare).abs().max() > 0.1
    close = 1e-5 * float(want.abs().max())
    by_peft = logits(peft_model(tiny_moe, files, tmp_path / "adapter"))
    torch.testing.assert_close(by_peft, want, rtol=0, atol=close)

    folder = tmp_path / "merged"
    folder.mkdir()
    merge_adapter(Path(tiny_moe), files, folder)
    by_merge = logits(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(by_merge, want, rtol=0, atol=close)

    engine = SamplerEngine(moe, AutoTokenizer.from_pretrained(tiny_moe), kv_bytes=1 << 24)
    engine.add_adapter("a", 1, CONFIGS[kind], flat)
    request = SampleRequest(
        TOKENS, SamplingParams(max_tokens=1), PolicyRef("a", 1), prompt_logprobs=True
    )
    engine.submit(request)
    events = []
    while engine.busy:
        events += engine.step()
    (response,) = [event.response for event in events if event.response]
    targets = torch.from_numpy(TOKENS[1:, None])
    expected = want[:-1].log_softmax(-1).gather(1, targets)[:, 0]
    np.testing.assert_allclose(response.prompt_logprobs[1:], expected, atol=1e-4)


def test_gradients_equal_pefts(tiny_moe, moe, tmp_path):
    """PEFT fuses gate and up into one adapter of twice the rank: A of both, one after the other, and
    B in blocks, whose columns are (rank, expert). To 1e-4 of the largest."""
    engine, lora = LearnerEngine(moe), LoraConfig(rank=3, seed=1, alpha=8)
    add_run(engine, "a", lora)
    run, data = engine.runs["a"], datums_of(np.random.default_rng(4), "ppo", 4)
    model = peft_model(tiny_moe, write_adapter(run.layout, run.params, tiny_moe), tmp_path / "a")
    engine.forward_backward("a", data, "ppo")
    padded_reference(model, data, "ppo", {})[0].backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    ours = run.layout.views(run.grad)
    for number in range(2):
        of = f"base_model.model.model.layers.{number}.mlp.{{}}.default.weight".format
        gate, up, down = (ours[f"model.layers.{number}.mlp.{name}"] for name in (GATE, UP, DOWN))
        a_E2RD = grads[of("experts.base_layer.lora_A")].view(8, 6, 64)
        b_2I2RE = grads[of("experts.base_layer.lora_B")].view(64, 6, 8)
        b_DRE = grads[of("experts.lora_B")].view(64, 3, 8)
        for got, want in (
            (gate[0], a_E2RD[:, :3]),
            (up[0], a_E2RD[:, 3:]),
            (gate[1], b_2I2RE[:32, :3].permute(2, 0, 1)),
            (up[1], b_2I2RE[32:, 3:].permute(2, 0, 1)),
            (down[0], grads[of("experts.lora_A")].view(8, 3, 32)),
            (down[1], b_DRE.permute(2, 0, 1)),
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_the_files_have_the_names_and_shapes_that_vllm_packs(moe, tiny_moe):
    """vLLM (`process_packed_modules_mapping`, `PackedLoRALayerWeights.pack_moe`) looks for
    `experts.<e>.{gate,up,down}_proj` of every expert, A `[R, in]` and B `[out, R]`."""
    for kind in ("each", "shared"):
        layout, flat = trained(moe, CONFIGS[kind])
        tensors = saved(layout, flat, tiny_moe)
        for expert in range(8):
            for name, (inputs, outputs) in (
                ("gate_proj", (64, 32)),
                ("up_proj", (64, 32)),
                ("down_proj", (32, 64)),
            ):
                module = f"model.layers.1.mlp.experts.{expert}.{name}"
                assert module in peft_modules(layout)
                a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
                assert (a.shape, b.shape) == ((3, inputs), (outputs, 3))
        # In memory they are handed over as places in the flat buffer.
        for name, (start, rows, columns) in tensor_places(layout).items():
            assert torch.equal(
                flat[start : start + rows * columns].view(rows, columns), tensors[name]
            )


def saved(layout, flat, path):
    return safetensors.torch.load(write_adapter(layout, flat, path)[WEIGHTS])


def test_experts_that_differ_do_not_load_into_a_run_that_shares_them(moe, tiny_moe):
    layout, flat = trained(moe, CONFIGS["each"])
    files = write_adapter(layout, flat, tiny_moe)
    with pytest.raises(tinsmith.InvalidInput, match=r"differs from another expert's.*each"):
        read_adapter(files, moe.layout(CONFIGS["shared"]))


def test_shared_adapters_are_smaller(moe):
    each, shared = (
        moe.layout(LoraConfig(rank=4, experts=e, train_attn=False, train_unembed=False))
        for e in ("each", "shared")
    )
    assert each.size == 8 * shared.size


def test_a_model_may_have_dense_layers_too(tmp_path):
    """Logprobs of transformers with the adapter merged into the model's files: 1e-4."""
    path = make_tiny_model(tmp_path / "mixed", "qwen3_moe", mlp_only_layers=[0])
    backbone, lora = Backbone(path), LoraConfig(rank=3, seed=1, train_router=True)
    layout, flat = trained(backbone, lora)
    assert {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.experts.up_proj"} < set(
        layout.targets
    )
    engine = LearnerEngine(backbone)
    engine.create_run("a", lora)
    engine.load("a", flat, None, 1)
    folder = tmp_path / "merged"
    folder.mkdir()
    merge_adapter(Path(path), write_adapter(layout, flat, path), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    data = datums_of(np.random.default_rng(0), "cross_entropy", 4)
    output = engine.forward_backward("a", data, "cross_entropy")
    _, logprobs = padded_reference(model, data, "cross_entropy", {})
    for got, want in zip(output.loss_fn_outputs, logprobs, strict=True):
        np.testing.assert_allclose(got["logprobs"], want, atol=1e-4)
    assert engine.runs["a"].grad.any()


def test_a_helper_computes_the_same(moe):
    """Through pickle, as to another learner's process and back."""
    mix = [
        {
            "rank": 3,
            "alpha": 8.0,
            "groups": "mlp router",
            "experts": "each",
            "loss_fn": "ppo",
            "leaves": 6,
            "seed": 1,
        }
    ]
    outputs = []
    for helped in (False, True):
        engine = LearnerEngine(moe, max_pack_tokens=12, learners=2)
        if helped:

            def run(works):
                future: Future = Future()
                works = pickle.loads(cloudpickle.dumps(works))
                future.set_result(pickle.loads(pickle.dumps(run_pass(moe, works))))
                return future

            engine.helpers[1] = run
        batches = batches_of(engine, mix)
        outputs.append((together(engine, batches)["run-0"], engine.runs["run-0"].grad))
    (alone, grad), (shared, same) = outputs
    assert torch.equal(grad, same)
    assert untimed(alone.metrics) == untimed(shared.metrics)
    assert alone.metrics["expert_load:max"] > 1


# ---- what is refused ----


def test_quantised_experts_are_refused(tiny_moe):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(
        tinsmith.InvalidInput, match=r"mixture of experts.*fp32 or bf16, not in nf4"
    ):
        Backbone(tiny_moe, "nf4")


def test_a_router_cannot_be_trained_where_there_is_none(tiny_llama):
    with pytest.raises(tinsmith.InvalidInput, match="no routers"):
        AdapterLayout.of(LoraConfig(train_router=True), targets_of_folder(tiny_llama))


def test_an_activation_that_is_not_silu_is_refused(tmp_path):
    path = make_tiny_model(tmp_path / "m", "qwen3_moe")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"gelu"'))
    with pytest.raises(tinsmith.InvalidInput, match="activation 'gelu': only silu"):
        Backbone(path)
