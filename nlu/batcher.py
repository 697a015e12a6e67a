"""The bounded, deadline-aware queue in front of the vectorizer.

A request's phrases are taken on together or refused together, before the first is computed. What is cancelled or late
when its turn comes is dropped before any compute; a phrase that makes the model raise fails alone; every waiter gets an
answer or an error, whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from annotators.annotator import Encoding
from nlu import metrics
from nlu.admission import Admission, pause_ms
from nlu.errors import Draining, EncodeFailed, Overloaded, Stuck, TooLate

logger = logging.getLogger(__name__)

Encode = Callable[[Sequence[str], bool], list[Encoding]]

# The longest phrase there is takes a CPU some 20 ms and nobody waits longer than max_deadline_s, 5 s as it comes: a
# thread that is in the model for that long is not slow, it is lost.
STUCK_S = 5.0
_LEAVING_S = 1.0  # on closing, threads may take this long to come out of the model

_COMPUTED, _FAILED, _DROPPED = (metrics.PHRASES.labels(fate) for fate in ("computed", "failed", "dropped"))


@dataclass(slots=True, eq=False)
class Ticket:
    """One phrase waiting for its Encoding. `deadline` is in time.monotonic() seconds and may be moved while it waits."""

    phrase: str
    tokens: bool
    deadline: float
    future: asyncio.Future[Encoding]
    since: float = field(default_factory=time.monotonic)
    waits: bool = True  # in the queue, and for somebody


class Batcher:
    """`workers` loops, each taking up to `max_batch` waiting phrases and running them on its own thread.

    On a CPU a batch is one phrase (see Vectorizer); on a GPU a worker takes what is waiting, with no timer: while one
    batch computes, the next one gathers. At most `limit` phrases wait, and none that would wait longer than `queue_s`
    or past its deadline; `lag_s` says how late the event loop is. A Watchdog calls `look`.
    """

    def __init__(
        self,
        encode: Encode,
        *,
        workers: int,
        limit: int,
        max_batch: int = 1,
        queue_s: float = math.inf,
        lag_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._encode = encode
        self._limit = limit
        self._max_batch = max_batch
        self._queue: asyncio.Queue[Ticket] = asyncio.Queue()
        self._lanes = [_Lane(encode) for _ in range(workers)]
        self._loops = [asyncio.create_task(self._work(lane)) for lane in range(workers)]
        self._running = 0  # phrases in the model
        self._closed = False
        self.admission = Admission(workers=workers, queue_s=queue_s, lag_s=lag_s)
        self.waiting = 0  # phrases in the queue that somebody still waits for
        self.computed = 0  # phrases that reached the model
        self.dropped = 0  # phrases dropped unrun, cancelled or late
        self.replaced = 0  # threads given up because they were stuck, and loops that died
        self.fruitless = 0  # times in a row that threads were given up and nothing was computed in between

    def wait_s(self, phrases: int) -> float:
        """When so many more phrases would be done, from now."""
        return self.admission.wait_s(self.waiting + self._running + phrases)

    def submit(self, phrases: Sequence[str], *, tokens: bool, deadline: float) -> list[Ticket]:
        """Queue all of these phrases; await each `ticket.future`. Or take none: raises Overloaded, TooLate or Draining."""
        if self._closed:
            raise Draining("this server is stopping; call another")
        if self.waiting + len(phrases) > self._limit:
            metrics.SHED.labels("queue").inc()
            raise Overloaded(
                f"{self.waiting} phrases are waiting already, and {self._limit} may",
                retry_after_ms=pause_ms(self.wait_s(0)),
            )
        self.admission.admit(self.waiting + self._running, len(phrases), deadline - time.monotonic())
        return [self._queued(phrase, tokens=tokens, deadline=deadline) for phrase in phrases]

    async def warm(self, phrases: Sequence[str]) -> None:
        """Before the first `submit`: each thread runs the model, and admission learns how long that takes, so that the
        first burst is not judged by a guess. Raises what the model raises."""
        await asyncio.gather(*(lane.run(phrases[:1], True) for lane in self._lanes))  # the slow first time
        for phrase in phrases:
            began = time.monotonic()
            await asyncio.gather(*(lane.run([phrase], True) for lane in self._lanes))
            self.admission.observe(time.monotonic() - began, 1)

    def look(self, seconds: float) -> None:
        """Give up threads that are stuck and start loops that died anew, `seconds` of this process's life after the last
        look. (A process that was stopped and went on has not lived in between, and none of its threads is stuck.)"""
        stuck = [number for number, lane in enumerate(self._lanes) if lane.stuck(seconds)]
        for number in stuck:
            self._lanes[number].give_up()
            self._lanes[number] = _Lane(self._encode)
            self._replaced("stuck")
        self.fruitless += bool(stuck)
        for number, loop in enumerate(self._loops):
            if loop.done() and not self._closed:
                error = None if loop.cancelled() else loop.exception()
                logger.error("a loop of the batcher ended; starting another", exc_info=error)
                self._loops[number] = asyncio.create_task(self._work(number))
                self._replaced("died")

    async def close(self) -> None:
        """Answer what is queued with Draining and stop the workers."""
        self._closed = True
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        while not self._queue.empty():
            _fail(self._queue.get_nowait(), Draining("this server is stopping; call another"))
        for lane in self._lanes:
            lane.leave()
        until = time.monotonic() + _LEAVING_S
        while any(lane.alive for lane in self._lanes) and time.monotonic() < until:
            await asyncio.sleep(0.001)
        self._loops.clear()  # ended tasks lead back here, and so would keep the model until a collection
        self._lanes.clear()

    def _queued(self, phrase: str, *, tokens: bool, deadline: float) -> Ticket:
        ticket = Ticket(phrase, tokens, deadline, asyncio.get_running_loop().create_future())
        ticket.future.add_done_callback(lambda _: self._waits_no_more(ticket))
        self.waiting += 1
        self._queue.put_nowait(ticket)
        return ticket

    def _waits_no_more(self, ticket: Ticket) -> None:
        """It was taken from the queue, or everybody who waited for it has gone: whichever comes first."""
        self.waiting -= ticket.waits
        ticket.waits = False

    async def _work(self, number: int) -> None:
        while True:
            batch = [await self._queue.get(), *self._gather()]
            try:
                await self._run(number, self._live(batch))
            except asyncio.CancelledError:
                for ticket in batch:
                    _fail(ticket, Draining("this server is stopping; call another"))
                raise
            finally:
                for ticket in batch:  # nothing left to do, unless something happened that nobody foresaw
                    _fail(ticket, EncodeFailed("the vectorizer failed on this phrase"))

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
            self._waits_no_more(ticket)
            if ticket.future.done():
                self._drop()
            elif ticket.deadline <= now:
                self._drop()
                _fail(ticket, TooLate("the deadline passed while the phrase was waiting"))
            else:
                live.append(ticket)
        return live

    def _drop(self) -> None:
        self.dropped += 1
        _DROPPED.inc()

    async def _run(self, number: int, batch: list[Ticket]) -> None:
        if not batch:
            return
        began = time.monotonic()
        try:
            encodings = await self._encoded(number, batch)
        except Exception as error:
            await self._failed(number, batch, error)
            return
        self._measure(batch, began)
        for ticket, encoding in zip(batch, encodings, strict=True):
            if not ticket.future.done():
                ticket.future.set_result(encoding)

    async def _encoded(self, number: int, batch: Sequence[Ticket]) -> list[Encoding]:
        phrases, tokens = [ticket.phrase for ticket in batch], any(ticket.tokens for ticket in batch)
        self._running += len(batch)
        try:
            encodings = await self._lanes[number].run(phrases, tokens)
        finally:
            self._running -= len(batch)
        if len(encodings) != len(batch):
            raise RuntimeError(f"{len(encodings)} encodings for {len(batch)} phrases; this is a bug")
        return encodings

    def _measure(self, batch: Sequence[Ticket], began: float) -> None:
        seconds = time.monotonic() - began
        self.admission.observe(seconds, len(batch))
        self.fruitless = 0
        self.computed += len(batch)
        _COMPUTED.inc(len(batch))
        metrics.ENCODE_SECONDS.labels().observe(seconds)
        metrics.BATCH_PHRASES.labels().observe(len(batch))
        for ticket in batch:
            metrics.QUEUE_SECONDS.labels().observe(began - ticket.since)

    async def _failed(self, number: int, batch: list[Ticket], error: Exception) -> None:
        """One bad phrase must not fail its batchmates: run them again one by one. Unless the thread was lost with them."""
        if isinstance(error, Stuck):
            _FAILED.inc(len(batch))
            for ticket in batch:
                _fail(ticket, error)
            return
        if len(batch) == 1:
            _FAILED.inc()
            logger.error(
                "the vectorizer failed on a phrase of %d code points", len(batch[0].phrase), exc_info=error
            )
            failure = EncodeFailed("the vectorizer failed on this phrase")
            failure.__cause__ = error
            _fail(batch[0], failure)
            return
        for ticket in batch:
            await self._run(number, self._live([ticket]))

    def _replaced(self, reason: str) -> None:
        self.replaced += 1
        metrics.BATCHER_RESTARTS.labels(reason).inc()


class _Lane:
    """A thread that runs the model. One that is stuck there cannot be stopped: it is left behind and never asked again.

    Hence a thread of our own: those of an executor cannot be replaced, and are waited for when the process ends.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._running: asyncio.Future[list[Encoding]] | None = None
        self._seconds = 0.0  # how long this run has been looked at
        self._thread = threading.Thread(target=self._loop, name="encode", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread is there."""
        return self._thread.is_alive()

    async def run(self, phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        """What the model says; raises what it raises, or Stuck."""
        loop = asyncio.get_running_loop()
        self._running, self._seconds = loop.create_future(), 0.0
        try:
            self._work.put(_Work(phrases, tokens, loop, self._running))
            return await self._running
        finally:
            self._running = None

    def stuck(self, seconds: float) -> bool:
        """Whether the run of now has taken too long, so many seconds after the last look."""
        if self._running is None:
            return False
        self._seconds += seconds
        return self._seconds > STUCK_S

    def give_up(self) -> None:
        """Answer who waits for the run of now."""
        if self._running is not None and not self._running.done():
            self._running.set_exception(
                Stuck("the vectorizer does not come back from this phrase; call another server")
            )
        logger.error("a thread has been in the vectorizer for %.0f s; another takes its place", STUCK_S)
        self.leave()

    def leave(self) -> None:
        """The thread ends when it has come out of the model."""
        self._work.put(None)

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            encodings: list[Encoding] = []
            failure: Exception | None = None
            try:
                encodings = self._encode(work.phrases, work.tokens)
            except BaseException as error:
                failure = _settable(error)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                work.loop.call_soon_threadsafe(_settle, work.future, encodings, failure)
            del work, encodings, failure


@dataclass(frozen=True, slots=True)
class _Work:
    phrases: Sequence[str]
    tokens: bool
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Encoding]]


def _settle(
    future: asyncio.Future[list[Encoding]], encodings: list[Encoding], failure: Exception | None
) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(encodings)
    else:
        future.set_exception(failure)


def _settable(error: BaseException) -> Exception:
    """A StopIteration cannot be set on a future, so its waiters would hang; SystemExit would end the event loop."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    failure = RuntimeError(f"the vectorizer raised {type(error).__name__}")
    failure.__cause__ = error
    return failure


def _fail(ticket: Ticket, error: Exception) -> None:
    if not ticket.future.done():
        ticket.future.set_exception(error)
