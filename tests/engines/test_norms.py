"""Our norm against transformers' own, forward and backward."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tinsmith.engines.norms import RmsNorm, is_rms_norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 7, 48), (1, 5, 3, 16)])
def test_norms_equal_transformers(shape, dtype, tolerance):
    """Relative to the largest; rows of very different sizes."""
    rng = torch.Generator().manual_seed(0)
    theirs = LlamaRMSNorm(shape[-1], 1e-5).to(dtype).requires_grad_(False)
    theirs.weight.uniform_(-2, 2, generator=rng)
    ours = RmsNorm(theirs)
    scale = 10.0 ** torch.randint(-3, 3, shape[:-1], generator=rng)
    x, dy = (torch.randn(shape, generator=rng) for _ in range(2))
    x = (x * scale[..., None]).to(dtype)
    results = []
    for norm in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(dy.to(dtype))
        with torch.inference_mode():
            results.append((y.detach(), leaf.grad * scale[..., None], norm(x)))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        atol = tolerance * float(one.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def test_only_such_norms_are_recognised():
    assert is_rms_norm(LlamaRMSNorm(8))
    assert not is_rms_norm(torch.nn.LayerNorm(8))
    assert not is_rms_norm(RmsNorm(LlamaRMSNorm(8)))
