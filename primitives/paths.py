"""Where things are kept. Checkpoints: `tinker://<run>/weights/<name>` (with optimizer),
`tinker://<run>/sampler_weights/<name>` and `tinker://<run>/external_weights/<name>`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import InvalidInput

SCHEME = "tinker://"
KINDS = ("weights", "sampler_weights", "external_weights")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}")


def default_home() -> Path:
    """Where everything is kept unless told otherwise: `$TINSMITH_HOME`, else `~/.tinsmith`."""
    return Path(os.environ.get("TINSMITH_HOME", "~/.tinsmith")).expanduser()


def check_name(what: str, name: str) -> None:
    """
    Raises:
        InvalidInput: `name` cannot be part of a path.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{what} {name!r} must be 1 to 128 letters, digits or . _ : + -, "
            "starting with a letter or digit"
        )


@dataclass(frozen=True)
class CheckpointPath:
    run_id: str
    kind: str
    name: str

    def __post_init__(self) -> None:
        check_name("run id", self.run_id)
        check_name("checkpoint name", self.name)

    def __str__(self) -> str:
        return f"{SCHEME}{self.run_id}/{self.kind}/{self.name}"

    @property
    def folder(self) -> str:
        """The checkpoint's folder below the storage root."""
        return f"runs/{self.run_id}/{self.kind}/{self.name}"

    @classmethod
    def parse(cls, path: str) -> CheckpointPath:
        parts = path.removeprefix(SCHEME).split("/")
        if not path.startswith(SCHEME) or len(parts) != 3 or parts[1] not in KINDS:
            raise InvalidInput(
                f"{path!r} is not a checkpoint path: expected {SCHEME}<run>/weights/<name> "
                f"or {SCHEME}<run>/sampler_weights/<name>"
            )
        return cls(*parts)
