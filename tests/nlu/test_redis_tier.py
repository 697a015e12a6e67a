"""nlu.redis_tier against a real redis-server: what it holds comes back to the bit; everything else is a miss and a counter."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import redis

from annotators.annotator import Encoding
from nlu import redis_tier
from nlu.record import key, pack
from nlu.redis_tier import MAX_VALUE, Breaker, RedisTier
from tests.conftest import RedisServer

FINGERPRINT = "ab" * 32
HELLO, OTHER = key(FINGERPRINT, "hello"), key(FINGERPRINT, "other")
DIM, TOKEN_DIM = 3, 2
FULL = Encoding(
    np.array([0.5, -0.25, 0.125], np.float32),
    np.array([[1, 2], [3, 4]], np.float32),
    np.array([[0, 5], [6, 9]], np.int32),
)
BARE = Encoding(np.array([1, 0, -1], np.float32))
SECRET = b"of this deployment"


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A plain client with patience, to plant and to look."""
    with redis.Redis(port=redis_server.port, socket_timeout=20) as made:
        yield made


@pytest.fixture
async def tier(redis_server: RedisServer) -> AsyncIterator[RedisTier]:
    made = RedisTier(redis_server.url, secret=SECRET)
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "nlu.redis_tier")


def name(phrase_key: bytes) -> bytes:
    return b"chorus:" + phrase_key


async def get(tier: RedisTier, phrase_key: bytes = HELLO, *, dim: int = DIM) -> Encoding | None:
    return await tier.get(phrase_key, dim=dim, token_dim=TOKEN_DIM)


async def answered(tier: RedisTier, phrase_key: bytes = HELLO, *, dim: int = DIM) -> Encoding | None:
    """What Redis answers. On a busy machine it may miss its 20 ms, which is an error of the tier: then ask again."""
    for _ in range(200):
        errors = tier.errors.total()
        if not tier.breaker.open:
            found = await get(tier, phrase_key, dim=dim)
            if tier.errors.total() == errors:
                return found
        tier.breaker.succeeded()
        await asyncio.sleep(0.02)
    raise AssertionError("Redis never answered")


async def written(
    tier: RedisTier, client: redis.Redis, encoding: Encoding, phrase_key: bytes = HELLO
) -> None:
    """Write through the tier, again where the 20 ms were missed."""
    for _ in range(200):
        tier.breaker.succeeded()
        tier.put(phrase_key, encoding)
        await asyncio.sleep(0.02)
        if client.exists(name(phrase_key)):
            return
    raise AssertionError("nothing was ever written")


def plant(tier: RedisTier, client: redis.Redis, encoding: Encoding, phrase_key: bytes = HELLO) -> bytes:
    """Put what the tier would write where it would write it, at once and for good; the bytes."""
    value = tier._seal(phrase_key, encoding)
    client.set(name(phrase_key), value)
    return value


def assert_same(found: Encoding | None, expected: Encoding) -> None:
    assert found is not None
    for one, other in (
        (found.sentence, expected.sentence),
        (found.tokens, expected.tokens),
        (found.offsets, expected.offsets),
    ):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@pytest.mark.parametrize("encoding", [FULL, BARE], ids=["full", "bare"])
async def test_redis_tier_round_trip_is_bit_for_bit(
    tier: RedisTier, client: redis.Redis, encoding: Encoding
) -> None:
    await written(tier, client, encoding)
    assert_same(await answered(tier), encoding)
    assert tier.rejected == 0


async def test_redis_tier_is_shared_between_processes_of_one_secret(
    tier: RedisTier, client: redis.Redis, redis_server: RedisServer
) -> None:
    await written(tier, client, FULL)
    other = RedisTier(redis_server.url, secret=SECRET)
    assert_same(await answered(other), FULL)
    await other.close()


async def test_redis_tier_does_not_know_what_was_not_written(tier: RedisTier, client: redis.Redis) -> None:
    plant(tier, client, FULL, OTHER)
    assert await answered(tier) is None
    assert tier.rejected == 0


async def test_redis_tier_values_expire_in_about_a_day(tier: RedisTier, client: redis.Redis) -> None:
    await written(tier, client, FULL)
    assert client.ttl(name(HELLO)) == pytest.approx(24 * 3600, rel=0.11)


async def test_redis_tier_close_finishes_what_it_was_writing(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    for _ in range(100):
        tier = RedisTier(redis_server.url)
        tier.put(HELLO, FULL)
        await tier.close()
        if not tier.errors:
            break
    assert client.exists(name(HELLO))


async def test_redis_tier_close_takes_no_offence(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py gives a connection 20 ms to hang up and raises when a busy machine takes longer."""
    tier = RedisTier(redis_server.url)
    hang_up = tier._redis.aclose

    async def late() -> None:
        await hang_up()
        raise redis.TimeoutError("Timed out closing connection after 0.02")

    monkeypatch.setattr(tier._redis, "aclose", late)
    await tier.close()


# --- values that are not what their key says ---


def flipped(at: int) -> Callable[[bytes], bytes]:
    def harm(value: bytes) -> bytes:
        where = at % len(value)
        return value[:where] + bytes([value[where] ^ 1]) + value[where + 1 :]

    return harm


def resealed(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda value: RedisTier("redis://nowhere", secret=secret)._seal(HELLO, FULL)


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(flipped(0), id="mac-flipped"),
        pytest.param(flipped(16), id="key-flipped"),
        pytest.param(flipped(16 + 32), id="magic-flipped"),
        pytest.param(flipped(16 + 32 + 8), id="vector-flipped"),
        pytest.param(flipped(-1), id="last-bit-flipped"),
        pytest.param(lambda value: value[:-1], id="a-byte-short"),
        pytest.param(lambda value: value[:48], id="mac-and-key-alone"),
        pytest.param(lambda value: value[:5], id="five-bytes"),
        pytest.param(lambda value: value + b"\0", id="a-byte-long"),
        pytest.param(lambda value: value[16:], id="no-mac"),
        pytest.param(lambda value: pack(FULL), id="bare-record"),
        pytest.param(lambda value: b"\x80\x04K\x01.", id="a-pickle"),
        pytest.param(lambda value: b"{}", id="json"),
        pytest.param(lambda value: value + bytes(MAX_VALUE), id="longer-than-any-value"),
        pytest.param(resealed(b"of another deployment"), id="another-secret"),
        pytest.param(resealed(b""), id="no-secret"),
    ],
)
async def test_redis_tier_rejects(
    tier: RedisTier, client: redis.Redis, harm: Callable[[bytes], bytes]
) -> None:
    value = plant(tier, client, FULL)
    assert_same(await answered(tier), FULL)  # the control: unharmed it is accepted
    client.set(name(HELLO), harm(value))
    assert await answered(tier) is None
    assert tier.rejected == 1


async def test_redis_tier_rejects_a_value_moved_to_another_key(tier: RedisTier, client: redis.Redis) -> None:
    hello, other = plant(tier, client, FULL), plant(tier, client, BARE, OTHER)
    client.mset({name(HELLO): other, name(OTHER): hello})
    assert [await answered(tier), await answered(tier, OTHER)] == [None, None]
    assert tier.rejected == 2


async def test_redis_tier_rejects_another_width(tier: RedisTier, client: redis.Redis) -> None:
    plant(tier, client, FULL)
    assert await answered(tier, dim=DIM + 1) is None
    assert tier.rejected == 1


async def test_redis_tier_resealed_with_its_own_secret_is_accepted(
    tier: RedisTier, client: redis.Redis
) -> None:
    """The control of the two above that seal with another."""
    client.set(name(HELLO), resealed(SECRET)(b""))
    assert_same(await answered(tier), FULL)


async def test_redis_tier_does_not_fetch_a_planted_50_mb(tier: RedisTier, client: redis.Redis) -> None:
    client.set(name(HELLO), bytes(50 * 2**20))
    before = client.info("stats")["total_net_output_bytes"]
    await answered(tier)
    sent = client.info("stats")["total_net_output_bytes"] - before
    assert await answered(tier) is None
    assert tier.rejected >= 1
    assert sent < 2**20


async def test_redis_tier_empty_value_is_a_miss(tier: RedisTier, client: redis.Redis) -> None:
    client.set(name(HELLO), b"")
    assert await answered(tier) is None


async def test_redis_tier_wrong_type_is_an_error_of_that_key_alone(
    tier: RedisTier, client: redis.Redis
) -> None:
    client.lpush(name(HELLO), "x")
    plant(tier, client, FULL, OTHER)
    assert await failing(tier, 20) == [None] * 20
    assert tier.errors["other"] >= 20 - tier.errors["timeout"]
    assert not tier.breaker.open
    assert_same(await answered(tier, OTHER), FULL)


async def test_redis_tier_an_evicting_server_is_a_cache_like_any_other(
    tier: RedisTier, client: redis.Redis
) -> None:
    used = client.info("memory")["used_memory"]
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("maxmemory", used + 300_000)
    keys = [key(FINGERPRINT, f"{i}") for i in range(2000)]
    for phrase_key in keys:
        plant(tier, client, FULL, phrase_key)
    assert 0 < client.dbsize() < len(keys)
    found = [await answered(tier, phrase_key) for phrase_key in keys[::50]]
    for encoding in found:
        if encoding is not None:
            assert_same(encoding, FULL)
    assert any(encoding is None for encoding in found)
    assert tier.rejected == 0


async def test_redis_tier_ten_thousand_poisoned_values_serve_nothing(
    tier: RedisTier, client: redis.Redis
) -> None:
    """Each key holds the sealed value of its neighbour, another vectorizer's, or half of its own."""
    keys = [key(FINGERPRINT, f"{i}") for i in range(10_001)]
    values = [tier._seal(phrase_key, BARE) for phrase_key in keys]
    theirs = [tier._seal(key("cd" * 32, f"{i}"), BARE) for i in range(len(keys))]
    poison = [(values[i + 1], theirs[i], values[i][:40])[i % 3] for i in range(10_000)]
    with client.pipeline(transaction=False) as pipe:
        for phrase_key, value in zip(keys, poison, strict=False):
            pipe.set(name(phrase_key), value)
        pipe.set(name(keys[-1]), values[-1])
        pipe.execute()
    served = [await answered(tier, phrase_key) for phrase_key in keys]
    assert served[:-1] == [None] * 10_000
    assert_same(served[-1], BARE)  # the control: a value under its own key
    assert tier.rejected == 10_000


async def test_redis_tier_a_full_server_costs_only_the_write(tier: RedisTier, client: redis.Redis) -> None:
    plant(tier, client, FULL)
    client.config_set("maxmemory", 1)
    while tier.errors["full"] < 10:
        tier.put(OTHER, FULL)
        await asyncio.sleep(0.005)
        if tier.breaker.open:  # by time-outs of a busy machine
            tier.breaker.succeeded()
    assert not client.exists(name(OTHER))
    assert_same(await answered(tier), FULL)


# --- locked out ---


async def test_redis_tier_a_locked_server_opens_the_breaker(
    redis_server: RedisServer, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "nlu.redis_tier")
    client.config_set("requirepass", "x")
    tier = RedisTier(redis_server.url)
    await opening(tier)
    assert tier.errors["auth"] >= 1
    assert len([line for line in caplog.messages if "going on without it" in line]) == 1
    client.config_set("requirepass", "")
    assert await recovered(tier)
    await tier.close()


async def test_redis_tier_a_password_that_changes_locks_out_new_connections(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    client.config_set("requirepass", "old")
    client.auth("old")
    url = redis_server.url.replace("redis://", "redis://:old@")
    tier = RedisTier(url, secret=SECRET)
    plant(tier, client, FULL)
    assert_same(await answered(tier), FULL)
    client.config_set("requirepass", "new")
    client.client_kill_filter(_type="normal", skipme=True)
    await opening(tier)
    assert tier.errors["auth"] >= 1
    client.config_set("requirepass", "old")
    assert await recovered(tier)
    assert_same(await answered(tier), FULL)
    await tier.close()


async def test_redis_tier_a_user_without_rights_opens_the_breaker(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    """The probe asks what was refused, not PING, which this user may."""
    client.acl_setuser("cache", enabled=True, passwords=["+x"], keys=["*"], commands=["+ping", "+set"])
    tier = RedisTier(redis_server.url.replace("redis://", "redis://cache:x@"), secret=SECRET)
    await opening(tier)
    assert tier.errors["auth"] >= 5 - tier.errors["timeout"]
    probed = tier.errors.total()
    while tier.errors.total() == probed:
        await get(tier)
        await asyncio.sleep(0.02)
    assert tier.breaker.open
    client.acl_setuser("cache", commands=["+getrange"])
    assert await recovered(tier)
    await tier.close()


async def test_redis_tier_a_user_who_may_only_read_reads(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    client.acl_setuser("reader", enabled=True, passwords=["+x"], keys=["*"], commands=["+getrange"])
    tier = RedisTier(redis_server.url.replace("redis://", "redis://reader:x@"), secret=SECRET)
    plant(tier, client, FULL)
    assert_same(await answered(tier), FULL)
    for _ in range(20):
        tier.put(OTHER, FULL)
        await asyncio.sleep(0.005)
    assert tier.errors["auth"] >= 5
    tier.breaker.succeeded()  # whatever time-outs a busy machine had
    assert_same(await answered(tier), FULL)
    assert not client.exists(name(OTHER))
    await tier.close()


# --- writes ---


async def test_redis_tier_drops_writes_when_too_many_are_under_way(tier: RedisTier) -> None:
    for i in range(100):
        tier.put(key(FINGERPRINT, f"{i}"), BARE)
    assert tier.dropped == 100 - 64


async def test_redis_tier_drops_writes_while_the_breaker_is_open(
    tier: RedisTier, client: redis.Redis
) -> None:
    for _ in range(5):
        tier.breaker.failed("timeout")
    tier.put(HELLO, BARE)
    assert tier.dropped == 1
    await asyncio.sleep(0.02)
    assert not client.exists(name(HELLO))


@pytest.mark.parametrize(("words", "dropped"), [(1000, 0), (10_000, 1)])
async def test_redis_tier_drops_a_write_it_would_never_read(
    tier: RedisTier, words: int, dropped: int
) -> None:
    huge = Encoding(BARE.sentence, np.zeros((words, TOKEN_DIM), np.float32), np.zeros((words, 2), np.int32))
    tier.put(HELLO, huge)
    assert tier.dropped == dropped


# --- servers that are gone, frozen, or no Redis at all ---


async def failing(tier: RedisTier, times: int) -> list[Encoding | None]:
    return [await get(tier) for _ in range(times)]


async def opening(tier: RedisTier) -> None:
    """Ask until the breaker is open; five failures do."""
    for _ in range(50):
        if tier.breaker.open:
            return
        await get(tier)
    raise AssertionError("the breaker never opened")


async def recovered(tier: RedisTier) -> bool:
    """Whether the breaker's probes, one a second, find the server well again."""
    for _ in range(400):
        await get(tier)
        if not tier.breaker.open:
            return True
        await asyncio.sleep(0.02)
    return False


async def test_redis_tier_killed_server_opens_the_breaker_after_five(
    tier: RedisTier, client: redis.Redis, redis_server: RedisServer
) -> None:
    plant(tier, client, FULL)
    assert_same(await answered(tier), FULL)
    redis_server.stop()
    errors = tier.errors.total()
    assert await failing(tier, 4) == [None] * 4
    assert not tier.breaker.open
    assert await failing(tier, 50) == [None] * 50
    assert tier.breaker.open
    assert tier.errors.total() <= errors + 6  # nobody knocks while it is open, but for a probe after a second


async def test_redis_tier_recovers_after_a_restart(
    tier: RedisTier, redis_server: RedisServer, client: redis.Redis
) -> None:
    redis_server.stop()
    await failing(tier, 5)
    assert tier.breaker.open
    redis_server.restart()
    assert await recovered(tier)
    await written(tier, client, FULL)
    assert_same(await answered(tier), FULL)


async def test_redis_tier_survives_a_frozen_server(
    tier: RedisTier, redis_server: RedisServer, client: redis.Redis
) -> None:
    plant(tier, client, FULL)
    assert_same(await answered(tier), FULL)
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        assert await failing(tier, 5) == [None] * 5
        assert tier.breaker.open
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
    assert await recovered(tier)
    assert_same(await answered(tier), FULL)  # no late answer to an earlier question is taken for this one's


async def test_redis_tier_nobody_waits_for_a_frozen_server_once_the_breaker_is_open(
    tier: RedisTier, redis_server: RedisServer, client: redis.Redis
) -> None:
    """The probes neither: an open breaker answers before the event loop does anything else."""
    plant(tier, client, FULL)
    assert_same(await answered(tier), FULL)
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        await opening(tier)
        probed, waited = tier.errors.total(), 0
        for _ in range(500):
            asking = asyncio.create_task(get(tier))
            await asyncio.sleep(0)
            waited += not asking.done()
            assert await asking is None
            await asyncio.sleep(0.005)
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
    assert waited == 0
    assert 1 <= tier.errors.total() - probed <= 5  # the probes of two or three seconds
    assert await recovered(tier)


async def test_redis_tier_who_asks_a_frozen_server_at_once_waits_at_once(
    tier: RedisTier, redis_server: RedisServer, client: redis.Redis
) -> None:
    """A hundred callers at the moment it freezes: all wait for one time-out, together, and the next one for none."""
    plant(tier, client, FULL)
    assert_same(await answered(tier), FULL)
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        asking = [asyncio.create_task(get(tier)) for _ in range(100)]
        assert await asyncio.gather(*asking) == [None] * 100
        assert tier.breaker.open
        late = asyncio.create_task(get(tier))
        await asyncio.sleep(0)
        assert late.done()
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
    assert await recovered(tier)


async def test_redis_tier_a_slow_server_opens_the_breaker(redis_server: RedisServer) -> None:
    """Every answer comes, 50 ms late."""

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", redis_server.port)
        try:
            while data := await reader.read(65536):
                back.write(data)
                answer = await there.read(65536)
                await asyncio.sleep(0.05)
                writer.write(answer)
                await writer.drain()
        finally:
            back.close()

    async with peer(slow) as url:
        tier = RedisTier(url, secret=SECRET)
        await opening(tier)
        assert tier.errors.total() == tier.errors["timeout"] == 5
        await tier.close()


async def test_redis_tier_flapping_server_never_raises_and_comes_back(
    tier: RedisTier, redis_server: RedisServer, client: redis.Redis
) -> None:
    for _ in range(3):
        for _ in range(50):
            await get(tier)
            tier.put(HELLO, FULL)
            await asyncio.sleep(0.01)
        redis_server.stop()
        for _ in range(50):
            assert await get(tier) is None
            tier.put(HELLO, FULL)
            await asyncio.sleep(0.01)
        redis_server.restart()
    assert await recovered(tier)
    assert tier.rejected == 0


async def test_redis_tier_frozen_server_does_not_hold_up_writers(
    tier: RedisTier, redis_server: RedisServer
) -> None:
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        for i in range(10):
            tier.put(key(FINGERPRINT, f"{i}"), FULL)
        await asyncio.wait_for(tier.close(), 20)
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
    assert tier.errors.total() == 10


async def test_redis_tier_absent_server_is_a_miss(redis_server: RedisServer) -> None:
    redis_server.stop()
    tier = RedisTier(redis_server.url)
    tier.put(HELLO, FULL)
    assert await get(tier) is None
    await tier.close()
    assert tier.errors.total() == 2


async def test_redis_tier_a_caller_may_be_cancelled(
    tier: RedisTier, redis_server: RedisServer, client: redis.Redis
) -> None:
    """The connection it used is not handed on with an answer still to come."""
    plant(tier, client, FULL)
    plant(tier, client, BARE, OTHER)
    redis_server.process.send_signal(signal.SIGSTOP)
    caller = asyncio.create_task(get(tier, OTHER))
    for _ in range(3):
        await asyncio.sleep(0)
    caller.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await caller
    redis_server.process.send_signal(signal.SIGCONT)
    assert_same(await answered(tier), FULL)
    assert tier.rejected == 0


Speak = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def peer(speak: Speak) -> AsyncIterator[str]:
    """The URL of a server that is no Redis; its connections are closed in the end."""
    calls: list[asyncio.Task[None]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await speak(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(asyncio.create_task(answer(reader, writer)))

    server = await asyncio.start_server(called, "127.0.0.1", 0)
    yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    server.close()
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize(
    "reply",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\xff\r\n", b"+OK\r\n", b":12\r\n", b"-ERR no\r\n", b"$abc\r\n", b"$-5\r\n",
     b"$5\r\nabc", b"*1000000000\r\n", b"%x\r\n", b"(zz\r\n", b",zz\r\n", b"%1\r\n*1\r\n+x\r\n+y\r\n", b">2\r\n+x\r\n+y\r\n", b"_\r\n"],
    ids=ascii,
)  # fmt: skip
async def test_redis_tier_never_raises_whatever_the_peer_says(reply: bytes) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while reply and await reader.read(1000):
            writer.write(reply * 9)
            await writer.drain()

    async with peer(speak) as url:
        tier = RedisTier(url)
        assert await failing(tier, 3) == [None] * 3
        tier.put(HELLO, FULL)
        await tier.close()


async def test_redis_tier_does_not_wait_for_a_peer_that_drips() -> None:
    """Every byte comes within the socket's timeout, and the last one never."""
    done = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"$100000\r\n")
        for _ in range(400):
            writer.write(b"x")
            await asyncio.sleep(0.005)
        done.set()

    async with peer(drip) as url:
        tier = RedisTier(url)
        assert await get(tier) is None
        assert tier.errors.total() == 1
        assert not done.is_set()
        await tier.close()


# --- the breaker ---


class Clock(SimpleNamespace):
    """The time module as the breaker sees it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(redis_tier, "time", made)
    return made


def opened() -> Breaker:
    breaker = Breaker()
    for _ in range(5):
        breaker.failed("timeout")
    return breaker


@pytest.mark.parametrize(("failures", "opens"), [(0, False), (4, False), (5, True), (6, True)])
def test_redis_tier_breaker_opens_after_five_failures(clock: Clock, failures: int, opens: bool) -> None:
    breaker = Breaker()
    for _ in range(failures):
        breaker.failed("timeout")
    assert breaker.open == opens
    assert not breaker.probes()


def test_redis_tier_breaker_counts_failures_in_a_row(clock: Clock) -> None:
    breaker = Breaker()
    for _ in range(20):
        for _ in range(4):
            breaker.failed("timeout")
        breaker.succeeded()
    assert not breaker.open


@pytest.mark.parametrize(("seconds", "probes"), [(0.0, False), (0.79, False), (1.21, True)])
def test_redis_tier_breaker_waits_about_a_second(clock: Clock, seconds: float, probes: bool) -> None:
    breaker = opened()
    clock.now += seconds
    assert breaker.probes() == probes


def test_redis_tier_breaker_lets_one_probe_through(clock: Clock) -> None:
    breaker = opened()
    clock.now += 1.21
    assert [breaker.probes() for _ in range(5)] == [True, False, False, False, False]


def test_redis_tier_breaker_stays_open_when_the_probe_fails(clock: Clock) -> None:
    breaker = opened()
    clock.now += 1.21
    breaker.probes()
    breaker.failed("timeout")
    clock.now += 0.79
    assert not breaker.probes()
    clock.now += 0.42
    assert breaker.probes()


def test_redis_tier_breaker_closes_when_the_probe_succeeds(clock: Clock) -> None:
    breaker = opened()
    clock.now += 1.21
    breaker.probes()
    breaker.succeeded()
    assert not breaker.open


def test_redis_tier_breaker_warns_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "nlu.redis_tier")
    breaker = opened()
    for _ in range(20):
        breaker.failed("timeout")
    assert [record.getMessage() for record in caplog.records] == [
        "redis: 5 failures in a row (timeout); going on without it"
    ]
