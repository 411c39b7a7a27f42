"""A placement group of Ray's, held for as long as its actors are there."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..primitives.errors import OutOfCapacity
from .placement import Placement, Seat, amounts

_OURS = "tinsmith"


@dataclass(frozen=True)
class Reservation:
    """`group` is None where nothing was to be reserved."""

    group: PlacementGroup | None = None

    @classmethod
    async def make(
        cls, what: str, bundles: list[dict[str, float]], placement: Placement
    ) -> Reservation:
        """Reserve all bundles, or none.

        Raises:
            OutOfCapacity: the cluster had no room for `what` for `placement.wait_s`.
        """
        if not bundles:
            return cls()
        name = f"{_OURS} {uuid.uuid4().hex}: {what}"
        group = placement_group(bundles, placement.strategy, name=name)
        if not await asyncio.to_thread(group.wait, placement.wait_s):
            remove_placement_group(group)
            needed: Counter[str] = Counter()
            for bundle in bundles:
                needed.update(bundle)  # type: ignore[arg-type]
            raise OutOfCapacity(
                f"no room for {what}: {amounts(needed)} needed, in bundles of "
                f"{'; '.join(map(amounts, bundles))} ({placement.strategy}); the cluster has "
                f"{amounts(ray.cluster_resources())}, of which are free: "
                f"{amounts(ray.available_resources())}. Give it more, or ask for less with "
                "placement=tinsmith.Placement(...)"
            )
        return cls(group)

    def options(self, seat: Seat) -> dict[str, Any]:
        """For `.options()` of the actor that takes this seat."""
        options: dict[str, Any] = dict(num_cpus=seat.cpus, num_gpus=seat.gpus)
        if self.group is not None and seat.bundle is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self.group, placement_group_bundle_index=seat.bundle
            )
        return options

    def release(self) -> None:
        """Its actors, if there are any left, end."""
        if self.group is not None:
            remove_placement_group(self.group)


def release_left_over() -> None:
    """Reservations of a controller that died, whose actors ended with it."""
    for group in placement_group_table().values():
        if group["name"].startswith(f"{_OURS} ") and group["state"] != "REMOVED":
            remove_placement_group(get_placement_group(group["name"]))


def has_room(seat: Seat) -> bool:
    """Whether the cluster has what an actor outside of any group needs."""
    free = ray.available_resources()
    return all(free.get(name, 0) >= amount for name, amount in seat.resources.items())
