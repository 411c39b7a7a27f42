"""A local corpus that the model searches (BM25), and questions over it.

    corpus = Corpus.from_jsonl("passages.jsonl")        # {"id": …, "text": …, "title": …} a line
    questions = load_questions("questions.jsonl")       # {"question": …, "answers": […], "gold": […]}
    register("my-qa", lambda **kwargs: RetrievalQA(corpus, questions, **kwargs))

Make the corpus where the environment is registered, or in its module: it is then loaded once for
all episodes, whose processes share its memory. Needs `bm25s` (`pip install "tinsmith[envs]"`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import string
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..primitives.errors import InvalidInput, NotFound, Unavailable
from ..primitives.paths import default_home
from .core import StepResult, message
from .tools import Syntax, ToolEnv

log = logging.getLogger(__name__)
T = TypeVar("T")

PROGRESS_AFTER_SECONDS = 5.0
_BATCH = 2000
EVAL_SHARE = 0.2
SYSTEM = (
    "Answer the question from what the search tool finds. Call it with\n"
    '<tool_call>{"name": "search", "arguments": {"query": "..."}}</tool_call>\n'
    "Then answer in a few words, without explanation."
)


@dataclass(frozen=True)
class Passage:
    id: str
    text: str
    title: str = ""


@dataclass(frozen=True)
class Skipped:
    """A row that was left out: its line (from 1) or file, and why."""

    where: str
    why: str


class Corpus:
    """Passages and their BM25 index (Lucene's variant; `bm25s`, arXiv:2407.03618).

    Args:
        passages: at least one, with ids of their own.
        cache: folder for indices; None: `cache/retrieval` in `TINSMITH_HOME`.
        cache_after_seconds: an index that took longer to build is kept there.

    Raises:
        InvalidInput: no passage, or two of the same id.
        Unavailable: `bm25s` is not installed.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        *,
        skipped: Sequence[Skipped] = (),
        cache: str | Path | None = None,
        cache_after_seconds: float = 2.0,
    ) -> None:
        self.passages = list(passages)
        self.skipped = list(skipped)
        if not self.passages:
            raise InvalidInput("a corpus needs at least one passage with words in it")
        twice = [name for name, n in Counter(p.id for p in self.passages).items() if n > 1]
        if twice:
            raise InvalidInput(f"two passages of the corpus have the id {twice[0]!r}")
        folder = default_home() / "cache" / "retrieval" if cache is None else Path(cache)
        self._index = _index(self.passages, folder, cache_after_seconds)

    @classmethod
    def from_texts(cls, texts: Sequence[str], **options: Any) -> Corpus:
        """Passages with the ids "0", "1", …"""
        return cls([Passage(str(i), text) for i, text in enumerate(texts)], **options)

    @classmethod
    def from_jsonl(cls, path: str | Path, *, strict: bool = False, **options: Any) -> Corpus:
        """One passage a line: `text`, and where they are given `id` (else the line) and `title`.

        Lines that are no passage are skipped and listed in `skipped`, or refused with `strict`.
        """

        def passage(line: int, row: dict[str, Any]) -> Passage:
            text, title = row.get("text"), row.get("title") or ""
            if not isinstance(text, str) or not text.strip():
                raise ValueError("`text` must be a text with words in it")
            if not isinstance(title, str):
                raise ValueError("`title` must be a text")
            name = row.get("id", line)
            if not isinstance(name, str | int):
                raise ValueError("`id` must be a text or a whole number")
            return Passage(str(name), text, title)

        passages, skipped = read_jsonl(path, passage, strict=strict, key=lambda p: p.id)
        return cls(passages, skipped=skipped, **options)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        pattern: str = "**/*.txt",
        words: int = 150,
        strict: bool = False,
        **options: Any,
    ) -> Corpus:
        """The text files of a folder, cut between paragraphs into passages of about `words` words.

        A passage's id is `file#number`. Files that are empty or not UTF-8 are skipped, or refused
        with `strict`.
        """
        root = Path(path)
        if not root.is_dir():
            raise NotFound(f"there is no folder {root}")
        passages: list[Passage] = []
        skipped: list[Skipped] = []
        for file in sorted(file for file in root.glob(pattern) if file.is_file()):
            name = file.relative_to(root).as_posix()
            try:
                parts = list(_parts(file.read_text("utf-8"), words))
                if not parts:
                    raise ValueError("it is empty")
            except ValueError as error:
                _skip(skipped, name, str(error), strict)
                continue
            passages += [Passage(f"{name}#{i}", part, file.stem) for i, part in enumerate(parts)]
        _tell_skipped(root, skipped, len(skipped) + len(passages))
        return cls(passages, skipped=skipped, **options)

    def find(self, query: str, k: int = 3) -> list[tuple[Passage, float]]:
        """The `k` passages that fit best, best first, each with its score; fewer where fewer have
        a word of the query."""
        if k < 1:
            raise InvalidInput(f"k must be at least 1, got {k}")
        tokens = _tokenize([query])
        if not tokens[0]:
            return []
        wanted = min(k, len(self.passages))
        found, scores = self._index.retrieve(tokens, k=wanted, show_progress=False)
        pairs = zip(found[0].tolist(), scores[0].tolist(), strict=True)
        return [(self.passages[i], score) for i, score in pairs if score > 0]

    def search(self, query: str, k: int = 3) -> str:
        """Find the passages that fit a query best.

        Args:
            query: words to look for.
            k: how many passages.
        """
        return as_text(passage for passage, _ in self.find(query, k))


def as_text(passages: Iterator[Passage]) -> str:
    """Passages as the model reads them: `[id] title`, then the text."""
    texts = [f"[{p.id}] {p.title}".rstrip() + f"\n{p.text}" for p in passages]
    return "\n\n".join(texts) or "No passage has any of these words."


def _parts(text: str, words: int) -> Iterator[str]:
    part: list[str] = []
    size = 0
    for paragraph in filter(None, map(str.strip, re.split(r"\n\s*\n", text))):
        length = len(paragraph.split())
        if part and size + length > words:
            yield "\n\n".join(part)
            part, size = [], 0
        part.append(paragraph)
        size += length
    if part:
        yield "\n\n".join(part)


def _tokenize(texts: list[str]) -> list[list[str]]:
    import bm25s

    return bm25s.tokenize(
        texts, token_pattern=r"(?u)\b\w+\b", return_ids=False, show_progress=False
    )


def _index(passages: list[Passage], cache: Path, cache_after_seconds: float) -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise Unavailable(
            f'retrieval needs bm25s: pip install "tinsmith[envs]" ({error})'
        ) from error
    folder = cache / _digest(passages, bm25s.__version__)
    if folder.is_dir():
        try:
            return bm25s.BM25.load(folder, mmap=True, show_progress=False)
        except (OSError, ValueError, KeyError) as error:
            log.warning("the index in %s cannot be read and is built anew: %s", folder, error)
    started = time.monotonic()
    tokens = _all_tokens(passages)
    index = bm25s.BM25()
    slow = time.monotonic() - started > PROGRESS_AFTER_SECONDS
    index.index(tokens, show_progress=slow)
    if time.monotonic() - started >= cache_after_seconds:
        _keep(index, folder)
    return index


def _all_tokens(passages: list[Passage]) -> list[list[str]]:
    from rich.console import Console
    from rich.progress import Progress

    tokens: list[list[str]] = []
    started = time.monotonic()
    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task(f"reading {len(passages)} passages", total=len(passages))
    try:
        for start in range(0, len(passages), _BATCH):
            batch = passages[start : start + _BATCH]
            tokens += _tokenize([f"{p.title} {p.text}" for p in batch])
            if time.monotonic() - started > PROGRESS_AFTER_SECONDS:
                progress.start()
            progress.update(task, completed=len(tokens))
    finally:
        progress.stop()
    return tokens


def _digest(passages: list[Passage], version: str) -> str:
    digest = hashlib.blake2b(version.encode(), digest_size=16)
    for passage in passages:
        digest.update(json.dumps([passage.title, passage.text]).encode())
    return digest.hexdigest()


def _keep(index: Any, folder: Path) -> None:
    """Under a name of its own first: others may build the same one."""
    half = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
    index.save(half, show_progress=False)
    try:
        os.replace(half, folder)
    except OSError:  # the other one was first, or what is there cannot be read
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
        os.replace(half, folder)


def read_jsonl(
    path: str | Path,
    parse: Callable[[int, dict[str, Any]], T],
    *,
    strict: bool = False,
    key: Callable[[T], Any] | None = None,
) -> tuple[list[T], list[Skipped]]:
    """What `parse(line number, row)` makes of each line, and the lines for which it raised
    ValueError or that are no JSON object, or whose `key` another has. Empty lines are no rows.

    Raises:
        NotFound: no such file.
        InvalidInput: the first bad line, if `strict`.
    """
    rows: list[T] = []
    skipped: list[Skipped] = []
    seen = set()
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is not a JSON object")
            value = parse(number, row)
            if key is not None:
                if key(value) in seen:
                    raise ValueError(f"{key(value)!r} was there before")
                seen.add(key(value))
        except ValueError as error:
            _skip(skipped, f"line {number}", str(error), strict, f"{path}, ")
        else:
            rows.append(value)
    _tell_skipped(path, skipped, len(rows) + len(skipped))
    return rows, skipped


def _skip(skipped: list[Skipped], where: str, why: str, strict: bool, file: str = "") -> None:
    if strict:
        raise InvalidInput(f"{file}{where}: {why}")
    skipped.append(Skipped(where, why))


def _tell_skipped(path: str | Path, skipped: list[Skipped], rows: int) -> None:
    if skipped:
        shown = "; ".join(f"{bad.where}: {bad.why}" for bad in skipped[:5])
        more = "; …" if len(skipped) > 5 else ""
        log.warning("%s: skipped %d of %d: %s%s", path, len(skipped), rows, shown, more)


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
