"""One run's batch for the learner: checked, cut into units of work, and put together again.

A position may have several targets. What belongs to one target is a cell: K of them per position,
those of all the batch's datums in a row.

Dimension names: N rows with a target, M (row, target) pairs of a unit, C cells of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..algorithms.losses import get_loss, ratio_metrics
from ..primitives.types import ROUTED_EXPERTS, Datum, ForwardBackwardOutput
from ..primitives.validation import validate_datums
from .backbone import Backbone
from .packing import Pack, pack_sequences
from .routing import RouterLoad

SMALLEST_PART = 128  # rows; with fewer, products are slow and prefixes are computed twice


@dataclass(frozen=True, eq=False)
class Unit:
    """What is computed in one go; all on the CPU.

    Attributes:
        pack: the tokens, as a forest.
        rows: those that have a target, int64 `[N]`, ascending.
        pair_rows: int64 `[M]`, ascending, indices into `rows`.
        cells: int64 `[M]`, the pairs' cells in the batch.
        targets: int64 `[M]`, token ids.
        inputs: of the loss, `[M]` each.
        needed: bool `[M]`, whether the loss depends on the pair.
        routed: the experts that rows are to go through, int64 `[rows of the pack, layers, k]`, -1 where
            the router chooses; None: everywhere.
    """

    pack: Pack
    rows: np.ndarray
    pair_rows: np.ndarray
    cells: np.ndarray
    targets: np.ndarray
    inputs: dict[str, Tensor]
    needed: Tensor
    routed: np.ndarray | None = None


class Batch:
    """
    Args:
        logprobs: "all", or "loss" for only those that the loss needs (the others are NaN).

    Raises:
        InvalidInput: a bad datum (named by its index) or setting.
        NotFound: no such loss.
    """

    def __init__(
        self,
        backbone: Backbone,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None,
        logprobs: str,
    ) -> None:
        self.loss = get_loss(loss_fn)
        self.config = self.loss.fill_config(loss_fn_config)
        validate_datums(
            data,
            self.loss.inputs,
            backbone.vocab_size,
            backbone.max_context,
            optional=tuple(self.loss.optional),
            multi_target=self.loss.multi_target,
            routed=None if (r := backbone.routing) is None else (r.layers, r.experts, r.per_token),
        )
        self.datums = data
        targets = [d.loss_fn_inputs["target_tokens"] for d in data]
        self.starts = np.cumsum([0, *(t.size for t in targets)])
        self.targets = np.concatenate([t.reshape(-1) for t in targets]).astype(np.int64, copy=False)
        self.positions = np.concatenate([np.arange(t.size) // (t.size // len(t)) for t in targets])
        filled = [self._inputs(index, datum) for index, datum in enumerate(data)]
        self.inputs = {name: torch.cat([i[name] for i in filled]) for name in filled[0]}
        self.needed = torch.cat([self.loss.needed(inputs, self.config) for inputs in filled])
        self.wanted = self.needed.numpy() | (logprobs == "all")
        self.logprobs = np.full(len(self.targets), np.nan, np.float32)
        self.loss_sum = 0.0
        self.rows = 0
        self.load: RouterLoad | None = None

    def _inputs(self, index: int, datum: Datum) -> dict[str, Tensor]:
        given = {
            name: torch.tensor(values.reshape(-1), dtype=torch.float32)
            for name, values in datum.loss_fn_inputs.items()
            if name not in ("target_tokens", ROUTED_EXPERTS)
        }
        owner = torch.full((datum.loss_fn_inputs["target_tokens"].size,), index)
        return {**self.loss.fill_inputs(given, self.config), "datum": owner}

    def _wanted_cells(self, index: int) -> np.ndarray:
        start, stop = self.starts[index : index + 2]
        return start + np.flatnonzero(self.wanted[start:stop])

    def units(self, max_rows: int, learners: int = 1) -> list[Unit]:
        """Cut the batch into units of at most `max_rows` rows (a longer sequence is one by
        itself), in even parts for that many learners. Nothing else has a say in how it is cut."""
        cells = [self._wanted_cells(i) for i in range(len(self.datums))]
        used = [i for i, c in enumerate(cells) if len(c)]
        if not used:
            return []
        # Tokens after the last wanted one change nothing.
        sequences = [
            self.datums[i].model_input.tokens[: int(self.positions[cells[i][-1]]) + 1] for i in used
        ]
        routed = [
            None
            if (r := self.datums[i].loss_fn_inputs.get(ROUTED_EXPERTS)) is None
            else r[: len(s)]
            for i, s in zip(used, sequences, strict=True)
        ]
        keys = _keys(sequences, routed)
        packs = pack_sequences(sequences, max_rows, keys)
        if len(packs) % learners:
            rounds = -(-len(packs) // learners)
            part = -(-sum(len(pack.tokens) for pack in packs) // (rounds * learners))
            packs = pack_sequences(sequences, min(max_rows, max(part, SMALLEST_PART)), keys)
        return [
            self._unit(
                pack,
                [cells[used[m]] for m in pack.members],
                _routed_rows(pack, [routed[m] for m in pack.members]),
            )
            for pack in packs
        ]

    def _unit(self, pack: Pack, cells: list[np.ndarray], routed: np.ndarray | None) -> Unit:
        """`cells`: the wanted ones, by member."""
        cells_M = np.concatenate(cells)
        rows_M = np.concatenate(
            [rows[self.positions[c]] for rows, c in zip(pack.rows, cells, strict=True)]
        )
        order = np.argsort(rows_M, kind="stable")
        cells_M = cells_M[order]
        rows_N, pair_rows_M = np.unique(rows_M[order], return_inverse=True)
        return Unit(
            pack,
            rows_N,
            pair_rows_M,
            cells_M,
            self.targets[cells_M],
            {name: values[cells_M] for name, values in self.inputs.items()},
            self.needed[cells_M],
            routed,
        )

    def add(self, unit: Unit, loss: float, logprobs_M: np.ndarray, load: RouterLoad | None) -> None:
        """Take in what a unit gave."""
        if load is not None:
            self.load = load if self.load is None else self.load + load
        self.loss_sum += loss
        self.rows += len(unit.pack.tokens)
        self.logprobs[unit.cells] = logprobs_M

    def output(self, metrics: Mapping[str, float]) -> ForwardBackwardOutput:
        """Per datum its logprobs, in its targets' shape; the batch's metrics besides `metrics`."""
        outputs = [
            {"logprobs": part.reshape(d.loss_fn_inputs["target_tokens"].shape)}
            for d, part in zip(self.datums, np.split(self.logprobs, self.starts[1:-1]), strict=True)
        ]
        ratios = {}
        if "logprobs" in self.loss.inputs:
            p = torch.from_numpy(self.logprobs)
            ratios = ratio_metrics(self.loss, p, self.inputs, self.config, self.needed)
        own = {
            "loss:sum": self.loss_sum,
            "tokens:sum": float(sum(d.model_input.length for d in self.datums)),
            "packed_rows:sum": float(self.rows),
        }
        load = {} if self.load is None else self.load.metrics()
        return ForwardBackwardOutput(outputs, {**own, **ratios, **load, **metrics})


def _keys(
    sequences: Sequence[np.ndarray], routed: Sequence[np.ndarray | None]
) -> list[np.ndarray] | None:
    """Numbers that are equal where tokens are, and the experts that they are to go through. None:
    tokens alone decide."""
    if all(experts is None for experts in routed):
        return None
    numbers: dict[tuple[int, bytes], int] = {}
    keys = []
    for tokens, experts in zip(sequences, routed, strict=True):
        choices = [b""] * len(tokens)
        if experts is not None:
            choices = [choice.tobytes() for choice in experts.astype(np.int16)]
        pairs = zip(tokens.tolist(), choices, strict=True)
        keys.append(np.array([numbers.setdefault(pair, len(numbers)) for pair in pairs], np.int64))
    return keys


def _routed_rows(pack: Pack, routed: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """`routed`: by member."""
    rows = None
    for places, experts in zip(pack.rows, routed, strict=True):
        if experts is not None:
            if rows is None:
                rows = np.full((len(pack.tokens), *experts.shape[1:]), -1, np.int64)
            rows[places] = experts
    return rows
