"""Which faults come when, from a seed alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .processes import PROCESSES


@dataclass(frozen=True)
class Kind:
    """
    Attributes:
        action: what is done; `faults.py` has a method of that name.
        target: a name in `PROCESSES`, or what else it is done to.
        weight: how often it is drawn, among the others.
        seconds: how long it lasts, from and to.
    """

    action: str
    target: str
    weight: float
    seconds: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Fault:
    """
    Attributes:
        after: it comes once so many operations have been acknowledged.
        pick: which of several processes of its target, from 0 to 1.
    """

    number: int
    after: int
    action: str
    target: str
    pick: float
    seconds: float

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.2f} s" if self.seconds else ""
        return f"fault {self.number}, {self.action} {self.target}{lasting}, after {self.after} ops"


# The first are what a short campaign has. A process that is killed takes seconds of a CPU to come
# back, all else next to nothing.
KINDS = (
    Kind("kill", "learner", 4),
    Kind("fill", "disk", 8, (0.05, 1.0)),
    Kind("cut answers", "connections", 12),
    Kind("kill", "sampler", 3),
    Kind("refuse growth", "learner", 10, (0.05, 1.0)),
    Kind("cut", "connections", 12),
    Kind("kill", "environment", 8),
    Kind("refuse growth", "controller", 4, (0.05, 1.0)),
    Kind("refuse growth", "gateway", 4, (0.05, 1.0)),
    *(Kind("stop", name, 5, (0.1, 2.0)) for name in PROCESSES),
    Kind("turn away", "connections", 6, (0.1, 2.0)),
    Kind("kill", "environment worker", 2),
    Kind("kill", "sampler pool", 1),
    Kind("kill", "controller", 1),
    Kind("kill", "gateway", 1),
)


def draw(seed: int, faults: int, first: int, last: int, kinds: tuple[Kind, ...]) -> list[Fault]:
    """`faults` of them, after `first` to `last` operations: every kind once, and then at random."""
    rng = random.Random(seed)
    drawn = [*kinds, *rng.choices(kinds, [kind.weight for kind in kinds], k=faults)][:faults]
    rng.shuffle(drawn)
    places = sorted(rng.randint(first, last) for _ in drawn)
    return [
        Fault(
            number,
            after,
            kind.action,
            kind.target,
            rng.random(),
            round(rng.uniform(*kind.seconds), 2),
        )
        for number, (after, kind) in enumerate(zip(places, drawn, strict=True), 1)
    ]
