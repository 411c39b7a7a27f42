"""Batches of many runs in shared passes: against PEFT, against each by itself, and under strain."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import numpy as np
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import tinsmith
from tests.data import VOCAB, untimed
from tests.engines.as_trained import as_trained
from tests.engines.test_learner import padded_reference
from tinsmith.algorithms.losses import LOSSES, Loss
from tinsmith.engines import learner as learner_module
from tinsmith.engines.adapter_files import write_adapter
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.batch import Batch
from tinsmith.engines.fair_queue import FairQueue
from tinsmith.engines.learner import LearnerEngine
from tinsmith.engines.memory import state_bytes
from tinsmith.engines.passes import run_pass
from tinsmith.primitives.types import AdamParams, Datum, LoraConfig

ADAM = AdamParams(1e-2, 0.9, 0.95, 1e-3, 0.1, 1.0)


@pytest.fixture(scope="module")
def llama(tiny_llama) -> Backbone:
    return Backbone(tiny_llama)


def tree(rng: np.random.Generator, leaves: int) -> list[np.ndarray]:
    """Token sequences that share prefixes: each begins as one before it does, or afresh."""
    sequences: list[np.ndarray] = []
    for _ in range(leaves):
        stem = np.array([], np.int64)
        if sequences and rng.random() < 0.7:
            stem = sequences[rng.integers(len(sequences))]
            stem = stem[: rng.integers(0, len(stem) + 1)]
        sequences.append(np.concatenate([stem, rng.integers(0, VOCAB, rng.integers(2, 14))]))
    return sequences


def datums_of(rng: np.random.Generator, loss_fn: str, leaves: int) -> list[Datum]:
    datums = []
    for tokens in tree(rng, leaves):
        used = rng.random(len(tokens) - 1) < 0.6
        inputs = (
            {"weights": np.where(used, rng.uniform(0, 1, len(used)), 0)}
            if loss_fn == "cross_entropy"
            else {
                "logprobs": rng.uniform(-7, -5, len(used)),
                "advantages": np.where(used, rng.normal(size=len(used)), 0),
            }
        )
        datums.append(Datum(tokens[:-1], {"target_tokens": tokens[1:], **inputs}))
    return datums


def add_run(engine: LearnerEngine, run_id: str, lora: LoraConfig, **options) -> None:
    """Its B random too, as after some training."""
    engine.create_run(run_id, lora, **options)
    run = engine.runs[run_id]
    as_trained(run.layout, run.params, lora.seed or 0)


tenants = st.lists(
    st.fixed_dictionaries(
        {
            "rank": st.integers(1, 9),
            "alpha": st.sampled_from([4.0, 32.0]),
            "groups": st.sampled_from(["attn", "mlp", "unembed", "attn mlp", "attn mlp unembed"]),
            "loss_fn": st.sampled_from(["cross_entropy", "ppo", "importance_sampling", "cispo"]),
            "leaves": st.integers(1, 6),
            "seed": st.integers(0, 999),
        }
    ),
    min_size=1,
    max_size=4,
)


def lora_of(tenant) -> LoraConfig:
    trained = {f"train_{g}": g in tenant["groups"].split() for g in ("attn", "mlp", "unembed")}
    return LoraConfig(rank=tenant["rank"], alpha=tenant["alpha"], seed=tenant["seed"], **trained)


def together(engine: LearnerEngine, batches: dict[str, tuple[list[Datum], str]]):
    """Submit all, and run to the end: the outputs (or errors) by run."""
    numbers = {
        engine.submit(run_id, data, loss_fn, backward=True): run_id
        for run_id, (data, loss_fn) in batches.items()
    }
    outcomes = {}
    while engine.busy:
        for finished in engine.step():
            outcomes[numbers[finished.number]] = finished.error or finished.output
    return outcomes


def peft_of(path: str, engine: LearnerEngine, run_id: str, folder):
    run = engine.runs[run_id]
    folder.mkdir(parents=True)
    for name, data in write_adapter(run.layout, run.params, path).items():
        (folder / name).write_bytes(data)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(tenants, st.sampled_from([12, 60, 2048]))
def test_any_mix_of_runs_equals_each_through_peft(tiny_llama, llama, tmp_path_factory, mix, rows):
    """Outputs, gradients, and adapters after a step; relative to the largest, 1e-4."""
    engine = LearnerEngine(llama, max_pack_tokens=rows)
    folder = tmp_path_factory.mktemp("adapters")
    batches, references = {}, {}
    for i, tenant in enumerate(mix):
        add_run(engine, f"run-{i}", lora_of(tenant))
        data = datums_of(np.random.default_rng(tenant["seed"]), tenant["loss_fn"], tenant["leaves"])
        batches[f"run-{i}"] = (data, tenant["loss_fn"])
        references[f"run-{i}"] = peft_of(tiny_llama, engine, f"run-{i}", folder / str(i))
    outcomes = together(engine, batches)
    for run_id, (data, loss_fn) in batches.items():
        model, run = references[run_id], engine.runs[run_id]
        loss, logprobs = padded_reference(model, data, loss_fn, {})
        loss.backward()
        for got, want in zip(outcomes[run_id].loss_fn_outputs, logprobs, strict=True):
            np.testing.assert_allclose(got["logprobs"], want, atol=1e-4)
        assert outcomes[run_id].metrics["loss:sum"] == pytest.approx(
            loss.item(), rel=1e-4, abs=1e-4
        )
        factors = dict(model.named_parameters())
        of = "base_model.model.{}.lora_{}.default.weight".format
        ours = [
            (view, factors[of(name, part)])
            for name, pair in run.layout.views(run.grad).items()
            for part, view in zip("AB", pair, strict=True)
        ]
        largest = max(float(p.grad.abs().max()) for _, p in ours)
        for got, p in ours:
            torch.testing.assert_close(got, p.grad, rtol=0, atol=1e-4 * largest + 1e-7)
        trained = [p for _, p in ours]
        torch.nn.utils.clip_grad_norm_(trained, ADAM.grad_clip_norm)
        torch.optim.AdamW(
            trained,
            ADAM.learning_rate,
            (ADAM.beta1, ADAM.beta2),
            ADAM.eps,
            ADAM.weight_decay,
        ).step()
    engine.optim_steps(dict.fromkeys(batches, ADAM))
    for run_id, model in references.items():
        run, factors = engine.runs[run_id], dict(model.named_parameters())
        for name, pair in run.layout.views(run.params).items():
            for part, got in zip("AB", pair, strict=True):
                torch.testing.assert_close(
                    got, factors[of(name, part)].detach(), rtol=0, atol=1e-2 * ADAM.learning_rate
                )


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(tenants, st.sampled_from([12, 60, 2048]))
def test_company_changes_no_bit(llama, mix, rows):
    shared = LearnerEngine(llama, max_pack_tokens=rows)
    batches = {}
    for i, tenant in enumerate(mix):
        add_run(shared, f"run-{i}", lora_of(tenant))
        data = datums_of(np.random.default_rng(tenant["seed"]), tenant["loss_fn"], tenant["leaves"])
        batches[f"run-{i}"] = (data, tenant["loss_fn"])
    outcomes = together(shared, batches)
    for i, tenant in enumerate(mix):
        run_id, alone = f"run-{i}", LearnerEngine(llama, max_pack_tokens=rows)
        add_run(alone, run_id, lora_of(tenant))
        output = alone.forward_backward(run_id, *batches[run_id])
        assert torch.equal(alone.runs[run_id].grad, shared.runs[run_id].grad)
        assert untimed(output.metrics) == untimed(outcomes[run_id].metrics)
        for a, b in zip(output.loss_fn_outputs, outcomes[run_id].loss_fn_outputs, strict=True):
            np.testing.assert_array_equal(a["logprobs"], b["logprobs"])


def mixed_losses(engine: LearnerEngine) -> dict[str, tuple[list[Datum], str]]:
    rng = np.random.default_rng(5)
    for i in range(3):
        add_run(engine, f"run-{i}", LoraConfig(rank=2 + i, seed=i))
    return {f"run-{i}": (datums_of(rng, "ppo", 3), "ppo") for i in range(3)}


@pytest.fixture
def raising_loss():
    """A user's loss with a bug."""

    def function(p, inputs, config):
        raise ZeroDivisionError("of the user's")

    loss = Loss("raising", function, lambda inputs, config: inputs["advantages"] != 0)
    LOSSES["raising"] = loss
    yield loss.name
    del LOSSES["raising"]


def test_a_bad_batch_fails_alone(llama, raising_loss):
    engine, alone = LearnerEngine(llama), LearnerEngine(llama)
    batches, wanted = mixed_losses(engine), mixed_losses(alone)
    bad = [
        Datum(d.model_input, {**d.loss_fn_inputs, "logprobs": np.full(d.model_input.length, -1e5)})
        for d in batches["run-1"][0]
    ]
    add_run(engine, "raising", LoraConfig(rank=2))
    outcomes = together(
        engine,
        {
            **batches,
            "run-1": (bad, "importance_sampling"),
            "raising": (wanted["run-0"][0], raising_loss),
        },
    )
    assert isinstance(outcomes["run-1"], tinsmith.InvalidInput)
    assert "not finite" in str(outcomes["run-1"])
    assert not engine.runs["run-1"].grad.any()
    assert "ZeroDivisionError: of the user's" in str(outcomes["raising"])
    for run_id in ("run-0", "run-2"):
        alone.forward_backward(run_id, *wanted[run_id])
        assert torch.equal(alone.runs[run_id].grad, engine.runs[run_id].grad)


def test_a_pass_that_fails_is_computed_again_batch_by_batch(llama, monkeypatch):
    engine, real = LearnerEngine(llama), learner_module.run_pass

    def short_of_memory(backbone, works, *options):
        if len(works) > 1 or works[0].layout.config.rank == 3:
            raise MemoryError("no room")
        return real(backbone, works, *options)

    monkeypatch.setattr(learner_module, "run_pass", short_of_memory)
    outcomes = together(engine, mixed_losses(engine))
    assert "MemoryError: no room" in str(outcomes["run-1"])
    assert isinstance(outcomes["run-1"], tinsmith.TinsmithError)
    for run_id in ("run-0", "run-2"):
        assert outcomes[run_id].metrics["tokens:sum"] > 0
        assert engine.runs[run_id].grad.any()


# ---- fair turns ----


def long_batch(rng, units: int, rows: int = 60) -> list[Datum]:
    """Each datum fills a pass."""
    datums = []
    for _ in range(units):
        tokens = rng.integers(0, VOCAB, rows + 1)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(rows)}
        datums.append(Datum(tokens[:-1], inputs))
    return datums


def test_a_small_batch_does_not_wait_for_a_greedy_ones_end(llama):
    engine, rng = LearnerEngine(llama, max_pack_tokens=60), np.random.default_rng(0)
    for run_id in ("greedy", "small"):
        engine.create_run(run_id, LoraConfig(rank=2))
    greedy = engine.submit("greedy", long_batch(rng, 40), "cross_entropy", backward=True)
    for _ in range(10):
        assert engine.step() == []
    for _ in range(3):  # and it may come back: the greedy one takes turns with it
        small = engine.submit("small", long_batch(rng, 1), "cross_entropy", backward=True)
        finished = [f.number for _ in range(2) for f in engine.step()]
        assert finished == [small]
    while engine.busy:
        finished = [f.number for f in engine.step()]
    assert finished == [greedy]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0.25, 4), min_size=2, max_size=5),
    st.lists(st.integers(1, 100), min_size=2, max_size=5),
)
def test_turns_follow_the_shares(shares, sizes):
    """Runs that always wait get rows in proportion to their shares, within a batch or two."""
    queue, had = FairQueue(), dict.fromkeys(range(len(shares)), 0)
    queue.weights = {str(i): share for i, share in enumerate(shares)}
    for run in queue.weights:
        queue.arrive(run)
    for turn in range(500):
        run = queue.next(queue.weights)
        rows = sizes[(turn * 7 + int(run)) % len(sizes)]
        queue.charge(run, rows)
        had[int(run)] += rows
    served = [had[i] / share for i, share in enumerate(shares)]
    assert max(served) - min(served) <= 2 * 100 / min(shares)


def test_who_pauses_is_owed_nothing():
    queue = FairQueue()
    for run in ("a", "b"):
        queue.arrive(run)
    for _ in range(100):  # b has nothing to do meanwhile
        queue.charge("a", 10)
    queue.arrive("b")
    turns = []
    for _ in range(10):
        run = queue.next(["a", "b"])
        queue.charge(run, 10)
        turns.append(run)
    assert 4 <= turns.count("a") <= 6


# ---- more runs than fit ----


def train(engine: LearnerEngine, run_ids: list[str], steps: int) -> None:
    rng = np.random.default_rng(8)
    for _ in range(steps):
        for run_id in run_ids:
            engine.forward_backward(run_id, datums_of(rng, "ppo", 2), "ppo")
            if rng.random() < 0.6:
                engine.optim_step(run_id, AdamParams(learning_rate=1e-2))


def test_runs_set_aside_come_back_exactly(llama, tmp_path):
    lora, run_ids = LoraConfig(rank=4, seed=1), [f"run-{i}" for i in range(5)]
    size = state_bytes([llama.layout(lora)])
    folder = tmp_path / "aside"
    roomy, tight = (
        LearnerEngine(llama),
        LearnerEngine(llama, resident_bytes=2 * size, folder=folder),
    )
    for engine in (roomy, tight):
        for run_id in run_ids:
            engine.create_run(run_id, lora)
        train(engine, run_ids, 4)
    assert list(tight.runs.set_aside().values()) == ["file"] * 3
    assert list(folder.iterdir()) == []  # nothing that a killed process would leave behind
    for run_id in run_ids:
        ours, wanted = tight.state(run_id, True), roomy.state(run_id, True)
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_a_pass_takes_only_runs_that_fit_together(llama, tmp_path):
    lora = LoraConfig(rank=4, seed=1)
    size = state_bytes([llama.layout(lora)])
    engine = LearnerEngine(llama, resident_bytes=2 * size, folder=tmp_path)
    for i in range(5):
        engine.create_run(f"run-{i}", lora)
    rng = np.random.default_rng(9)
    outcomes = together(engine, {f"run-{i}": (datums_of(rng, "ppo", 2), "ppo") for i in range(5)})
    assert all(outcome.metrics["tokens:sum"] > 0 for outcome in outcomes.values())
    assert len(outcomes) == 5


def test_what_cannot_fit_is_refused_with_what_it_needs(llama, tmp_path):
    size = state_bytes([llama.layout(LoraConfig(rank=4))])
    engine = LearnerEngine(llama, resident_bytes=size, folder=tmp_path / "file")
    engine.create_run("a", LoraConfig(rank=4))
    with pytest.raises(tinsmith.OutOfCapacity, match=f"needs {2 * size:,} bytes.*has {size:,}"):
        engine.create_run("b", LoraConfig(rank=8))
    train(engine, ["a"], 1)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(tinsmith.OutOfCapacity, match="could not be set aside"):
        engine.create_run("b", LoraConfig(rank=4))
    train(engine, ["a"], 1)  # still there


# ---- several learners ----


class Elsewhere:
    """A helper on another copy of the model, in a thread; `dies_after` passes, like one killed."""

    def __init__(self, path: str, dies_after: int = 10**9) -> None:
        self.backbone, self.left = Backbone(path), dies_after
        self.thread = ThreadPoolExecutor(1)
        self.passes = 0

    def __call__(self, works):
        def compute():
            # As between processes: nothing is shared.
            sent = pickle.loads(cloudpickle.dumps(works))
            if self.left == 0:
                raise tinsmith.Unavailable("it was killed")
            self.left -= 1
            self.passes += 1
            return run_pass(self.backbone, sent)

        return self.thread.submit(compute)


@pytest.mark.parametrize("dies_after", [0, 3, 10**9])
def test_a_batch_in_parts_gives_the_same_whoever_computes_them(tiny_llama, llama, dies_after):
    """Two learners, one, or two of which one dies: bit for bit. Against undivided batches: 1e-5."""
    rng = np.random.default_rng(3)
    batches = [
        {f"run-{i}": (long_batch(rng, 5 + i), "cross_entropy") for i in range(2)} for _ in range(3)
    ]

    def trained(learners: int, helper: Elsewhere | None) -> LearnerEngine:
        engine = LearnerEngine(llama, max_pack_tokens=256, learners=learners)
        if helper is not None:
            engine.helpers[1] = helper
        for i in range(2):
            add_run(engine, f"run-{i}", LoraConfig(rank=3, seed=i))
        for step in batches:
            outcomes = together(engine, step)
            assert all(outcome.metrics["loss:sum"] > 0 for outcome in outcomes.values())
            engine.optim_steps(dict.fromkeys(step, ADAM))
        return engine

    helper = Elsewhere(tiny_llama, dies_after)
    alone, helped, undivided = trained(2, None), trained(2, helper), trained(1, None)
    assert helper.passes == min(dies_after, helper.passes)
    assert (helper.passes > 3) == (dies_after > 3)
    assert (1 in helped.helpers) == (dies_after > 3)
    for i in range(2):
        assert torch.equal(alone.export(f"run-{i}"), helped.export(f"run-{i}"))
        torch.testing.assert_close(
            undivided.export(f"run-{i}"), helped.export(f"run-{i}"), rtol=1e-5, atol=1e-5
        )


def test_a_batch_is_divided_evenly(llama):
    rng = np.random.default_rng(4)
    batch = Batch(llama, long_batch(rng, 12), "cross_entropy", None, "all")
    rows = [[len(u.pack.tokens) for u in batch.units(2048, learners)] for learners in (1, 2, 3)]
    assert rows == [[720], [360, 360], [240, 240, 240]]
