"""Questions that are answered by searching a corpus."""

from __future__ import annotations

import hashlib
import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..primitives.errors import InvalidInput
from .core import StepResult, message
from .jsonl import read_jsonl
from .retrieval import Corpus, as_text
from .tools import Syntax, ToolEnv

EVAL_SHARE = 0.2
SYSTEM = (
    "Answer the question from what the search tool finds. Call it with\n"
    '<tool_call>{"name": "search", "arguments": {"query": "..."}}</tool_call>\n'
    "Then answer in a few words, without explanation."
)


@dataclass(frozen=True)
class Question:
    """`answers` that count as right, and the ids of the passages that hold them, where known."""

    question: str
    answers: Sequence[str]
    gold: Sequence[str] = field(default_factory=tuple)


def load_questions(path: str | Path, *, strict: bool = False) -> list[Question]:
    """One question a line: `question`, `answers` (or `answer`), and where known `gold`.

    Lines that are no question are skipped with a warning that names them, or refused with
    `strict`.
    """

    def parse(line: int, row: dict[str, Any]) -> Question:
        answers, gold = row.get("answers", row.get("answer")), row.get("gold", [])
        answers = [answers] if isinstance(answers, str) else answers
        gold = gold if isinstance(gold, list) else [gold]
        if not isinstance(row.get("question"), str):
            raise ValueError("`question` must be a text")
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise ValueError("`answers` must be texts")
        if not any(normalized(answer) for answer in answers):
            raise ValueError("`answers` hold no word")
        return Question(row["question"], tuple(answers), tuple(map(str, gold)))

    return read_jsonl(path, parse, strict=strict)[0]


class RetrievalQA(ToolEnv):
    """One question, answered after searching the corpus.

    `info` holds `exact` and `f1` of the answer, `success` (exact), `retrieved` (ids) and, where the
    question knows its passages, `gold_recall`: how many of them were found.

    Args:
        corpus: passages, or a JSONL file of them (then read anew by every episode).
        questions: as many as there are, or a JSONL file of them.
        split: "train" and "eval" share no question; None: all.
        reward: "exact" or "f1", as SQuAD defines them (arXiv:1606.05250).
        max_turns: turns until the episode is truncated.
        max_passages: the most that a search gives.
    """

    def __init__(
        self,
        corpus: Corpus | str,
        questions: Sequence[Question] | str,
        split: Literal["train", "eval"] | None = None,
        reward: Literal["exact", "f1"] = "f1",
        max_turns: int = 4,
        max_passages: int = 10,
        syntax: Syntax = "json",
        result_role: Literal["tool", "user"] = "tool",
    ) -> None:
        if split not in (None, "train", "eval"):
            raise InvalidInput(f'RetrievalQA: split must be "train" or "eval", got {split!r}')
        if reward not in ("exact", "f1"):
            raise InvalidInput(f'RetrievalQA: reward must be "exact" or "f1", got {reward!r}')
        self.corpus = Corpus.from_jsonl(corpus) if isinstance(corpus, str) else corpus
        asked = load_questions(questions) if isinstance(questions, str) else questions
        self.questions = [q for q in asked if split in (None, split_of(q.question))]
        if not self.questions:
            raise InvalidInput(f"RetrievalQA: there is no question in split {split!r}")
        self.reward = reward
        self.max_passages = max_passages

        def search(query: str, k: int = 3) -> str:
            found = [p for p, _ in self.corpus.find(query, max(1, min(k, self.max_passages)))]
            self.retrieved += [p.id for p in found]
            return as_text(iter(found))

        search.__doc__ = Corpus.search.__doc__
        super().__init__([search], syntax=syntax, result_role=result_role, max_turns=max_turns)

    def begin(self, seed: int | None, options: dict[str, Any] | None) -> list[dict[str, Any]]:
        """`options["index"]` sets the question instead of drawing it."""
        index = (options or {}).get("index")
        draw = random.Random(seed).choice
        self.asked = draw(self.questions) if index is None else self.questions[index]
        self.retrieved: list[str] = []
        self.scores = {"exact": 0.0, "f1": 0.0}
        return [message("system", SYSTEM), message("user", self.asked.question)]

    def score(self, answer: str) -> float:
        answers = self.asked.answers
        self.scores = {
            "exact": max(exact_match(answer, right) for right in answers),
            "f1": max(f1(answer, right) for right in answers),
        }
        return self.scores[self.reward]

    async def step(self, action: str) -> StepResult:
        observation, reward, terminated, truncated, info = await super().step(action)
        info |= self.scores | {"success": self.scores["exact"] > 0, "retrieved": self.retrieved}
        if self.asked.gold:
            gold = set(self.asked.gold)
            info["gold_recall"] = len(gold & set(self.retrieved)) / len(gold)
        return observation, reward, terminated, truncated, info


def split_of(question: str) -> str:
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest) < EVAL_SHARE * 2**64 else "train"


def normalized(answer: str) -> str:
    """Lower case, without punctuation, articles and spare spaces."""
    text = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, right: str) -> float:
    return float(normalized(answer) == normalized(right))


def f1(answer: str, right: str) -> float:
    """The harmonic mean of precision and recall over words."""
    given, wanted = normalized(answer).split(), normalized(right).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))
