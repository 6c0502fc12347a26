"""The thread that runs a sentence encoder: texts of many clients share its passes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

from jpq_export.runtime.bundle import Bundle
from jpq_export.serve.worker import BusyError, ServerError

logger = logging.getLogger(__name__)

BATCH = 32  # texts of a pass


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Token rows of one request and the future of their embeddings."""

    rows: list[list[int]]
    answer: asyncio.Future[np.ndarray]


class Embedder:
    """Embeds token rows; at most `queue` requests wait while one pass runs."""

    def __init__(self, bundle: Bundle, *, queue: int) -> None:
        """Start the thread."""
        self._bundle, self._queue = bundle, queue
        self._changed = threading.Condition()
        self._waiting: deque[Texts] = deque()
        self._running: list[Texts] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="jpq-embedder", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """Requests in the current pass, and those that wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    async def embed(self, rows: list[list[int]]) -> np.ndarray:
        """Embeddings float32 [rows, dimension].

        Raises:
            CapacityError, UsageError: a row can never be embedded.
            BusyError: there is no room now.
        """
        self._bundle.check_rows(rows)
        texts = Texts(rows, asyncio.get_running_loop().create_future())
        with self._changed:
            if self._closing:
                raise BusyError("the server is shutting down")
            if len(self._waiting) >= self._queue:
                raise BusyError(f"{len(self._waiting)} requests wait, the queue is full; try later")
            self._waiting.append(texts)
            self._changed.notify()
        try:
            return await texts.answer
        finally:  # a client that left takes its texts along; a pass that has begun ends
            with self._changed:
                if texts in self._waiting:
                    self._waiting.remove(texts)

    def stop(self) -> None:
        """End the thread after its current pass; waiting requests get a ServerError."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self) -> None:
        """Stop, and wait for the end."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            rows = [row for texts in batch for row in texts.rows]
            try:
                vectors = self._bundle.embed_rows(rows, batch_size=BATCH)
            except Exception:  # whatever it was, the clients must hear of it and the thread must live on
                logger.exception("a pass failed; its requests are given up")
                for texts in batch:
                    _tell(texts, ServerError("the model failed; the server's log says why"))
                continue
            for texts in batch:
                _tell(texts, vectors[: len(texts.rows)])
                vectors = vectors[len(texts.rows) :]

    def _next(self) -> list[Texts]:
        """The requests of the next pass; none when the thread shall end."""
        with self._changed:
            self._running = []
            while not (self._closing or self._waiting):
                self._changed.wait()
            if self._closing:
                for texts in self._waiting:
                    _tell(texts, ServerError("the server was shut down"))
                return []
            rows = 0
            while self._waiting and (not rows or rows + len(self._waiting[0].rows) <= BATCH):
                self._running.append(self._waiting.popleft())
                rows += len(self._running[-1].rows)
            return self._running


def _tell(texts: Texts, news: np.ndarray | ServerError) -> None:
    def settle() -> None:
        if texts.answer.done():  # its client left
            return
        if isinstance(news, ServerError):
            texts.answer.set_exception(news)
        else:
            texts.answer.set_result(news)

    loop = texts.answer.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)
