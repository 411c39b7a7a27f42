"""The generators of reasoning-gym: `make("reasoning_gym:<dataset>", **its_config)`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Literal

from ..primitives.errors import InvalidInput, NotFound
from .core import Env, ResetResult, StepResult, message
from .extras import extra
from .splits import Rows


class ReasoningGymEnv(Env):
    """One question of a procedural dataset, answered in one turn and scored by the library.

    A dataset is a function of its `seed` (0 unless the config says otherwise) and an index below
    its `size`. The last fifth of the indices is the split "eval", the others are "train"; an
    episode's seed picks one of them, consecutive seeds different ones. What the library accepts as
    an answer stands between `<answer>` tags; without tags the last line of the turn counts.

    Args:
        dataset: its name in the library.
        split: questions to draw from.
        system_prompt: one of the library's ("default", "direct", "simple", "chain_of_draft",
            "DeepSeekZero"), or a text of your own; it has to state the form of the answer.
        config: the dataset's own configuration.

    Raises:
        InvalidInput: a configuration that the dataset refuses.
    """

    def __init__(
        self,
        dataset: str,
        *,
        split: Literal["train", "eval"] | None = "train",
        system_prompt: str = "default",
        **config: Any,
    ) -> None:
        from reasoning_gym.utils import SYSTEM_PROMPTS

        self.system_prompt = SYSTEM_PROMPTS.get(system_prompt, system_prompt).strip()
        self.dataset = _made(dataset, {"seed": 0, **config})
        self.rows = Rows(len(self.dataset), split, f"environment 'reasoning_gym:{dataset}'")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """`options["index"]` sets the question instead of drawing it."""
        index = (options or {}).get("index", self.rows.pick(seed))
        _seed_globals(index)
        self.entry = self.dataset[index]
        messages = [message("system", self.system_prompt), message("user", self.entry["question"])]
        return messages, {"index": index}

    def step(self, action: str) -> StepResult:
        answer, tagged = extracted(action)
        info = {"answer": answer, "tagged": tagged, "expected": self.entry["answer"]}
        try:
            score = float(self.dataset.score_answer(answer, self.entry))
        except Exception as error:  # not every scorer reads every text that a model may write
            score, info["unreadable"] = 0.0, f"{type(error).__name__}: {error}"
        return "", score, True, False, {"success": score >= 1.0 - 1e-9, **info}


def extracted(action: str) -> tuple[str | None, bool]:
    """The answer in a turn, and whether it stands between `<answer>` tags."""
    from reasoning_gym.utils import extract_answer

    tagged = extract_answer(action)
    if tagged is not None:
        return tagged, True
    lines = action.strip().splitlines()
    return (lines[-1].strip() if lines else None), False


def _made(dataset: str, config: dict[str, Any]) -> Any:
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import create_dataset

    where = f"environment 'reasoning_gym:{dataset}'"
    _seed_globals(config["seed"] or 0)
    try:
        if dataset == "composite":  # its parts come as plain data, as in the library's YAML
            config["datasets"] = [DatasetSpec(**part) for part in config.get("datasets", [])]
        return create_dataset(dataset, **config)
    except (TypeError, ValueError, AssertionError) as error:
        raise InvalidInput(f"{where} cannot be made with {config!r}: {error}") from error
    except (ImportError, OSError) as error:
        raise NotFound(f"{where} misses something on this machine: {error}") from error


def _seed_globals(seed: int) -> None:
    # A few generators draw from the global generators instead of their own.
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)


def find_reasoning_gym(dataset: str) -> Callable[..., ReasoningGymEnv]:
    """A factory of the dataset's environment.

    Raises:
        NotFound: no such dataset, or the library is not installed.
    """
    library = extra("reasoning_gym", f"environment 'reasoning_gym:{dataset}'")
    known = library.factory.DATASETS
    if dataset not in known:
        raise NotFound(
            f"environment 'reasoning_gym:{dataset}': the library has no such dataset; it has "
            f"{', '.join(sorted(known))}"
        )

    def factory(
        *,
        split: Literal["train", "eval"] | None = "train",
        system_prompt: str = "default",
        **config: Any,
    ) -> ReasoningGymEnv:
        return ReasoningGymEnv(dataset, split=split, system_prompt=system_prompt, **config)

    return factory
