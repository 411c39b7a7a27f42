"""What a pass takes at its peak, as counted before it and as torch's profiler sees it."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

import tinsmith
from tests.tiny import make_tiny_model
from tinsmith.engines import memory_budget
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.engines.memory import MemoryModel, PassShape, state_bytes, weights_bytes
from tinsmith.engines.packing import pack_sequences
from tinsmith.primitives.types import Datum, LoraConfig

LORA = LoraConfig(rank=16, seed=0)


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3_moe"])
def path(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "small"
    return make_tiny_model(folder, request.param, head_dim=32, intermediate=192)


def sequence(length: int, seed: int = 0) -> Datum:
    tokens = np.random.default_rng(seed).integers(0, 336, length + 1)
    return Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": np.ones(length)})


def group(prompt: int, completion: int, size: int) -> list[Datum]:
    rng = np.random.default_rng(0)
    shared, datums = rng.integers(0, 336, prompt), []
    for _ in range(size):
        tokens = np.concatenate([shared, rng.integers(0, 336, completion + 1)])
        weights = np.where(np.arange(1, len(tokens)) >= prompt, 1.0, 0.0)
        datums.append(Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights}))
    return datums


def peak(action) -> int:
    """Bytes that torch held most at once, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "datums",
    [[sequence(250)], [sequence(500)], group(250, 60, 8)],
    ids=["250 tokens", "500 tokens", "a group"],
)
def test_a_passs_peak_is_known_to_15_percent(path, weights, datums, checkpointing, monkeypatch):
    engine = LearnerEngine(Backbone(path, weights))
    engine.create_run("a", LORA)
    monkeypatch.setattr(engine.budget, "checkpointing", lambda *_, **__: [checkpointing])

    def train() -> None:
        engine.forward_backward("a", datums, "cross_entropy", logprobs="loss")

    train()  # once, so that what torch keeps for good is there
    measured = peak(train)
    (pack,) = pack_sequences([d.model_input.tokens for d in datums], engine.max_pack_tokens)
    targets = {
        int(pack.rows[k][position])
        for k, member in enumerate(pack.members)
        for position in np.flatnonzero(datums[member].loss_fn_inputs["weights"])
    }
    shape = PassShape(pack.segments, pack.paths, len(targets))
    layouts = [engine.runs["a"].layout]
    counted = engine.budget.model.pass_(shape, layouts, checkpointing=checkpointing)
    assert counted == pytest.approx(measured, rel=0.15)


def test_a_pass_without_gradient_stays_below_what_is_counted(path):
    engine = LearnerEngine(Backbone(path))
    engine.create_run("a", LORA)
    layouts, datum = [engine.runs["a"].layout], sequence(400)
    engine.forward("a", [datum], "cross_entropy")
    measured = peak(lambda: engine.forward("a", [datum], "cross_entropy"))
    counted = engine.budget.model.forward(PassShape([400], [()], 400), layouts)
    assert counted / 2 < measured < counted


def test_a_runs_state_and_the_weights_are_counted_exactly(path):
    for weights in ("fp32", "bf16"):
        backbone = Backbone(path, weights)
        held = {p.data_ptr(): p.nbytes for p in backbone.model.parameters()}
        assert weights_bytes(path, weights) == sum(held.values())
    engine = LearnerEngine(backbone)
    engine.create_run("a", LORA)
    run = engine.runs["a"]
    tensors = (run.params, run.grad, run.adam.exp_avg, run.adam.exp_avg_sq)
    assert state_bytes([run.layout]) == sum(t.nbytes for t in tensors)


def needs(path: str, length: int) -> tuple[int, int]:
    """Of a run and a pass over one sequence, without and with checkpointing."""
    engine = LearnerEngine(Backbone(path))
    layout = engine.backbone.layout(LORA)
    shape, state = PassShape([length], [()], length), state_bytes([layout])
    plain, short = (
        state + engine.budget.model.pass_(shape, [layout], checkpointing=c) for c in (False, True)
    )
    return plain, short


def test_a_pass_that_fits_only_so_is_checkpointed(path):
    plain, short = needs(path, 400)
    assert short < plain
    for limit, recomputed in ((plain, False), (plain - 1, True), (short, True)):
        engine = LearnerEngine(Backbone(path), memory_bytes=limit)
        engine.create_run("a", LORA)
        passes = []
        layer = engine.backbone.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        engine.forward_backward("a", [sequence(400)], "cross_entropy")
        assert len(passes) == 1 + recomputed


def test_a_sequence_that_cannot_fit_is_refused_before_anything_is_computed(path):
    _, short = needs(path, 400)
    engine = LearnerEngine(Backbone(path), memory_bytes=short - 1)
    engine.create_run("a", LORA)
    engine.forward_backward("a", [sequence(50)], "cross_entropy")
    before = engine.runs["a"].grad.clone()
    engine.backbone.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    with pytest.raises(
        tinsmith.OutOfCapacity, match=r"400 tokens needs .* even with .*, there are"
    ):
        engine.forward_backward("a", [sequence(20), sequence(400)], "cross_entropy")
    assert torch.equal(engine.runs["a"].grad, before)


def test_what_is_free_is_the_least_of_machine_and_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_budget, "CGROUP", tmp_path)
    cpu = torch.device("cpu")
    free = memory_budget.available_bytes(cpu)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 2000000\n")
    assert memory_budget.available_bytes(cpu) == pytest.approx(free, rel=0.5)
    (tmp_path / "memory.max").write_text("9000000\n")
    assert memory_budget.available_bytes(cpu) == 6_000_000


def test_the_model_follows_a_config_without_weights(tmp_path):
    path = make_tiny_model(tmp_path / "m", "llama")
    model = MemoryModel(AutoConfig.from_pretrained(path), 4)
    layout = Backbone(path).layout(LORA)
    short, long = (model.forward(PassShape([n], [()], n), [layout]) for n in (1000, 2000))
    assert short < long < 2 * short + 1
