"""What a gateway allows, and how long it waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MiB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        models: served base models by the name that clients use; empty: every model in the models
            folder and, without a key file, whatever else `base_model` may name.
        max_body_bytes: of one request, as it arrives.
        max_decoded_bytes: of one request once decompressed and its sparse tensors are filled in.
        max_sessions: active ones of one owner; beyond, 429.
        max_pending_samples: sampling requests of one owner under way at once; beyond, 429.
        max_pending_bytes: of training requests that wait; beyond, 429.
        session_timeout_s: without a heartbeat for this long (clients send one every 10 s) a
            session's runs and samplers are let go.
        idle_unload_s: a base model without open runs and unused for this long is unloaded.
        poll_s: how long `retrieve_future` waits for a result; clients give up after 45 s.
        keep_results_s: how long finished results can be fetched again.
        keep_results_bytes: above this, the older half of them goes before its time.
        compress: whether clients are told to compress training requests (None: those on other
            machines are).
        batch_polls: whether clients are told to wait for many samples with one request.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    max_body_bytes: int = 256 * MiB
    max_decoded_bytes: int = 1024 * MiB
    max_sessions: int = 1024
    max_pending_samples: int = 8192
    max_pending_bytes: int = 1024 * MiB
    session_timeout_s: float = 120.0
    idle_unload_s: float = 1800.0
    poll_s: float = 30.0
    keep_results_s: float = 86400.0
    keep_results_bytes: int = 8192 * MiB
    compress: bool | None = None
    batch_polls: bool = False
