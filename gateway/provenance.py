"""What `stable_reinforce` needs to know of the sampled tokens, recorded when they were sampled.

A datum names, for every position, the sequence that it came from; the sampler's own logprobs then
come from the record, not from the client. Records belong to a session and live for a day after
their last use.

Dimension names: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..primitives import codec
from ..primitives.errors import InvalidInput
from ..primitives.types import Datum, SampleResponse
from .store import Store
from .wire import Span, TrainingRequest


@dataclass(frozen=True, eq=False)
class SampledRecord:
    """`prompt` int64 `[P]`; `tokens` int64, `logprobs` float32 and `versions` int32 `[T]`."""

    prompt: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray


async def record(
    store: Store,
    session_id: str,
    names: Sequence[str],
    prompt: np.ndarray,
    response: SampleResponse,
) -> None:
    records = {
        name: codec.encode(SampledRecord(prompt, s.tokens, s.logprobs, s.versions))
        for name, s in zip(names, response.sequences, strict=True)
    }
    await store.add_sequences(session_id, records)


async def with_recorded(store: Store, session_id: str, request: TrainingRequest) -> list[Datum]:
    """The request's datums with `logprobs` and `sampled_mask` from the records they name.

    Raises:
        InvalidInput: a datum without spans, a sequence that is not recorded in this session,
            tokens that are not the recorded ones, or an advantage on a token not sampled.
    """
    spans = [*request.input_spans, *request.target_spans]
    names = sorted({span.sequence_id for datum in spans for span in datum})
    stored = await store.use_sequences(session_id, names)
    records = {name: codec.decode(data, SampledRecord) for name, data in stored.items()}
    datums = []
    for index, datum in enumerate(request.data):
        try:
            datums.append(
                _annotate(datum, request.input_spans[index], request.target_spans[index], records)
            )
        except InvalidInput as error:
            raise InvalidInput(f"datum {index}: {error}") from None
    return datums


def _annotate(
    datum: Datum,
    input_spans: list[Span],
    target_spans: list[Span],
    records: dict[str, SampledRecord],
) -> Datum:
    if not input_spans or not target_spans:
        raise InvalidInput(
            "stable_reinforce needs to know where every token comes from: Datum.with_provenance()"
        )
    given = dict(datum.loss_fn_inputs)
    for field in ("target_tokens", "advantages"):
        if field not in given or given[field].ndim != 1:
            raise InvalidInput(f"loss_fn_inputs[{field!r}] must be there, with one dimension")
    _trace("model_input", datum.model_input.tokens, input_spans, records)
    targets, advantages = given["target_tokens"], given["advantages"]
    q_T, sampled_T = _trace("target_tokens", targets, target_spans, records)
    if len(advantages) == len(targets) and (advantages[~sampled_T] != 0).any():
        position = int(np.flatnonzero((advantages != 0) & ~sampled_T)[0])
        raise InvalidInput(
            f"advantages[{position}] is {advantages[position]:g}, on a token that was not sampled"
        )
    inputs = {
        "target_tokens": targets,
        "advantages": advantages,
        "logprobs": q_T,
        "sampled_mask": sampled_T.astype(np.float32),
    }
    return Datum(datum.model_input, inputs)


def _trace(
    field: str, tokens: np.ndarray, spans: list[Span], records: dict[str, SampledRecord]
) -> tuple[np.ndarray, np.ndarray]:
    """Recorded logprobs (float32 `[T]`, 0 where not sampled) and which tokens were sampled."""
    total = sum(span.length for span in spans)
    if total != len(tokens):
        raise InvalidInput(f"the spans of {field} cover {total} of {len(tokens)} tokens")
    logprobs_T = np.zeros(len(tokens), np.float32)
    sampled_T = np.zeros(len(tokens), bool)
    start = 0
    for span in spans:
        record = records.get(span.sequence_id)
        if record is None:
            raise InvalidInput(
                f"sequence {span.sequence_id!r} is not recorded in this session: sample with "
                "record_stability_info=True; records live for a day after their last use"
            )
        here = slice(start, start + span.length)
        there = slice(span.offset, span.offset + span.length)
        source = record.tokens if span.sampled else record.prompt
        named = source[there]
        # What precedes the sampled tokens has no part in the loss: clients may put any targets.
        filler = field == "target_tokens" and not span.sampled
        matches = len(named) == span.length if filler else np.array_equal(named, tokens[here])
        if not matches:
            part = "sampled tokens" if span.sampled else "prompt"
            raise InvalidInput(
                f"{field}[{here.start}:{here.stop}] are not tokens {there.start} to {there.stop} "
                f"of the {part} of sequence {span.sequence_id!r}"
            )
        if span.sampled:
            logprobs_T[here] = record.logprobs[there]
            sampled_T[here] = True
        start = here.stop
    return logprobs_T, sampled_T
