"""Deterministic simulation of the log and the scheduler: any interleaving of operations, retries,
crashes, recoveries and failing disks gives what the operations give one after the other.

`TINSMITH_SIMULATION=500 make test ARGS='-n 0 -s tests/actors/test_simulation.py'` tries so many
histories instead of a few, others every time, and prints what was in them.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import tinsmith
from tests.actors.simulated import Life, Published
from tests.actors.test_training import engine_threads
from tests.data import VOCAB, policy_datum, text_datum, untimed
from tinsmith.actors import learner as learner_module
from tinsmith.actors.wal import Log
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.primitives import codec
from tinsmith.primitives.types import AdamParams, LoraConfig

EXAMPLES = int(os.environ.get("TINSMITH_SIMULATION", "0"))
LORAS = [LoraConfig(rank=rank, seed=rank, train_unembed=rank > 1) for rank in (1, 2, 4)]
UNDONE = (tinsmith.OpCancelled, tinsmith.StorageFailure)
LOSSES = ["ppo", "cross_entropy", "cispo", "importance_sampling"]

counts: collections.Counter[str] = collections.Counter()
model_path = ""
backbone: Backbone


@dataclass
class Run:
    """`given`: results and errors by number, as they were first given."""

    run_id: str
    lora: LoraConfig
    ops: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    sent: set[int] = field(default_factory=set)
    given: dict[int, tuple[Any, Exception | None]] = field(default_factory=dict)

    @property
    def failed(self) -> list[int]:
        return [n for n, (_, error) in self.given.items() if error and n >= self.answered]

    @property
    def answered(self) -> int:
        """Before which number what became of all operations is known."""
        return next(n for n in range(1, len(self.ops) + 2) if n not in self.given)


def batch(seed: int, length: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    loss = LOSSES[seed % len(LOSSES)]
    make = text_datum if loss == "cross_entropy" else policy_datum
    return dict(data=[make(rng, length) for _ in range(1 + seed % 2)], loss_fn=loss)


seeds = st.integers(0, 1000)
batches = st.builds(batch, seeds, st.integers(4, 12))
bad_batches = st.sampled_from(
    [
        dict(data=[tinsmith.Datum([VOCAB], {"target_tokens": [1], "weights": [1.0]})])
        | dict(loss_fn="cross_entropy"),
        dict(data=[], loss_fn="ppo"),
        batch(0, 4) | dict(loss_fn="no such loss"),
    ]
)
steps = st.builds(
    lambda rate, clip: dict(adam_params=AdamParams(learning_rate=rate, grad_clip_norm=clip)),
    st.sampled_from([1e-4, 1e-2, 0.1]),
    st.sampled_from([0.0, 1.0]),
)
names = st.sampled_from("ab")
operations = st.one_of(
    st.tuples(st.just("forward_backward"), batches),
    st.tuples(st.just("forward_backward"), batches),
    st.tuples(st.just("forward"), batches),
    st.tuples(st.just("optim_step"), steps),
    st.tuples(st.just("optim_step"), steps),
    st.tuples(st.just("set_share"), st.fixed_dictionaries({"share": st.sampled_from([0.5, 2.0])})),
    st.tuples(
        st.just("publish"),
        st.fixed_dictionaries({"keep": st.booleans(), "every_step": st.booleans()}),
    ),
    st.tuples(
        st.just("save_state"), st.fixed_dictionaries({"name": names, "overwrite": st.booleans()})
    ),
    st.tuples(
        st.just("load_state"), st.fixed_dictionaries({"name": names, "optimizer": st.booleans()})
    ),
    st.tuples(st.just("forward_backward"), bad_batches),
    st.tuples(st.just("get_info"), st.just({})),
)
which = st.integers(0, 99)


class Simulation(RuleBasedStateMachine):
    """Which rules are drawn depends on nothing that a thread or a clock could change."""

    @initialize(replay_seconds=st.sampled_from([0.0, 1e9]))
    def begin(self, replay_seconds: float) -> None:
        counts["examples"] += 1
        self.steps = 0  # of this life
        self.folder = Path(tempfile.mkdtemp(prefix="simulation-"))
        self.lives = 0
        self.published = Published()
        self.runs: list[Run] = []
        self.versions_lost = False
        self.crashed = False  # what comes now is not on the disk that the next life gets
        (self.folder / "0").mkdir()
        self.live(replay_seconds)
        for index in range(2):
            self.open_run(index)

    def live(self, replay_seconds: float) -> None:
        self.life = Life(self.folder / str(self.lives), model_path, self.published, replay_seconds)
        self.tasks: list[asyncio.Task[None]] = []
        self.steps = 0

    def open_run(self, index: int) -> None:
        run = Run(f"run-{len(self.runs)}", LORAS[index % len(LORAS)])
        created = (run.run_id, model_path, run.lora, None, False, {})
        self.life.run(self.life.controller.create_run(*created))
        self.runs.append(run)

    def run_of(self, number: int) -> Run:
        return self.runs[number % len(self.runs)]

    # ---- operations ----

    def send(self, run: Run, seq_id: int) -> None:
        run.sent.add(seq_id)
        kind, args = run.ops[seq_id - 1]

        async def one() -> None:
            result, error = None, None
            try:
                known = (min(run.answered, seq_id), run.failed)
                result = await self.life.learner.submit(run.run_id, seq_id, kind, args, *known)
            except tinsmith.TinsmithError as failure:
                error = failure
            if self.crashed:
                return
            if seq_id not in run.given:
                run.given[seq_id] = (result, error)
                return
            before, error_before = run.given[seq_id]
            assert codec.encode(result) == codec.encode(before), (run.run_id, seq_id, kind)
            assert repr(error) == repr(error_before)

        self.tasks.append(self.life.loop.create_task(one()))

    @rule(number=which, ops=st.lists(operations, min_size=1, max_size=6), at_once=st.booleans())
    def submit(self, number: int, ops: list[tuple[str, dict[str, Any]]], at_once: bool) -> None:
        run = self.run_of(number)
        for kind, args in ops:
            if kind == "load_state":
                path = f"tinker://{run.run_id}/weights/{args['name']}"
                args = dict(path=path, optimizer=args["optimizer"])
            run.ops.append((kind, args))
            if at_once:
                self.send(run, len(run.ops))

    @rule(number=which, op=which)
    def send_one_or_send_it_again(self, number: int, op: int) -> None:
        run = self.run_of(number)
        if run.ops:
            seq_id = op % len(run.ops) + 1
            if not isinstance(run.given.get(seq_id, (None, None))[1], tinsmith.StorageFailure):
                self.send(run, seq_id)

    @rule(number=which, op=which)
    def withdraw(self, number: int, op: int) -> None:
        run = self.run_of(number)
        if run.ops:
            seq_id = op % len(run.ops) + 1

            async def one() -> None:
                with contextlib.suppress(tinsmith.StorageFailure):
                    await self.life.learner.withdraw(run.run_id, seq_id)

            self.tasks.append(self.life.loop.create_task(one()))

    @rule(count=st.integers(1, 60), number=which, ops=st.lists(operations, max_size=3))
    def time_passes(self, count: int, number: int, ops: list[tuple[str, dict[str, Any]]]) -> None:
        self.submit(number, ops, True)
        self.life.tick(count)

    @precondition(lambda self: not (self.life.disk.broken or self.life.disk.room is not None))
    @rule(number=which)
    def snapshot(self, number: int) -> None:
        self.life.disk.release()
        with contextlib.suppress(tinsmith.StorageFailure):  # it is being mended just now
            self.life.run(self.life.learner.park(self.run_of(number).run_id))

    # ---- disks ----

    @precondition(lambda self: not self.life.learner.mending)
    @rule()
    def disk_is_slow(self) -> None:
        self.life.disk.holding = True

    @precondition(lambda self: self.life.disk.holding)
    @rule()
    def disk_syncs(self) -> None:
        self.life.disk.release()

    @rule()
    def disk_breaks(self) -> None:
        self.life.disk.broken = True
        self.life.disk.release()

    @rule(room=st.integers(0, 3000))
    def disk_is_nearly_full(self, room: int) -> None:
        self.life.disk.room = room

    @precondition(lambda self: self.life.disk.broken or self.life.disk.room is not None)
    @rule()
    def disk_is_mended(self) -> None:
        self.life.disk.broken, self.life.disk.room = False, None
        self.life.tick(200)

    # ---- crashes ----

    @rule(count=st.integers(1, 12), survives=st.floats(0, 1), power=st.booleans())
    def crash_soon(self, count: int, survives: float, power: bool) -> None:
        """Before an fsync to come."""
        left = count

        def countdown() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self.copy_disk(power, survives, False)

        if not self.crashed:
            self.life.disk.before_sync = countdown

    @precondition(lambda self: self.steps > 1)
    @rule(
        power=st.booleans(),
        survives=st.floats(0, 1),
        flipped=st.booleans(),
        sampler_too=st.booleans(),
        replay_seconds=st.sampled_from([0.0, 1e9]),
        shuffled=seeds,
    )
    def crash(
        self,
        power: bool,
        survives: float,
        flipped: bool,
        sampler_too: bool,
        replay_seconds: float,
        shuffled: int,
    ) -> None:
        counts["crashes"] += 1
        if not self.crashed:
            self.copy_disk(power, survives, flipped)
        self.life.end()
        if sampler_too:
            self.published.newest.clear()
            self.versions_lost |= power  # what was pinned outlives processes, not the machine
        self.lives, self.crashed = self.lives + 1, False
        self.live(replay_seconds)
        for run in self.runs:
            self.life.run(self.life.controller.reopen_run(run.run_id))
            unanswered = sorted(run.sent - run.given.keys())
            np.random.default_rng(shuffled).shuffle(unanswered)
            for seq_id in unanswered:
                self.send(run, seq_id)

    def copy_disk(self, power: bool, survives: float, flipped: bool) -> None:
        target = self.folder / str(self.lives + 1)
        if power:
            self.life.disk.after_power_cut(target, survives, flipped)
        else:
            self.life.disk.after_kill(target)
        self.crashed = True

    @invariant()
    def count(self) -> None:
        self.steps += 1
        counts["steps"] += 1

    @precondition(lambda self: not self.crashed and self.steps > 5)
    @rule()
    def the_service_is_stopped_and_started(self) -> None:
        counts["restarts"] += 1
        self.everything_comes_to_its_end()
        if self.crashed:
            return
        self.life.run(self.life.controller.park_runs())
        if not self.crashed:
            self.copy_disk(False, 1.0, False)
        self.life.end()
        self.lives, self.crashed = self.lives + 1, False
        self.live(1e9)
        for run in self.runs:
            grant = self.life.run(self.life.controller.resume_run(run.run_id, None))
            # A new client may use the numbers again of what was refused and left no trace.
            for seq_id in range(grant.next_seq_id, len(run.ops) + 1):
                assert isinstance(run.given.pop(seq_id)[1], tinsmith.StorageFailure)
            del run.ops[grant.next_seq_id - 1 :]
            run.sent = {seq_id for seq_id in run.sent if seq_id < grant.next_seq_id}
            assert grant.next_seq_id == len(run.ops) + 1

    # ---- what must be ----

    def everything_comes_to_its_end(self) -> None:
        disk = self.life.disk
        disk.broken, disk.room = False, None
        disk.release()

        async def whole() -> None:
            await asyncio.gather(*self.life.learner.mending.values())
            for run in self.runs:
                for seq_id in range(1, len(run.ops) + 1):
                    if seq_id not in run.given:
                        self.send(run, seq_id)
            await asyncio.gather(*self.tasks)

        self.life.run(whole())

    def teardown(self) -> None:
        if not hasattr(self, "life"):
            return
        try:
            self.crash(True, 0.5, False, False, 1e9, 0)
            self.everything_comes_to_its_end()
            for run in self.runs:
                assert len(run.given) == len(run.ops)
                counts["operations"] += len(run.ops)
                self.compare(run)
        finally:
            self.life.end()
            shutil.rmtree(self.folder)

    def compare(self, run: Run) -> None:
        """With the same operations done one after the other."""
        engine = LearnerEngine(backbone)
        engine.create_run("run", run.lora)
        saved: dict[str, dict[str, torch.Tensor]] = {}
        weights: dict[int, torch.Tensor] = {0: engine.export("run")}
        newest, every_step = None, False
        for seq_id, (kind, args) in enumerate(run.ops, 1):
            result, error = run.given[seq_id]
            where = f"{run.run_id}, operation {seq_id} ({kind})"
            counts[type(error).__name__ if error else "given"] += 1
            if isinstance(error, UNDONE):
                continue
            if kind in ("forward", "forward_backward", "optim_step"):
                wanted, refused = outcome(getattr(engine, kind), "run", **args)
                assert type(error) is type(refused), where
                if refused is not None:
                    continue
                assert_same(result, wanted)
            elif kind == "set_share":
                engine.queue.weights["run"] = args["share"]
            elif kind == "save_state":
                taken = args["name"] in saved and not args["overwrite"]
                assert isinstance(error, tinsmith.InvalidInput) == taken, where
                if not taken:
                    saved[args["name"]] = engine.state("run")
            elif kind == "load_state":
                state = dict(saved.get(args["path"].rpartition("/")[2], {}))
                assert isinstance(error, tinsmith.NotFound) == (not state), where
                if state:
                    params = state.pop("params")
                    engine.load("run", params, state if args["optimizer"] else None, None)
            elif kind == "publish":
                every_step = every_step or args["every_step"]
            elif kind == "get_info":
                assert result.version == engine.runs["run"].version, where
            version = engine.runs["run"].version
            weights[version] = engine.export("run")
            publishes = kind == "publish" or (every_step and kind in ("optim_step", "load_state"))
            if publishes and error is None:
                newest = version

        learner = self.life.learner
        wanted = engine.state("run", True)
        for name, tensor in learner.engine.state(run.run_id, True).items():
            assert torch.equal(tensor, wanted[name]), (run.run_id, name)
        assert learner.engine.runs[run.run_id].version == engine.runs["run"].version
        assert learner.engine.queue.weights[run.run_id] == engine.queue.weights["run"]
        for version, sent in self.published.sent.get(run.run_id, {}).items():
            for flat in sent:
                assert np.array_equal(flat, weights[version].numpy()), (run.run_id, version)
        if newest is not None and (every_step or not self.versions_lost):
            assert self.published.newest[run.run_id] >= newest


def outcome(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, Exception | None]:
    try:
        return function(*args, **kwargs), None
    except tinsmith.TinsmithError as error:
        return None, error


def assert_same(a: Any, b: Any) -> None:
    assert untimed(a.metrics) == untimed(b.metrics)
    if hasattr(a, "loss_fn_outputs"):
        for x, y in zip(a.loss_fn_outputs, b.loss_fn_outputs, strict=True):
            np.testing.assert_array_equal(x["logprobs"], y["logprobs"])
    else:
        assert a.version == b.version


@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_any_history_gives_the_sequential_result(tiny_llama, monkeypatch):
    global model_path, backbone
    model_path, backbone = tiny_llama, Backbone(tiny_llama)
    monkeypatch.setattr(learner_module, "Backbone", lambda *_, **__: backbone)  # loaded once
    monkeypatch.setattr(learner_module, "MEND_SECONDS", 0.0)
    monkeypatch.setitem(Log.__init__.__kwdefaults__, "segment_bytes", 4000)
    chosen = settings(
        max_examples=EXAMPLES or 60,
        stateful_step_count=50 if EXAMPLES else 30,
        deadline=None,
        derandomize=not EXAMPLES,
        report_multiple_bugs=False,
        phases=[Phase.generate],  # shrinking takes minutes
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    with engine_threads():
        run_state_machine_as_test(Simulation, settings=chosen)
    print(dict(counts))  # with `pytest -s`
