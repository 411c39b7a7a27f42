"""What is planned from a config against published sizes, and against what ranks really take."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from torch.distributed.tensor import DTensor
from transformers import AutoConfig
from typer.testing import CliRunner

from tests.engines.on_ranks import on_ranks
from tests.engines.test_memory import peak, sequence
from tests.tiny import make_tiny_model
from tinsmith import InvalidInput
from tinsmith.cli import app
from tinsmith.engines import plan
from tinsmith.engines.layout import Layout
from tinsmith.engines.learner import LearnerEngine
from tinsmith.engines.memory import MemoryModel, PassShape
from tinsmith.engines.memory_budget import own_bytes
from tinsmith.engines.plan import Demand, ModelSizes, Planner
from tinsmith.engines.published import published_config
from tinsmith.engines.sharded_backbone import ShardedBackbone
from tinsmith.primitives.types import Datum, LoraConfig

GB = 10**9
LORA = LoraConfig(rank=16, seed=0, train_unembed=False)
LAYERS, EXPERTS, CHOSEN = 2, 8, 2  # of the tiny mixture


@pytest.mark.parametrize(
    ("name", "billions"),
    [  # from the models' cards
        ("Qwen3-8B", 8.2),
        ("qwen/qwen3-32b", 32.8),
        ("Qwen3-30B-A3B", 30.5),
        ("Qwen3-235B-A22B", 235),
        ("Qwen2.5-7B", 7.61),
        ("Qwen2.5-72B", 72.7),
        ("meta-llama/Llama-3.1-8B", 8.03),
        ("Llama-3.1-70B", 70.6),
    ],
)
def test_published_configs_have_their_models_sizes(name, billions):
    assert ModelSizes.of(published_config(name)).total / GB == pytest.approx(billions, rel=5e-3)


def planner(name: str, **demand) -> Planner:
    return Planner(published_config(name), Demand(**demand), 80 * GB)


def test_copies_come_before_shards_and_shards_before_cut_products():
    small, large = planner("Qwen3-8B"), planner("Llama-3.1-70B")
    assert [str(small.choose(n).layout) for n in (1, 8)] == ["data=1", "data=8"]
    assert [str(large.choose(n).layout) for n in (4, 16)] == ["shard=4", "data=4,shard=4"]
    assert not large.choose(1).fits
    assert str(large.enough(1).layout) == "shard=4"
    # One sequence so long that only ranks that compute it together can hold what is kept of it.
    long = planner("Llama-3.1-70B", context=131072)
    assert long.choose(32).layout.tensor > 1


def test_experts_are_spread_over_the_ranks_that_share_a_copy():
    mixture = planner("Qwen3-235B-A22B", experts="shared")
    chosen = mixture.choose(16)
    assert chosen.fits
    assert chosen.layout.expert == chosen.layout.shard > 1
    assert chosen.gathered < 8 * GB  # a layer without its experts, twice
    whole = mixture.estimate(Layout(shard=16))
    assert whole.gathered == pytest.approx(2 * 2 * 235e9 / 94, rel=0.02)  # a layer, twice


def test_a_layout_asked_for_is_counted_or_refused():
    eight = planner("Qwen3-8B")
    one, four = (eight.estimate(Layout.parse(text)) for text in ("data=1", "shard=2,tensor=2"))
    assert four.weights < one.weights / 2
    assert four.activations < one.activations
    with pytest.raises(InvalidInput, match="tensor=16 does not divide the model's num_key_value"):
        eight.estimate(Layout(tensor=16))


def test_what_does_not_fit_comes_with_what_would():
    assert planner("Llama-3.1-70B").remedy(1) == "4 do, as shard=4"
    mixture, shared = planner("Qwen3-235B-A22B"), "8 with adapters that a layer's experts share"
    assert mixture.remedy(1) == mixture.remedy(8) == f"{shared}, as shard=8,expert=8"
    assert "take a lower rank" in planner("Qwen3-8B", rank=20000).remedy(1)


def test_longer_sequences_are_checkpointed():
    assert not planner("Qwen3-8B").choose(1).checkpointing
    assert planner("Qwen3-8B", context=16384).choose(1).checkpointing


def taken(leader, lengths: list[int], make=sequence) -> dict:
    """What this rank holds of the weights, and what a pass takes at its peak over a sequence on every part,
    by length and by whether it is checkpointed."""
    parameters = leader.backbone.model.parameters()
    held = {p.data_ptr(): p.nbytes for p in map(local, parameters)}
    engine = LearnerEngine(leader.backbone, group=leader)
    engine.create_run("a", LORA)
    passes = {}
    for length in lengths:
        datums = [make(length, part) for part in range(leader.parts)]
        train = partial(engine.forward_backward, "a", datums, "cross_entropy", None, "loss")
        for checkpointing in (False, True):
            engine.budget.checkpointing = lambda *_, how=checkpointing, **__: [how]
            train()  # once, so that what torch keeps for good is there
            passes[length, checkpointing] = peak(train)
    return {"weights": sum(held.values()), "passes": passes}


def local(parameter):
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@pytest.mark.parametrize("layout", ["data=2", "shard=2", "tensor=2", "shard=2,tensor=2"])
def test_a_rank_takes_what_is_planned_to_15_percent(layout, tmp_path, monkeypatch):
    shapes = {"llama": dict(head_dim=32, intermediate=192), "qwen3": dict(intermediate=2048)}
    paths = [make_tiny_model(tmp_path / name, name, **shape) for name, shape in shapes.items()]
    measured = on_ranks(layout, paths, partial(taken, lengths=[200, 400]), tmp_path)
    for path, told in zip(paths, measured, strict=True):
        config = AutoConfig.from_pretrained(path)
        for (length, checkpointing), peak_bytes in told["passes"].items():
            monkeypatch.setattr(plan, "PASS_ROWS", length)
            room = 0 if checkpointing else GB
            planned = Planner(config, Demand(16, length, "fp32"), room)
            estimate = planned.estimate(Layout.parse(layout))
            assert estimate.checkpointing == checkpointing
            assert estimate.weights == told["weights"]
            counted = estimate.gathered + estimate.activations
            assert counted == pytest.approx(peak_bytes, rel=0.15)


def routed(length: int, seed: int, shares: int) -> Datum:
    """Through experts that are chosen as the plan takes it: of each share of them one twice as often as the
    mean, the others evenly."""
    datum, rng = sequence(length, seed), np.random.default_rng(seed)
    often = np.arange(EXPERTS) % (EXPERTS // shares) == 0
    chance = np.where(often, 2 / EXPERTS, (1 - 2 * shares / EXPERTS) / max(1, (~often).sum()))
    chance = np.maximum(chance, 1e-9)
    drawn = np.log(chance) + rng.gumbel(size=(length, LAYERS, EXPERTS))  # without replacement
    choice = drawn.argsort(-1)[..., -CHOSEN:]
    return Datum(datum.model_input, {**datum.loss_fn_inputs, "routed_experts": choice})


@pytest.mark.parametrize(
    "layout", ["shard=2", "tensor=2", "shard=2,expert=2", "shard=2,tensor=2,expert=2"]
)
def test_so_does_a_rank_of_a_mixture(layout, tmp_path, monkeypatch):
    path = make_tiny_model(tmp_path / "mixture", "qwen3_moe", intermediate=1536)
    make = partial(routed, shares=Layout.parse(layout).expert * Layout.parse(layout).tensor)
    (told,) = on_ranks(layout, [path], partial(taken, lengths=[200, 400], make=make), tmp_path)
    config = AutoConfig.from_pretrained(path)
    for (length, checkpointing), peak_bytes in told["passes"].items():
        monkeypatch.setattr(plan, "PASS_ROWS", length)
        planned = Planner(config, Demand(16, length, "fp32"), 0 if checkpointing else GB)
        estimate = planned.estimate(Layout.parse(layout))
        assert estimate.weights == told["weights"]
        counted = estimate.gathered + estimate.activations
        assert counted == pytest.approx(peak_bytes, rel=0.15)


def pass_of(leader, length: int, checkpointing: bool) -> None:
    engine = LearnerEngine(leader.backbone, group=leader)
    engine.create_run("a", LORA)
    engine.budget.checkpointing = lambda *_, **__: [checkpointing]
    for _ in range(2):
        engine.forward_backward("a", [sequence(length)], "cross_entropy", None, "loss")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_of_ranks_that_share_rows_the_last_takes_most(checkpointing, tmp_path):
    path = make_tiny_model(tmp_path / "model", "llama", head_dim=32, intermediate=192)
    config, layout = AutoConfig.from_pretrained(path), "context=2"
    one_pass = partial(pass_of, length=400, checkpointing=checkpointing)
    (measured,) = on_ranks(layout, [path], one_pass, tmp_path, peak)
    model = MemoryModel(config, 4, context=2)
    adapter = Planner(config, Demand(16, 400, "fp32"), GB).adapter
    counted = model.pass_(PassShape([400], [()], 400), [adapter], checkpointing=checkpointing)
    received = 4 * adapter.size
    assert counted + received == pytest.approx(measured, rel=0.15)


def loaded(leader) -> tuple[int, int]:
    before = own_bytes()
    again = ShardedBackbone(leader.backbone.path, "fp32", leader.ranks)
    return own_bytes() - before, again.bytes_read


def test_a_rank_reads_and_holds_its_share_alone(tmp_path):
    """A model of 101 MB, nearly all of it in its MLPs."""
    path = make_tiny_model(tmp_path / "wide", intermediate=65536)
    for layout in ("shard=2", "tensor=2", "shard=2,tensor=2"):
        ((grown, read),) = on_ranks(layout, [path], loaded, tmp_path)
        share = 101e6 / Layout.parse(layout).world
        assert read == pytest.approx(share, rel=0.02)
        assert grown == pytest.approx(share, rel=0.2)


def test_the_command_prints_a_table_or_json():
    runner = CliRunner()
    command = ["plan", "Qwen3-30B-A3B", "--gpus", "1", "--gpus", "16"]
    shown = runner.invoke(app, command, env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    assert "Qwen3-30B-A3B: 30.5 B parameters in bf16" in shown.output
    assert "1 GPU does not do: 2 do, as tensor=2; 1 with adapters that" in shown.output
    told = runner.invoke(app, [*command, "--json"])
    first, second = map(json.loads, told.output.splitlines())
    assert (first["fits"], second["fits"], second["layout"]) == (
        False,
        True,
        "data=4,shard=4,expert=4",
    )
    refused = runner.invoke(app, ["plan", "Qwen3-8B", "--gpus", "4", "--layout", "shard=2"])
    assert "layout shard=2 is for 2 GPUs, not 4" in refused.output
