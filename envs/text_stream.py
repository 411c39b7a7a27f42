"""Streamed tokens to text, a piece at a time."""

from __future__ import annotations

from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into pieces of text that never end inside a character.

    A token may be part of a character's bytes, and its text may depend on the token before it (a
    space that only the first token of a text drops). So a piece is what the text of a short window
    grows by, held back while its last character is incomplete. The pieces join to the text of all
    tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self._window = 0  # where the window begins
        self._told = 0  # tokens up to here are in pieces given out

    def push(self, token: int) -> str:
        """The text that is complete with this token; often one word, sometimes nothing."""
        self.tokens.append(token)
        text = self._text(self._window, len(self.tokens))
        return "" if text.endswith(INCOMPLETE) else self._tell(text)

    def finish(self) -> str:
        """What was held back."""
        return self._tell(self._text(self._window, len(self.tokens)))

    def _tell(self, text: str) -> str:
        piece = text[len(self._text(self._window, self._told)) :]
        self._window, self._told = self._told, len(self.tokens)
        return piece

    def _text(self, start: int, end: int) -> str:
        return self.tokenizer.decode(
            self.tokens[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
