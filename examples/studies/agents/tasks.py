"""What is played: environments, who plays their agents, and how a careless player would.

A single agent's environment is slowed down as one behind a network would be; the game of two is
that of `examples/multiagent/two_specialists.py`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import tinsmith
from examples.multiagent.kiosk import careless_planner, careless_tool_user

Script = Callable[[list[dict[str, Any]], random.Random], str]
RUNS = ("planner", "tool_user")


@dataclass(frozen=True)
class Task:
    """`seats`: agent -> the run that plays it. `scripts`: agent -> what that run imitates before."""

    env: str
    seats: Mapping[str, str]
    scripts: Mapping[str, Script] = field(default_factory=dict)
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    slow: bool = True

    def spec(
        self,
        policies: Mapping[str, Any],
        params: tinsmith.SamplingParams,
        seed: int,
        split: Literal["train", "eval"],
        latency: float = 0.0,
    ) -> tinsmith.MatchSpec:
        """A match with `policies` by agent; every answer of a slow environment takes `latency`
        seconds in the mean."""
        env, env_kwargs = self.env, {**self.env_kwargs, "split": split}
        if self.slow:
            env_kwargs = {"env": env, "env_kwargs": env_kwargs, "mean": latency}
            env = "tinsmith.envs.latency:SlowTools"
        limits = tinsmith.envs.EpisodeLimits(step_seconds=120, episode_seconds=900)
        return tinsmith.MatchSpec(
            env, policies, params, seed=seed, env_kwargs=env_kwargs, limits=limits
        )


def careless_calculator(messages: list[dict[str, Any]], rng: random.Random) -> str:
    """Gets one number in five wrong."""
    question = next(m["content"] for m in messages if m["content"].startswith("First"))
    terms = re.findall(r"\d+", question)
    turn = sum(m["role"] == "assistant" for m in messages)
    total = int(re.findall(r"\d+", messages[-1]["content"])[0])  # the first term, or a result
    if rng.random() < 0.2:
        total += rng.randint(1, 9)
    return f"CALC({total}+{terms[turn + 1]})" if turn + 1 < len(terms) else f"ANSWER: {total}"


TASKS = {
    "kiosk": Task(
        "examples.multiagent.kiosk:Kiosk",
        {"planner": "planner", "tool_user": "tool_user"},
        {"planner": careless_planner, "tool_user": careless_tool_user},
        slow=False,
    ),
    "calculator": Task(
        "calculator",
        {"agent": "tool_user"},
        {"agent": careless_calculator},
        {"examples": 0},
    ),
    "python": Task("python", {"agent": "tool_user"}),
}
