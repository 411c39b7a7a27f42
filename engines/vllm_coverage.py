"""Which of a model's layers vLLM can adapt, and why not the others, before it is started.

What is asked: the names of the layers that our LoRA may train, the model's `config.json`, and the
installed vLLM's source files (`vllm_source.py`). What only vLLM's workers know, they say when an
adapter comes (`vllm_worker.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..primitives.errors import InvalidInput
from ..primitives.types import LoraConfig
from . import vllm_source
from .backbone import targets_of_folder
from .lora import ATTN_TARGETS, ROUTER_TARGETS, UNEMBED, AdapterLayout, Shape
from .vllm_start import VllmOptions

ATTN, MLP, EXPERTS, ROUTER = "attn", "mlp", "experts", "router"
LAYERS = {
    ATTN: "attention layers",
    MLP: "MLP layers",
    EXPERTS: "routed experts",
    ROUTER: "routers",
    UNEMBED: "output layer (unembed)",
}
WITHOUT = {
    ATTN: "train_attn=False",
    MLP: "train_mlp=False",
    EXPERTS: "train_mlp=False",
    ROUTER: "train_router=False",
    UNEMBED: "train_unembed=False",
}
INSTEAD = "connect with engine='torch'"
# vLLM's arguments by which a model is chosen that its `config.json` does not name.
CHOOSING = ("hf_overrides", "hf_config_path", "model_impl", "model_class_overrides")
ALL_TO_ALL = "allgather_reducescatter"


@dataclass(frozen=True)
class Coverage:
    """What vLLM, started with `options`, can adapt of a model.

    Attributes:
        targets: what an adapter may train, by name.
        model: why vLLM cannot run this model with adapters at all, if so.
        groups: why it cannot adapt a group of layers, by group.
    """

    options: VllmOptions
    targets: Mapping[str, Shape]
    model: str | None
    groups: Mapping[str, str]

    @classmethod
    def of(cls, path: str | Path, options: VllmOptions) -> Coverage:
        """Of a model folder; its weights are not read."""
        config, targets = transformers.AutoConfig.from_pretrained(path), targets_of_folder(path)
        groups = {_group(name) for name in targets}
        reasons = {group: _why_not(group, config, options) for group in groups}
        return cls(
            options,
            targets,
            _why_not_at_all(config, options, EXPERTS in groups),
            {group: reason for group, reason in reasons.items() if reason},
        )

    def check_model(self) -> None:
        """
        Raises:
            InvalidInput: vLLM could not run the model with adapters.
        """
        if self.model is not None:
            raise InvalidInput(f"vLLM cannot sample from this model: {self.model}; {INSTEAD}")

    def check(self, lora: LoraConfig) -> None:
        """
        Raises:
            InvalidInput: vLLM, started so, could not serve such a run.
        """
        self.check_model()
        self.options.check(lora)
        trained = {_group(name) for name in AdapterLayout.of(lora, self.targets).targets}
        for group in LAYERS:
            if group in trained and group in self.groups:
                raise InvalidInput(
                    f"vLLM cannot adapt the {LAYERS[group]} that this run trains: "
                    f"{self.groups[group]}; create it with {WITHOUT[group]}, or {INSTEAD}"
                )

    def refuse(self, names: Iterable[str]) -> None:
        """
        Raises:
            InvalidInput: `names` holds layers, those that vLLM's workers do not adapt.
        """
        first = min(names, default=None)
        if first is not None:
            group = _group(first)
            raise InvalidInput(
                f"vLLM adapts no layer {first} in this model, which this run trains; create it "
                f"with {WITHOUT[group]}, or {INSTEAD}"
            )

    def modules(self) -> list[str]:
        """vLLM's `lora_target_modules`: what it is to wrap. Told nothing, it leaves the output
        layer out in some families and fails to start over one that is too large."""
        return sorted({_module(name) for name in self.targets if _group(name) not in self.groups})


def _group(name: str) -> str:
    if "experts" in name.split("."):
        return EXPERTS
    last = name.rpartition(".")[2]
    if last in ROUTER_TARGETS:
        return ROUTER
    return UNEMBED if last == UNEMBED else ATTN if last in ATTN_TARGETS else MLP


def _module(name: str) -> str:
    """What vLLM calls the module of a layer: all experts of a block are one."""
    return EXPERTS if _group(name) == EXPERTS else name.rpartition(".")[2]


def _why_not_at_all(config: Any, options: VllmOptions, experts: bool) -> str | None:
    names = config.architectures or []
    if names and not any(key in options.more for key in CHOOSING):
        known = [name for name in names if vllm_source.runs(name) is not False]
        if not known:
            return f"it has no model for the architecture {names[0]}"
        if vllm_source.adapts(known[0]) is False:
            return f"its model for the architecture {known[0]} takes no LoRA adapters"
    if torch.cuda.is_available():
        return None
    if experts:
        return "on a CPU it runs no mixture of experts that takes LoRA adapters"
    heads, size = vllm_source.cpu_head_sizes(), _head_size(config)
    if heads is not None and size not in heads:
        return f"on a CPU it has no attention for heads of {size}, only of " + ", ".join(
            map(str, heads)
        )
    return None


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _why_not(group: str, config: Any, options: VllmOptions) -> str | None:
    more, limit = options.more, vllm_source.vocabulary_limit()
    if group == UNEMBED and limit is not None and config.vocab_size > limit:
        return f"the vocabulary of {config.vocab_size} is above its limit of {limit} for that"
    if group == EXPERTS and more.get("enable_expert_parallel"):
        if more.get("fully_sharded_loras"):
            return "it cannot with enable_expert_parallel and fully_sharded_loras at once"
        if more.get("all2all_backend", ALL_TO_ALL) != ALL_TO_ALL:
            return f"with enable_expert_parallel it can only with all2all_backend={ALL_TO_ALL!r}"
    return None
