"""Environments of the `verifiers` library: `make("verifiers:<taskset>", **its_config)`."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ..primitives.errors import EnvironmentFailure, InvalidInput, NotFound
from .core import Env, ResetResult, StepResult
from .extras import extra
from .splits import Rows

MAX_TASKS = 1000
"""Tasks drawn from a taskset without end."""


class VerifiersEnv(Env):
    """One task of a taskset, played by the library itself.

    The library runs the whole episode (its environment's control flow, the harness, tool servers,
    `@stop`, scoring); where it asks its model, the episode's policy answers. The last turn's reward
    is the trace's: the weighted sum of the task's rewards. They and the metrics are in `info`.

    The seat that is trained is played by a chat loop with tools (`verifiers_harness`) in this
    process, unless `env` or the taskset's package names a harness; programs of such a harness run
    on this machine, in the library's "subprocess" runtime, unless `env` says otherwise.

    Args:
        taskset: the id of a taskset: an importable module that exports one.
        split: "eval": the last fifth of the tasks, "train": the others; None: all, for tasksets
            whose own configuration chooses a split.
        env: the library's environment configuration but for `taskset`, such as
            `{"id": "best-of-n"}` or `{"agent": {"max_turns": 4}}`.
        config: the taskset's own configuration.

    Raises:
        InvalidInput: a configuration that the library refuses.
    """

    def __init__(
        self,
        taskset: str,
        *,
        split: Literal["train", "eval"] | None = None,
        env: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        import verifiers.v1 as vf

        self.name = f"environment 'verifiers:{taskset}'"
        self.env = _loaded(self.name, taskset, dict(env or {}), config)
        tasks = self.env.taskset
        bounded = tasks.bounded
        self.tasks = list(tasks if bounded else itertools.islice(tasks, MAX_TASKS))
        self.rows = Rows(len(self.tasks), split, self.name)
        self.episode: asyncio.Task[vf.Episode] | None = None

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """`options["task"]` picks a task by its index instead of the seed."""
        from .verifiers_endpoint import Endpoint

        await self.close()
        index = (options or {}).get("task", self.rows.pick(seed))
        self.endpoint = Endpoint()
        self.episode = asyncio.create_task(self._play(self.tasks[index]))
        messages = await self._next_turn()
        if messages is None:
            raise EnvironmentFailure(f"{self.name}: task {index} ended before the model's turn")
        self.tool_schemas = self.endpoint.tools
        return messages, {"task": index}

    async def step(self, action: str) -> StepResult:
        self.endpoint.answer(action)
        messages = await self._next_turn()
        if messages is not None:
            return messages, 0.0, False, False, {}
        assert self.episode is not None
        episode = self.episode.result()
        trace = episode.traces[-1]
        info = {
            "rewards": {name: reward.value for name, reward in trace.rewards.items() if reward},
            "metrics": dict(trace.metrics),
            "stopped_by": trace.stop_condition,
        }
        return "", trace.reward, not trace.is_truncated, trace.is_truncated, info

    async def close(self) -> None:
        if self.episode is not None and not self.episode.done():
            self.episode.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.episode

    async def _play(self, task: Any) -> Any:
        import verifiers.v1 as vf

        async with self.endpoint, self.env.serving():
            client = vf.EvalClientConfig(
                base_url=self.endpoint.base_url, api_key_var="TINSMITH_NO_KEY"
            )
            return await self.env.run_episode(task, vf.ModelContext(model="policy", client=client))

    async def _next_turn(self) -> list[dict[str, Any]] | None:
        """What the model is to answer; None once the episode is over.

        Raises:
            EnvironmentFailure: the library's environment failed.
        """
        assert self.episode is not None
        turn = asyncio.create_task(self.endpoint.turn())
        await asyncio.wait([turn, self.episode], return_when=asyncio.FIRST_COMPLETED)
        if turn.done():
            return turn.result()
        turn.cancel()
        episode = self.episode.result()
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        if errors or not episode.traces:
            told = "\n".join(
                error.traceback or f"{error.type}: {error.message}" for error in errors
            )
            raise EnvironmentFailure(f"{self.name} failed:\n{told}")
        return None


def _loaded(name: str, taskset: str, env: dict[str, Any], config: dict[str, Any]) -> Any:
    import verifiers.v1 as vf
    from pydantic import ValidationError
    from verifiers.v1.configs.agent import agent_config_fields

    from .verifiers_harness import ID

    # Tool servers are other processes; they import the taskset's module too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        roles = agent_config_fields(vf.env_config_type(taskset, env.get("id", ""))())
        bundled = vf.default_harness_id(taskset)
        harness = bundled if bundled == taskset else ID
        for role, agent in roles.items():
            given = dict(env.get(role, {}))
            pinned = agent.harness is not None or "harness" in given
            env[role] = given if pinned else {**given, "harness": {"id": harness}}
            env[role].setdefault("runtime", {"type": "subprocess"})
        return vf.load_environment(
            vf.resolve_env_config({**env, "taskset": {**config, "id": taskset}})
        )
    except (ValidationError, ValueError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{name} cannot be made: {error}") from error


def find_verifiers(taskset: str) -> Callable[..., VerifiersEnv]:
    """A factory of the taskset's environment.

    Raises:
        NotFound: no such taskset, or the library is not installed.
    """
    name = f"environment 'verifiers:{taskset}'"
    library = extra("verifiers.v1", name)
    # Loaded here, once, and not in the process of every episode.
    for module in ("verifiers_harness", "verifiers_endpoint"):
        importlib.import_module(f".{module}", __package__)
    try:
        library.import_taskset(taskset)
    except ModuleNotFoundError as error:
        raise NotFound(f"{name}: {error}") from None

    def factory(
        *,
        split: Literal["train", "eval"] | None = None,
        env: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> VerifiersEnv:
        return VerifiersEnv(taskset, split=split, env=env, **config)

    return factory
