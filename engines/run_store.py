"""The runs of a learner: those at work in the device's memory, idle ones set aside.

When room is needed the run that was used longest ago goes: from a GPU to the host's memory, from
there (or at once, if the device is the host) to a file. It comes back, bit for bit, when it is
next used.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from ..primitives.errors import NotFound, OutOfCapacity
from ..primitives.types import LoraConfig
from .lora import AdapterLayout
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


def state_bytes(layout: AdapterLayout) -> int:
    """What a run takes: parameters, gradient and two moments in float32."""
    return 4 * 4 * layout.size


@dataclass(eq=False)
class _Place:
    """Where a run's tensors are."""

    run: Run
    kind: Literal["device", "host", "file"] = "device"

    @property
    def nbytes(self) -> int:
        return state_bytes(self.run.layout)


class RunStore:
    """A mapping of runs by id, as large as the disk; what is looked up is brought back.

    Args:
        device: where runs are at work.
        resident_bytes: of it, for runs at work (None: no bound).
        host_bytes: of the host's memory, for runs set aside from another device (None: no bound).
        folder: for files; None: a temporary one.
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
        self._folder = folder
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
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
        place = self._places.get(run_id)
        if place is None:
            raise NotFound(f"run {run_id!r} is not in this learner's memory")
        if place.kind != "device":
            self._make_room(place.nbytes, "device", run_id)
            self._bring_back(run_id, place)
        self._places.move_to_end(run_id)
        return place.run

    def create(self, run_id: str, config: LoraConfig, layout: AdapterLayout) -> Run:
        """
        Raises:
            OutOfCapacity: the run is larger than all the room there is.
        """
        self.drop(run_id)
        self._make_room(state_bytes(layout), "device", run_id)
        run = Run.start(config, layout, layout.initial().to(self.device))
        self._places[run_id] = _Place(run)
        return run

    def drop(self, run_id: str) -> None:
        place = self._places.pop(run_id, None)
        if place is not None and place.kind == "file":
            self._file(run_id).unlink(missing_ok=True)

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
        kept = {name: t.contiguous().cpu() for name, t in place.run.tensors.items() if t.any()}
        try:
            safetensors.torch.save_file(kept, self._file(run_id))
        except (OSError, safetensors.SafetensorError) as error:
            raise OutOfCapacity(f"run {run_id!r} could not be set aside on disk: {error}") from None
        place.run.tensors = dict.fromkeys(place.run.tensors, torch.empty(0))
        place.kind = "file"

    def _bring_back(self, run_id: str, place: _Place) -> None:
        run, kept = place.run, place.run.tensors
        if place.kind == "file":
            kept = safetensors.torch.load_file(self._file(run_id))
        zeros = {n: torch.zeros(run.layout.size) for n in run.tensors if n not in kept}
        run.tensors = {n: t.to(self.device) for n, t in {**kept, **zeros}.items()}
        if place.kind == "file":
            self._file(run_id).unlink()
        place.kind = "device"

    def _file(self, run_id: str) -> Path:
        if self._folder is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="tinsmith-runs-")
            self._folder = Path(self._scratch.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{run_id.replace('/', '_')}.safetensors"
