"""LoRA on vLLM's CPU backend, by groups of rows.

vLLM gathers each row's A and B out of the stacked adapters, a copy of whole matrices per token, and
takes index -1, which means no adapter, for the last slot. Here rows of one adapter are multiplied
together and rows of none are left out. The functions have the names, arguments and effects of those
in `vllm.lora.ops.torch_ops.lora_ops`, whose place they take.

Dimension names: T rows, R rank, I and O a layer's inputs and outputs, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def use_grouped_lora() -> None:
    """In this process, from now on."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for function in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
        for module in (lora_ops, punica_cpu):
            setattr(module, function.__name__, function)


def bgmv_shrink(
    inputs: Tensor,
    lora_a_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    scaling: float = 1.0,
) -> None:
    """`output[T, R] = scaling * inputs[T, I] A'`, A of `[S, 1, R, I]`; 0 for rows of none."""
    output_tensor.zero_()
    for rows, slot in _groups(lora_indices_tensor):
        a_RI = lora_a_weights[slot, 0].to(output_tensor.dtype)
        product = inputs[rows].to(output_tensor.dtype) @ a_RI.T
        output_tensor[rows, : len(a_RI)] = product.mul_(scaling)


def bgmv_expand(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    add_inputs: bool = True,
) -> None:
    """`output[T, O] += inputs[T, R] B'`, B of `[S, 1, O, R]`; without `add_inputs`, `=`."""
    width = min(lora_b_weights.shape[-2], output_tensor.shape[1])
    _expand(inputs, lora_b_weights, output_tensor, lora_indices_tensor, slice(0, width), add_inputs)


def bgmv_expand_slice(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """As `bgmv_expand`, into columns of the output."""
    columns = slice(slice_offset, slice_offset + slice_size)
    _expand(inputs, lora_b_weights, output_tensor, lora_indices_tensor, columns, add_inputs)


def _expand(
    inputs: Tensor,
    b_S1OR: Tensor,
    output: Tensor,
    indices_T: Tensor,
    columns: slice,
    add_inputs: bool,
) -> None:
    if not add_inputs:
        output[:, columns] = 0
    width = columns.stop - columns.start
    for rows, slot in _groups(indices_T):
        b_OR = b_S1OR[slot, 0, :width].to(output.dtype)
        output[rows, columns] += inputs[rows].to(output.dtype) @ b_OR.T


def _groups(indices_T: Tensor) -> Iterator[tuple[slice | Tensor, int]]:
    """The rows of each slot in use."""
    slots = indices_T.unique().tolist()
    for slot in slots:
        if slot >= 0:
            whole = len(slots) == 1
            yield (slice(len(indices_T)) if whole else (indices_T == slot).nonzero()[:, 0]), slot
