"""The runs of a learner: those at work in the device's memory, idle ones set aside.

When room is needed the run that was used longest ago goes: from a GPU to the host's memory, from
there (or at once, if the device is the host) to a file without a name, which ends with the
process. It comes back, bit for bit, when it is next used.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from torch import Tensor

from ..primitives.errors import NotFound, OutOfCapacity
from ..primitives.types import LoraConfig
from .lora import AdapterLayout
from .memory import state_bytes
from .optimizer import AdamState


@dataclass(eq=False)
class Run:
    """A run's trainable state; `params`, `grad` and the moments are flat float32 `[layout.size]`."""

    config: LoraConfig
    layout: AdapterLayout
    params: Tensor
    grad: Tensor
    adam: AdamState
    version: int = 0

    @classmethod
    def start(cls, config: LoraConfig, layout: AdapterLayout, params: Tensor) -> Run:
        return cls(config, layout, params, torch.zeros_like(params), AdamState.zeros(params))

    @property
    def tensors(self) -> dict[str, Tensor]:
        adam = self.adam
        return {
            "params": self.params,
            "grad": self.grad,
            "exp_avg": adam.exp_avg,
            "exp_avg_sq": adam.exp_avg_sq,
        }

    @tensors.setter
    def tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.params, self.grad = tensors["params"], tensors["grad"]
        self.adam.exp_avg, self.adam.exp_avg_sq = tensors["exp_avg"], tensors["exp_avg_sq"]


@dataclass(eq=False)
class _Place:
    """Where a run's tensors are."""

    run: Run
    kind: Literal["device", "host", "file"] = "device"
    file: IO[bytes] | None = None
    kept: list[str] = field(default_factory=list)  # the tensors in the file, in order

    @property
    def nbytes(self) -> int:
        return state_bytes([self.run.layout])


class RunStore:
    """A mapping of runs by id, as large as the disk; what is looked up is brought back.

    Args:
        device: where runs are at work.
        resident_bytes: of it, for runs at work (None: no bound).
        host_bytes: of the host's memory, for runs set aside from another device (None: no bound).
        folder: for files; None: the system's for temporary ones.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        resident_bytes: int | None = None,
        host_bytes: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.device = device
        self.bounds = {"device": resident_bytes, "host": host_bytes}
        self.folder = folder
        self._places: OrderedDict[str, _Place] = OrderedDict()  # the last used last
        self._in_use: set[str] = set()

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, run_id: str) -> Run:
        """
        Raises:
            NotFound: no such run.
            OutOfCapacity: no room can be made for it.
        """
        place = self._place(run_id)
        if place.kind != "device":
            self._make_room(place.nbytes, "device", run_id)
            self._bring_back(place)
        self._places.move_to_end(run_id)
        return place.run

    def _place(self, run_id: str) -> _Place:
        place = self._places.get(run_id)
        if place is None:
            raise NotFound(f"run {run_id!r} is not in this learner's memory")
        return place

    def layout(self, run_id: str) -> AdapterLayout:
        """Of a run wherever it is.

        Raises:
            NotFound: no such run.
        """
        return self._place(run_id).run.layout

    def resident(self) -> list[AdapterLayout]:
        """Of the runs that are in the device's memory."""
        return [place.run.layout for place in self._places.values() if place.kind == "device"]

    def create(self, run_id: str, config: LoraConfig, layout: AdapterLayout) -> Run:
        """
        Raises:
            OutOfCapacity: the run is larger than all the room there is.
        """
        self.drop(run_id)
        self._make_room(state_bytes([layout]), "device", run_id)
        run = Run.start(config, layout, layout.initial().to(self.device))
        self._places[run_id] = _Place(run)
        return run

    def drop(self, run_id: str) -> None:
        place = self._places.pop(run_id, None)
        if place is not None and place.file is not None:
            place.file.close()

    @contextmanager
    def using(self, run_id: str) -> Iterator[Run]:
        """The run, which stays where it is meanwhile."""
        run, first = self[run_id], run_id not in self._in_use
        self._in_use.add(run_id)
        try:
            yield run
        finally:
            if first:
                self._in_use.discard(run_id)

    def set_aside(self) -> dict[str, str]:
        """The runs that are not at work, and where they are: "host" or "file"."""
        return {i: place.kind for i, place in self._places.items() if place.kind != "device"}

    def places(self) -> list[tuple[str, str, int, int]]:
        """Of every run: its id, where it is ("device", "host" or "file"), its bytes there, its version."""
        return [(i, p.kind, p.nbytes, p.run.version) for i, p in list(self._places.items())]

    def _used(self, kind: str) -> int:
        return sum(place.nbytes for place in self._places.values() if place.kind == kind)

    def _make_room(self, needed: int, kind: Literal["device", "host"], run_id: str) -> None:
        bound = self.bounds[kind]
        if bound is None:
            return
        if needed > bound:
            raise OutOfCapacity(
                f"run {run_id!r} needs {needed:,} bytes for its parameters, gradient and optimizer; "
                f"this learner has {bound:,} for runs. Take a lower rank or train fewer layers"
            )
        while self._used(kind) + needed > bound:
            idle = (
                (i, place)
                for i, place in self._places.items()
                if place.kind == kind and i not in self._in_use and i != run_id
            )
            candidate = next(idle, None)
            if candidate is None:
                raise OutOfCapacity(
                    f"run {run_id!r} needs {needed:,} bytes; of {bound:,} for runs, "
                    f"{self._used(kind):,} are in use just now"
                )
            self._put_aside(*candidate)

    def _put_aside(self, run_id: str, place: _Place) -> None:
        bound = self.bounds["host"]
        on_host = place.kind == "host" or self.device.type == "cpu"
        if not on_host and (bound is None or place.nbytes <= bound):
            self._make_room(place.nbytes, "host", run_id)
            place.run.tensors = {name: t.to("cpu") for name, t in place.run.tensors.items()}
            place.kind = "host"
            return
        # Zeros need no room: the gradient after a step, the moments before the first.
        kept = {name: t.cpu().numpy() for name, t in place.run.tensors.items() if t.any()}
        try:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (open while it is aside)
            for values in kept.values():
                values.tofile(file)
            file.flush()
        except OSError as error:
            raise OutOfCapacity(f"run {run_id!r} could not be set aside on disk: {error}") from None
        place.run.tensors = dict.fromkeys(place.run.tensors, torch.empty(0))
        place.kind, place.file, place.kept = "file", file, list(kept)

    def _bring_back(self, place: _Place) -> None:
        run, tensors = place.run, place.run.tensors
        if place.file is not None:
            tensors = {name: torch.zeros(run.layout.size) for name in tensors}
            place.file.seek(0)
            for name in place.kept:
                values = np.fromfile(place.file, np.float32, run.layout.size)
                tensors[name] = torch.from_numpy(values)
            place.file.close()
        run.tensors = {name: t.to(self.device) for name, t in tensors.items()}
        place.kind, place.file = "device", None
