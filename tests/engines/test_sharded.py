"""A learner cut over ranks against one that is whole, in fp32; ranks are processes, and talk by gloo."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.data import VOCAB, changed, policy_datum, text_datum
from tests.engines.as_trained import as_trained
from tests.engines.on_ranks import on_ranks
from tinsmith import InvalidInput
from tinsmith.algorithms.losses import get_loss, register_loss
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.layout import Layout
from tinsmith.engines.learner import LearnerEngine
from tinsmith.primitives.types import AdamParams, Datum, LoraConfig

LAYOUTS = [
    "data=2",
    "shard=2",
    "tensor=2",
    "context=2",
    "shard=2,tensor=2",
    "shard=2,expert=2",
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (
            "data=2,shard=2",
            "shard=2,context=2",
            "tensor=2,context=2",
            "data=2,shard=2,expert=2",
            "data=2,shard=2,expert=4",
        )
    ),
]
# Runs that train different layers, some of them none of the decoder's.
RUNS = {
    "all": LoraConfig(rank=4, seed=1, train_unembed=True),
    "attention": LoraConfig(rank=3, seed=2, train_mlp=False),
    "output": LoraConfig(rank=2, seed=3, train_attn=False, train_mlp=False, train_unembed=True),
}
ADAM = AdamParams(2e-3, 0.9, 0.95, 1e-3, 0.1, 1.0)


def engine_of(backbone, **options) -> LearnerEngine:
    """Of small passes, so that a batch takes several rounds; its runs' B random, as after training."""
    engine = LearnerEngine(backbone, max_pack_tokens=192, **options)
    for run_id, lora in RUNS.items():
        engine.create_run(run_id, lora)
        run = engine.runs[run_id]
        as_trained(run.layout, run.params, seed=4)
    return engine


def batch(run_id: str, step: int) -> tuple[list[Datum], str]:
    """Sequences of which some share a prefix; more than one pass of them, or hardly any."""
    rng = np.random.default_rng([step, list(RUNS).index(run_id)])
    if run_id == "attention":
        data = [policy_datum(rng, int(rng.integers(4, 90))) for _ in range(9)]
        # None negative: in a sum near zero rounding would be all there is to compare.
        data = [changed(d, advantages=abs(d.loss_fn_inputs["advantages"])) for d in data]
        return data, "importance_sampling"
    if run_id == "output":
        return [text_datum(rng, 5)], "cross_entropy"
    data, stem = [], rng.integers(0, VOCAB, 40)
    for _ in range(8):
        tokens = np.concatenate([stem, rng.integers(0, VOCAB, rng.integers(2, 60))])
        weights = (np.arange(len(tokens) - 1) > 30).astype(float)
        data.append(Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights}))
    return data, "cross_entropy"


def step_all(engine: LearnerEngine, step: int) -> dict[str, tuple]:
    """A batch of every run in shared passes, and a step. By run: loss, logprobs, gradient."""
    numbers = {engine.submit(r, *batch(r, step), backward=True): r for r in RUNS}
    outputs, told = {}, {}
    while engine.busy:
        for finished in engine.step():
            assert finished.error is None, finished.error
            outputs[numbers[finished.number]] = finished.output
    for run_id, output in outputs.items():
        logprobs = np.concatenate([o["logprobs"] for o in output.loss_fn_outputs])
        gradient = engine.runs[run_id].grad.clone()
        told[run_id] = (output.metrics["loss:sum"], logprobs, gradient)
    engine.optim_steps(dict.fromkeys(RUNS, ADAM))
    return told


def states(engine: LearnerEngine) -> dict:
    return {run_id: engine.state(run_id) for run_id in RUNS}


def train(engine: LearnerEngine) -> dict:
    """Five steps, then others: without a gradient, checkpointed, and with a loss that fails."""
    told: dict = {"steps": [step_all(engine, step) for step in range(2)]}
    told["half-way"] = copy.deepcopy(states(engine))
    told["steps"] += [step_all(engine, step) for step in range(2, 5)]
    told["end"] = states(engine)
    data, loss = batch("all", 9)
    told["forward"] = engine.forward("all", data, loss)
    choose, engine.budget.checkpointing = (
        engine.budget.checkpointing,
        lambda passes, *_, **__: [True] * len(passes),
    )
    engine.forward_backward("all", data, loss)
    told["checkpointed"] = engine.runs["all"].grad.clone()
    engine.budget.checkpointing = choose
    data, loss = batch("attention", 9)
    bad = [changed(d, logprobs=np.full(d.model_input.length, -1e5)) for d in data[:2]]
    told["failures"] = [failure_of(engine, [*bad, *data], loss)]
    register_loss(replace(get_loss(loss), name="raising", function=raising))
    told["failures"].append(failure_of(engine, data, "raising"))
    engine.forward_backward("attention", *batch("attention", 9))
    told["after failure"] = engine.runs["attention"].grad.clone()
    return told


def raising(p, inputs, config):
    raise ZeroDivisionError("of the user's")


def failure_of(engine: LearnerEngine, data: list[Datum], loss: str) -> str:
    try:
        engine.forward_backward("attention", data, loss)
    except InvalidInput as error:
        return str(error)
    return ""


def train_ranks(leader) -> dict:
    engine = engine_of(leader.backbone, group=leader)
    told = train(engine)
    for run_id, state in told["half-way"].items():
        engine.load(run_id, state["params"], state, None)
    told["loaded"] = copy.deepcopy(states(engine))
    told["again"] = step_all(engine, 2)
    return told


@pytest.fixture(scope="module")
def all_paths(tiny_llama, tiny_qwen2, tiny_qwen3, tiny_moe) -> list[str]:
    return [tiny_llama, tiny_qwen2, tiny_qwen3, tiny_moe]


@pytest.fixture(scope="module")
def paths(layout, all_paths) -> list[str]:
    """Tensor and context layouts of mixtures of experts: see `test_sharded_mixtures.py`."""
    parsed = Layout.parse(layout)
    if parsed.expert > 1:
        return all_paths[3:]
    return all_paths[: 3 if parsed.together > 1 else 4]


@pytest.fixture(scope="module")
def all_whole(all_paths) -> list[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    told = [train(engine_of(Backbone(path, "fp32"))) for path in all_paths]
    torch.set_num_threads(threads)
    return told


@pytest.fixture(scope="module")
def whole(all_whole, all_paths, paths) -> list[dict]:
    return [all_whole[all_paths.index(path)] for path in paths]


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def ranks(layout, paths, tmp_path_factory) -> list[dict]:
    return on_ranks(layout, paths, train_ranks, tmp_path_factory.mktemp("ranks"))


def close(got, wanted, tolerance: float = 1e-5) -> None:
    got, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (got, wanted))
    assert torch.linalg.vector_norm(got - wanted) <= tolerance * torch.linalg.vector_norm(wanted)


def test_a_layout_gives_what_one_rank_gives(ranks, whole):
    for ours, theirs in zip(ranks, whole, strict=True):
        for got, wanted in zip(ours["steps"], theirs["steps"], strict=True):
            for run_id in RUNS:
                for ours_, theirs_ in zip(got[run_id], wanted[run_id], strict=True):
                    close(ours_, theirs_)
        for run_id in RUNS:
            for name, wanted in theirs["end"][run_id].items():
                close(ours["end"][run_id][name], wanted)


def test_passes_without_gradient_and_checkpointed_ones_too(ranks, whole):
    for ours, theirs in zip(ranks, whole, strict=True):
        for got, wanted in zip(
            ours["forward"].loss_fn_outputs, theirs["forward"].loss_fn_outputs, strict=True
        ):
            close(got["logprobs"], wanted["logprobs"])
        close(ours["checkpointed"], theirs["checkpointed"])


def test_a_batch_that_fails_leaves_the_group_in_step(ranks, whole):
    for ours, theirs in zip(ranks, whole, strict=True):
        overflow, raised = ours["failures"]
        assert "is not finite" in overflow
        assert "'raising' raised ZeroDivisionError: of the user's" in raised
        close(ours["after failure"], theirs["after failure"])


def test_a_checkpoint_goes_on_exactly(ranks):
    for ours in ranks:
        for run_id in RUNS:
            for name, wanted in ours["half-way"][run_id].items():
                assert torch.equal(ours["loaded"][run_id][name], wanted)
        assert str(ours["again"]) == str(ours["steps"][2])


def first_step(backbone, **options) -> dict[str, tuple]:
    return step_all(engine_of(backbone, **options), 0)


def off(got, wanted) -> float:
    """Relative to what is wanted."""
    got, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (got, wanted))
    return float(torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted))


@pytest.mark.parametrize("layout_", ["shard=2", "tensor=2", "context=2", "shard=2,tensor=2"])
def test_in_bf16_ranks_are_as_close_to_fp32_as_one_is(layout_, all_paths, all_whole, tmp_path):
    """Logprobs and gradients; rounded differently, so within half as much again."""
    paths, exact = all_paths[:3], [whole["steps"][0] for whole in all_whole[:3]]
    on_one = [first_step(Backbone(path, "bf16")) for path in paths]
    on_many = on_ranks(
        layout_,
        paths,
        lambda leader: first_step(leader.backbone, group=leader),
        tmp_path,
        weights="bf16",
    )
    for many, one, wanted in zip(on_many, on_one, exact, strict=True):
        for run_id in RUNS:
            for ours, theirs, in_fp32 in zip(
                many[run_id][1:], one[run_id][1:], wanted[run_id][1:], strict=True
            ):
                rounding = off(theirs, in_fp32)
                assert 1e-4 < rounding < 0.1
                assert off(ours, in_fp32) < 1.5 * rounding


def test_a_checkpoint_moves_to_one_rank(ranks, whole, paths):
    for path, ours, theirs in zip(paths, ranks, whole, strict=True):
        engine = engine_of(Backbone(path, "fp32"))
        for run_id, state in ours["half-way"].items():
            engine.load(run_id, state["params"], state, None)
            for name, values in engine.state(run_id).items():
                assert torch.equal(values, state[name])
        for step in range(2, 5):
            step_all(engine, step)
        for run_id in RUNS:
            for name, wanted in theirs["end"][run_id].items():
                close(engine.state(run_id)[name], wanted)
