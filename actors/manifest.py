"""What a checkpoint says of itself, in its `manifest.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from ..primitives.errors import InvalidInput
from ..primitives.types import LoraConfig


@dataclass(frozen=True)
class Manifest:
    """`operation`: of which run's opening and which number it was saved by."""

    base_model: str
    lora: LoraConfig
    version: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    user_metadata: dict[str, Any] = field(default_factory=dict)
    operation: str = ""

    @classmethod
    def of(cls, path: str, told: Mapping[str, Any]) -> Manifest:
        """From what the manifest of the checkpoint `path` says.

        Raises:
            InvalidInput: that is no manifest.
        """
        try:
            return msgspec.convert(told, cls)
        except (msgspec.ValidationError, OverflowError) as error:
            raise InvalidInput(
                f"checkpoint {path} is damaged: its manifest.json: {error}"
            ) from None
