"""A learner of several ranks: `LearnerRanks` is the first one's side, in the learner's process; every
other rank is a `LearnerRank`, an actor of its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import ray

from ..engines.base_weights import BaseWeights
from ..engines.layout import Layout
from ..engines.passes import Outcome, Work
from ..engines.ranks import Ranks, open_store
from ..engines.sharded_backbone import ShardedBackbone
from ..engines.sharded_pass import Leader, serve
from ..primitives.errors import Unavailable
from ..primitives.op import Handle, Op
from .threads import engine_device, set_engine_threads


class LearnerRank:
    """Wrapped by the controller with `ray.remote`. It keeps nothing but its share of the frozen base."""

    def __init__(
        self,
        model_path: str,
        layout: Layout,
        rank: int,
        num_threads: int | None,
        weights: BaseWeights,
        copies: Path,
    ) -> None:
        set_engine_threads(num_threads)
        self.layout, self.rank = layout, rank
        self.model_path, self.weights, self.copies = model_path, weights, copies

    def ping(self) -> str:
        return self.model_path

    def serve(self, host: str, port: int) -> None:
        """Join the others, load, and compute passes for as long as they are there."""
        ranks = Ranks(self.layout, self.rank, open_store(host, port), engine_device())
        backbone = ShardedBackbone(self.model_path, self.weights, ranks, copies=self.copies)
        serve(ranks, backbone)


class LearnerRanks:
    """A `passes.Group` that is made again when one of its ranks is lost. The runs are in this process, so they
    lose nothing but the pass under way, which is computed again.

    Args:
        controller: starts the other ranks.

    Attributes:
        backbone: this rank's share; the same object all along.

    Raises:
        InvalidInput: the model cannot be laid out so.
        OutOfCapacity: the cluster has no room for the ranks.
        Unavailable: they could not be started.
    """

    def __init__(
        self,
        controller: Handle,
        base_model: str,
        model_path: str,
        layout: Layout,
        weights: BaseWeights,
        copies: Path,
    ) -> None:
        self.controller, self.base_model, self.layout = controller, base_model, layout
        self.parts = layout.parts
        self.others: list[Any] = []  # handles of the other ranks
        self.serving: list[Future[Any]] = []
        self.leader: Leader | None = None
        ranks = self._gather()
        try:
            self.backbone = ShardedBackbone(model_path, weights, ranks, copies=copies)
        except BaseException:
            self._end(ranks)
            raise
        self.leader = Leader(ranks, self.backbone)

    def _gather(self) -> Ranks:
        """New processes for the other ranks, joined by this one as the first."""
        host = ray.util.get_node_ip_address()
        store = open_store(host)
        starting = [
            Op(self.controller.call("learner_rank", self.base_model, rank, self.layout))
            for rank in range(1, self.layout.world)
        ]
        self.others = others = [op.result() for op in starting]
        self.serving = [handle.call("serve", host, store.port) for handle in others]
        try:
            ranks = Ranks(self.layout, 0, store, engine_device())
        except RuntimeError as error:  # torch's
            self._kill(others)
            raise Unavailable(
                f"the learner's ranks ({self.layout}) did not find each other: {error}"
            ) from None

        def lost(_: Future[Any]) -> None:
            # In a thread: where Ray calls back it cannot be called.
            Thread(target=self._lost, args=(ranks, others), daemon=True).start()

        for future in self.serving:
            future.add_done_callback(lost)
        return ranks

    def _lost(self, ranks: Ranks, others: Sequence[Any]) -> None:
        """What this rank waits for in the others fails, instead of waiting for ever."""
        self._kill(others)
        ranks.abort()

    def _kill(self, others: Sequence[Any]) -> None:
        for handle in others:
            ray.kill(handle.actor)

    def _end(self, ranks: Ranks) -> None:
        self._kill(self.others)
        ranks.leave()
        self.leader = None

    def run(self, passes: Sequence[Sequence[Work]], checkpointing: bool) -> list[Outcome]:
        if self.leader is None:
            self._begin_again()
        leader = self.leader
        assert leader is not None
        try:
            return leader.run(passes, checkpointing)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        # Outside of the handler, which would keep what the pass held.
        told = "; ".join(dict.fromkeys([told, *self._failures()]))
        self._end(leader.ranks)
        raise Unavailable(
            f"a rank of the learner of {self.base_model} ({self.layout}) was lost in a pass: {told}"
        )

    def _failures(self) -> list[str]:
        """What the other ranks that are gone said."""
        errors = [future.exception() for future in self.serving if future.done()]
        return [f"{type(error).__name__}: {error}" for error in errors if error is not None]

    def _begin_again(self) -> None:
        ranks = self._gather()
        try:
            self.backbone.join(ranks)
        except BaseException:
            self._end(ranks)
            raise
        self.leader = Leader(ranks, self.backbone)
