"""A placement group of Ray's, held for as long as its actors are there."""

from __future__ import annotations

import asyncio
import time
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

from ..primitives.errors import OutOfCapacity, Unavailable
from .placement import Placement, Seat, amounts

POLL_SECONDS = 0.2
_OURS = "tinsmith"


@dataclass(frozen=True)
class Reservation:
    """`group` is None where nothing was to be reserved. `what` it is for, in messages."""

    what: str
    bundles: list[dict[str, float]]
    placement: Placement
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
            return cls(what, bundles, placement)
        name = f"{_OURS} {uuid.uuid4().hex}: {what}"
        group = placement_group(bundles, placement.strategy, name=name)
        reservation = cls(what, bundles, placement, group)
        if not await asyncio.to_thread(group.wait, placement.wait_s):
            reservation.release()
            raise OutOfCapacity(
                f"no room for {what}: {reservation._asked()}. Give it more, or ask for less with "
                "placement=tinsmith.Placement(...)"
            )
        return reservation

    async def there(self) -> None:
        """Wait until all of it is reserved: what is lost with a node, Ray reserves again when it finds
        room elsewhere.

        Raises:
            Unavailable: it found none for `placement.wait_s`, and goes on looking.
        """
        deadline = time.monotonic() + self.placement.wait_s
        while (state := await asyncio.to_thread(self._state)) != "CREATED":
            if state == "REMOVED":
                raise Unavailable(f"what was reserved for {self.what} was given back")
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"what was reserved for {self.what} is lost, with a node of the cluster, and there "
                    f"is no room for it now: {self._asked()}. It is reserved again as soon as there is"
                )
            await asyncio.sleep(POLL_SECONDS)

    def given_back(self) -> bool:
        return self._state() == "REMOVED"

    def _state(self) -> str:
        if self.group is None:
            return "CREATED"
        return placement_group_table(self.group).get("state", "REMOVED")

    def _asked(self) -> str:
        needed: Counter[str] = Counter()
        for bundle in self.bundles:
            needed.update(bundle)  # type: ignore[arg-type]
        return (
            f"{amounts(needed)} needed, in bundles of {'; '.join(map(amounts, self.bundles))} "
            f"({self.placement.strategy}); the cluster has {amounts(ray.cluster_resources())}, of "
            f"which are free: {amounts(ray.available_resources())}"
        )

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
