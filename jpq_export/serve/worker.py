"""The thread that runs a decoder: sequences of many clients wait in a bounded queue and share the model's passes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

from jpq_export.runtime.batching import Batcher, Sequence
from jpq_export.runtime.bundle import Bundle

logger = logging.getLogger(__name__)


class BusyError(Exception):
    """The queue is full; the same request may be accepted later."""


class ServerError(Exception):
    """The request was accepted and cannot be finished."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that the sequence `index` of a job got; `finish_reason` when nothing follows."""

    index: int
    text: str
    finish_reason: str | None


class Job:
    """The sequences of one request; iterating gives their pieces as they come, until all are finished."""

    def __init__(self, sequences: list[Sequence]) -> None:
        """Belongs to the running event loop."""
        self.sequences = sequences
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Piece | ServerError] = asyncio.Queue()

    def tell(self, news: Piece | ServerError) -> None:
        """Called by the worker's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    async def pieces(self) -> AsyncIterator[Piece]:
        """ServerError when the worker cannot go on."""
        left = len(self.sequences)
        while left:
            news = await self._news.get()
            if isinstance(news, ServerError):
                raise news
            left -= news.finish_reason is not None
            yield news


class Worker:
    """Runs at most `slots` sequences of a bundle at a time and lets `queue` others wait."""

    def __init__(self, bundle: Bundle, *, slots: int, queue: int) -> None:
        """Start the thread."""
        self.most = slots + queue
        self._bundle, self._slots = bundle, slots
        self._batcher = bundle.batcher(slots)
        # What the event loop tells the thread; between two passes the thread takes it over.
        self._changed = threading.Condition()
        self._new: list[Job] = []
        self._gone: list[Job] = []
        self._closing = False
        self._places: dict[Sequence, tuple[Job, int]] = {}  # every sequence that is not finished
        self._thread = threading.Thread(target=self._run, name="jpq-worker", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """Sequences that hold a slot, and those that wait for one."""
        with self._changed:
            held = self._batcher.running
            return held, max(len(self._places) - held, 0)

    def submit(self, job: Job) -> None:
        """Queue all sequences of a job, or none.

        Raises:
            CapacityError, UsageError: one of them can never run.
            BusyError: there is no room now.
        """
        for sequence in job.sequences:
            self._batcher.check(sequence)
        with self._changed:
            if self._closing:
                raise BusyError("the server is shutting down")
            if len(self._places) + len(job.sequences) > self.most:
                raise BusyError(f"{len(self._places)} sequences are running or waiting, the queue is full; try later")
            self._places |= {sequence: (job, index) for index, sequence in enumerate(job.sequences)}
            self._new.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more; does nothing when it is finished."""
        with self._changed:
            self._gone.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after its current pass; unfinished jobs get a ServerError."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self) -> None:
        """Stop, and wait for the end."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        while self._take_over():
            try:
                news = self._batcher.step()
            except Exception:  # whatever it was, the clients must hear of it and the thread must live on
                logger.exception("a pass failed; its requests are given up")
                self._give_up("the model failed; the server's log says why")
                continue
            for sequence, text in news:
                self._tell(sequence, text)

    def _take_over(self) -> bool:
        """Wait for work; False when the thread shall end."""
        with self._changed:
            while not (self._closing or self._new or self._gone or self._batcher.busy):
                self._changed.wait()
            new, gone = self._new, self._gone
            self._new, self._gone = [], []
        if self._closing:
            self._give_up("the server was shut down")
            return False
        for job in new:
            for sequence in job.sequences:
                self._batcher.add(sequence)
        for job in gone:
            for sequence in job.sequences:
                self._batcher.cancel(sequence)
                self._forget(sequence)
        return True

    def _tell(self, sequence: Sequence, text: str) -> None:
        job, index = self._places[sequence]
        if sequence.finish_reason:  # its place is free before its client knows
            self._forget(sequence)
        if text or sequence.finish_reason:
            job.tell(Piece(index, text, sequence.finish_reason))

    def _forget(self, sequence: Sequence) -> None:
        with self._changed:
            self._places.pop(sequence, None)

    def _give_up(self, reason: str) -> None:
        self._batcher: Batcher = self._bundle.batcher(self._slots)
        with self._changed:
            jobs = {job for job, _ in self._places.values()}
            self._places.clear()
            self._new.clear()
        for job in jobs:
            job.tell(ServerError(reason))
