"""How a model would be laid out over devices, and what each of them would hold: counted from its config, with
nothing loaded.

Counted is the fullest rank: rank 0, which also holds the runs' gradients and optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from ..primitives.errors import InvalidInput
from ..primitives.types import ExpertAdapters, LoraConfig
from .backbone import DTYPES, adapter_targets
from .layout import Layout
from .lora import AdapterLayout, Shape
from .memory import FLOAT, GATHERED_LAYERS, MemoryModel, PassShape

PASS_ROWS = 2048
USABLE = 0.9  # of a device's memory; the rest is the driver's, and holes between tensors
NODE = 8  # devices of a machine, beyond which products are not cut
MOST = 1024  # devices that are looked for where those given do not do


@dataclass(frozen=True)
class ModelSizes:
    """Numbers in a model: of a decoder layer those that tensor ranks share out, those that each of them has,
    and those of its routed experts; and all that is outside of the layers. `targets`: what an adapter may
    train."""

    layers: int
    cut: int
    whole: int
    experts: int
    outside: int
    targets: dict[str, Shape]

    @classmethod
    def of(cls, config: Any) -> ModelSizes:
        with init_empty_weights():
            model: Any = AutoModelForCausalLM.from_config(config)
        plan = getattr(config, "base_model_tp_plan", None) or {}
        projections = {name.rpartition(".")[2] for name in plan if name.endswith("_proj")}
        counts = dict.fromkeys(("cut", "whole", "experts", "outside"), 0)
        named = dict(model.named_parameters())
        if config.tie_word_embeddings:
            named.pop("lm_head.weight", None)
        for name, parameter in named.items():
            if ".layers." not in name:
                kind = "outside"
            elif ".experts." in name:
                kind = "experts"
            else:
                kind = "cut" if name.split(".")[-2] in projections else "whole"
            counts[kind] += parameter.numel()
        layers = config.num_hidden_layers
        of_layer = {k: counts[k] // layers for k in ("cut", "whole", "experts")}
        targets = adapter_targets(model)
        return cls(layers, outside=counts["outside"], targets=targets, **of_layer)

    @property
    def total(self) -> int:
        return self.outside + self.layers * (self.cut + self.whole + self.experts)

    def held(self, layout: Layout) -> int:
        """Of which a rank keeps."""
        experts = self.experts // (layout.tensor * layout.expert)
        layer = self.cut // layout.tensor + self.whole
        if layout.expert == 1:
            layer, experts = layer + experts, 0
        return self.outside + self.layers * (-(-layer // layout.shard) + experts)

    def gathered(self, layout: Layout) -> int:
        """Of which a rank gathers at once, beyond what it keeps."""
        if layout.shard == 1:
            return 0
        experts = self.experts // layout.tensor if layout.expert == 1 else 0
        return GATHERED_LAYERS * (self.cut // layout.tensor + self.whole + experts)


@dataclass(frozen=True)
class Demand:
    """What is to be trained.

    Attributes:
        rank: of one run's adapter, on attention and MLP.
        context: tokens of the longest sequence.
        weights: what the base is kept and computed in, "fp32" or "bf16".
        experts: whether every routed expert has its own A and B, or a layer's share them.
    """

    rank: int = 32
    context: int = PASS_ROWS
    weights: str = "bf16"
    experts: ExpertAdapters = "each"


@dataclass(frozen=True)
class Estimate:
    """Bytes on the fullest rank.

    Attributes:
        weights: its share of the base.
        gathered: layers of other ranks, while they are computed.
        adapters: one run's parameters, gradient and Adam's moments.
        activations: of a pass at its peak, `logits` (a chunk of them) among them.
        checkpointing: whether only layers' inputs are kept of a pass.
        memory: of a device.
    """

    layout: Layout
    weights: int
    gathered: int
    adapters: int
    activations: int
    logits: int
    checkpointing: bool
    memory: int

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.adapters + self.activations

    @property
    def fits(self) -> bool:
        return self.total <= USABLE * self.memory

    def __str__(self) -> str:
        parts = (self.weights, self.gathered, self.adapters, self.activations)
        names = ("weights", "gathered layers", "a run's adapter and optimizer", "a pass")
        told = ", ".join(f"{p / 1e9:.2f} GB {n}" for p, n in zip(parts, names, strict=True) if p)
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"layout {self.layout}: {told}; {self.total / 1e9:.2f} GB on the fullest rank, {verdict} "
            f"in {self.memory / 1e9:.2f} GB"
        )


class Planner:
    """For a model of that transformers `config`.

    Args:
        memory: bytes of a device.
    """

    def __init__(self, config: Any, demand: Demand, memory: int) -> None:
        self.config, self.demand, self.memory = config, demand, memory
        self.sizes = ModelSizes.of(config)
        self.item = DTYPES[demand.weights].itemsize  # type: ignore[index]
        lora = LoraConfig(rank=demand.rank, train_unembed=False, experts=demand.experts)
        self.adapter = AdapterLayout.of(lora, self.sizes.targets)
        self.num_experts: int = getattr(config, "num_experts", None) or 0

    def estimate(self, layout: Layout) -> Estimate:
        """
        Raises:
            InvalidInput: the model cannot be laid out so.
        """
        layout.check(self.config)
        device = "cuda" if self.demand.weights == "bf16" else "cpu"
        ranks = (layout.tensor, layout.context, layout.expert)
        model = MemoryModel(self.config, self.item, 0, *ranks, device)
        rows = max(PASS_ROWS, self.demand.context)
        shape, adapters = PassShape([rows], [()], rows), [self.adapter]
        fixed = (
            self.item * self.sizes.held(layout),
            self.item * self.sizes.gathered(layout),
            4 * FLOAT * self.adapter.size,
        )

        def of(checkpointing: bool) -> Estimate:
            activations = model.pass_(shape, adapters, checkpointing=checkpointing)
            logits = model.logits(shape, adapters)
            return Estimate(layout, *fixed, activations, logits, checkpointing, self.memory)

        whole = of(False)
        return whole if whole.fits else of(True)

    def choose(self, devices: int) -> Estimate:
        """The first layout that fits: copies of the whole model; else, layers cut over as few ranks as it
        takes; else products too, within a machine; else the rows of a pass too. If none fits, the one that
        needs least."""
        estimates = []
        for layout in self._layouts(devices):
            estimate = self.estimate(layout)
            if estimate.fits:
                return estimate
            estimates.append(estimate)
        return min(estimates, key=lambda estimate: estimate.total)

    def enough(self, devices: int) -> Estimate | None:
        """What fits with the fewest devices beyond `devices`, doubled as often as it takes; None if
        nothing does."""
        while devices < MOST:
            devices *= 2
            estimate = self.choose(devices)
            if estimate.fits:
                return estimate
        return None

    def remedy(self, devices: int) -> str:
        """What would do where that many devices do not."""
        ways, enough = [], self.enough(devices)
        if enough is not None:
            ways.append(f"{enough.layout.world} do, as {enough.layout}")
        if self.num_experts and self.demand.experts == "each":
            shared = Planner(self.config, replace(self.demand, experts="shared"), self.memory)
            now = shared.choose(devices)
            then = now if now.fits else shared.enough(devices)
            if then is not None and (now.fits or not ways):
                ways.append(
                    f"{then.layout.world} with adapters that a layer's experts share, as {then.layout}"
                )
        return "; ".join(ways) or "nor do more: take a lower rank, or shorter sequences"

    def _layouts(self, devices: int) -> Iterator[Layout]:
        degrees = [degree for degree in range(1, devices + 1) if devices % degree == 0]
        tensors = [degree for degree in degrees if degree <= NODE]
        for context, tensor, shard in product(degrees, tensors, degrees):
            if devices % (context * tensor * shard):
                continue
            data = devices // (context * tensor * shard)
            spread = shard if self.num_experts and self.num_experts % shard == 0 else 1
            layout = Layout(data, shard, tensor, spread, context)
            try:
                layout.check(self.config)
            except InvalidInput:
                continue
            yield layout
