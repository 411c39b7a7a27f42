"""The learner's engine: forward, backward and optimizer steps of the LoRA runs of one base model.

A batch is packed into forests (`packing.py`), each pass goes through the frozen base once, and
only the rows whose logprob is wanted meet the unembedding. Gradients are added to the run's flat
buffer once the whole batch has gone through and is finite, so a bad batch leaves it unchanged.

A position may have several targets. What belongs to one target is a cell; a datum's cells are its
`target_tokens` flattened, K of them per position.

Dimension names: T packed rows, N rows with a target, M (row, target) pairs, C cells of a datum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..algorithms.losses import Loss, get_loss, ratio_metrics
from ..primitives.errors import InvalidInput, NotFound
from ..primitives.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    OptimStepResponse,
)
from ..primitives.validation import validate_datums
from .backbone import Backbone
from .lora import UNEMBED, Adapter, AdapterLayout, Span
from .malloc import frugal
from .memory import PassShape
from .memory_budget import Budget
from .optimizer import AdamState, adam_step
from .packing import Pack, pack_sequences
from .target_logprobs import UnembedSpan, target_logprobs
from .tree_attention import TreeAttention


@dataclass(eq=False)
class Run:
    """A run's trainable state; `params`, `grad` and the moments are flat float32 `[layout.size]`."""

    config: LoraConfig
    layout: AdapterLayout
    params: Tensor
    grad: Tensor
    adam: AdamState
    version: int = 0


@dataclass(frozen=True, eq=False)
class _Batch:
    """A validated batch: per datum, its inputs `[C]` of the loss, which cells the loss needs
    (bool `[C]`), and the cells whose logprobs to compute (indices, ascending)."""

    datums: Sequence[Datum]
    loss: Loss
    config: dict[str, float]
    inputs: list[dict[str, Tensor]]
    needed: list[Tensor]
    wanted: list[np.ndarray]

    def targets(self, index: int) -> np.ndarray:
        """A datum's target tokens, int64 `[C]`."""
        targets = self.datums[index].loss_fn_inputs["target_tokens"]
        return targets.reshape(-1).astype(np.int64, copy=False)

    def positions(self, index: int) -> np.ndarray:
        """The positions of a datum's wanted cells."""
        targets = self.datums[index].loss_fn_inputs["target_tokens"]
        return self.wanted[index] // (targets.size // len(targets))


class LearnerEngine:
    """Not thread-safe: one call at a time.

    Args:
        backbone: the frozen base model.
        max_pack_tokens: rows of one pass; bounds the memory that activations take.
        memory_bytes: for runs and passes; None: most of what is free.
    """

    def __init__(
        self, backbone: Backbone, *, max_pack_tokens: int = 2048, memory_bytes: int | None = None
    ) -> None:
        self.backbone = backbone
        self.budget = Budget(backbone, memory_bytes)
        self.max_pack_tokens = max_pack_tokens
        self.runs: dict[str, Run] = {}

    # ---- runs ----

    def create_run(self, run_id: str, lora: LoraConfig) -> None:
        """
        Raises:
            OutOfCapacity: there is no memory for its state.
        """
        layout = self.backbone.layout(lora)
        self.budget.admit(layout, self._layouts())
        params = layout.initial().to(self.backbone.device)
        self.runs[run_id] = Run(
            lora, layout, params, torch.zeros_like(params), AdamState.zeros(params)
        )

    def drop_run(self, run_id: str) -> None:
        self.runs.pop(run_id, None)

    def _layouts(self) -> list[AdapterLayout]:
        return [run.layout for run in self.runs.values()]

    def _run(self, run_id: str) -> Run:
        if run_id not in self.runs:
            raise NotFound(f"run {run_id!r} is not in this learner's memory")
        return self.runs[run_id]

    def export(self, run_id: str) -> Tensor:
        """A copy of the run's flat parameters, on the CPU."""
        return self._run(run_id).params.detach().to("cpu", copy=True)

    def state(self, run_id: str, gradient: bool = False) -> dict[str, Tensor]:
        """Copies of everything that the run's next steps depend on, on the CPU; `gradient`: also
        what has been accumulated for the next step."""
        run = self._run(run_id)
        return {
            **({"grad": run.grad.to("cpu", copy=True)} if gradient else {}),
            "params": self.export(run_id),
            "exp_avg": run.adam.exp_avg.to("cpu", copy=True),
            "exp_avg_sq": run.adam.exp_avg_sq.to("cpu", copy=True),
            "step": torch.tensor(run.adam.step),
        }

    def load(
        self, run_id: str, params: Tensor, state: Mapping[str, Tensor] | None, version: int | None
    ) -> None:
        """Replace the run's parameters, and its optimizer by `state` (None: a fresh one).

        The accumulated gradient is dropped, unless `state` has one. `version=None` counts as a
        step, so that samplers take the loaded weights for new.
        """
        run = self._run(run_id)
        run.params.copy_(params)
        run.grad.zero_()
        run.adam = AdamState.zeros(run.params)
        if state is not None:
            run.adam.exp_avg.copy_(state["exp_avg"])
            run.adam.exp_avg_sq.copy_(state["exp_avg_sq"])
            run.adam.step = int(state["step"])
            if "grad" in state:
                run.grad.copy_(state["grad"])
        run.version = run.version + 1 if version is None else version

    # ---- operations ----

    def forward(
        self,
        run_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None = None,
        logprobs: str = "all",
    ) -> ForwardBackwardOutput:
        """Loss and logprobs, no gradient. Errors as `forward_backward`."""
        batch = self._batch(data, loss_fn, loss_fn_config, logprobs)
        return self._through(self._run(run_id), batch, None)

    def forward_backward(
        self,
        run_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None = None,
        logprobs: str = "all",
    ) -> ForwardBackwardOutput:
        """Add the gradient of the summed loss to the run's accumulated gradient.

        Raises:
            InvalidInput: a bad datum or config, or a gradient that is not finite; the
                accumulated gradient is unchanged.
            NotFound: no such loss or run.
            OutOfCapacity: a pass would not fit into memory, even with activation checkpointing;
                nothing was computed.
        """
        run = self._run(run_id)
        batch = self._batch(data, loss_fn, loss_fn_config, logprobs)
        grad = torch.zeros_like(run.grad)
        output = self._through(run, batch, grad)
        if not torch.isfinite(grad).all():
            raise InvalidInput(
                f"the gradient of {loss_fn!r} on this batch is not finite "
                f"(loss {output.metrics['loss:sum']:g}); the run's gradient is unchanged. "
                "Look for logprobs far from the policy's, or diverged weights"
            )
        run.grad += grad
        return output

    def optim_step(self, run_id: str, adam_params: AdamParams) -> OptimStepResponse:
        """One Adam step on the accumulated gradient, which is zero afterwards."""
        run = self._run(run_id)
        norm = adam_step(run.params, run.grad, run.adam, adam_params)
        run.grad.zero_()
        run.version += 1
        return OptimStepResponse(run.version, {"grad_norm": norm})

    # ---- inside a pass ----

    def _batch(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None,
        logprobs: str,
    ) -> _Batch:
        loss = get_loss(loss_fn)
        config = loss.fill_config(loss_fn_config)
        backbone = self.backbone
        validate_datums(
            data,
            loss.inputs,
            backbone.vocab_size,
            backbone.max_context,
            optional=tuple(loss.optional),
            multi_target=loss.multi_target,
        )
        inputs = [self._inputs(index, datum, loss, config) for index, datum in enumerate(data)]
        needed = [loss.needed(i, config) for i in inputs]
        wanted = [
            np.arange(len(n)) if logprobs == "all" else np.flatnonzero(n.cpu().numpy())
            for n in needed
        ]
        return _Batch(data, loss, config, inputs, needed, wanted)

    def _inputs(
        self, index: int, datum: Datum, loss: Loss, config: Mapping[str, float]
    ) -> dict[str, Tensor]:
        given = {
            name: torch.tensor(values.reshape(-1), dtype=torch.float32, device=self.backbone.device)
            for name, values in datum.loss_fn_inputs.items()
            if name != "target_tokens"
        }
        cells = datum.loss_fn_inputs["target_tokens"].size
        owner = torch.full((cells,), index, device=self.backbone.device)
        return {**loss.fill_inputs(given, config), "datum": owner}

    def _through(self, run: Run, batch: _Batch, grad: Tensor | None) -> ForwardBackwardOutput:
        """Pass by pass; adds the gradient to `grad` (flat) if given."""
        logprobs = [np.full(len(needed), np.nan, np.float32) for needed in batch.needed]
        used = [i for i, wanted in enumerate(batch.wanted) if len(wanted)]
        # Tokens after the last wanted one change nothing.
        sequences = [
            batch.datums[i].model_input.tokens[: int(batch.positions(i)[-1]) + 1] for i in used
        ]
        total, rows = 0.0, 0
        if used:
            packs = pack_sequences(sequences, self.max_pack_tokens)
            members_of = [[used[m] for m in pack.members] for pack in packs]
            # All are looked at before the first one runs.
            chosen = self.budget.checkpointing(
                [
                    (self._shape(batch, pack, members), [run.layout])
                    for pack, members in zip(packs, members_of, strict=True)
                ],
                self._layouts(),
                gradient=grad is not None,
            )
            for pack, members, checkpointing in zip(packs, members_of, chosen, strict=True):
                with frugal(checkpointing):
                    total += self._pass(run, batch, pack, members, logprobs, grad, checkpointing)
                rows += len(pack.tokens)
        outputs = [
            {"logprobs": p.reshape(d.loss_fn_inputs["target_tokens"].shape)}
            for d, p in zip(batch.datums, logprobs, strict=True)
        ]
        metrics = {
            "loss:sum": total,
            "tokens:sum": float(sum(d.model_input.length for d in batch.datums)),
            "packed_rows:sum": float(rows),
            **self._ratio_metrics(batch, logprobs),
        }
        return ForwardBackwardOutput(outputs, metrics)

    @staticmethod
    def _shape(batch: _Batch, pack: Pack, members: list[int]) -> PassShape:
        rows = [pack.rows[k][batch.positions(i)] for k, i in enumerate(members)]
        return PassShape(pack.segments, pack.paths, len(np.unique(np.concatenate(rows))))

    def _pass(
        self,
        run: Run,
        batch: _Batch,
        pack: Pack,
        members: list[int],
        logprobs: list[np.ndarray],
        grad: Tensor | None,
        checkpointing: bool,
    ) -> float:
        """One pack forward (and backward); returns its loss and fills in its `logprobs`."""
        device = self.backbone.device
        pairs = [(pack.rows[k][batch.positions(i)], i) for k, i in enumerate(members)]
        rows_M = np.concatenate([rows for rows, _ in pairs])
        targets_M = np.concatenate([batch.targets(i)[batch.wanted[i]] for i in members])
        order = np.argsort(rows_M, kind="stable")
        rows_N, pair_rows_M = np.unique(rows_M[order], return_inverse=True)
        leaves = {
            name: (a.detach().requires_grad_(), b.detach().requires_grad_())
            for name, (a, b) in run.layout.views(run.params).items()
        }
        with torch.set_grad_enabled(grad is not None):
            hidden_TD = self.backbone.hidden(
                torch.from_numpy(pack.tokens).to(device),
                torch.from_numpy(pack.positions).to(device),
                TreeAttention(
                    pack.segments,
                    pack.paths,
                    self.backbone.num_heads // self.backbone.num_kv_heads,
                    device,
                ),
                [Span(0, len(pack.tokens), Adapter(run.layout, leaves))],
                checkpointing=checkpointing,
            )
            spans = []
            if UNEMBED in leaves:
                spans = [UnembedSpan(0, len(rows_N), run.layout.scale, *leaves[UNEMBED])]
            sorted_M = target_logprobs(
                hidden_TD[torch.from_numpy(rows_N).to(device)],
                torch.from_numpy(pair_rows_M).to(device),
                torch.from_numpy(targets_M[order]).to(device),
                self.backbone.unembedding,
                spans,
            )
            # Back to the order of the members.
            p_M = sorted_M[torch.from_numpy(np.argsort(order)).to(device)]
            inputs_M = {
                name: torch.cat([batch.inputs[i][name][batch.wanted[i]] for i in members])
                for name in batch.inputs[members[0]]
            }
            needed_M = torch.cat([batch.needed[i][batch.wanted[i]] for i in members])
            per_token_M = batch.loss.function(p_M, inputs_M, batch.config)
            loss = torch.where(needed_M, per_token_M, 0.0).sum()
            if grad is not None and bool(needed_M.any()):
                self._add_gradient(run, loss, leaves, grad)
        values, start = p_M.detach().cpu().numpy(), 0
        for rows, i in pairs:
            logprobs[i][batch.wanted[i]] = values[start : start + len(rows)]
            start += len(rows)
        return float(loss.detach())

    @staticmethod
    def _add_gradient(
        run: Run, loss: Tensor, leaves: dict[str, tuple[Tensor, Tensor]], grad: Tensor
    ) -> None:
        flat_leaves = [leaf for pair in leaves.values() for leaf in pair]
        parts = torch.autograd.grad(loss, flat_leaves)
        views = [view for pair in run.layout.views(grad).values() for view in pair]
        torch._foreach_add_(views, list(parts))

    @staticmethod
    def _ratio_metrics(batch: _Batch, logprobs: list[np.ndarray]) -> dict[str, float]:
        if "logprobs" not in batch.loss.inputs:
            return {}
        p = torch.from_numpy(np.concatenate(logprobs))
        inputs = {
            name: torch.cat([i[name] for i in batch.inputs]).cpu() for name in batch.inputs[0]
        }
        needed = torch.cat(batch.needed).cpu()
        return ratio_metrics(batch.loss, p, inputs, batch.config, needed)
