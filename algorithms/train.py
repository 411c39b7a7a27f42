"""The training loop: from strictly on-policy (`max_staleness=0`) to fully asynchronous (`k`).

Rollouts go on while the learner works; every `optim_step` publishes its version to the live
sampler, and trajectories under way continue under it. All of the loop's state is in its
checkpoints, so a loop that was stopped in whatever way goes on from the last one as if it had
not been.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..envs.episode import EpisodeSpec
from ..primitives.client import EnvClient, SamplingClient, ServiceClient, TrainingClient
from ..primitives.codec import encode
from ..primitives.errors import NotFound
from ..primitives.types import Datum, SamplingParams, Trajectory
from .advantages import get_advantage
from .config import TrainConfig
from .datums import (
    mismatch_metrics,
    on_policy_masks,
    trajectory_datums,
    truncated_importance_weights,
)
from .evaluate import EvalResult, evaluate, is_success
from .rollout import Group, RolloutCounts, Rollouts
from .run_folder import load_run, new_run_folder

T = TypeVar("T")


class Watcher:
    """Sees the loop's progress; override what you want to show."""

    def started(self, run_id: str, run_dir: Path, first_step: int) -> None: ...

    def group(self, group: Group) -> None: ...

    def step(self, metrics: dict[str, float]) -> None: ...

    def eval_episode(self, trajectory: Trajectory) -> None: ...

    def evaluated(self, step: int, result: EvalResult) -> None: ...


@dataclass(frozen=True, eq=False)
class TrainResult:
    """`stopped`: a signal ended the loop early, after a checkpoint. `before` and `after` are None
    where that evaluation was not run (also `before` after a resume)."""

    run_id: str
    run_dir: Path
    steps: int
    stopped: bool
    before: EvalResult | None
    after: EvalResult | None
    totals: dict[str, float]


@dataclass
class _Loop:
    """What a checkpoint keeps besides the weights. `step` counts optimizer steps."""

    step: int = 0
    next_index: int = 0
    outstanding: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: asdict(RolloutCounts()))
    episodes: int = 0
    sampled_tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0


async def train(
    service: ServiceClient,
    config: TrainConfig,
    *,
    run_dir: str | Path | None = None,
    watch: Watcher | None = None,
) -> TrainResult:
    """Start a run. `run_dir` defaults to `<home>/runs/<run id>`.

    Ctrl-C and SIGTERM end it with a checkpoint: at once while it waits for episodes, else after
    the step under way.

    Raises:
        InvalidInput, NotFound: the config cannot be used.
        RolloutFailure: the environment fails every time.
    """
    about = {"env": config.env}
    if run_dir:
        about["run_dir"] = new_run_folder(run_dir)
    training = await _new_client(service, config, about)
    folder = Path(run_dir) if run_dir else Path(service.home) / "runs" / training.run_id
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "run.json", {"run_id": training.run_id, "config": asdict(config)})
    await training.save_state(_name(0), user_metadata={"loop": asdict(_Loop())})
    return await _train(service, training, config, folder, _Loop(), watch or Watcher())


async def _new_client(
    service: ServiceClient, config: TrainConfig, about: dict[str, Any]
) -> TrainingClient:
    if config.start:
        return await service.create_training_client_from_state(config.start, user_metadata=about)
    return await service.create_lora_training_client(
        config.model,
        rank=config.rank,
        alpha=config.alpha,
        seed=config.seed,
        train_unembed=config.train_unembed,
        user_metadata=about,
    )


async def resume(
    service: ServiceClient,
    run_dir: str | Path,
    *,
    steps: int | None = None,
    watch: Watcher | None = None,
) -> TrainResult:
    """Go on with the run in `run_dir` from its last checkpoint; `steps` sets another end.

    Raises:
        NotFound: there is no run in `run_dir`, or the service does not know it.
    """
    folder = Path(run_dir)
    run_id, config = load_run(folder)
    if steps is not None:
        config = replace(config, steps=steps)
    saved = [c for c in await service.list_checkpoints(run_id) if "loop" in c.user_metadata]
    if not saved:
        raise NotFound(f"run {run_id} has no checkpoint to go on from")
    newest = max(saved, key=lambda c: c.user_metadata["loop"]["step"])
    loop = _Loop(**newest.user_metadata["loop"])
    training = await service.resume_training_client(run_id, path=newest.path)
    _truncate_metrics(folder / "metrics.jsonl", loop.step)
    return await _train(service, training, config, folder, loop, watch or Watcher())


async def _train(
    service: ServiceClient,
    training: TrainingClient,
    config: TrainConfig,
    folder: Path,
    loop: _Loop,
    watch: Watcher,
) -> TrainResult:
    watch.started(training.run_id, folder, loop.step)
    live = await training.live_sampling_client().ready()
    before = after = None
    with _stop_on_signals() as stop, _appending(folder / "metrics.jsonl") as log:
        workers = await service.create_env_client(config.model, config.num_env_workers)
        async with workers as env_client:
            runner = _Runner(training, env_client, live, config, folder, loop, watch, log)
            if loop.step == 0 and config.eval_episodes:
                before = await _unless(stop, runner.evaluate())
            async with runner.rollouts() as rollouts:
                saved = loop.step
                while loop.step < config.steps and not stop.is_set():
                    await runner.step(rollouts, stop)
                    if loop.step % config.checkpoint_every == 0:
                        await runner.checkpoint(rollouts)
                        saved = loop.step
                    due = config.eval_every and loop.step % config.eval_every == 0
                    if due and loop.step < config.steps and not stop.is_set():
                        await _unless(stop, runner.evaluate())
                if loop.step > saved:
                    await runner.checkpoint(rollouts)
            if config.eval_episodes and not stop.is_set():
                after = await _unless(stop, runner.evaluate())
    totals = {
        "episodes": loop.episodes,
        "sampled_tokens": loop.sampled_tokens,
        "trained_tokens": loop.trained_tokens,
        "seconds": loop.seconds,
        **loop.counts,
    }
    stopped = loop.step < config.steps
    return TrainResult(training.run_id, folder, loop.step, stopped, before, after, totals)


class _Runner:
    """One process's part of a run: what a step, an evaluation and a checkpoint do."""

    def __init__(
        self,
        training: TrainingClient,
        env_client: EnvClient,
        live: SamplingClient,
        config: TrainConfig,
        folder: Path,
        loop: _Loop,
        watch: Watcher,
        log: Any,
    ) -> None:
        self.training, self.env_client, self.live = training, env_client, live
        self.config, self.folder, self.loop = config, folder, loop
        self.watch, self.log = watch, log
        self.advantage = get_advantage(config.advantage)
        self.counts_before = dict(loop.counts)
        self.turn = asyncio.Lock() if config.deterministic else nullcontext()
        self.version = 0
        self.finished: list[Group] = []
        self.step_started = time.monotonic()

    @asynccontextmanager
    async def rollouts(self) -> AsyncIterator[Rollouts]:
        self.version = (await self.training.get_info()).version
        rollouts = Rollouts(
            self._play,
            groups_per_step=self.config.groups_per_step,
            group_size=self.config.group_size,
            max_staleness=self.config.max_staleness,
            oversubscription=self.config.oversubscription,
            max_replaced=round(self.config.max_replaced * self.config.groups_per_step),
            version=self.version,
            first_index=self.loop.next_index,
            redo=self.loop.outstanding,
        )
        rollouts.on_group = self._group_finished
        self.step_started = time.monotonic()
        async with rollouts:
            yield rollouts

    def _group_finished(self, group: Group) -> None:
        self.finished.append(group)
        self.watch.group(group)

    async def _play(self, index: int, member: int) -> Trajectory:
        return await self.run_episode(
            EpisodeSpec(
                env=self.config.env,
                env_kwargs=self.config.env_kwargs,
                seed=_seed(self.config.seed, 0, index),
                policy=self.live,
                sampling_params=SamplingParams(
                    max_tokens=self.config.max_tokens,
                    temperature=self.config.temperature,
                    seed=_seed(self.config.seed, 1, index, member),
                ),
                limits=self.config.limits(),
            )
        )

    async def run_episode(self, spec: EpisodeSpec) -> Trajectory:
        async with self.turn:
            episode = self.env_client.run_episode(spec)
            try:
                return await episode
            except asyncio.CancelledError:  # nobody wants it any more
                episode.cancel()
                raise

    async def step(self, rollouts: Rollouts, stop: asyncio.Event) -> None:
        """Train on one batch, unless `stop` is set before there is one."""
        config, loop = self.config, self.loop
        waiting_since = time.monotonic()
        batch = await _unless(stop, rollouts.next_batch())
        if batch is None:
            return
        waited = time.monotonic() - waiting_since
        staleness = [self.version - group.oldest_version for group in batch]
        datums, fresh = self._datums(batch)
        metrics: dict[str, float] = {}
        if datums:
            if config.proximal_cap > 0:
                proximal = await self.training.forward(
                    datums, config.loss_fn, config.loss_fn_config, logprobs="loss"
                )
                metrics |= mismatch_metrics(datums, proximal, fresh)
                datums = truncated_importance_weights(datums, proximal, config.proximal_cap)
            forward_backward = self.training.forward_backward(
                datums, config.loss_fn, config.loss_fn_config, logprobs="loss"
            )
            optim_step = self.training.optim_step(config.adam())
            output, updated = await forward_backward, await optim_step
            if config.proximal_cap <= 0:
                metrics |= mismatch_metrics(datums, output, fresh)
            metrics |= {name.replace(":", "_"): value for name, value in output.metrics.items()}
            metrics |= updated.metrics
        else:  # an environment that ends before the model speaks
            updated = await self.training.optim_step(config.adam())
        _write(self.folder / "trajectories" / f"{_name(loop.step + 1)}.msgpack", encode(batch))
        self.version = updated.version
        loop.step += 1
        rollouts.advance(updated.version)
        loop.counts = {
            name: self.counts_before[name] + value
            for name, value in asdict(rollouts.counts).items()
        }
        self._log_step(batch, staleness, waited, metrics)

    def _datums(self, batch: list[Group]) -> tuple[list[Datum], list[np.ndarray]]:
        """The batch's datums, and per datum which targets the learner's own version sampled."""
        config = self.config
        datums, fresh = [], []
        # The loss sums over tokens: weight by episodes, so that the gradient's scale does not
        # depend on the batch's size.
        weight = 1 / (config.groups_per_step * config.group_size)
        for group in batch:
            advantages = self.advantage(group.rewards) * weight
            for trajectory, advantage in zip(group.trajectories, advantages, strict=True):
                datums += trajectory_datums(trajectory, float(advantage))
                fresh += on_policy_masks(trajectory, self.version)
        return datums, fresh

    def _log_step(
        self,
        batch: list[Group],
        staleness: list[int],
        waited: float,
        metrics: dict[str, float],
    ) -> None:
        loop, finished = self.loop, self.finished
        self.finished = []
        now = time.monotonic()
        seconds, self.step_started = now - self.step_started, now
        played = [t for group in finished for t in group.trajectories]
        sampled = sum(t.num_sampled_tokens for t in played)
        trained = int(metrics.get("tokens_sum", 0))
        loop.episodes += len(played)
        loop.sampled_tokens += sampled
        loop.trained_tokens += trained
        loop.seconds += seconds
        row = {
            "step": loop.step,
            "version": self.version,
            "reward": _mean(t.reward for t in played),
            "success": _mean(is_success(t) for t in played),
            "turns": _mean(t.info.get("turns", 0) for t in played),
            "batch_reward": _mean(t.reward for g in batch for t in g.trajectories),
            "staleness_mean": _mean(staleness),
            "staleness_max": max(staleness, default=0),
            "episodes": loop.episodes,
            "sampled_tokens_per_s": sampled / seconds,
            "trained_tokens_per_s": trained / seconds,
            "waited_s": waited,
            "step_s": seconds,
            "seconds": loop.seconds,
            **loop.counts,
            **metrics,
        }
        self._append(row)
        self.watch.step(row)

    def _append(self, row: dict[str, Any]) -> None:
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()

    async def evaluate(self) -> EvalResult:
        """Play the held-out set with the weights as they are now, pinned."""
        config, started = self.config, time.monotonic()
        policy = await self.training.save_weights_and_get_sampling_client()
        specs = [
            EpisodeSpec(
                env=config.env,
                env_kwargs={**config.env_kwargs, **config.eval_env_kwargs},
                seed=_seed(config.seed, 2, number),
                policy=policy,
                sampling_params=SamplingParams(
                    max_tokens=config.max_tokens,
                    temperature=config.temperature,
                    seed=_seed(config.seed, 3, number),
                ),
                limits=config.limits(),
            )
            for number in range(config.eval_episodes)
        ]
        result = await evaluate(self, specs, self.watch.eval_episode)
        seconds = time.monotonic() - started
        self._append({"step": self.loop.step, "eval": result.to_json(), "eval_s": seconds})
        self.watch.evaluated(self.loop.step, result)
        self.step_started = time.monotonic()
        return result

    async def checkpoint(self, rollouts: Rollouts) -> None:
        loop = self.loop
        loop.next_index, loop.outstanding = rollouts.next_index, rollouts.outstanding
        await self.training.save_state(
            _name(loop.step), user_metadata={"loop": asdict(loop)}, overwrite=True
        )


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None where `stop` is set first; `work` is cancelled then."""
    stopping, working = asyncio.create_task(stop.wait()), asyncio.create_task(work)
    try:
        await asyncio.wait((stopping, working), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        stopping.cancel()
        working.cancel()
        await asyncio.gather(stopping, working, return_exceptions=True)


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _mean(values: Any) -> float:
    array = np.fromiter(values, float)
    return float(array.mean()) if len(array) else 0.0


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=1).encode())


def _truncate_metrics(path: Path, step: int) -> None:
    """Forget the rows of steps after a checkpoint: they will be taken again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            break
        if row["step"] <= step:
            kept.append(line + "\n")
    _write(path, "".join(kept).encode())


@contextmanager
def _appending(path: Path) -> Iterator[Any]:
    with path.open("a") as file:
        yield file


@contextmanager
def _stop_on_signals() -> Iterator[asyncio.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second acts as ever."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    handled: list[tuple[signal.Signals, Any]] = []

    def restore() -> None:
        while handled:
            number, previous = handled.pop()
            loop.remove_signal_handler(number)
            signal.signal(number, previous)

    def request_stop() -> None:
        stop.set()
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous = signal.getsignal(number)
        try:
            loop.add_signal_handler(number, request_stop)
        except (ValueError, RuntimeError, NotImplementedError):
            continue  # not in the main thread (a notebook's .sync, for instance)
        handled.append((number, previous))
    try:
        yield stop
    finally:
        restore()
