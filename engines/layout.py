"""How the ranks of a large model's learner share its work."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..primitives.errors import InvalidInput


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; there are `world` = data x shard x context x tensor ranks.

    Attributes:
        data: copies of the model, each of which computes its part of a batch.
        shard: ranks that a copy's layers are cut over. A rank gathers a layer when it is about to
            compute it (`fully_shard`), and computes its own part of a batch too.
        tensor: ranks that compute every product of one part together, each with its heads and its
            share of the MLP's inner size.
        context: ranks that compute one part together by its rows: every token is one's, and its keys and
            values all others'.
        expert: ranks that a mixture's experts are spread over. They are found among the data x shard x
            context ranks, which it divides: it adds none.
    """

    data: int = 1
    shard: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for name, degree in self._degrees().items():
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise InvalidInput(f"layout: {name} must be an integer from 1, got {degree!r}")
        if self.holders % self.expert:
            hint = "; tensor ranks share them out anyway: leave expert out" * (self.tensor > 1)
            raise InvalidInput(
                f"layout {self}: expert={self.expert} must divide data x shard x context = "
                f"{self.holders}, on whose ranks experts are spread{hint}"
            )

    def _degrees(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From "shard=2,tensor=2"; what is not named is 1.

        Raises:
            InvalidInput: it cannot be read so, or no layout is like that.
        """
        degrees: dict[str, int] = {}
        known = [f.name for f in fields(cls)]
        for item in text.split(","):
            name, _, degree = (part.strip() for part in item.partition("="))
            if name not in known or name in degrees or not degree.isdecimal():
                raise InvalidInput(
                    f'layout must read like "shard=2,tensor=2", of {", ".join(known)}, each once; '
                    f"got {text!r}"
                )
            degrees[name] = int(degree)
        return cls(**degrees)

    def __str__(self) -> str:
        named = [f"{name}={degree}" for name, degree in self._degrees().items() if degree != 1]
        return ",".join(named) or "data=1"

    @property
    def world(self) -> int:
        return self.parts * self.together

    @property
    def together(self) -> int:
        """Ranks that compute one part."""
        return self.context * self.tensor

    @property
    def holders(self) -> int:
        """Ranks, or groups of tensor ranks, that have rows of their own."""
        return self.parts * self.context

    @property
    def parts(self) -> int:
        """Into how many a batch is cut."""
        return self.data * self.shard

    def check(self, config: Any) -> None:
        """
        Args:
            config: of transformers.

        Raises:
            InvalidInput: a model of that config cannot be laid out so.
        """
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            size = getattr(config, name)
            if size % self.tensor:
                raise InvalidInput(
                    f"layout {self}: tensor={self.tensor} does not divide the model's {name} of {size}"
                )
        experts = getattr(config, "num_experts", None)
        if self.expert > 1 and not experts:
            raise InvalidInput(f"layout {self}: the model ({config.model_type}) has no experts")
        if experts and experts % (self.expert * self.tensor):
            raise InvalidInput(
                f"layout {self}: expert x tensor = {self.expert * self.tensor} does not divide the "
                f"model's {experts} experts, of which a rank has whole ones; take more shard ranks, or "
                "context ranks, and fewer of these"
            )
