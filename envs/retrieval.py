"""A local corpus that the model searches (BM25); `retrieval_qa` asks questions over it.

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
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..primitives.errors import InvalidInput, NotFound, Unavailable
from ..primitives.paths import default_home
from .jsonl import Skipped, read_jsonl, skip, tell_skipped

log = logging.getLogger(__name__)

PROGRESS_AFTER_SECONDS = 5.0
_BATCH = 2000


@dataclass(frozen=True)
class Passage:
    id: str
    text: str
    title: str = ""


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
                skip(skipped, name, str(error), strict)
                continue
            passages += [Passage(f"{name}#{i}", part, file.stem) for i, part in enumerate(parts)]
        tell_skipped(root, skipped, len(skipped) + len(passages))
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
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(half, folder)
