"""Phrases to Encodings by the cheapest way there is: cold table, this process's LRU, Redis, and last the model.

What is cached are Encodings, not answers, keyed by the vectorizer's fingerprint: retraining heads empties nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from annotators.annotator import Encoding
from nlu.batcher import Batcher, Ticket
from nlu.cold import ColdTable
from nlu.errors import TooLate
from nlu.lru import Lru
from nlu.record import key
from nlu.redis_tier import RedisTier
from nlu.types import Source

_ENTRY_OVERHEAD = 500  # bytes of Python objects around an entry's arrays, measured

Found = tuple[Encoding, Source]


@dataclass(slots=True, eq=False)
class _Flight:
    """One phrase on its way through the model, and how many callers wait for it."""

    key: tuple[bytes, bool]
    ticket: Ticket
    waiters: int = 0


class EncodingCache:
    """The tiers in front of one vectorizer. The LRU and Redis outlive it: their keys carry the fingerprint."""

    def __init__(
        self,
        fingerprint: str,
        *,
        dim: int,
        token_dim: int,
        cold: ColdTable | None,
        lru: Lru[Encoding],
        redis: RedisTier | None,
        batcher: Batcher,
    ) -> None:
        self._fingerprint = fingerprint
        self._dim, self._token_dim = dim, token_dim
        self._cold, self._lru, self._redis, self._batcher = cold, lru, redis, batcher
        self._flights: dict[tuple[bytes, bool], _Flight] = {}
        self._asked: dict[bytes, asyncio.Task[Encoding | None]] = {}  # of Redis

    def near(self, phrase: str, *, tokens: bool) -> Found | None:
        """What this machine already holds, without waiting; an Encoding without token vectors misses where they are needed."""
        return self._near(key(self._fingerprint, phrase), tokens=tokens)

    def wait_s(self, phrases: int) -> float:
        """How long so many phrases that only the model knows are expected to take."""
        return self._batcher.wait_s(phrases)

    async def encode(self, phrases: Sequence[str], *, tokens: bool, deadline: float) -> list[Found]:
        """The Encodings of one request's phrases, in order, and where each came from.

        All or nothing: raises Overloaded, TooLate or Draining before the first is computed; EncodeFailed, Stuck or
        TooLate later, and then nothing more is computed for this request. Requests for the same phrase share one flight,
        which is cancelled when all of them are gone.
        """
        keys = {phrase: key(self._fingerprint, phrase) for phrase in phrases}
        found: dict[str, Found] = {}
        for phrase, phrase_key in keys.items():
            near = self._near(phrase_key, tokens=tokens)
            if near is not None:
                found[phrase] = near
        missing = [phrase for phrase in keys if phrase not in found]
        if missing and self._redis is not None:
            found |= await self._shared(self._redis, missing, keys, tokens=tokens)
            missing = [phrase for phrase in keys if phrase not in found]
        if missing:
            found |= await self._computed(missing, keys, tokens=tokens, deadline=deadline)
        return [found[phrase] for phrase in phrases]

    def _near(self, phrase_key: bytes, *, tokens: bool) -> Found | None:
        encoding = self._lru.get(phrase_key)
        if encoding is not None and (encoding.tokens is not None or not tokens):
            return encoding, Source.LRU
        if self._cold is not None:
            encoding = self._cold.get(phrase_key)
            if encoding is not None and (encoding.tokens is not None or not tokens):
                return encoding, Source.COLD
        return None

    async def _shared(
        self, redis: RedisTier, phrases: Sequence[str], keys: dict[str, bytes], *, tokens: bool
    ) -> dict[str, Found]:
        """What Redis has of them, asked once however many callers wait. It takes milliseconds at most, so that nobody
        needs to call it off."""
        if redis.breaker.open:
            redis.probe(keys[phrases[0]])
            return {}
        asked = [self._ask(redis, keys[phrase]) for phrase in phrases]
        await asyncio.wait(asked)
        found = {}
        for phrase, task in zip(phrases, asked, strict=True):
            encoding = None if task.cancelled() else task.result()
            if encoding is not None and (encoding.tokens is not None or not tokens):
                self._remember(keys[phrase], encoding)
                found[phrase] = encoding, Source.REDIS
        return found

    def _ask(self, redis: RedisTier, phrase_key: bytes) -> asyncio.Task[Encoding | None]:
        task = self._asked.get(phrase_key)
        if task is None:
            task = asyncio.create_task(redis.get(phrase_key, dim=self._dim, token_dim=self._token_dim))
            self._asked[phrase_key] = task
            task.add_done_callback(lambda _: self._asked.pop(phrase_key, None))
        return task

    async def _computed(
        self, phrases: Sequence[str], keys: dict[str, bytes], *, tokens: bool, deadline: float
    ) -> dict[str, Found]:
        """Ride on the flights that are under way, and start the others."""
        flights = {phrase: self._flight(keys[phrase], tokens=tokens) for phrase in phrases}
        new = [phrase for phrase, flight in flights.items() if flight is None]
        tickets = self._batcher.submit(new, tokens=tokens, deadline=deadline) if new else []
        started = {
            phrase: self._start(keys[phrase], ticket) for phrase, ticket in zip(new, tickets, strict=True)
        }
        ridden = {phrase: flight or started[phrase] for phrase, flight in flights.items()}
        for flight in ridden.values():
            flight.waiters += 1
            # The work is worth doing as long as one caller can still use it.
            flight.ticket.deadline = max(flight.ticket.deadline, deadline)
        try:
            await _all_done([flight.ticket.future for flight in ridden.values()], deadline)
            return {
                phrase: (flight.ticket.future.result(), Source.MODEL) for phrase, flight in ridden.items()
            }
        finally:
            for flight in ridden.values():
                self._leave(flight)

    def _flight(self, phrase_key: bytes, *, tokens: bool) -> _Flight | None:
        """One to ride on."""
        return self._flights.get((phrase_key, tokens)) or self._flights.get((phrase_key, True))

    def _start(self, phrase_key: bytes, ticket: Ticket) -> _Flight:
        flight = _Flight((phrase_key, ticket.tokens), ticket)
        self._flights[flight.key] = flight
        ticket.future.add_done_callback(partial(self._landed, flight))
        return flight

    def _landed(self, flight: _Flight, future: asyncio.Future[Encoding]) -> None:
        self._forget(flight)
        if future.cancelled() or future.exception() is not None:
            return
        encoding, phrase_key = future.result(), flight.key[0]
        self._remember(phrase_key, encoding)
        if self._redis is not None:
            self._redis.put(phrase_key, encoding)

    def _leave(self, flight: _Flight) -> None:
        flight.waiters -= 1
        if not flight.waiters and not flight.ticket.future.done():
            self._forget(
                flight
            )  # at once: who comes before the cancellation has come through must not board it
            flight.ticket.future.cancel()

    def _forget(self, flight: _Flight) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def _remember(self, phrase_key: bytes, encoding: Encoding) -> None:
        if encoding.tokens is None and self._lru.get(phrase_key) is not None:
            return  # the same vectors, and maybe the tokens that another caller needs
        self._lru.put(phrase_key, encoding, encoding.nbytes + _ENTRY_OVERHEAD)


async def _all_done(futures: Sequence[asyncio.Future[Encoding]], deadline: float) -> None:
    """Until all have a result; raises as soon as one fails, or when it is too late for all."""
    done, pending = await asyncio.wait(
        futures, timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_EXCEPTION
    )
    for future in done:
        future.result()
    if pending:
        raise TooLate("the deadline passed while the phrase was waiting")
