"""Real `verifiers` tasksets for tests: written with the library's own classes, found by module."""

from __future__ import annotations

import verifiers.v1 as vf

__all__ = ["CountTaskset"]


class CountData(vf.TaskData):
    answer: str


class Scale(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = "scale"

    @vf.tool
    def weigh(self, stones: int) -> str:
        """Weigh stones."""
        return f"{3 * stones} kg"


class CountTaskConfig(vf.TaskConfig):
    tools: vf.ToolsetConfig = vf.ToolsetConfig()
    with_tools: bool = False


class CountTask(vf.Task[CountData, vf.State, CountTaskConfig]):
    @classmethod
    def toolsets(cls, config: CountTaskConfig) -> list[vf.Toolset]:
        return [Scale(config.tools)] if config.with_tools else []

    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)

    @vf.reward(weight=0.5)
    async def short(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 20)

    @vf.metric
    async def length(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class CountConfig(vf.TasksetConfig):
    num_tasks: int = 10
    task: CountTaskConfig = CountTaskConfig()


class CountTaskset(vf.Taskset[CountTask, CountConfig]):
    def load(self) -> list[CountTask]:
        return [
            CountTask(
                CountData(
                    prompt=f"How much do {n} stones weigh?",
                    system_prompt="You weigh stones.",
                    answer=f"{3 * n} kg",
                ),
                self.config.task,
            )
            for n in range(self.config.num_tasks)
        ]


if __name__ == "__main__":
    Scale.run()
