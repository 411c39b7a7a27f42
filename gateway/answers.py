"""What a client gets for an operation of a run's log."""

from __future__ import annotations

from typing import Any

from .futures import Answer
from .wire import write_training_output

_SAVED = {
    "save_state": "save_weights",
    "save_weights_for_sampler": "save_weights_for_sampler",
    "save_weights_external": "save_weights_external",
}


def answer(kind: str, run_id: str, result: Any) -> Answer:
    """
    Args:
        kind: of operation, as the learner calls it; any but `publish`, whose answer depends on more.
        result: of the learner.
    """
    if kind in ("forward", "forward_backward"):
        return Answer.proto(write_training_output(result))
    if kind == "optim_step":
        return Answer.json({"metrics": result.metrics})
    if kind == "load_state":
        return Answer.json({"type": "load_weights", "path": result.path, "model_id": run_id})
    return Answer.json({"type": _SAVED[kind], "path": result.path})
