"""Where a model's learner and samplers go: what each reserves, and which share a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..primitives.errors import InvalidInput

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


@dataclass(frozen=True)
class Placement:
    """What actors reserve of a Ray cluster, each model's by one placement group.

    Attributes:
        learner_gpus, sampler_gpus: GPUs of each of a model's learners and samplers, or a part of
            one; together at most one, they share it. None: one each (a sampler
            `tensor_parallel`); where there are fewer, learner and samplers have half of one each.
        learner_cpus, sampler_cpus, env_worker_cpus: CPUs reserved. 0 reserves none: the actors
            of one machine then share its cores as they come.
        strategy: of the placement group: PACK keeps a model on few nodes, SPREAD on many.
        wait_s: how long a cluster may take to find room (it may have to start a node).
    """

    learner_gpus: float | None = None
    sampler_gpus: float | None = None
    learner_cpus: float = 0
    sampler_cpus: float = 0
    env_worker_cpus: float = 0
    strategy: Strategy = "PACK"
    wait_s: float = 30.0

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise InvalidInput(
                f"strategy must be one of {', '.join(get_args(Strategy))}, got {self.strategy!r}"
            )
        for name in ("learner_cpus", "sampler_cpus", "env_worker_cpus", "wait_s"):
            if getattr(self, name) < 0:
                raise InvalidInput(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= (self.learner_gpus or 0) <= 1:
            raise InvalidInput(f"learner_gpus must be from 0 to 1, got {self.learner_gpus}")
        gpus = self.sampler_gpus or 0
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise InvalidInput(f"sampler_gpus must be a part of one, or whole ones, got {gpus}")


@dataclass(frozen=True)
class Seat:
    """What one actor reserves.

    Attributes:
        bundle: of the model's placement group (None: not in it).
    """

    cpus: float = 0
    gpus: float = 0
    bundle: int | None = None

    @property
    def resources(self) -> dict[str, float]:
        needed = {"CPU": float(self.cpus), "GPU": float(self.gpus)}
        return {name: amount for name, amount in needed.items() if amount}


@dataclass(frozen=True)
class Plan:
    """Seats of a model's actors in the bundles of its placement group (none: nothing is reserved),
    and of `another` sampler, beyond those that are always there. `helpers`: of the learner."""

    bundles: list[dict[str, float]]
    learner: Seat
    samplers: list[Seat]
    another: Seat
    helpers: list[Seat] = field(default_factory=list)


def plan(
    placement: Placement, gpus: float, tensor_parallel: int, samplers: int, learners: int = 1
) -> Plan:
    """For a cluster with that many GPUs in all.

    Raises:
        InvalidInput: a sampler has not as many GPUs as `tensor_parallel`.
    """
    learner_gpus, sampler_gpus = _gpus(placement, gpus, tensor_parallel, samplers, learners)
    if sampler_gpus and tensor_parallel > 1 and sampler_gpus != tensor_parallel:
        raise InvalidInput(
            f"tensor_parallel={tensor_parallel} needs as many sampler_gpus, got {sampler_gpus}"
        )
    bundles: list[dict[str, float]] = []

    def seat(cpus: float, gpus: float, shared: bool) -> Seat:
        alone = Seat(cpus, gpus)
        if not alone.resources:
            return alone
        if shared and bundles:
            for name, amount in alone.resources.items():
                bundles[0][name] = bundles[0].get(name, 0.0) + amount
            return Seat(cpus, gpus, 0)
        bundles.append(alone.resources)
        return Seat(cpus, gpus, len(bundles) - 1)

    together = learners * learner_gpus + samplers * sampler_gpus
    colocated = bool(learner_gpus) and 0 < together <= 1
    learner = seat(placement.learner_cpus, learner_gpus, colocated)
    seats = [seat(placement.sampler_cpus, sampler_gpus, colocated) for _ in range(samplers)]
    helpers = [seat(placement.learner_cpus, learner_gpus, colocated) for _ in range(learners - 1)]
    return Plan(bundles, learner, seats, Seat(placement.sampler_cpus, sampler_gpus), helpers)


def _gpus(
    placement: Placement, there: float, tensor_parallel: int, samplers: int, learners: int
) -> tuple[float, float]:
    """Of each learner and of each sampler."""
    learner, sampler = 1.0, float(tensor_parallel)
    if there == 0:
        learner, sampler = 0.0, 0.0
    elif there < learners * learner + samplers * sampler and tensor_parallel == 1:
        # Ray counts in ten-thousandths: rounded down, they fit into a half.
        learner, sampler = 0.5, int(5000 / samplers) / 1e4
    if placement.learner_gpus is not None:
        learner = float(placement.learner_gpus)
    if placement.sampler_gpus is not None:
        sampler = float(placement.sampler_gpus)
    return learner, sampler


def amounts(resources: Mapping[str, float]) -> str:
    """As in "2 GPU, 1 CPU"."""
    kept = {name: resources[name] for name in ("GPU", "CPU") if resources.get(name)}
    return ", ".join(f"{amount:g} {name}" for name, amount in kept.items()) or "nothing"
