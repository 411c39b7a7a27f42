"""How much memory a learner may take, and what is refused because it would take more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil
import torch

from ..primitives.errors import OutOfCapacity
from .backbone import Backbone
from .lora import AdapterLayout
from .memory import MemoryModel, PassShape, state_bytes

# Of what is free. What is counted are torch's tensors: with kernels' scratch space, and holes that
# the C library keeps, a process takes up to 1.5 times as much; and others have needs too.
SHARE = 0.6
# Limit, use and statistics of this process's control group (versions 2 and 1), and the name of the
# statistic that says how much of it is files that the kernel would drop.
CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = [
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
]


def available_bytes(device: torch.device) -> int:
    """What is free on a GPU (with what torch keeps for itself there), or of this machine's memory
    and of this process's control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + idle
    return min([psutil.virtual_memory().available, *_cgroup_free()])


def _cgroup_free() -> list[int]:
    """Empty where there is no limit."""
    for limit, use, statistics, files in CGROUP_FILES:
        try:
            text = (CGROUP / limit).read_text().strip()
            used = int((CGROUP / use).read_text())
            stat = dict(line.split() for line in (CGROUP / statistics).read_text().splitlines())
        except OSError:
            continue
        return [] if text == "max" else [int(text) - used + int(stat[files])]
    return []


def own_bytes() -> int:
    """Memory that is this process's alone: what it has of files is not."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


class Budget:
    """What a learner may take: `limit` bytes for runs and passes, or (None) most of what is free.

    What its earlier passes took counts as free: the process keeps it for the next one.
    """

    def __init__(self, backbone: Backbone, limit: int | None = None) -> None:
        self.model, self.device, self.limit = MemoryModel.of(backbone), backbone.device, limit
        self._before = own_bytes()

    def left(self, held: Iterable[AdapterLayout]) -> int:
        """Bytes for passes and further runs, beside the runs whose layouts are given."""
        states = state_bytes(held)
        if self.limit is not None:
            return max(self.limit - states, 0)
        free = available_bytes(self.device)
        if self.device.type != "cuda":
            free += max(own_bytes() - self._before - states, 0)
        return int(SHARE * free)

    def checkpointing(
        self,
        passes: Sequence[tuple[PassShape, Sequence[AdapterLayout]]],
        held: Iterable[AdapterLayout],
        *,
        gradient: bool,
    ) -> list[bool]:
        """Which passes, each with the layouts of its runs, keep only their layers' inputs for the
        backward pass: those that do not fit otherwise.

        Raises:
            OutOfCapacity: one does not fit even so.
        """
        left, chosen = self.left(held), []
        for shape, layouts in passes:
            if not gradient:
                needed, short = self.model.forward(shape, layouts), False
            else:
                needed = self.model.pass_(shape, layouts, checkpointing=False)
                short = needed > left
                if short:
                    needed = self.model.pass_(shape, layouts, checkpointing=True)
            if needed > left:
                what = "even with activation checkpointing" if gradient else "without a gradient"
                raise OutOfCapacity(
                    f"a pass of {shape.rows} tokens needs {_gb(needed)} {what}, there are "
                    f"{self._have(left)}; shorten the longest sequence, or free memory"
                )
            chosen.append(short)
        return chosen

    def _have(self, left: int) -> str:
        if self.limit is not None:
            return f"{_gb(left)} left of memory_bytes={self.limit}"
        return f"{_gb(left)} ({SHARE:.0%} of what is free)"


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
