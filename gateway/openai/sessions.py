"""One request and the trajectory that it belongs to, if any."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from ...envs.recording import Prompt, Recording
from ...primitives.types import Message, SampledSequence
from .errors import InvalidRequest
from .requests import SamplingRequest
from .store import TrajectoryStore

HEADER = "X-Trajectory-Id"


class Session:
    """Where a request's prompt is made and its answer recorded: for a request without a
    trajectory id, a recording that goes with it."""

    def __init__(self, store: TrajectoryStore, owner: str, name: str | None) -> None:
        self.store, self.owner, self.name = store, owner, name
        self.recording = Recording() if name is None else store.open(owner, name)

    @classmethod
    def of(
        cls, store: TrajectoryStore, owner: str, body: SamplingRequest, request: Request
    ) -> Session:
        """
        Raises:
            InvalidRequest: an id that cannot be used, or not with this request.
            NotFound: the trajectory was forgotten.
        """
        given = {body.trajectory_id, request.headers.get(HEADER)} - {None}
        if len(given) > 1:
            raise InvalidRequest(
                f"trajectory_id and the header {HEADER} name different trajectories",
                "trajectory_id",
            )
        name = next(iter(given), None)
        if name is not None and body.n > 1:
            raise InvalidRequest("a trajectory has one answer to every request: n must be 1", "n")
        return cls(store, owner, name)

    def add(
        self, tokenizer: Any, prompt: Prompt, sampled: SampledSequence, answer: Message
    ) -> None:
        if self.name is not None:
            self.recording.add(tokenizer, prompt, sampled, answer)
            self.store.settle(self.owner, self.name, self.recording)
