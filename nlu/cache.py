"""Phrase to Encoding by the cheapest way there is: cold table, this process's LRU, Redis, and last the model.

What is cached are Encodings, not answers, keyed by the vectorizer's fingerprint: retraining heads empties nothing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from annotators.annotator import Encoding
from nlu.batcher import Batcher, Ticket
from nlu.cold import ColdTable
from nlu.lru import Lru
from nlu.record import key
from nlu.redis_tier import RedisTier
from nlu.types import Source

_ENTRY_OVERHEAD = 500  # bytes of Python objects around an entry's arrays, measured


@dataclass(slots=True, eq=False)
class _Flight:
    """One phrase on its way through Redis and the model, and how many callers wait for it."""

    key: tuple[bytes, bool]
    deadline: float
    task: asyncio.Task[tuple[Encoding, Source]] | None = None
    ticket: Ticket | None = None
    waiters: int = 0

    def extend(self, deadline: float) -> None:
        """The work is worth doing as long as one caller can still use it."""
        self.deadline = max(self.deadline, deadline)
        if self.ticket is not None:
            self.ticket.deadline = self.deadline


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

    def near(self, phrase: str, *, tokens: bool) -> tuple[Encoding, Source] | None:
        """What this machine already holds, without waiting; an Encoding without token vectors misses where they are needed."""
        return self._near(key(self._fingerprint, phrase), tokens=tokens)

    async def encode(self, phrase: str, *, tokens: bool, deadline: float) -> tuple[Encoding, Source]:
        """The phrase's Encoding and where it came from. Raises Overloaded, TooLate, Draining or EncodeFailed.

        Callers of one phrase share one flight; it is cancelled only when all of them are.
        """
        phrase_key = key(self._fingerprint, phrase)
        found = self._near(phrase_key, tokens=tokens)
        if found is not None:
            return found
        flight = self._flights.get((phrase_key, tokens)) or self._flights.get((phrase_key, True))
        if flight is None:
            flight = self._flights[phrase_key, tokens] = _Flight((phrase_key, tokens), deadline)
            flight.task = asyncio.create_task(self._fetch(flight, phrase_key, phrase, tokens=tokens))
        flight.extend(deadline)
        return await self._wait(flight)

    def _near(self, phrase_key: bytes, *, tokens: bool) -> tuple[Encoding, Source] | None:
        encoding = self._lru.get(phrase_key)
        if encoding is not None and (encoding.tokens is not None or not tokens):
            return encoding, Source.LRU
        if self._cold is not None:
            encoding = self._cold.get(phrase_key)
            if encoding is not None and (encoding.tokens is not None or not tokens):
                return encoding, Source.COLD
        return None

    async def _wait(self, flight: _Flight) -> tuple[Encoding, Source]:
        task = flight.task
        if task is None:
            raise RuntimeError("a flight without a task; this is a bug")
        flight.waiters += 1
        try:
            return await asyncio.shield(task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not task.done():
                self._land(flight)  # at once: who comes before the task has ended must not board it
                task.cancel()

    async def _fetch(
        self, flight: _Flight, phrase_key: bytes, phrase: str, *, tokens: bool
    ) -> tuple[Encoding, Source]:
        try:
            if self._redis is not None:
                encoding = await self._redis.get(phrase_key, dim=self._dim, token_dim=self._token_dim)
                if encoding is not None and (encoding.tokens is not None or not tokens):
                    self._remember(phrase_key, encoding)
                    return encoding, Source.REDIS
            flight.ticket = self._batcher.submit(phrase, tokens=tokens, deadline=flight.deadline)
            encoding = await flight.ticket.future
            self._remember(phrase_key, encoding)
            if self._redis is not None:
                self._redis.put(phrase_key, encoding)
            return encoding, Source.MODEL
        finally:
            self._land(flight)

    def _remember(self, phrase_key: bytes, encoding: Encoding) -> None:
        if encoding.tokens is None and self._lru.get(phrase_key) is not None:
            return  # the same vectors, and maybe the tokens that another caller needs
        self._lru.put(phrase_key, encoding, encoding.nbytes + _ENTRY_OVERHEAD)

    def _land(self, flight: _Flight) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]
