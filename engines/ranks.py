"""The processes of a learner that is cut over several ranks, as torch's process groups see them."""

from __future__ import annotations

from datetime import timedelta
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .layout import Layout

DIMENSIONS = ("data", "shard", "context", "tensor")
IDLE = timedelta(days=365)  # between two passes ranks wait for as long as nobody trains
JOIN = timedelta(minutes=5)  # ranks start at about the same time
PASS = timedelta(minutes=30)  # a rank that has not come by then is taken for dead


def open_store(host: str, port: int | None = None) -> dist.TCPStore:
    """Where ranks find each other: opened on `host` (its own address), at any free port, by rank 0;
    joined by the others."""
    if port is None:
        return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return dist.TCPStore(host, port, is_master=False)


class Ranks:
    """All of a layout's ranks, and which of them this process is.

    Making one waits for the others. There is one at a time in a process.

    Attributes:
        part: which part of a batch this rank computes.
        place: its place among those that compute it, of which it is one of
        context_rank: by rows, and
        tensor_rank: by products.
        expert_rank: its place among those that have a mixture's experts together, which are
        expert_members: by part and `context_rank`.
        control: a group for what is said between passes, on the CPU.
    """

    def __init__(
        self, layout: Layout, rank: int, store: dist.Store, device: torch.device | str
    ) -> None:
        self.layout, self.rank, self.device = layout, rank, torch.device(device)
        self._leaving, self._left = Lock(), False
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=layout.world, timeout=JOIN
        )
        self.everyone = dist.new_group(timeout=PASS)
        sizes = (layout.data, layout.shard, layout.context, layout.tensor)
        self.mesh: DeviceMesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=DIMENSIONS)
        self.control = dist.new_group(backend="gloo", timeout=IDLE)
        self.shard: DeviceMesh = self.mesh["shard"]
        self.shard_rank = self.shard.get_local_rank()
        self.part, self.place = divmod(rank, layout.together)
        self.context_rank, self.tensor_rank = divmod(self.place, layout.tensor)
        self.context, self.tensor = self.mesh.get_group("context"), self.mesh.get_group("tensor")
        starts = range(0, layout.world, layout.together)
        members = [list(range(start, start + layout.together)) for start in starts]
        self.together = [dist.new_group(ranks, timeout=PASS) for ranks in members][self.part]
        holder = rank // layout.tensor
        first, self.expert_rank = holder - holder % layout.expert, holder % layout.expert
        holders = range(first, first + layout.expert)
        self.expert_members = [divmod(holder, layout.context) for holder in holders]
        for start in range(0, layout.holders, layout.expert):
            for tensor_rank in range(layout.tensor):
                holders = range(start, start + layout.expert)
                group = dist.new_group(
                    [h * layout.tensor + tensor_rank for h in holders], timeout=PASS
                )
                if (start, tensor_rank) == (first, self.tensor_rank):
                    self.experts = group

    def tell(self, message: Any = None) -> Any:
        """Rank 0's message (picklable), on every rank."""
        box = [message]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def collect(self, told: Any) -> list[Any] | None:
        """What every rank tells, on rank 0."""
        all_told = [None] * self.layout.world if self.rank == 0 else None
        dist.gather_object(told, all_told, dst=0, group=self.control)
        return all_told

    def share_out(self, values: Tensor) -> Tensor:
        """Rank 0's values, written into those of every rank."""
        dist.broadcast(values, src=0, group=self.everyone)
        return values

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, on rank 0, in place."""
        dist.reduce(values, dst=0, group=self.everyone)
        return values

    def abort(self) -> None:
        """From another thread: what this rank waits for fails. On a CPU it does so by itself when the
        others are gone, over NCCL it would wait on."""
        with self._leaving:
            if self.device.type == "cuda" and not self._left:
                dist.distributed_c10d._abort_process_group()

    def leave(self) -> None:
        with self._leaving:
            self._left = True
            dist.destroy_process_group()
