"""`/v1/trajectories`: what was recorded, for training."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Response

from ...primitives.trajectory_json import trajectory_to_json
from .store import TrajectoryStore


def list_trajectories(store: TrajectoryStore, owner: str) -> Response:
    return _json(
        {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "trajectory",
                    "turns": len(recording.turns),
                    "sampled_tokens": sum(len(turn.sampled.tokens) for turn in recording.turns),
                }
                for name, recording in store.of(owner).items()
            ],
        }
    )


def get_trajectory(store: TrajectoryStore, owner: str, name: str) -> Response:
    trajectory = store.get(owner, name).trajectory()
    return _json({"id": name, "object": "trajectory", **trajectory_to_json(trajectory)})


def delete_trajectory(store: TrajectoryStore, owner: str, name: str) -> Response:
    store.delete(owner, name)
    return _json({"id": name, "object": "trajectory", "deleted": True})


def _json(content: Any) -> Response:
    # Segments are long lists of numbers, which msgspec writes far quicker than json.
    return Response(msgspec.json.encode(content), media_type="application/json")
