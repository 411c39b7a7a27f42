"""What runs inside vLLM's worker processes: adapters come from memory, logprobs at temperature.

vLLM mixes `AdapterWorker` into its worker class (`worker_extension_cls`) and calls its methods by
`collective_rpc`. This is the one place that touches vLLM's insides: its LoRA manager's loading and
its sampler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora import lora_model
from vllm.lora.layers import FusedMoE3DWithLoRA, LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.platforms import current_platform

from .shared_memory import open_shared
from .vllm_cpu_lora import use_grouped_lora

MAPPER = "hf_to_vllm_mapper"


@dataclass(frozen=True)
class Staged:
    """An adapter as it came: its PEFT config and float32 tensors, unscaled. They lie in memory that
    the engine's process shares and fills anew once the adapter is dropped."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


class AdapterWorker:
    """Methods for vLLM's worker; `model_runner` and the rest of `self` are the worker's."""

    model_runner: Any
    kinds: dict[str, tuple[dict[str, Any], dict[str, tuple[int, int, int]]]]
    staged: dict[str, Staged]
    names: dict[int, str]
    _load_folder: Any
    _score_prompts: Any

    def prepare_adapters(self) -> None:
        """Once, before the first adapter or request: load from what is staged, and temper logprobs."""
        self.kinds, self.staged, self.names = {}, {}, {}
        remember_tensor_names()
        self._load_folder = self.model_runner.lora_manager._load_adapter
        self.model_runner.lora_manager._load_adapter = self._load
        self.model_runner.sampler = TemperedSampler(self.model_runner.sampler)
        if current_platform.is_cpu():
            use_grouped_lora()
            keep_seeds_of_parts(self.model_runner)
        self._score_prompts = self.model_runner._get_prompt_logprobs_dict
        self.model_runner._get_prompt_logprobs_dict = self._score_prompts_under_adapters

    def unserved_modules(self, names: list[str]) -> list[str]:
        """Those of an adapter's modules, by their names in the model's own code, that vLLM has not
        wrapped here: it would pass over what is loaded for them in silence."""
        manager = self.model_runner.lora_manager._adapter_manager
        wrapped = {*manager.modules, *chain.from_iterable(manager.packed_modules.values())}
        wrapped |= {  # the experts' gate and up projection
            f"{name}.base_layer"
            for name, module in manager.modules.items()
            if isinstance(module, FusedMoE3DWithLoRA)
        }
        skipped = getattr(manager.model, "lora_skip_prefixes", None) or []
        unserved = []
        for name in names:
            tensor = f"base_model.model.{name}.lora_A.weight"
            in_vllm, _ = parse_fine_tuned_lora_name(tensor, self._renaming())
            if in_vllm not in wrapped or LoRAModel._should_skip_module(tensor, skipped):
                unserved.append(name)
        return unserved

    def _renaming(self) -> Any:
        """From the names of the model's own code to vLLM's; None: they are the same."""
        mapper = getattr(self.model_runner.lora_manager._adapter_manager.model, MAPPER, None)
        return None if mapper is None else mapper.get_rename_mapper()

    def describe_adapters(
        self, kind: str, config: dict[str, Any], places: dict[str, tuple[int, int, int]]
    ) -> None:
        """What adapters of a kind have in common: their PEFT config, and where each tensor starts
        among the parameters, with its rows and columns."""
        self.kinds[kind] = config, places

    def stage_adapter(self, name: str, kind: str, path: str) -> None:
        """Keep an adapter of a kind, whose parameters are in the shared memory at `path`."""
        config, places = self.kinds[kind]
        params = torch.frombuffer(open_shared(path), dtype=torch.float32)
        tensors = {
            tensor: params[start : start + rows * columns].view(rows, columns)
            for tensor, (start, rows, columns) in places.items()
        }
        self.staged[name] = Staged(config, tensors)

    def point_adapter(self, number: int, name: str) -> None:
        """Requests that carry this integer id run under that adapter from the next step on."""
        self.names[number] = name
        manager = self.model_runner.lora_manager
        if number not in manager.list_adapters():
            return  # loaded when a request asks for it
        manager._adapter_manager._last_mapping = None
        if number in manager._adapter_manager._active_adapters:
            manager.add_adapter(LoRARequest(name, number, "memory", load_inplace=True))
        else:
            manager.remove_adapter(number)

    def drop_adapters(self, names: list[str], numbers: list[int]) -> None:
        for number in numbers:
            self.names.pop(number, None)
            self.model_runner.lora_manager.remove_adapter(number)
        for name in names:
            self.staged.pop(name, None)

    def _load(self, request: Any) -> LoRAModel:
        """In place of vLLM's reading of a folder, which is left to ids that are not ours: a
        benchmark loads by path beside us."""
        if request.lora_int_id not in self.names:
            return self._load_folder(request)
        staged = self.staged[self.names[request.lora_int_id]]
        manager = self.model_runner.lora_manager
        model = manager._adapter_manager.model
        helper = PEFTHelper.from_dict(staged.config)
        helper.validate_legal(manager.lora_config)
        dtype, tensors = manager.lora_config.lora_dtype, staged.tensors
        if dtype == torch.float32 and helper.vllm_lora_scaling_factor != 1:
            # vLLM multiplies B by the scale in place, and may load what is staged again.
            tensors = {n: t.clone() if ".lora_B." in n else t for n, t in tensors.items()}
        return LoRAModel.from_lora_tensors(
            request.lora_int_id,
            tensors,
            helper,
            device="cpu",
            dtype=dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=self._renaming(),
            skip_prefixes=getattr(model, "lora_skip_prefixes", None),
        )

    def _score_prompts_under_adapters(self, hidden_TD: Tensor, scheduled: Any) -> Any:
        """vLLM computes a prompt's logits with its output layer adapted as for the rows that are
        sampled: wrong, or of another number. Here each row is under the adapter of its request."""
        runner, manager = self.model_runner, self.model_runner.lora_manager._adapter_manager
        last = manager._last_mapping
        if last is None or not runner.num_prompt_logprobs:
            return self._score_prompts(hidden_TD, scheduled)
        compute = runner.model.compute_logits

        def compute_logits(rows_ND: Tensor) -> Tensor:
            offset = rows_ND.storage_offset() - hidden_TD.storage_offset()
            first = offset // hidden_TD.stride(0)
            numbers = tuple(last.index_mapping[first : first + len(rows_ND)])
            manager.set_adapter_mapping(LoRAMapping(numbers, numbers, is_prefill=True))
            return compute(rows_ND)

        runner.model.compute_logits = compute_logits
        try:
            return self._score_prompts(hidden_TD, scheduled)
        finally:
            del runner.model.compute_logits
            manager.set_adapter_mapping(last)


def remember_tensor_names() -> None:
    """vLLM takes the names of an adapter's tensors apart at every load, a sixth of the time that an
    exchange takes. The model is always the same here, and so is what a name means in it."""
    parse, known = lora_model.parse_fine_tuned_lora_name, {}

    def remembered(name: str, mapper: Any = None) -> tuple[str, bool]:
        key = name, mapper is None
        if key not in known:
            known[key] = parse(name, mapper)
        return known[key]

    lora_model.parse_fine_tuned_lora_name = remembered  # type: ignore[assignment]


class TemperedSampler(nn.Module):
    """vLLM's sampler, whose raw logprobs are of the distribution at the request's temperature, as
    the torch engine's are (at temperature 1 for greedy requests)."""

    def __init__(self, sampler: nn.Module) -> None:
        super().__init__()
        self.sampler = sampler

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.sampler, name)

    def forward(self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        temperature = sampling_metadata.temperature
        if temperature is not None:
            greedy = temperature < 1e-5
            logits = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
            ones = torch.where(greedy, temperature, 1.0)
            sampling_metadata = replace(sampling_metadata, temperature=ones)
        return self.sampler(logits, sampling_metadata, *args, **kwargs)


def keep_seeds_of_parts(runner: Any) -> None:
    """On a CPU, from now on: a seeded request whose prompt is computed in parts draws as if it were
    not. vLLM draws a token after each part, throws it away and turns the seed's generator back; a
    CPU's can't be, which ends the engine. So it is not used for such a draw."""
    sample, finish = runner.sampler.sampler.forward, runner._bookkeeping_sync

    def forward(logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        thrown_away = runner.discard_request_mask.np
        seeded = sampling_metadata.generators
        generators = {row: g for row, g in seeded.items() if not thrown_away[row]}
        return sample(logits, replace(sampling_metadata, generators=generators), *args, **kwargs)

    def without_turning_back(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        generators, batch.generators = batch.generators, {}
        try:
            return finish(*args, **kwargs)
        finally:
            batch.generators = generators

    runner.sampler.sampler.forward, runner._bookkeeping_sync = forward, without_turning_back
