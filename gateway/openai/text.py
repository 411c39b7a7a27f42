"""A growing answer: what of its text can be told already, and what it was in the end."""

from __future__ import annotations

from collections.abc import Sequence

from ...envs.tools import CALL_MARK, Call, split_json_calls


class AnswerText:
    """Takes an answer's text in pieces and gives out what is certain. It ends before the first
    stop string; with `calls`, tool calls are held back to be taken out at the end."""

    def __init__(self, stops: Sequence[str] = (), *, calls: bool = False) -> None:
        self.text = ""
        self.stopped = False
        self._stops, self._calls = stops, calls
        self._longest = max(map(len, stops), default=0)
        self._told = 0

    def push(self, piece: str) -> str:
        """The text that is certain with this piece."""
        if self.stopped:
            return ""
        start = max(0, len(self.text) - self._longest)
        self.text += piece
        found = [at for stop in self._stops if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]
        end = len(self.text) if self.stopped else _certain(self.text, self._stops)
        if self._calls:
            mark = self.text.find(CALL_MARK)
            before = self.text[: mark if mark >= 0 else _certain(self.text, [CALL_MARK])]
            end = min(end, len(before.rstrip()))
        piece, self._told = self.text[self._told : end], max(end, self._told)
        return piece

    def finish(self) -> tuple[str, str, list[Call]]:
        """The rest to tell, the whole text that was told with it, and the calls."""
        content, calls = split_json_calls(self.text) if self._calls else (self.text, [])
        return content[self._told :], content, calls


def _certain(text: str, marks: Sequence[str]) -> int:
    """How much of `text` cannot be the beginning of a mark that more text completes."""
    longest = max(map(len, marks), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(mark.startswith(text[start:]) for mark in marks):
            return start
    return len(text)
