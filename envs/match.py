"""One match: the agents of a game bound to policies and scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..primitives.client import SamplingClient
from ..primitives.errors import InvalidInput
from ..primitives.sync import SyncClient
from ..primitives.types import Match, SamplingParams
from .episode import EpisodeLimits
from .fork_server import EnvSource
from .isolation import EnvPool
from .playing import Seat, play
from .registry import pickled_factory
from .renderer import ChatRenderer
from .scripted import Scripted

Policy = SamplingClient | Scripted


@dataclass(frozen=True)
class MatchSpec:
    """All that a worker needs to play one match.

    `policies` binds every agent: to a sampling client (one may play several agents; live, pinned
    to a version, a checkpoint's, the base model's, of several base models), or to a `Scripted`
    function. A plain `Env` is a game of one agent, called "agent".

    `seed` and `options` go to the environment's `reset`, and `seed` to the scripts.
    `sampling_params` hold for all agents or are given by agent. Turn t of an agent samples with a
    seed derived from `sampling_params.seed` (or else `seed`), its name and t: the members of a
    group share `seed` and differ in `sampling_params.seed`.

    `limits` hold for each agent (turns, context) and for the match (seconds, memory); an agent
    that reaches its own forfeits, as the game says.

    Raises:
        InvalidInput: naming the agent whose policy or sampling parameters cannot be used.
    """

    env: str
    policies: Mapping[str, Policy]
    sampling_params: SamplingParams | Mapping[str, SamplingParams] = field(
        default_factory=SamplingParams
    )
    seed: int = 0
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] | None = None
    limits: EpisodeLimits = field(default_factory=EpisodeLimits)
    source: EnvSource = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.policies, Mapping) or not self.policies:
            raise InvalidInput(
                "MatchSpec.policies must be a dict of a sampling client or Scripted by agent, "
                f"got {self.policies!r:.200}"
            )
        policies = {}
        for agent, policy in self.policies.items():
            bound = policy.client if isinstance(policy, SyncClient) else policy
            if not isinstance(bound, Scripted):
                if not callable(getattr(bound, "sample", None)):
                    raise InvalidInput(
                        f"MatchSpec.policies[{agent!r}] must be a sampling client or "
                        f"Scripted(function), got {policy!r:.200}"
                    )
                self._params(agent)
            policies[agent] = bound
        object.__setattr__(self, "policies", policies)
        scripts = [(a, policy) for a, policy in policies.items() if isinstance(policy, Scripted)]
        source = EnvSource(self.env, pickled_factory(self.env), tuple(scripts))
        object.__setattr__(self, "source", source)

    @property
    def samplers(self) -> dict[str, SamplingClient]:
        """The policies of the agents that no script plays."""
        return {a: p for a, p in self.policies.items() if not isinstance(p, Scripted)}

    def seat(self, agent: str, renderer: ChatRenderer) -> Seat:
        params = self._params(agent)
        seed = self.seed if params.seed is None else params.seed
        return Seat(self.samplers[agent], renderer, params, f"{seed} {agent}")

    def _params(self, agent: str) -> SamplingParams:
        params = self.sampling_params
        if isinstance(params, SamplingParams):
            return params
        if not isinstance(params, Mapping) or not isinstance(params.get(agent), SamplingParams):
            raise InvalidInput(
                f"MatchSpec.sampling_params must be SamplingParams, or a dict of them by agent; "
                f"there are none for {agent!r}"
            )
        return params[agent]


async def play_match(
    pool: EnvPool, renderer_of: Callable[[str], ChatRenderer], spec: MatchSpec
) -> Match:
    """Play one match to its end. `renderer_of` gives the renderer of an agent's policy.

    Raises:
        EnvironmentFailure: the environment or a script raised, hung, died or used too much
            memory, or the match took too long.
        NotFound, InvalidInput: no such environment, or not with these arguments, or `policies`
            do not bind exactly its agents.
    """

    def seats(agents: Sequence[str]) -> dict[str, Seat]:
        unbound = [agent for agent in agents if agent not in spec.policies]
        unknown = [agent for agent in spec.policies if agent not in agents]
        if unbound or unknown:
            raise InvalidInput(
                f"environment {spec.env!r} has the agents {list(agents)}, policies are bound to "
                f"{list(spec.policies)}: bind each of its agents and no others"
            )
        return {agent: spec.seat(agent, renderer_of(agent)) for agent in spec.samplers}

    return await play(pool, spec, seats)
