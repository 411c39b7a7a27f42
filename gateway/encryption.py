"""Exports that only their recipients can open, in the age format (age-encryption.org)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyrage

from ..primitives.errors import InvalidInput
from ..primitives.types import Checkpoint

SUFFIX = ".age"
RECIPIENTS = "age_encryption_recipients"  # in a checkpoint's metadata, a line each
MAX_RECIPIENTS = 10


def recipients_metadata(recipients: Sequence[str]) -> dict[str, str]:
    """What an export's metadata says of them.

    Raises:
        InvalidInput: there are too many, or one is no key.
    """
    if len(recipients) > MAX_RECIPIENTS:
        raise InvalidInput(f"at most {MAX_RECIPIENTS} recipients, got {len(recipients)}")
    for recipient in recipients:
        _parse(recipient)
    return {RECIPIENTS: "\n".join(recipients)} if recipients else {}


def recipients_of(checkpoint: Checkpoint) -> list[str]:
    """Empty: its files are as they are."""
    if checkpoint.kind != "external_weights":
        return []
    return str(checkpoint.user_metadata.get(RECIPIENTS, "")).splitlines()


def seal(data: bytes, recipients: Sequence[str]) -> bytes:
    return pyrage.encrypt(data, [_parse(recipient) for recipient in recipients])


def _parse(recipient: str) -> Any:
    kind = pyrage.ssh if recipient.startswith("ssh-") else pyrage.x25519
    try:
        if not recipient.isprintable():  # a line of the metadata
            raise pyrage.RecipientError
        return kind.Recipient.from_str(recipient)
    except pyrage.RecipientError:
        raise InvalidInput(
            f"{recipient!r} is no age recipient: an age1… key or an SSH public key"
        ) from None
