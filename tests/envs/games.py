"""Games as the tests need them: played at the same time, in turns, with tools, and broken."""

from __future__ import annotations

import random
import re
import time

from tinsmith.envs import MultiAgentEnv, ToolSet


class Longest(MultiAgentEnv):
    """Both write at the same time, `rounds` times; who wrote more wins the round."""

    possible_agents = ("left", "right")

    def __init__(self, rounds: int = 2, win_by_forfeit: bool = False) -> None:
        self.rounds = rounds
        self.win_by_forfeit = win_by_forfeit

    def reset(self, *, seed=None, options=None):
        self.round = 0
        topic = random.Random(seed).choice(["dogs", "foxes", "jumps", "answers"])
        return {a: f"{a}, write about {topic}" for a in self.possible_agents}, {}

    def step(self, actions):
        self.round += 1
        left, right = (len(actions[a]) for a in self.possible_agents)
        rewards = {"left": float(left > right), "right": float(right > left)}
        over = dict.fromkeys(self.possible_agents, self.round == self.rounds)
        told = dict.fromkeys(self.possible_agents, f"lengths {left} {right}")
        return told, rewards, over, {}, {a: {"round": self.round} for a in told}

    def forfeit(self, failures):
        if not self.win_by_forfeit or len(failures) > 1:
            return super().forfeit(failures)
        return (
            dict.fromkeys(self.possible_agents, f"{failures}"),
            {a: float(a not in failures) for a in self.possible_agents},
            dict.fromkeys(self.possible_agents, True),
            {},
            {},
        )


class Countdown(MultiAgentEnv):
    """In turns, each takes as many from `count` as its text has characters, three at most. Who
    takes the last loses it: -1, and the other agents win 1 before it is their turn."""

    possible_agents = ("first", "second", "third")

    def __init__(self, count: int = 12, players: int = 2) -> None:
        self.possible_agents = self.possible_agents[:players]
        self.start = count

    def reset(self, *, seed=None, options=None):
        self.left, self.turn = self.start, 0
        return {"first": f"{self.left} left"}, {}

    def step(self, actions):
        ((agent, action),) = actions.items()
        assert agent == self.possible_agents[self.turn]
        self.left -= max(1, min(3, len(action)))
        if self.left <= 0:
            rewards = {a: -1.0 if a == agent else 1.0 for a in self.possible_agents}
            return {}, rewards, dict.fromkeys(self.possible_agents, True), {}, {}
        self.turn = (self.turn + 1) % len(self.possible_agents)
        return {self.possible_agents[self.turn]: f"{self.left} left"}, {}, {}, {}, {}


class Knockout(MultiAgentEnv):
    """All write at the same time; who forfeits is out, the others play on to the last."""

    possible_agents = ("a", "b", "c")

    def reset(self, *, seed=None, options=None):
        self.still_in = list(self.possible_agents)
        self.round = 0
        return dict.fromkeys(self.still_in, "begin"), {}

    def step(self, actions):
        assert sorted(actions) == self.still_in
        self.round += 1
        over = self.round == 4
        told = dict.fromkeys(self.still_in, f"round {self.round}")
        return told, dict.fromkeys(self.still_in, 1.0), dict.fromkeys(self.still_in, over), {}, {}

    def forfeit(self, failures):
        self.still_in = [a for a in self.still_in if a not in failures]
        told = dict.fromkeys(self.still_in, f"without {sorted(failures)}")
        return told, dict.fromkeys(failures, -5.0), {}, dict.fromkeys(failures, True), {}


class Workshop(MultiAgentEnv):
    """A planner says what to do, a worker has tools and does it."""

    possible_agents = ("planner", "worker")

    def __init__(self) -> None:
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        self.tools = ToolSet([add], syntax="plain")
        self.tool_schemas = {"worker": self.tools.schemas}

    def reset(self, *, seed=None, options=None):
        return {"planner": "What is 2 and 3?"}, {}

    async def step(self, actions):
        if "planner" in actions:
            return {"worker": actions["planner"]}, {}, {}, {}, {}
        results = await self.tools.run(actions["worker"])
        if not results:
            return {}, {}, dict.fromkeys(self.possible_agents, True), {}, {}
        told = [{"role": "tool", "content": result.text} for result in results]
        reward = float(results[0].text == "5")
        return {"worker": told}, dict.fromkeys(self.possible_agents, reward), {}, {}, {}


class Returning(MultiAgentEnv):
    """Returns what it is told to, to see what is said about it."""

    possible_agents = ("a", "b")

    def __init__(self, **returned) -> None:
        self.returned = returned
        self.possible_agents = returned.get("possible_agents", self.possible_agents)

    def reset(self, *, seed=None, options=None):
        return self.returned.get("reset", ({"a": "?"}, {}))

    def step(self, actions):
        over = dict.fromkeys(self.possible_agents, True)
        return self.returned.get("step", ({}, {}, over, {}, {}))

    def forfeit(self, failures):
        return self.returned.get("forfeit", super().forfeit(failures))


def says_x(messages, rng):
    return "x" * rng.randint(1, 3)


def raises(messages, rng):
    raise ValueError("this script is broken")


def hangs(messages, rng):
    time.sleep(3600)


class Remembers:
    """A script with a state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, messages, rng):
        self.calls += 1
        return f"{self.calls} of {len(messages)}"


def any_legal(messages, rng):
    """Any of the moves that an adapter's last message says are legal."""
    told = messages[-1]["content"]
    listed = told.rpartition("Available" if "Available" in told else "one of")[2]
    return rng.choice(re.findall(r"\d+", listed))
