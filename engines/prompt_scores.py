"""What a request asks about its prompt, filled in while the prompt goes through the model.

Everything here is about the distribution of a prompt token given those before it, at temperature
1; only the alternatives are drawn at the request's temperature.

Dimension names: P prompt tokens, K ids per token, N rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..primitives.types import SampleRequest, TokenLogprobs
from .sampling import draw, uniforms

_FIRST_STREAM = 1 << 32  # sample indices, whose draws these must not repeat, stay below it


class PromptScores:
    """The scores of one request.

    Attributes:
        first: the first prompt token that must be scored; P if none need be.
        tail: the first one of those whose own logprob and likeliest tokens are asked for.
        logprobs, top, targets, alternatives: as `SampleResponse` has them.
    """

    def __init__(self, request: SampleRequest, seed: int) -> None:
        self.request, self.seed = request, seed
        length, last_n = len(request.prompt), request.prompt_logprobs_last_n
        self.tail = 1 if last_n is None else length - last_n
        self.logprobs: np.ndarray | None = None
        self.top: TokenLogprobs | None = None
        self.targets: np.ndarray | None = None
        self.alternatives: TokenLogprobs | None = None
        starts = [length]
        if request.prompt_logprobs:
            starts.append(self.tail)
            self.logprobs = np.full(length, np.nan, np.float32)
        if request.topk_prompt_logprobs:
            starts.append(self.tail)
            self.top = TokenLogprobs.empty(length, request.topk_prompt_logprobs)
        if request.target_prompt_logprobs is not None:
            starts.append(int((request.target_prompt_logprobs >= 0).any(1).argmax()) + 1)
            self.targets = np.zeros(request.target_prompt_logprobs.shape, np.float32)
        if request.prompt_alt_tokens_k:
            starts.append(1)
            self.alternatives = TokenLogprobs.empty(length - 1, request.prompt_alt_tokens_k)
        self.first = min(starts)

    def add(self, first: int, logits_NV: Tensor) -> None:
        """Score prompt tokens `first`, `first + 1`, ... by the logits that predict each."""
        logits_NV = logits_NV.float()
        logprobs_NV = logits_NV.log_softmax(-1)
        stop = first + len(logits_NV)
        tail = max(first, self.tail)
        if tail < stop:
            self._add_tail(slice(tail, stop), logprobs_NV[tail - first :])
        rows = slice(first - 1, stop - 1)
        if self.targets is not None:
            ids = self.request.target_prompt_logprobs
            assert ids is not None
            chosen = _gather(logprobs_NV, np.maximum(ids[rows], 0))
            self.targets[rows] = np.where(ids[rows] >= 0, chosen, 0.0)
        if self.alternatives is not None:
            tokens = self._draw(first, logits_NV)
            self.alternatives.tokens[rows] = tokens
            self.alternatives.logprobs[rows] = _gather(logprobs_NV, tokens)

    def _add_tail(self, here: slice, logprobs_NV: Tensor) -> None:
        if self.logprobs is not None:
            self.logprobs[here] = _gather(logprobs_NV, self.request.prompt[here, None])[:, 0]
        if self.top is not None:
            values, ids = logprobs_NV.topk(self.top.tokens.shape[1])
            self.top.tokens[here] = ids.cpu().numpy()
            self.top.logprobs[here] = values.cpu().numpy()

    def _draw(self, first: int, logits_NV: Tensor) -> np.ndarray:
        """Independent draws, int64 `[N, K]`."""
        count = len(logits_NV)
        positions = np.arange(first, first + count, dtype=np.uint64)
        columns = []
        for k in range(self.request.prompt_alt_tokens_k):
            numbers = uniforms(
                np.full(count, self.seed, np.uint64),
                np.full(count, _FIRST_STREAM + k, np.uint64),
                positions,
            )
            tokens, _ = draw(
                logits_NV.clone(),
                np.full(count, self.request.params.temperature),
                np.full(count, -1),
                np.ones(count),
                numbers,
            )
            columns.append(tokens.cpu().numpy())
        return np.stack(columns, 1)


def _gather(logprobs_NV: Tensor, tokens_NK: np.ndarray) -> np.ndarray:
    index = torch.from_numpy(tokens_NK).to(logprobs_NV.device)
    return logprobs_NV.gather(1, index).cpu().numpy()
