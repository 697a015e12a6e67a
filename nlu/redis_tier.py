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

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from annotators.annotator import Encoding
from nlu.record import KEY_BYTES, pack, unpack

logger = logging.getLogger(__name__)

TIMEOUT_S = 0.020
MAX_VALUE = 64 * 1024  # bytes; 512 code points of token vectors fit, a planted 50 MB value is not fetched
_TTL_S = 24 * 3600
_FAILURES_TO_OPEN = 5
_OPEN_S = 1.0
_CONNECTIONS = 8
_MAX_WRITES = 64  # more writes than this under way are dropped: the hot path never waits for the cache
_MAC_BYTES = 16
_PREFIX = b"chorus:"


class Breaker:
    """Opens after consecutive failures; then lets one probe through per second until one succeeds."""

    def __init__(self) -> None:
        self._failures = 0
        self._closed_again = 0.0

    def allows(self) -> bool:
        """Whether to try now; a True while open is the probe."""
        if self._failures < _FAILURES_TO_OPEN:
            return True
        now = time.monotonic()
        if now < self._closed_again:
            return False
        self._closed_again = now + _OPEN_S
        return True

    @property
    def open(self) -> bool:
        """Whether calls are being refused."""
        return self._failures >= _FAILURES_TO_OPEN

    def succeeded(self) -> None:
        """A call went well."""
        self._failures = 0

    def failed(self) -> None:
        """A call failed."""
        self._failures += 1
        if self._failures == _FAILURES_TO_OPEN:
            logger.warning("redis: %d failures in a row; going on without it", self._failures)
        if self._failures >= _FAILURES_TO_OPEN:
            self._closed_again = time.monotonic() + _OPEN_S * random.uniform(0.8, 1.2)


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
        self._writes: set[asyncio.Task[None]] = set()
        self.breaker = Breaker()
        self.errors = 0  # calls that failed
        self.rejected = 0  # values that were not what their key says
        self.dropped = 0  # writes not made: too many under way, Redis gone, or larger than a read fetches

    async def get(self, phrase_key: bytes, *, dim: int, token_dim: int) -> Encoding | None:
        """The Encoding under this key, or None; never raises for anything Redis does."""
        if not self.breaker.allows():
            return None
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                value = await self._redis.getrange(_PREFIX + phrase_key, 0, MAX_VALUE)
        except (
            ResponseError
        ):  # Redis is well; somebody put another kind of value under this key, or locked us out
            self.errors += 1
            return None
        except Exception:  # a peer that is no Redis makes redis-py raise ValueError, TypeError and more
            self.errors += 1
            self.breaker.failed()
            return None
        self.breaker.succeeded()
        if not isinstance(value, bytes) or not value:
            return None
        encoding = self._open(phrase_key, value, dim=dim, token_dim=token_dim)
        self.rejected += encoding is None
        return encoding

    def put(self, phrase_key: bytes, encoding: Encoding) -> None:
        """Write in the background; dropped when Redis is behind or gone."""
        value = self._seal(phrase_key, encoding)
        if self.breaker.open or len(self._writes) >= _MAX_WRITES or len(value) > MAX_VALUE:
            self.dropped += 1
            return
        task = asyncio.create_task(self._write(phrase_key, value))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def close(self) -> None:
        """Finish writing and hang up."""
        await asyncio.gather(*self._writes, return_exceptions=True)
        with contextlib.suppress(Exception):  # hanging up can time out too
            await self._redis.aclose()

    async def _write(self, phrase_key: bytes, value: bytes) -> None:
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                await self._redis.set(
                    _PREFIX + phrase_key, value, ex=round(_TTL_S * random.uniform(0.9, 1.1))
                )
        except Exception:
            self.errors += 1
            self.breaker.failed()

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
