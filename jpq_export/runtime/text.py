"""Text of tokens as they come: whole characters, spaces between words, and texts at which to stop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNFINISHED = "\ufffd"  # what the tokenizer gives for the first bytes of a character
CONTEXT = 5  # tokens of the prompt that are decoded along: SentencePiece strips the space of a text's first word


class TextStream:
    """Turns one sequence's tokens into text; `stopped` says that one of the texts `stop` came (it is not given)."""

    def __init__(self, tokenizer: Tokenizer, *, after: Iterable[int] = (), stop: Iterable[str] = ()) -> None:
        """`after`: the prompt, whose text is not given."""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._seen = list(after)[-CONTEXT:]
        # Text of seen[start:shown] was given; decoding from `start` keeps the spaces between words.
        self._start, self._shown = 0, len(self._seen)
        self._held = ""  # what may be the beginning of a stop text

    def push(self, token: int) -> str:
        """The text that is certain after one more token; a character is given once all its bytes are there."""
        self._seen.append(token)
        new = self._undecided()
        if not new or new.endswith(UNFINISHED):
            return ""
        self._start, self._shown = self._shown, len(self._seen)
        return self._until_stop(new)

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._until_stop(self._undecided()) + self._held
        self._held, self._shown = "", len(self._seen)
        return rest

    def _undecided(self) -> str:
        before = self._tokenizer.decode(self._seen[self._start : self._shown])
        return self._tokenizer.decode(self._seen[self._start :])[len(before) :]

    def _until_stop(self, new: str) -> str:
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of text of tokens as they come, none of them empty."""
    stream = TextStream(tokenizer)
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if rest := stream.end():
        yield rest
