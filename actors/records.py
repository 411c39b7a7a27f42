"""What a run's log says: operations as they came, what became of them, and marks that tell which of
them a learner has died of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from ..primitives import codec, errors
from ..primitives.errors import InvalidInput, TinsmithError
from ..primitives.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    OptimStepResponse,
    PublishResponse,
    SaveResponse,
    TrainingInfo,
)


@dataclass(frozen=True)
class _Batch:
    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, Any] = field(default_factory=dict)
    logprobs: str = "all"


@dataclass(frozen=True)
class _Step:
    adam_params: AdamParams


# What the arguments are decoded as (others are plain values), and the results.
_ARGS: dict[str, Any] = {"forward": _Batch, "forward_backward": _Batch, "optim_step": _Step}
_RESULTS: dict[str, Any] = {
    "forward": ForwardBackwardOutput,
    "forward_backward": ForwardBackwardOutput,
    "optim_step": OptimStepResponse,
    "publish": PublishResponse,
    "save_state": SaveResponse,
    "save_weights_for_sampler": SaveResponse,
    "save_weights_external": SaveResponse,
    "load_state": SaveResponse,
    "get_info": TrainingInfo,
}


@dataclass(frozen=True, eq=False)
class Record:
    """Operation `seq_id` as it came (`body`: its arguments), or what became of it (`body`: its
    result, if `error` does not name the type and the message of what it raised). `applied`: it
    took effect on the run's state, also where it failed after that.

    A mark has no body. `recovery`: a learner replays what comes from `seq_id` on (`applied`: it has).
    `alone`: the operation is done now, and nothing else (`applied`: it was)."""

    what: Literal["operation", "result", "recovery", "alone"]
    seq_id: int
    kind: str
    body: msgspec.Raw
    applied: bool = False
    error: tuple[str, str] | None = None

    def encode(self) -> bytes:
        return codec.encode(self)

    def args(self) -> dict[str, Any]:
        """
        Raises:
            InvalidInput: they are not such an operation's.
        """
        wanted = _ARGS.get(self.kind)
        try:
            if wanted is None:
                return codec.decode(bytes(self.body), dict[str, Any])
            decoded = codec.decode(bytes(self.body), wanted)
            return {name: getattr(decoded, name) for name in wanted.__dataclass_fields__}
        except msgspec.MsgspecError as error:
            raise InvalidInput(f"operation {self.seq_id} ({self.kind}): {error}") from None

    def outcome(self) -> tuple[Any, Exception | None]:
        """The result or the error."""
        if self.error is not None:
            name, message = self.error
            known = getattr(errors, name, None)
            if isinstance(known, type) and issubclass(known, TinsmithError):
                return None, known(message)
            return None, TinsmithError(f"{name}: {message}")
        wanted = _RESULTS.get(self.kind)
        return None if wanted is None else codec.decode(bytes(self.body), wanted), None


def operation(seq_id: int, kind: str, args: dict[str, Any]) -> Record:
    """
    Raises:
        InvalidInput: the arguments are nothing that can be written down.
    """
    try:
        return Record("operation", seq_id, kind, msgspec.Raw(codec.encode(args)))
    except (NotImplementedError, TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"operation {seq_id} ({kind}): {error}") from None


def result(
    seq_id: int, kind: str, value: Any, error: BaseException | None, applied: bool
) -> Record:
    told = None if error is None else (type(error).__name__, str(error))
    body = msgspec.Raw(codec.encode(None if error is not None else value))
    return Record("result", seq_id, kind, body, applied, told)


def mark(
    what: Literal["recovery", "alone"], seq_id: int, kind: str, *, over: bool = False
) -> Record:
    return Record(what, seq_id, kind, msgspec.Raw(codec.encode(None)), over)


def decode(payload: bytes) -> Record:
    """
    Raises:
        msgspec.MsgspecError: that is no record.
    """
    return codec.decode(payload, Record)
