"""The bounded, deadline-aware queue in front of the vectorizer.

What is cancelled or late when its turn comes is dropped before any compute; a phrase that makes the model raise fails
alone; every waiter gets an answer or an error, whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from annotators.annotator import Encoding
from nlu.errors import Draining, EncodeFailed, Overloaded, TooLate

logger = logging.getLogger(__name__)

Encode = Callable[[Sequence[str], bool], list[Encoding]]


@dataclass(slots=True, eq=False)
class Ticket:
    """One phrase waiting for its Encoding. `deadline` is in time.monotonic() seconds and may be moved while it waits."""

    phrase: str
    tokens: bool
    deadline: float
    future: asyncio.Future[Encoding]


class Batcher:
    """`workers` loops, each taking up to `max_batch` waiting phrases and running them on its own thread.

    On a CPU a batch is one phrase (see Vectorizer); on a GPU a worker takes what is waiting, with no timer: while one
    batch computes, the next one gathers.
    """

    def __init__(self, encode: Encode, *, workers: int, limit: int, max_batch: int = 1) -> None:
        self._encode = encode
        self._limit = limit
        self._max_batch = max_batch
        self._queue: asyncio.Queue[Ticket] = asyncio.Queue(maxsize=limit)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        self._loops = [asyncio.create_task(self._work(), name=f"batcher-{i}") for i in range(workers)]
        self._service_s = 0.005  # moving average of one batch's time, for the pause we ask of refused callers
        self._closed = False
        self.computed = 0  # phrases that reached the model
        self.dropped = 0  # phrases dropped unrun, cancelled or late

    @property
    def waiting(self) -> int:
        """Phrases in the queue."""
        return self._queue.qsize()

    def submit(self, phrase: str, *, tokens: bool, deadline: float) -> Ticket:
        """Queue a phrase; await `ticket.future`. Raises Overloaded at once when the queue is full."""
        if self._closed:
            raise Draining("this server is stopping; call another")
        ticket = Ticket(phrase, tokens, deadline, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(ticket)
        except asyncio.QueueFull as error:
            pause = self._limit * self._service_s / max(1, len(self._loops))
            raise Overloaded(
                f"{self._limit} phrases are waiting already", retry_after_ms=max(1, round(1000 * pause))
            ) from error
        return ticket

    async def close(self) -> None:
        """Answer what is queued with Draining and stop the workers."""
        self._closed = True
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        while not self._queue.empty():
            _fail(self._queue.get_nowait(), Draining("this server is stopping; call another"))
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        while True:
            batch = self._live([await self._queue.get(), *self._gather()])
            try:
                await self._run(batch)
            except asyncio.CancelledError:
                for ticket in batch:
                    _fail(ticket, Draining("this server is stopping; call another"))
                raise

    def _gather(self) -> list[Ticket]:
        more: list[Ticket] = []
        with contextlib.suppress(asyncio.QueueEmpty):
            while len(more) < self._max_batch - 1:
                more.append(self._queue.get_nowait())
        return more

    def _live(self, tickets: list[Ticket]) -> list[Ticket]:
        now = time.monotonic()
        live = []
        for ticket in tickets:
            if ticket.future.done():
                self.dropped += 1
            elif ticket.deadline <= now:
                self.dropped += 1
                _fail(ticket, TooLate("the deadline passed while the phrase was waiting"))
            else:
                live.append(ticket)
        return live

    async def _run(self, batch: list[Ticket]) -> None:
        if not batch:
            return
        phrases, tokens = [ticket.phrase for ticket in batch], any(ticket.tokens for ticket in batch)
        began = time.monotonic()
        try:
            encodings = await asyncio.get_running_loop().run_in_executor(
                self._pool, self._guarded, phrases, tokens
            )
            if len(encodings) != len(batch):
                raise RuntimeError(f"{len(encodings)} encodings for {len(batch)} phrases; this is a bug")
        except Exception as error:
            await self._failed(batch, error)
            return
        self.computed += len(batch)
        self._service_s += 0.1 * (time.monotonic() - began - self._service_s)
        for ticket, encoding in zip(batch, encodings, strict=True):
            if not ticket.future.done():
                ticket.future.set_result(encoding)

    def _guarded(self, phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        """A StopIteration cannot be set on a future: it would leave its waiters hanging."""
        try:
            return self._encode(phrases, tokens)
        except StopIteration as error:
            raise RuntimeError("the vectorizer raised StopIteration") from error

    async def _failed(self, batch: list[Ticket], error: Exception) -> None:
        """One bad phrase must not fail its batchmates: run them again one by one."""
        if len(batch) == 1:
            logger.error(
                "the vectorizer failed on a phrase of %d code points", len(batch[0].phrase), exc_info=error
            )
            failure = EncodeFailed("the vectorizer failed on this phrase")
            failure.__cause__ = error
            _fail(batch[0], failure)
            return
        for ticket in batch:
            await self._run(self._live([ticket]))


def _fail(ticket: Ticket, error: Exception) -> None:
    if not ticket.future.done():
        ticket.future.set_exception(error)
