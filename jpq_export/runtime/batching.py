"""Continuous batching: sequences come and go while all that are under way get their next token in one pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from jpq_export.errors import CapacityError, UsageError
from jpq_export.runtime.sampling import Sampling, choose
from jpq_export.runtime.session import Decoding, OrtModel
from jpq_export.runtime.slots import Slots
from jpq_export.runtime.text import TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Tokens of a prompt read between two decode passes: those who wait for their next token wait 0.3 s at most on one core,
# and the logits of a pass stay small (25 MB for a vocabulary of 49k instead of 400 MB for 2,048 tokens at once).
CHUNK = 128


class Sequence:
    """One prompt and its continuation: `tokens` so far; `finish_reason` is None until it is "stop" or "length"."""

    def __init__(self, prompt: Iterable[int], sampling: Sampling, *, tokenizer: Tokenizer | None = None) -> None:
        """Without a `tokenizer` there is no text, and `sampling.stop` is not looked for."""
        self.prompt, self.sampling = list(prompt), sampling
        self.tokens: list[int] = []
        self.finish_reason: str | None = None if sampling.max_new_tokens else "length"
        self._rng = np.random.default_rng(sampling.seed)
        self._text = TextStream(tokenizer, after=self.prompt, stop=sampling.stop) if tokenizer else None

    def take(self, logits: np.ndarray, stop_ids: Iterable[int]) -> str:
        """Choose the next token from logits [vocab]; the text that became certain."""
        ask = self.sampling
        token = choose(logits, self._rng, temperature=ask.temperature, top_k=ask.top_k, top_p=ask.top_p)
        if token in stop_ids:
            self.finish_reason = "stop"
            return self._text.end() if self._text else ""
        self.tokens.append(token)
        piece = self._text.push(token) if self._text else ""
        if len(self.tokens) == ask.max_new_tokens:
            self.finish_reason = "length"
            piece += self._text.end() if self._text else ""
        if self._text and self._text.stopped:
            self.finish_reason = "stop"
        return piece


class Batcher:
    """Runs sequences on one model, at most `slots` at a time, none longer than `capacity` tokens."""

    def __init__(self, model: OrtModel, *, slots: int, capacity: int) -> None:
        """Start idle."""
        self.capacity, self.slots = capacity, slots
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []
        self._model, self._cache = model, Slots(model)
        self._reading: tuple[Sequence, Decoding] | None = None

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self.active) + (self._reading is not None)

    @property
    def most_cache_bytes(self) -> int:
        """Memory of all caches when every slot is full: less with an int8 cache."""
        return self.slots * self.capacity * self._model.cache_bytes_per_token

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.running or self.waiting)

    def check(self, sequence: Sequence) -> None:
        """CapacityError or UsageError when the sequence can never run."""
        check_prompt(
            sequence.prompt, sequence.sampling.max_new_tokens, vocab=self._model.spec.vocab, most=self.capacity
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.check(sequence)
        if sequence.finish_reason is None:
            self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is; its slot is free at once."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif self._reading and self._reading[0] is sequence:
            self._reading = None
        elif sequence in self.active:
            self._drop({self.active.index(sequence)})

    def step(self) -> list[tuple[Sequence, str]]:
        """One token for every active sequence and up to CHUNK tokens of one prompt: what each got, as text."""
        return self._decode() + self._read_prompt()

    def _decode(self) -> list[tuple[Sequence, str]]:
        if not self.active:
            return []
        logits = self._cache.step([sequence.tokens[-1] for sequence in self.active])
        news = [(sequence, self._take(sequence, row)) for sequence, row in zip(self.active, logits, strict=True)]
        self._drop({i for i, sequence in enumerate(self.active) if sequence.finish_reason})
        return news

    def _read_prompt(self) -> list[tuple[Sequence, str]]:
        if self._reading is None and self.waiting and len(self.active) < self.slots:
            self._reading = self.waiting.popleft(), self._model.start()
        if self._reading is None:
            return []
        sequence, decoding = self._reading
        logits = decoding.step(sequence.prompt[decoding.length : decoding.length + CHUNK])
        if decoding.length < len(sequence.prompt):
            return []
        self._reading = None
        piece = self._take(sequence, logits)
        if not sequence.finish_reason:
            self._cache.join(decoding)
            self.active.append(sequence)
        return [(sequence, piece)]

    def _take(self, sequence: Sequence, logits: np.ndarray) -> str:
        own = sequence.sampling.stop_ids
        return sequence.take(logits, self._model.spec.eos_ids if own is None else own)

    def _drop(self, rows: set[int]) -> None:
        if rows:
            self._cache.leave(rows)
            self.active = [sequence for i, sequence in enumerate(self.active) if i not in rows]


def check_prompt(ids: list[int], new: int, *, vocab: int, most: int) -> None:
    """UsageError for a prompt the model cannot read, CapacityError for one that leaves no room for `new` tokens."""
    if not ids:
        raise UsageError("the prompt has no tokens; give some text")
    if wrong := [token for token in ids if not 0 <= token < vocab]:
        raise UsageError(f"token {wrong[0]} is not in the model's vocabulary of {vocab}; use its own tokenizer")
    if len(ids) + new > most:
        raise CapacityError(
            f"a prompt of {len(ids)} tokens and {new} new ones need more than the capacity of {most} tokens; "
            "shorten the prompt or ask for fewer new tokens"
        )
