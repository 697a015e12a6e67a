"""The cache tier that pods share. Redis is optional always: absent, slow, full or poisoned, it is a miss and a counter.

redis-py's defaults (5 s timeouts, 10 retries) would hold a request for seconds, hence 20 ms, no retries and a breaker.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import Coroutine

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    OutOfMemoryError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from annotators.annotator import Encoding
from nlu import metrics
from nlu.record import KEY_BYTES, pack, unpack

logger = logging.getLogger(__name__)

TIMEOUT_S = 0.020  # of each step: a place in the pool, a connection, an answer
_AT_MOST_S = (
    0.022  # and of all of them, so that redis-py's own time-outs come first where one step is to blame
)
MAX_VALUE = 64 * 1024  # bytes; 512 code points of token vectors fit, a planted 50 MB value is not fetched
_TTL_S = 24 * 3600
_FAILURES_TO_OPEN = 5
_OPEN_S = 1.0
_CONNECTIONS = 8
_MAX_WRITES = 64  # more writes than this under way are dropped: the hot path never waits for the cache
_MAC_BYTES = 16
_PREFIX = b"chorus:"
_REASONS: dict[str, tuple[type[Exception], ...]] = {  # the first that fits
    "auth": (AuthenticationError, AuthorizationError, NoPermissionError),
    "full": (OutOfMemoryError,),
    "timeout": (TimeoutError, RedisTimeoutError),
    "connection": (OSError, RedisConnectionError),
}


class Breaker:
    """Opens after consecutive failures; then it is time for one probe per second, until one succeeds."""

    def __init__(self) -> None:
        self._failures = 0
        self._next_probe = 0.0

    @property
    def open(self) -> bool:
        """Whether Redis is to be left alone."""
        return self._failures >= _FAILURES_TO_OPEN

    def probes(self) -> bool:
        """Whether it is time to try again; True once, then not before another second has passed."""
        now = time.monotonic()
        if not self.open or now < self._next_probe:
            return False
        self._next_probe = now + _OPEN_S
        return True

    def succeeded(self) -> None:
        """A call went well."""
        if self.open:
            logger.warning("redis: it answers again")
        self._failures = 0

    def failed(self, reason: str) -> None:
        """A call failed."""
        self._failures += 1
        if self._failures == _FAILURES_TO_OPEN:
            logger.warning("redis: %d failures in a row (%s); going on without it", self._failures, reason)
        if self.open:
            self._next_probe = time.monotonic() + _OPEN_S * random.uniform(0.8, 1.2)


class RedisTier:
    """Encodings in Redis. A value repeats its key and is authenticated with the deployment's secret."""

    def __init__(self, url: str, *, secret: bytes = b"") -> None:
        # A cold burst waits its turn for a few connections: opening one for everybody at once takes longer than 20 ms.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
        )
        self._redis: Redis = Redis.from_pool(pool)
        self._secret = hashlib.blake2b(secret, digest_size=32).digest()
        self._background: set[asyncio.Task[None]] = set()  # writes, and the probe
        self.breaker = Breaker()
        self.errors: Counter[str] = Counter()  # calls that failed, by reason
        self.rejected = 0  # values that were not what their key says
        self.dropped = 0  # writes not made: too many under way, Redis gone, or larger than a read fetches

    async def get(self, phrase_key: bytes, *, dim: int, token_dim: int) -> Encoding | None:
        """The Encoding under this key, or None; never raises for anything Redis does. While the breaker is open nobody
        waits for anything, not even for the probe."""
        if self.breaker.open:
            self.probe(phrase_key)
            return None
        value = await self._read(phrase_key)
        if not value:
            return None
        encoding = self._open(phrase_key, value, dim=dim, token_dim=token_dim)
        if encoding is None:
            self.rejected += 1
            metrics.REDIS_REJECTED.inc()
        return encoding

    def probe(self, phrase_key: bytes) -> None:
        """Ask in the background, at most once a second, whether Redis is well again: the very question it failed at."""
        if self.breaker.probes():
            self._later(self._probe(phrase_key))

    def put(self, phrase_key: bytes, encoding: Encoding) -> None:
        """Write in the background; dropped when Redis is behind or gone."""
        value = self._seal(phrase_key, encoding)
        if self.breaker.open or len(self._background) >= _MAX_WRITES or len(value) > MAX_VALUE:
            self.dropped += 1
            metrics.REDIS_DROPPED.inc()
            return
        self._later(self._write(phrase_key, value))

    async def close(self) -> None:
        """Finish writing and hang up."""
        await asyncio.gather(*self._background, return_exceptions=True)
        with contextlib.suppress(Exception):  # hanging up can time out too
            await self._redis.aclose()

    async def _read(self, phrase_key: bytes) -> bytes | None:
        """What is there, up to a byte more than a value has; None where nothing is, or the call failed."""
        try:
            async with asyncio.timeout(_AT_MOST_S):
                value = await self._redis.getrange(_PREFIX + phrase_key, 0, MAX_VALUE)
        except (
            Exception
        ) as error:  # a peer that is no Redis makes redis-py raise ValueError, TypeError and more
            reason = self._failed(error)
            if not isinstance(error, ResponseError) or reason == "auth":
                self.breaker.failed(reason)
            return None  # else Redis is well, and somebody put another kind of value under this key
        self.breaker.succeeded()
        return value if isinstance(value, bytes) else None

    async def _probe(self, phrase_key: bytes) -> None:
        await self._read(phrase_key)

    async def _write(self, phrase_key: bytes, value: bytes) -> None:
        try:
            async with asyncio.timeout(_AT_MOST_S):
                await self._redis.set(
                    _PREFIX + phrase_key, value, ex=round(_TTL_S * random.uniform(0.9, 1.1))
                )
        except Exception as error:
            reason = self._failed(error)
            if not isinstance(
                error, ResponseError
            ):  # a Redis that is full, or ours only to read, still answers
                self.breaker.failed(reason)

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _failed(self, error: Exception) -> str:
        reason = next((name for name, kinds in _REASONS.items() if isinstance(error, kinds)), "other")
        self.errors[reason] += 1
        metrics.REDIS_ERRORS.labels(reason).inc()
        return reason

    def _seal(self, phrase_key: bytes, encoding: Encoding) -> bytes:
        body = phrase_key + pack(encoding)
        return self._mac(body) + body

    def _open(self, phrase_key: bytes, value: bytes, *, dim: int, token_dim: int) -> Encoding | None:
        mac, body = value[:_MAC_BYTES], value[_MAC_BYTES:]
        if mac != self._mac(body) or body[:KEY_BYTES] != phrase_key:
            return None
        return unpack(body[KEY_BYTES:], dim=dim, token_dim=token_dim)

    def _mac(self, body: bytes) -> bytes:
        return hashlib.blake2b(body, digest_size=_MAC_BYTES, key=self._secret).digest()
