"""The study of several agents in several environments: its tasks, its credit, and its script."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinsmith
from examples.studies.agents.tasks import RUNS, TASKS, careless_calculator
from examples.studies.agents.train import PRESETS, datums
from tinsmith.algorithms.rollout import Group
from tinsmith.envs import make
from tinsmith.envs.calculator import Calculator

ROOT = Path(__file__).resolve().parents[3]


def outcome(seed: int) -> bool:
    env, rng = Calculator(examples=0), random.Random(seed)
    messages, _ = env.reset(seed=seed)
    while True:
        action = careless_calculator(messages, rng)
        text, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            return info["success"]
        messages += [
            {"role": "assistant", "content": action},
            {"role": "user", "content": text},
        ]


def test_the_careless_calculator_is_right_about_half_of_the_time():
    assert 0.35 < np.mean([outcome(seed) for seed in range(300)]) < 0.65


@pytest.mark.parametrize("preset", PRESETS)
def test_every_environment_of_a_preset_can_be_made_for_both_splits(preset):
    policy = tinsmith.Scripted(lambda messages, rng: "pass")
    for task in (TASKS[name] for name in PRESETS[preset].tasks):
        assert set(task.seats.values()) <= set(RUNS)
        for split in ("train", "eval"):
            seated = dict.fromkeys(task.seats, policy)
            spec = task.spec(seated, tinsmith.SamplingParams(max_tokens=4), 0, split)
            make(spec.env, **spec.env_kwargs)


def trajectory(reward: float) -> tinsmith.Trajectory:
    segment = tinsmith.Segment(
        tokens=np.arange(4),
        mask=np.array([False, False, True, True]),
        logprobs=np.zeros(4, np.float32),
        versions=np.array([-1, -1, 0, 0]),
    )
    return tinsmith.Trajectory([segment], [reward], True, False, [])


def test_a_run_learns_from_all_its_seats_and_advantages_stay_within_an_environment():
    tasks = [TASKS["kiosk"], TASKS["calculator"]]
    kiosk = [
        tinsmith.Match({"planner": trajectory(p), "tool_user": trajectory(t)})
        for p, t in ((1.0, 0.0), (0.0, 0.0))
    ]
    calculator = [tinsmith.Match({"agent": trajectory(r)}) for r in (100.0, 101.0)]
    made = datums([Group(0, 0, [], [], kiosk), Group(1, 0, [], [], calculator)], tasks)
    signs = {
        run: [float(np.sign(d.loss_fn_inputs["advantages"].sum())) for d in data]
        for run, data in made.items()
    }
    assert signs["planner"] == [1, -1]
    assert [sign for sign in signs["tool_user"] if sign] == [-1, 1]


def test_the_script_plays_all_environments_and_measures_each_before_and_after(tiny_llama, tmp_path):
    flags = ["--preset", "smoke", "--model", tiny_llama, "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "examples.studies.agents.train", *flags],
        cwd=ROOT,
        env={**os.environ, "TINSMITH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for moment in ("before", "after"):
        assert list(result[moment]) == ["kiosk", "calculator"]
        assert all(r["low"] <= r["value"] <= r["high"] for r in result[moment].values())
    assert "step   2" in done.stdout
    assert (tmp_path / "out" / "agents.png").read_bytes().startswith(b"\x89PNG")
