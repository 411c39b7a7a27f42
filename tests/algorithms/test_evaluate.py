"""Several samples of every task, on a real environment and on outcomes known beforehand."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

import tinsmith
from tinsmith.algorithms.estimates import maj_at_k, mean_interval, pass_at_k
from tinsmith.algorithms.evaluate import TaskResults, evaluate, evaluate_tasks, last_words, repeated


def said(text: str, reward: float) -> tinsmith.Trajectory:
    return tinsmith.Trajectory(
        [], [reward], True, False, [{"role": "assistant", "content": f" {text}\n"}]
    )


def results() -> TaskResults:
    return TaskResults(
        4,
        [
            [said("7", 1.0), said("7", 1.0), said("8", 0.0), "it broke"],
            [said("1", 0.0), said("1", 0.0), said("2", 1.0), said("1", 0.0)],
        ],
    )


def test_pass_and_majority_at_k_are_means_over_tasks_with_intervals():
    assert results().successes.tolist() == [2, 1]
    for k in (1, 2, 4):
        expected = mean_interval([pass_at_k(2, 4, k), pass_at_k(1, 4, k)])
        assert results().pass_at(k) == expected
        majority = [
            maj_at_k([2, 1, 1], [True, False, False], k),
            maj_at_k([3, 1], [False, True], k),
        ]
        assert results().majority_at(k) == mean_interval(majority)
    summary = results().to_json()
    assert (summary["tasks"], summary["samples"], summary["failed"]) == (2, 4, 1)
    assert summary["pass@4"] == [1.0, 1.0, 1.0]


def test_equal_answers_must_succeed_alike():
    with pytest.raises(tinsmith.InvalidInput, match="the answer '7' both succeeds and does not"):
        TaskResults(2, [[said("7", 1.0), said("7", 0.0)]]).majority_at(1)
    assert results().majority_at(1, answer=lambda t: t.reward).value == pytest.approx(3 / 8)


async def test_any_environment_is_an_evaluator_with_n_samples_per_task(service):
    policy = await (await service.create_sampling_client(base_model="tiny-llama")).ready()
    specs = [
        tinsmith.EpisodeSpec(
            "tests.envs.spelling:Spelling",
            policy,
            tinsmith.SamplingParams(max_tokens=4, seed=seed),
            seed=seed,
        )
        for seed in range(3)
    ]
    async with await service.create_env_client("tiny-llama") as env_client:
        found = await evaluate_tasks(env_client, specs, 4, max_concurrent=3)
        again = await evaluate_tasks(env_client, specs, 2)
    assert [len(task) for task in found.outcomes] == [4, 4, 4]
    assert 0 <= found.pass_at(1).value <= found.pass_at(4).value <= 1

    def words(results, samples):
        return [[last_words(t) for t in task[:samples]] for task in results.outcomes]

    assert len({w for task in words(found, 4) for w in task}) > 3  # samples differ
    assert words(found, 2) == words(again, 2)  # and are repeatable, however many there are


def test_repeated_samples_differ_in_the_policys_seed_alone():
    spec = tinsmith.EpisodeSpec("calculator", None, tinsmith.SamplingParams(max_tokens=4), seed=5)
    episodes = repeated(spec, 6)
    assert len({e.sampling_params.seed for e in episodes}) == 6
    for episode in episodes:
        params = replace(episode.sampling_params, seed=None)
        assert replace(episode, sampling_params=params) == spec


async def test_no_more_episodes_play_at_once_than_asked_for():
    class Counting:
        running = most = 0

        async def run_episode(self, spec):
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0)
            self.running -= 1
            return said("x", 1.0)

    player = Counting()
    result = await evaluate(player, range(10), max_concurrent=3)
    assert (player.most, result.successes) == (3, 10)
    reward = result.reward_interval()
    assert np.allclose([reward.value, reward.low, reward.high], 1.0)


async def test_there_must_be_something_to_evaluate():
    for specs, samples in (([], 2), ([None], 0)):
        with pytest.raises(tinsmith.InvalidInput, match="at least one task and one sample"):
            await evaluate_tasks(None, specs, samples)
