"""The other learners of a model: they compute passes for the one that holds its runs.

A helper keeps nothing but the frozen base, so one that dies costs a pass, which is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..engines.backbone import Backbone
from ..engines.passes import Outcome, Work, run_pass
from .threads import engine_device, set_engine_threads


class LearnerHelper:
    """Wrapped by the controller with `ray.remote`."""

    def __init__(self, model_path: str, num_threads: int | None = None) -> None:
        set_engine_threads(num_threads)
        self.backbone = Backbone(model_path, device=engine_device())

    def ping(self) -> str:
        return self.backbone.path

    def run_pass(self, works: Sequence[Work], checkpointing: bool) -> Outcome:
        works = [work.to(self.backbone.device) for work in works]
        return run_pass(self.backbone, works, checkpointing).to(torch.device("cpu"))
