"""The training loop on real actors: its records, its staleness, and going on where it stopped."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import ray

import tinsmith
from tests.actors.script import ROOT
from tinsmith.algorithms.rollout import Group
from tinsmith.primitives.codec import decode

CONFIG = tinsmith.TrainConfig(
    model="tiny-llama",
    env="tests.envs.spelling:Spelling",
    env_kwargs={"turns": 2},
    rank=4,
    steps=3,
    groups_per_step=3,
    group_size=4,
    max_staleness=0,
    learning_rate=1e-2,
    max_tokens=8,
    deterministic=True,
    seed=7,
    eval_episodes=0,
    checkpoint_every=100,
)


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def groups(run_dir: Path, step: int) -> list[Group]:
    data = (run_dir / "trajectories" / f"step-{step:06d}.msgpack").read_bytes()
    return decode(data, list[Group])


def adapter(home: Path, run_id: str, step: int) -> bytes:
    folder = Path(home) / "runs" / run_id / "weights" / f"step-{step:06d}"
    return (folder / "adapter_model.safetensors").read_bytes()


def sampled(run_dir: Path, step: int) -> list[list[int]]:
    return [
        segment.tokens.tolist()
        for group in groups(run_dir, step)
        for trajectory in group.trajectories
        for segment in trajectory.segments
    ]


async def test_a_run_records_its_config_metrics_and_trajectories(service):
    config = replace(CONFIG, eval_episodes=4, eval_every=2)
    result = await tinsmith.train(service, config)
    assert (result.steps, result.stopped) == (3, False)
    assert result.run_dir == Path(service.home) / "runs" / result.run_id
    assert json.loads((result.run_dir / "run.json").read_text())["config"]["env_kwargs"] == {
        "turns": 2
    }
    steps = [row for row in rows(result.run_dir) if "eval" not in row]
    assert [row["step"] for row in steps] == [row["version"] for row in steps] == [1, 2, 3]
    evals = [row for row in rows(result.run_dir) if "eval" in row]
    assert [row["step"] for row in evals] == [0, 2, 3]
    assert evals[0]["eval"] == result.before.to_json()
    assert evals[-1]["eval"] == result.after.to_json()
    for row in steps:
        assert row["staleness_max"] == 0
        assert 0 <= row["batch_reward"] <= 2
        assert row["turns"] == 2
        assert row["grad_norm"] > 0
        assert row["mismatch_max"] < 1e-4  # trainer and sampler agree
        assert row["trained_tokens_per_s"] > 0
    for step in (1, 2, 3):
        batch = groups(result.run_dir, step)
        assert len(batch) == 3
        for group in batch:
            assert len(group.trajectories) == 4
            assert len({t.seed for t in group.trajectories}) == 1
            assert np.ptp(group.rewards) > 0
            for trajectory in group.trajectories:
                assert trajectory.num_sampled_tokens > 0
                for segment in trajectory.segments:
                    assert (segment.versions[segment.mask] == step - 1).all()
    totals = result.totals
    assert totals["trained"] == 9
    assert totals["episodes"] == 4 * (9 + totals["dropped_no_signal"])
    (checkpoint, first) = await service.list_checkpoints(result.run_id)
    assert (checkpoint.version, first.version) == (3, 0)
    with pytest.raises(tinsmith.InvalidInput, match="holds a run already"):
        await tinsmith.train(service, CONFIG, run_dir=result.run_dir)


async def test_stale_trajectories_stay_within_the_bound(service):
    config = replace(CONFIG, max_staleness=2, steps=4, env_kwargs={"turns": 3})
    result = await tinsmith.train(service, config)
    seen = []
    for step, row in enumerate(rows(result.run_dir), 1):
        staleness = [step - 1 - group.oldest_version for group in groups(result.run_dir, step)]
        assert row["staleness_max"] == max(staleness) <= 2
        assert all(s >= 0 for s in staleness)
        seen += staleness
    assert max(seen) > 0


@pytest.mark.parametrize(
    "settings",
    [
        dict(proximal_cap=2.0, loss_fn="ppo", max_staleness=1),
        dict(oversubscription=0.7, max_staleness=1, num_env_workers=2),
        dict(env_kwargs={"fail_every": 3}, loss_fn="dro", loss_fn_config={"beta": 0.1}),
        dict(overlong_buffer=4, normalize="token_mean", kl_coeff=0.1, reference="a checkpoint"),
    ],
    ids=["proximal", "oversubscription", "failures", "reference"],
)
async def test_other_settings_run(service, settings):
    if "reference" in settings:
        training = await service.create_lora_training_client("tiny-llama", rank=2, seed=1)
        saved = await training.save_weights_for_sampler("reference")
        settings = {**settings, "reference": saved.path}
    result = await tinsmith.train(service, replace(CONFIG, **settings))
    assert result.steps == 3
    for row in rows(result.run_dir):
        assert row["staleness_max"] <= CONFIG.max_staleness + settings.get("max_staleness", 0)
        assert math.isfinite(row["loss_sum"])
        assert row["policy_kl"] >= 0
    assert (result.totals["failed_episodes"] > 0) == ("env_kwargs" in settings)


async def test_an_environment_that_always_fails_ends_the_run_with_its_error(service):
    config = replace(CONFIG, env_kwargs={"fail_every": 1}, groups_per_step=8)
    with pytest.raises(tinsmith.RolloutFailure, match="this task is broken"):
        await tinsmith.train(service, config)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"env": "chess-3d"}, tinsmith.NotFound, "no environment 'chess-3d'"),
        ({"model": "/no/such/model"}, tinsmith.NotFound, "there is no model folder"),
    ],
)
async def test_a_config_that_cannot_be_used_is_a_typed_error(service, settings, error, message):
    with pytest.raises(error, match=message):
        await tinsmith.train(service, replace(CONFIG, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"TrainConfig\.steps must be at least 1"),
        ({"max_staleness": -1}, r"TrainConfig\.max_staleness must not be negative"),
        ({"loss_fn": "reinforce"}, "no loss 'reinforce'"),
        ({"loss_fn_config": {"beta": 1.0}}, "has no setting 'beta'"),
        ({"advantage": "none"}, "no advantage 'none'"),
        ({"importance_level": "all"}, "importance_level must be one of"),
    ],
)
def test_a_bad_config_is_refused_when_it_is_made(settings, message):
    with pytest.raises(tinsmith.TinsmithError, match=message):
        replace(CONFIG, **settings)


# ---- stopping and going on ----

SCRIPT = """
import asyncio, json, os, sys
import tinsmith

class Tell(tinsmith.Watcher):
    def step(self, metrics):
        print("step", metrics["step"], flush=True)

async def main(home, run_dir, config):
    async with tinsmith.connect(
        os.environ.get("RAY_ADDRESS") and "auto",
        home=home, num_cpus=2, learner_threads=1, sampler_threads=1, kv_bytes=1 << 24,
    ) as service:
        config = tinsmith.TrainConfig(**json.loads(config))
        result = await tinsmith.train(service, config, run_dir=run_dir, watch=Tell())
        print("stopped" if result.stopped else "done", result.steps, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def start(
    home: Path, run_dir: Path, config: tinsmith.TrainConfig, cluster: str | None = None
) -> subprocess.Popen:
    address = {"RAY_ADDRESS": cluster} if cluster else {}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(home), str(run_dir), json.dumps(asdict(config))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **address},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, line: str) -> None:
    assert process.stdout is not None
    for got in process.stdout:
        if got.strip() == line:
            return
    raise AssertionError(f"ended before {line!r}")


FOUR = replace(CONFIG, steps=4, checkpoint_every=2)


async def until_nothing_is_sampled(service) -> None:
    """By a run before: it would show in the last bits of logprobs."""
    names = ("tinsmith_samples_under_way", "tinsmith_episodes_running")
    while True:
        lines = (await service.metrics()).splitlines()
        if not any(float(line.split()[-1]) for line in lines if line.startswith(names)):
            return
        await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
async def uninterrupted(service, tmp_path_factory):
    """Four steps in one go."""
    await until_nothing_is_sampled(service)
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    result = await tinsmith.train(service, FOUR, run_dir=run_dir)
    return run_dir, adapter(service.home, result.run_id, 4)


def assert_same_course(run_dir: Path, reference_dir: Path) -> None:
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 4]
    for row, expected in zip(rows(run_dir), rows(reference_dir), strict=True):
        for name in ("batch_reward", "grad_norm", "loss_sum", "episodes", "trained"):
            assert row[name] == expected[name]
    for step in range(1, 5):
        assert sampled(run_dir, step) == sampled(reference_dir, step)


async def assert_goes_on_exactly(service, run_dir: Path, uninterrupted) -> None:
    reference_dir, reference = uninterrupted
    await until_nothing_is_sampled(service)
    result = await tinsmith.resume(service, run_dir, steps=4)
    assert (result.steps, result.stopped, result.before) == (4, False, None)
    assert_same_course(run_dir, reference_dir)
    assert adapter(service.home, result.run_id, 4) == reference


async def test_without_staleness_a_seed_gives_one_adapter_bit_for_bit(
    service, uninterrupted, tmp_path
):
    reference_dir, reference = uninterrupted
    again = await tinsmith.train(service, FOUR, run_dir=tmp_path)
    assert_same_course(tmp_path, reference_dir)
    assert adapter(service.home, again.run_id, 4) == reference


async def test_ctrl_c_in_the_terminal_saves_and_the_run_goes_on_exactly(
    service, uninterrupted, tmp_path
):
    config = replace(FOUR, checkpoint_every=100, steps=1000)
    process = await asyncio.to_thread(start, service.home, tmp_path, config)
    await asyncio.to_thread(wait_for, process, "step 1")
    os.killpg(process.pid, signal.SIGINT)  # to every process of the group, Ray's too
    output, _ = await asyncio.to_thread(process.communicate, None, 120)
    assert process.returncode == 0
    stopped, step = output.splitlines()[-1].split()
    assert stopped == "stopped"
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, int(step) + 1))
    await assert_goes_on_exactly(service, tmp_path, uninterrupted)


async def test_a_run_that_is_killed_goes_on_exactly_from_its_last_checkpoint(
    service, uninterrupted, tmp_path
):
    address = ray.get_runtime_context().gcs_address  # the cluster lives on
    process = await asyncio.to_thread(start, service.home, tmp_path, FOUR, address)
    await asyncio.to_thread(wait_for, process, "step 3")
    os.killpg(process.pid, signal.SIGKILL)
    await asyncio.to_thread(process.wait, 60)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # cut short
    await assert_goes_on_exactly(service, tmp_path, uninterrupted)


async def test_a_stop_during_an_evaluation_loses_no_step(service, tmp_path):
    class StopInEvaluation(tinsmith.Watcher):
        def step(self, metrics):  # noticed when the loop waits next: in the evaluation
            os.kill(os.getpid(), signal.SIGTERM)

    config = replace(CONFIG, eval_every=1, eval_episodes=1)
    result = await tinsmith.train(service, config, run_dir=tmp_path, watch=StopInEvaluation())
    assert (result.stopped, result.steps) == (True, 1)
    assert adapter(service.home, result.run_id, 1)
    newest = (await service.list_checkpoints(result.run_id))[0]
    assert newest.user_metadata["loop"]["step"] == result.steps


async def test_a_replay_buffer_goes_on_with_its_run(service, tmp_path):
    """Bit for bit: two steps and two more are four in one go."""
    await until_nothing_is_sampled(service)
    config = replace(FOUR, replay_groups=2, replay_staleness=2)
    whole = await tinsmith.train(service, config, run_dir=tmp_path / "whole")
    parts = await tinsmith.train(service, replace(config, steps=2), run_dir=tmp_path / "parts")
    parts = await tinsmith.resume(service, tmp_path / "parts", steps=4)
    assert_same_course(tmp_path / "parts", tmp_path / "whole")
    for one, other in zip(rows(tmp_path / "parts"), rows(tmp_path / "whole"), strict=True):
        for name in ("replay_replayed", "replay_expired", "replay_held", "tokens_sum"):
            assert one[name] == other[name]
    assert adapter(service.home, parts.run_id, 4) == adapter(service.home, whole.run_id, 4)
    # Nothing to draw at first, then two of the three groups there are.
    assert [row["replay_replayed"] for row in rows(tmp_path / "whole")] == [0, 2, 4, 6]
    assert [row["staleness_max"] for row in rows(tmp_path / "whole")][:2] == [0, 1]
    assert whole.totals["replay_replayed"] == parts.totals["replay_replayed"] == 6
    assert [p.name for p in (tmp_path / "parts" / "replay").iterdir()] == ["step-000004.msgpack"]


async def test_there_must_be_a_run_to_resume(service, tmp_path):
    with pytest.raises(tinsmith.NotFound, match=r"there is no run in .* \(no run\.json\)"):
        await tinsmith.resume(service, tmp_path)


# ---- evaluation ----


async def test_training_goes_on_during_an_evaluation_of_the_weights_of_its_step(service, tmp_path):
    class Told(tinsmith.Watcher):
        def __init__(self):
            self.order = []

        def step(self, metrics):
            self.order.append(("step", metrics["step"]))

        def evaluated(self, step, result):
            versions = {
                int(v)
                for t in result.trajectories
                for s in t.segments
                for v in np.unique(s.versions[s.mask])
            }
            self.order.append(("evaluated", step, versions))

    told = Told()
    config = replace(CONFIG, deterministic=False, steps=6, eval_every=3, eval_episodes=40)
    await tinsmith.train(service, config, run_dir=tmp_path, watch=told)
    evaluated = [entry for entry in told.order if entry[0] == "evaluated"]
    assert [(step, versions) for _, step, versions in evaluated] == [(0, {0}), (3, {3}), (6, {6})]
    # 40 episodes, 3 at a time, take longer than a step.
    assert told.order.index(evaluated[1]) > told.order.index(("step", 4))
    logged = [row for row in rows(tmp_path) if "eval" in row]
    assert [row["step"] for row in logged] == [0, 3, 6]


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval, after its own formula (1927)."""
    z, p = 1.959963984540054, successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


class Played:
    """Episodes with outcomes known beforehand, instead of an EnvClient."""

    def __init__(self, outcomes: list) -> None:
        self.outcomes = list(outcomes)

    async def run_episode(self, spec):
        outcome = self.outcomes[spec]
        if isinstance(outcome, Exception):
            raise outcome
        return tinsmith.Trajectory([], [float(outcome)], True, False, [])


@pytest.mark.parametrize(("successes", "episodes"), [(0, 8), (3, 10), (10, 10), (57, 200)])
async def test_an_evaluation_tells_how_sure_one_can_be(successes, episodes):
    played = Played([i < successes for i in range(episodes)])
    result = await tinsmith.evaluate(played, range(episodes))
    low, high = wilson(successes, episodes)
    assert (result.successes, result.episodes) == (successes, episodes)
    assert result.rate == result.mean_reward == successes / episodes
    assert (result.low, result.high) == (
        pytest.approx(low, abs=1e-9),
        pytest.approx(high, abs=1e-9),
    )


async def test_an_episode_that_the_environment_breaks_counts_as_no_success():
    broken = [tinsmith.EnvironmentFailure("it broke"), tinsmith.Unavailable("the worker is gone")]
    result = await tinsmith.evaluate(Played([True, *broken, False]), range(4))
    assert (result.successes, result.episodes, result.rate) == (1, 4, 0.25)
    assert list(result.failures) == ["it broke", "the worker is gone"]
    assert result.mean_reward == 0.5
    with pytest.raises(tinsmith.RolloutFailure, match="all 2 evaluation episodes failed; one:\nit"):
        await tinsmith.evaluate(Played(broken), range(2))
