"""A learner of a mixture of experts cut over ranks against one that is whole, in fp32; and checkpoints moved
between layouts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from tests.data import VOCAB
from tests.engines.as_trained import as_trained
from tests.engines.on_ranks import on_ranks
from tests.engines.test_sharded import ADAM, close
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.layout import Layout
from tinsmith.engines.learner import LearnerEngine
from tinsmith.primitives.types import Datum, LoraConfig

LAYOUTS = [
    "tensor=2",
    "context=2,expert=2",
    "shard=2,tensor=2,expert=2",
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (
            "data=2",
            "shard=2",
            "context=2",
            "shard=2,expert=2",
            "shard=4,expert=2",
            "shard=2,tensor=2",
            "data=2,tensor=2,expert=2",
            "shard=2,context=2",
            "shard=2,context=2,expert=4",
            "data=2,context=2,expert=2",
            "tensor=2,context=2",
            "tensor=2,context=2,expert=2",
        )
    ),
]
# Runs whose experts have adapters of their own, or share them; that train routers, or replay their choice.
RUNS = {
    "each": LoraConfig(rank=3, seed=1, train_router=True),
    "shared": LoraConfig(rank=4, seed=2, train_unembed=False, experts="shared"),
    "replayed": LoraConfig(rank=2, seed=3, train_unembed=False, train_router=True),
    "attention": LoraConfig(rank=2, seed=4, train_mlp=False, train_unembed=False),
}
ROUTING = ("expert_load:max", "expert_load:mean", "routing_entropy:mean")
LAYERS, EXPERTS, CHOSEN = 2, 8, 2


def engine_of(backbone, **options) -> LearnerEngine:
    engine = LearnerEngine(backbone, max_pack_tokens=256, **options)
    for run_id, lora in RUNS.items():
        engine.create_run(run_id, lora)
        run = engine.runs[run_id]
        as_trained(run.layout, run.params, seed=4)
    return engine


def batch(run_id: str, step: int) -> list[Datum]:
    """Some that share a prefix; `attention`: hardly any, and not for every rank."""
    rng = np.random.default_rng([step, list(RUNS).index(run_id)])
    data, stem = [], rng.integers(0, VOCAB, 20)
    for _ in range(1 if run_id == "attention" else 4):
        tokens = np.concatenate([stem, rng.integers(0, VOCAB, rng.integers(2, 50))])
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1)}
        if run_id == "replayed":
            choice = rng.random((len(tokens) - 1, LAYERS, EXPERTS)).argsort(-1)[..., :CHOSEN]
            choice[:7] = -1
            inputs["routed_experts"] = choice
        data.append(Datum(tokens[:-1], inputs))
    return data


def step_all(engine: LearnerEngine, step: int) -> dict[str, tuple]:
    """A batch of every run in shared passes, and a step. By run: loss, logprobs, gradient, routing."""
    numbers = {engine.submit(r, batch(r, step), "cross_entropy", backward=True): r for r in RUNS}
    told = {}
    while engine.busy:
        for finished in engine.step():
            assert finished.error is None, finished.error
            run_id, output = numbers[finished.number], finished.output
            logprobs = np.concatenate([o["logprobs"] for o in output.loss_fn_outputs])
            loss, routing = output.metrics["loss:sum"], [output.metrics[n] for n in ROUTING]
            told[run_id] = (loss, logprobs, engine.runs[run_id].grad.clone(), routing)
    engine.optim_steps(dict.fromkeys(RUNS, ADAM))
    return told


def states(engine: LearnerEngine) -> dict:
    return {run_id: engine.state(run_id) for run_id in RUNS}


def load(engine: LearnerEngine, kept: dict) -> None:
    for run_id, state in kept.items():
        engine.load(run_id, state["params"], state, None)


def train(engine: LearnerEngine) -> dict:
    """Five steps; and a checkpointed pass."""
    told: dict = {"steps": [step_all(engine, step) for step in range(3)]}
    told["kept"] = states(engine)
    told["steps"] += [step_all(engine, step) for step in range(3, 5)]
    told["end"] = states(engine)
    engine.budget.checkpointing = lambda passes, *_, **__: [True] * len(passes)
    engine.forward_backward("each", batch("each", 9), "cross_entropy")
    told["checkpointed"] = engine.runs["each"].grad.clone()
    return told


def go_on(engine: LearnerEngine, kept: dict) -> dict:
    """A checkpoint loaded, and the last two steps."""
    load(engine, kept)
    told: dict = {"loaded": states(engine)}
    told["steps"] = [step_all(engine, step) for step in range(3, 5)]
    return {**told, "end": states(engine)}


def go_on_ranks(leader, kept: dict) -> dict:
    return go_on(engine_of(leader.backbone, group=leader), kept)


def train_ranks(leader) -> dict:
    return train(engine_of(leader.backbone, group=leader))


@pytest.fixture(scope="module")
def whole(tiny_moe) -> dict:
    return train(engine_of(Backbone(tiny_moe, "fp32")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_what_one_rank_gives(layout, tiny_moe, whole, tmp_path):
    (ours,) = on_ranks(layout, [tiny_moe], train_ranks, tmp_path)
    for got, wanted in zip(ours["steps"], whole["steps"], strict=True):
        for run_id in RUNS:
            # A prefix that several parts compute counts as often.
            alike = 4 if Layout.parse(layout).parts == 1 else 3
            for ours_, theirs in zip(got[run_id][:alike], wanted[run_id][:alike], strict=True):
                close(ours_, theirs)
    for run_id in RUNS:
        for name, wanted in whole["end"][run_id].items():
            close(ours["end"][run_id][name], wanted)
    close(ours["checkpointed"], whole["checkpointed"])


@pytest.mark.parametrize(
    ("first", "then"), [("tensor=2", "shard=2"), ("shard=2,expert=2", "context=2,expert=2")]
)
def test_a_checkpoint_moves_from_one_layout_to_another(first, then, tiny_moe, whole, tmp_path):
    """Adapters and optimizers exactly; and training goes on as on one rank."""
    (before,) = on_ranks(first, [tiny_moe], train_ranks, tmp_path)
    (after,) = on_ranks(then, [tiny_moe], partial(go_on_ranks, kept=before["kept"]), tmp_path)
    for run_id in RUNS:
        for name, wanted in before["kept"][run_id].items():
            assert torch.equal(after["loaded"][run_id][name], wanted)
        for name, wanted in whole["end"][run_id].items():
            close(after["end"][run_id][name], wanted)
