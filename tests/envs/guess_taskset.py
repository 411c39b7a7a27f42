"""A multi-turn `verifiers` environment for tests: its `run` is the user of the conversation."""

from __future__ import annotations

from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["GuessEnv", "GuessTaskset"]


class GuessData(vf.TaskData):
    secret: int


class GuessTask(vf.Task[GuessData]):
    @vf.stop
    async def swears(self, trace: vf.Trace) -> bool:
        return "darn" in trace.last_reply

    @vf.metric
    async def guesses(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)


class GuessTaskset(vf.Taskset[GuessTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self) -> Iterator[GuessTask]:
        secret = 0
        while True:
            yield GuessTask(GuessData(prompt="Which digit?", secret=secret % 10), self.config.task)
            secret += 7


class GuessEnvConfig(vf.EnvConfig):
    guesser: vf.AgentConfig = vf.AgentConfig()
    rewrites: bool = False


class GuessEnv(vf.Env[GuessEnvConfig]):
    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        secret = task.data.secret
        if self.config.rewrites:  # two conversations in one episode
            await agents.guesser.run(task)
            await agents.guesser.run(task)
            return
        won = False
        async with agents.guesser.interaction(task) as interaction:
            segment = await interaction.turn()
            while not segment.terminated:
                if segment.last_reply == "darn":
                    segment = await interaction.turn("Pardon?")
                    continue
                guess = int(segment.last_reply)
                won = guess == secret
                if won:
                    break
                segment = await interaction.turn("higher" if guess < secret else "lower")
        interaction.trace.record_reward("won", float(won), 1.0)
