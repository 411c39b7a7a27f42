"""The other learners of a model: they compute passes for the one that holds its runs.

A helper keeps nothing but the frozen base, so one that dies costs a pass, which is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..engines.backbone import Backbone
from ..engines.base_weights import BaseWeights
from ..engines.memory_budget import Budget
from ..engines.models import copies_folder
from ..engines.passes import Outcome, Work, pass_shape, run_pass
from .threads import engine_device, set_engine_threads


class LearnerHelper:
    """Wrapped by the controller with `ray.remote`."""

    def __init__(
        self, model_path: str, home: str, num_threads: int | None, weights: BaseWeights
    ) -> None:
        set_engine_threads(num_threads)
        copies = copies_folder(home)
        self.backbone = Backbone(model_path, weights, engine_device(), copies=copies)
        self.budget = Budget(self.backbone)

    def ping(self) -> str:
        return self.backbone.path

    def run_pass(self, works: Sequence[Work]) -> Outcome:
        """
        Raises:
            OutOfCapacity: it does not fit into memory.
        """
        works = [work.to(self.backbone.device) for work in works]
        shape, layouts = pass_shape([w.unit for w in works]), [w.layout for w in works]
        (checkpointing,) = self.budget.checkpointing(
            [(shape, layouts)], [], gradient=works[0].backward
        )
        return run_pass(self.backbone, works, checkpointing).to(torch.device("cpu"))
