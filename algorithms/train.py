"""The training loop: from strictly on-policy (`max_staleness=0`) to fully asynchronous (`k`).

Rollouts go on while the learner works; every `optim_step` publishes its version to the live
sampler, and trajectories under way continue under it. All of the loop's state is in its
checkpoints (the replay buffer's groups in the run's folder, beside the metrics), so a loop that was
stopped in whatever way goes on from the last one as if it had not been.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..envs.episode import EpisodeSpec
from ..primitives.client import EnvClient, SamplingClient, ServiceClient, TrainingClient
from ..primitives.codec import decode, encode
from ..primitives.errors import InvalidInput, NotFound
from ..primitives.types import SamplingParams, Trajectory
from .batch import hold_near, loss_config, make_batch, worth_training_on
from .config import TrainConfig
from .datums import mismatch_metrics, truncated_importance_weights
from .evaluate import EvalResult, evaluate, is_success
from .replay import Replay, ReplayState
from .rollout import Group, RolloutCounts, Rollouts
from .run_files import appending, checkpoint_name, forget_after, write_file, write_json
from .run_folder import load_run, new_run_folder
from .run_start import new_training_client
from .seeds import derived_seed
from .stopping import Meanwhile, stop_on_signals, unless


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
    training = await new_training_client(service, config, about)
    folder = Path(run_dir) if run_dir else Path(service.home) / "runs" / training.run_id
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", {"run_id": training.run_id, "config": asdict(config)})
    await training.save_state(checkpoint_name(0), user_metadata={"loop": asdict(_Loop())})
    return await _train(service, training, config, folder, _Loop(), watch or Watcher())


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
    forget_after(folder / "metrics.jsonl", loop.step)
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
    reference = await _reference(service, config)
    before = after = None
    with stop_on_signals() as stop, appending(folder / "metrics.jsonl") as log:
        workers = await service.create_env_client(config.model, config.num_env_workers)
        async with workers as env_client:
            runner = _Runner(
                training, env_client, live, reference, config, folder, loop, watch, log
            )
            if loop.step == 0 and config.eval_episodes:
                before = await unless(stop, runner.evaluate())
            async with Meanwhile() as evaluations, runner.rollouts() as rollouts:
                saved = loop.step
                while loop.step < config.steps and not stop.is_set():
                    await runner.step(rollouts, stop)
                    if loop.step % config.checkpoint_every == 0:
                        await runner.checkpoint(rollouts)
                        saved = loop.step
                    evaluating = config.eval_every and config.eval_episodes
                    due = evaluating and loop.step % config.eval_every == 0
                    if due and loop.step < config.steps and not stop.is_set():
                        if config.deterministic:
                            await unless(stop, runner.evaluate())
                        else:
                            await unless(stop, runner.evaluate_meanwhile(evaluations))
                if loop.step > saved:
                    await runner.checkpoint(rollouts)
                if not stop.is_set():
                    await unless(stop, evaluations.finish())
            if config.eval_episodes and not stop.is_set():
                after = await unless(stop, runner.evaluate())
    totals = {
        "episodes": loop.episodes,
        "sampled_tokens": loop.sampled_tokens,
        "trained_tokens": loop.trained_tokens,
        "seconds": loop.seconds,
        **loop.counts,
        **runner.replay_counts(),
    }
    stopped = loop.step < config.steps
    return TrainResult(training.run_id, folder, loop.step, stopped, before, after, totals)


async def _reference(service: ServiceClient, config: TrainConfig) -> SamplingClient | None:
    if not config.kl_coeff:
        return None
    if config.reference:
        return await service.create_sampling_client(config.reference)
    return await service.create_sampling_client(base_model=config.model)


class _Runner:
    """One process's part of a run: what a step, an evaluation and a checkpoint do."""

    def __init__(
        self,
        training: TrainingClient,
        env_client: EnvClient,
        live: SamplingClient,
        reference: SamplingClient | None,
        config: TrainConfig,
        folder: Path,
        loop: _Loop,
        watch: Watcher,
        log: Any,
    ) -> None:
        self.training, self.env_client = training, env_client
        self.live, self.reference = live, reference
        self.config, self.folder, self.loop = config, folder, loop
        self.watch, self.log = watch, log
        self.replay = Replay(
            config.replay_staleness,
            seed=config.seed,
            state=_read_replay(folder, loop.step) if config.replay_groups else None,
        )
        self.limits = config.limits()
        self.counts_before = dict(loop.counts)
        self.turn = asyncio.Lock() if config.deterministic else nullcontext()
        self.version = 0
        self.finished: list[Group] = []
        self.step_started = time.monotonic()

    @asynccontextmanager
    async def rollouts(self) -> AsyncIterator[Rollouts]:
        info = await self.training.get_info()
        self.version = info.version
        if self.reference is not None:  # it needs room for one more token
            self.limits = replace(self.limits, max_context=info.max_context_length - 1)
        rollouts = Rollouts(
            self._play,
            groups_per_step=self.config.groups_per_step,
            group_size=self.config.group_size,
            max_staleness=self.config.max_staleness,
            oversubscription=self.config.oversubscription,
            max_replaced=round(self.config.max_replaced * self.config.groups_per_step),
            keep=lambda group: worth_training_on(group, self.config),
            total=(self.config.steps - self.loop.step) * self.config.groups_per_step,
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
                seed=derived_seed(self.config.seed, 0, index),
                policy=self.live,
                sampling_params=SamplingParams(
                    max_tokens=self.config.max_tokens,
                    temperature=self.config.temperature,
                    seed=derived_seed(self.config.seed, 1, index, member),
                    return_routed_experts=self.config.router_replay,
                ),
                limits=self.limits,
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
        batch = await unless(stop, rollouts.next_batch())
        if batch is None:
            return
        waited = time.monotonic() - waiting_since
        groups = batch
        if config.replay_groups:
            groups = batch + self.replay.draw(config.replay_groups, self.version)
            self.replay.add(batch)
        staleness = [self.version - group.oldest_version for group in groups]
        metrics = await self._train_on(groups)
        write_file(
            self.folder / "trajectories" / f"{checkpoint_name(loop.step + 1)}.msgpack",
            encode(batch),
        )
        loop.step += 1
        rollouts.advance(self.version)
        loop.counts = {
            name: self.counts_before[name] + value
            for name, value in asdict(rollouts.counts).items()
        }
        self._log_step(batch, staleness, waited, metrics)

    async def _train_on(self, groups: list[Group]) -> dict[str, float]:
        """One optimizer step; its metrics."""
        config = self.config
        try:
            batch = make_batch(groups, config, self.version)
        except InvalidInput as error:
            raise InvalidInput(f"step {self.loop.step + 1}: {error}") from None
        if not batch.datums_D:  # the model never spoke, or there is nothing to imitate
            updated = await self.training.optim_step(config.adam())
            self.version = updated.version
            return updated.metrics
        metrics: dict[str, float] = {}
        if self.reference is not None:
            batch, metrics = await hold_near(batch, self.reference, config)
        datums, settings = batch.datums_D, loss_config(config)
        if config.proximal_cap > 0:
            proximal = await self.training.forward(
                datums, config.loss_fn, settings, logprobs="loss"
            )
            metrics |= mismatch_metrics(datums, proximal, batch.fresh_D)
            datums = truncated_importance_weights(
                datums,
                proximal,
                config.proximal_cap,
                level=config.importance_level,
                mask=config.importance_mask,
            )
        forward_backward = self.training.forward_backward(
            datums, config.loss_fn, settings, logprobs="loss"
        )
        optim_step = self.training.optim_step(config.adam())
        output, updated = await forward_backward, await optim_step
        self.version = updated.version
        if config.proximal_cap <= 0 and not config.imitates:
            metrics |= mismatch_metrics(datums, output, batch.fresh_D)
        metrics |= {name.replace(":", "_"): value for name, value in output.metrics.items()}
        return metrics | updated.metrics

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
            **self.replay_counts(),
            **metrics,
        }
        self._append(row)
        self.watch.step(row)

    def _append(self, row: dict[str, Any]) -> None:
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()

    def replay_counts(self) -> dict[str, int]:
        if not self.config.replay_groups:
            return {}
        counts = asdict(self.replay.counts) | {"held": len(self.replay)}
        return {f"replay_{name}": count for name, count in counts.items()}

    async def evaluate(self) -> EvalResult:
        """Play the held-out set with the weights as they are now, pinned."""
        policy = await self.training.save_weights_and_get_sampling_client()
        result = await self._evaluate(policy, self.loop.step, None)
        self.step_started = time.monotonic()
        return result

    async def evaluate_meanwhile(self, evaluations: Meanwhile) -> None:
        """Begin the same beside the loop. An evaluation still under way is waited for first, so
        that they never pile up; few episodes at a time, so that training hardly waits for them."""
        policy = await self.training.save_weights_and_get_sampling_client()
        share = max(1, self.config.groups_per_step * self.config.group_size // 4)
        await evaluations.start(self._evaluate(policy, self.loop.step, share))

    async def _evaluate(
        self, policy: SamplingClient, step: int, max_concurrent: int | None
    ) -> EvalResult:
        config, started = self.config, time.monotonic()
        specs = [
            EpisodeSpec(
                env=config.env,
                env_kwargs={**config.env_kwargs, **config.eval_env_kwargs},
                seed=derived_seed(config.seed, 2, number),
                policy=policy,
                sampling_params=SamplingParams(
                    max_tokens=config.max_tokens,
                    temperature=config.temperature,
                    seed=derived_seed(config.seed, 3, number),
                ),
                limits=config.limits(),
            )
            for number in range(config.eval_episodes)
        ]
        result = await evaluate(self, specs, self.watch.eval_episode, max_concurrent=max_concurrent)
        seconds = time.monotonic() - started
        self._append({"step": step, "eval": result.to_json(), "eval_s": seconds})
        self.watch.evaluated(step, result)
        return result

    async def checkpoint(self, rollouts: Rollouts) -> None:
        loop = self.loop
        loop.next_index, loop.outstanding = rollouts.next_index, rollouts.outstanding
        held = self.folder / "replay" / f"{checkpoint_name(loop.step)}.msgpack"
        if self.config.replay_groups:
            write_file(held, encode(self.replay.state()))
        await self.training.save_state(
            checkpoint_name(loop.step), user_metadata={"loop": asdict(loop)}, overwrite=True
        )
        for old in held.parent.glob("*.msgpack"):  # only the newest checkpoint is gone on from
            if old != held:
                old.unlink()


def _read_replay(folder: Path, step: int) -> ReplayState | None:
    """The replay buffer as it was at the checkpoint of `step`; None at the start."""
    if step == 0:
        return None
    path = folder / "replay" / f"{checkpoint_name(step)}.msgpack"
    if not path.exists():
        raise NotFound(f"the replay buffer of step {step} is missing: {path}")
    return decode(path.read_bytes(), ReplayState)


def _mean(values: Any) -> float:
    array = np.fromiter(values, float)
    return float(array.mean()) if len(array) else 0.0
