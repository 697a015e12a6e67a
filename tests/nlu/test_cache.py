"""nlu.cache: the cheapest tier answers, one flight per phrase, and what callers' cancellations do and do not end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from annotators.annotator import Encoding
from nlu import cold
from nlu.batcher import Batcher
from nlu.cache import EncodingCache
from nlu.cold import ColdTable
from nlu.errors import Draining, EncodeFailed, Overloaded, TooLate
from nlu.lru import Lru
from nlu.record import key
from nlu.redis_tier import RedisTier
from nlu.types import Source
from tests.conftest import RedisServer

MINE, THEIRS = "aa" * 32, "bb" * 32
FAR = time.monotonic() + 3600
DIM, TOKEN_DIM = 2, 1


def bare(number: float) -> Encoding:
    return Encoding(np.array([number, 0], np.float32))


def full(number: float) -> Encoding:
    return Encoding(
        np.array([number, 0], np.float32), np.array([[number]], np.float32), np.array([[0, 1]], np.int32)
    )


class Model:
    """Numbers its answers from 1 and remembers what it was asked; waits while held; cannot take "poison"."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.busy = threading.Event()

    def __call__(self, phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        self.asked += phrases
        self.busy.set()
        if not self.open.wait(20):
            raise RuntimeError("nobody let the model go")
        if "poison" in phrases:
            raise ValueError("a phrase this model cannot take")
        return [(full if tokens else bare)(len(self.asked)) for _ in phrases]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
async def batcher(model: Model) -> AsyncIterator[Batcher]:
    made = Batcher(model, workers=1, limit=4)
    yield made
    model.open.set()
    await made.close()


def cache_of(
    batcher: Batcher,
    *,
    fingerprint: str = MINE,
    cold: ColdTable | None = None,
    lru: Lru[Encoding] | None = None,
    redis: RedisTier | None = None,
) -> EncodingCache:
    return EncodingCache(
        fingerprint,
        dim=DIM,
        token_dim=TOKEN_DIM,
        cold=cold,
        lru=Lru(2**20) if lru is None else lru,
        redis=redis,
        batcher=batcher,
    )


def table(folder: Path, phrase: str, encoding: Encoding, *, fingerprint: str = MINE) -> ColdTable:
    cold.write(folder, [(phrase, encoding)], fingerprint=fingerprint, dim=DIM, token_dim=TOKEN_DIM)
    return ColdTable(folder)


def number(found: tuple[Encoding, Source]) -> tuple[float, Source]:
    return float(found[0].sentence[0]), found[1]


async def held(batcher: Batcher, model: Model) -> asyncio.Future[Encoding]:
    """Keep the model busy with another phrase."""
    model.open.clear()
    model.busy.clear()
    ticket = batcher.submit(["before"], tokens=False, deadline=FAR)[0]
    await asyncio.to_thread(model.busy.wait, 20)
    return ticket.future


async def encode(
    cache: EncodingCache, phrase: str, *, tokens: bool, deadline: float
) -> tuple[Encoding, Source]:
    """Of a request of one phrase."""
    return (await cache.encode([phrase], tokens=tokens, deadline=deadline))[0]


async def settled(
    *tasks: asyncio.Task[tuple[Encoding, Source]],
) -> list[tuple[Encoding, Source] | BaseException]:
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)


# --- the tiers ---


async def test_cache_asks_the_model_once_and_then_itself(batcher: Batcher, model: Model) -> None:
    cache = cache_of(batcher)
    assert number(await encode(cache, "x", tokens=True, deadline=FAR)) == (1, Source.MODEL)
    assert number(await encode(cache, "x", tokens=True, deadline=FAR)) == (1, Source.LRU)
    assert model.asked == ["x"]


async def test_cache_takes_the_cold_table_before_the_model(
    batcher: Batcher, model: Model, tmp_path: Path
) -> None:
    cache = cache_of(batcher, cold=table(tmp_path, "x", full(7)))
    assert number(await encode(cache, "x", tokens=True, deadline=FAR)) == (7, Source.COLD)
    assert model.asked == []


async def test_cache_takes_its_own_memory_before_the_cold_table(batcher: Batcher, tmp_path: Path) -> None:
    lru = Lru[Encoding](2**20)
    lru.put(key(MINE, "x"), full(8), 1)
    cache = cache_of(batcher, lru=lru, cold=table(tmp_path, "x", full(7)))
    assert number(await encode(cache, "x", tokens=True, deadline=FAR)) == (8, Source.LRU)


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[RedisTier]:
    tier = RedisTier(redis_server.url, secret=b"test")
    yield tier
    await tier.close()


async def from_redis(
    batcher: Batcher, redis: RedisTier, *, tokens: bool
) -> tuple[EncodingCache, tuple[Encoding, Source]]:
    """What Redis answers a cache with nothing in memory, and that cache.

    On a busy machine Redis may miss its 20 ms, which is a miss by design: then ask again.
    """
    for _ in range(100):
        cache = cache_of(batcher, redis=redis)
        found = await encode(cache, "x", tokens=tokens, deadline=FAR)
        if found[1] is Source.REDIS:
            return cache, found
        await asyncio.sleep(0.05)
    raise AssertionError("Redis never answered")


async def test_cache_takes_redis_before_the_model(batcher: Batcher, model: Model, redis: RedisTier) -> None:
    _, found = await from_redis(batcher, redis, tokens=True)
    assert model.asked
    assert found[0].sentence[0] == len(model.asked)  # what the model said last is what Redis holds
    assert found[0].tokens is not None


async def test_cache_remembers_what_redis_said(batcher: Batcher, redis: RedisTier) -> None:
    cache, found = await from_redis(batcher, redis, tokens=True)
    again = await encode(cache, "x", tokens=True, deadline=FAR)
    assert again[1] is Source.LRU
    assert again[0] is found[0]


async def test_cache_without_redis_goes_on(batcher: Batcher, redis_server: RedisServer) -> None:
    redis_server.stop()
    tier = RedisTier(redis_server.url)
    cache = cache_of(batcher, redis=tier)
    assert number(await encode(cache, "x", tokens=True, deadline=FAR)) == (1, Source.MODEL)
    await tier.close()


async def test_cache_memory_stays_within_its_budget(batcher: Batcher) -> None:
    """A bare Encoding weighs its arrays and 500 bytes of Python objects."""
    lru = Lru[Encoding](3 * (500 + 4 * DIM))
    cache = cache_of(batcher, lru=lru)
    for i in range(9):
        await encode(cache, f"{i}", tokens=False, deadline=FAR)
    assert [cache.near(f"{i}", tokens=False) is not None for i in range(9)] == [False] * 6 + [True] * 3
    assert lru.nbytes == 3 * (500 + 4 * DIM)


async def test_cache_memory_without_tokens_misses_where_they_are_needed(
    batcher: Batcher, model: Model
) -> None:
    cache = cache_of(batcher)
    assert number(await encode(cache, "x", tokens=False, deadline=FAR)) == (1, Source.MODEL)
    assert number(await encode(cache, "x", tokens=False, deadline=FAR)) == (1, Source.LRU)  # the control
    found = await encode(cache, "x", tokens=True, deadline=FAR)
    assert number(found) == (2, Source.MODEL)
    assert found[0].tokens is not None


async def test_cache_cold_without_tokens_misses_where_they_are_needed(
    batcher: Batcher, tmp_path: Path
) -> None:
    cache = cache_of(batcher, cold=table(tmp_path, "x", bare(7)))
    assert number(await encode(cache, "x", tokens=False, deadline=FAR)) == (7, Source.COLD)  # the control
    assert number(await encode(cache, "x", tokens=True, deadline=FAR)) == (1, Source.MODEL)


async def test_cache_redis_without_tokens_misses_where_they_are_needed(
    batcher: Batcher, redis: RedisTier
) -> None:
    await from_redis(batcher, redis, tokens=False)  # the control
    found = await encode(cache_of(batcher, redis=redis), "x", tokens=True, deadline=FAR)
    assert found[1] is Source.MODEL
    assert found[0].tokens is not None


async def test_cache_goes_past_a_bare_memory_to_a_full_cold_entry(batcher: Batcher, tmp_path: Path) -> None:
    lru = Lru[Encoding](2**20)
    lru.put(key(MINE, "x"), bare(8), 1)
    cache = cache_of(batcher, lru=lru, cold=table(tmp_path, "x", full(7)))
    assert number(await encode(cache, "x", tokens=True, deadline=FAR)) == (7, Source.COLD)


async def test_cache_with_tokens_serves_those_who_need_none(batcher: Batcher, model: Model) -> None:
    cache = cache_of(batcher)
    await encode(cache, "x", tokens=True, deadline=FAR)
    assert number(await encode(cache, "x", tokens=False, deadline=FAR)) == (1, Source.LRU)


async def test_cache_of_another_fingerprint_never_hits(
    batcher: Batcher, model: Model, redis: RedisTier, tmp_path: Path
) -> None:
    lru = Lru[Encoding](2**20)
    mine = cache_of(batcher, lru=lru, redis=redis)
    await encode(mine, "x", tokens=True, deadline=FAR)
    await from_redis(batcher, redis, tokens=True)
    asked = len(model.asked)
    theirs = cache_of(
        batcher,
        fingerprint=THEIRS,
        lru=lru,
        redis=redis,
        cold=table(tmp_path, "x", full(7), fingerprint=MINE),
    )
    assert theirs.near("x", tokens=True) is None
    assert number(await encode(theirs, "x", tokens=True, deadline=FAR)) == (asked + 1, Source.MODEL)
    assert number(await encode(mine, "x", tokens=True, deadline=FAR)) == (1, Source.LRU)  # the control


@pytest.mark.parametrize("other", ["X", "x ", "y", "xx", ""])
async def test_cache_of_another_phrase_never_hits(batcher: Batcher, model: Model, other: str) -> None:
    cache = cache_of(batcher)
    await encode(cache, "x", tokens=True, deadline=FAR)
    assert number(await encode(cache, other, tokens=True, deadline=FAR)) == (2, Source.MODEL)


@pytest.mark.parametrize(("tokens", "found"), [(False, (7, Source.COLD)), (True, None)])
async def test_cache_near_says_what_is_here(
    batcher: Batcher, model: Model, tmp_path: Path, tokens: bool, found: tuple[float, Source] | None
) -> None:
    near = cache_of(batcher, cold=table(tmp_path, "x", bare(7))).near("x", tokens=tokens)
    assert (near and number(near)) == found
    assert model.asked == []


# --- one flight ---


@pytest.mark.parametrize("with_redis", [False, True], ids=["model", "redis-and-model"])
async def test_cache_fifty_callers_share_one_flight(
    batcher: Batcher, model: Model, redis: RedisTier, with_redis: bool
) -> None:
    cache = cache_of(batcher, redis=redis if with_redis else None)
    found = await asyncio.gather(*(encode(cache, "x", tokens=True, deadline=FAR) for _ in range(50)))
    assert model.asked == ["x"]
    assert {number(one) for one in found} == {(1, Source.MODEL)}


async def test_cache_different_phrases_fly_apart(batcher: Batcher, model: Model) -> None:
    cache = cache_of(batcher)
    await asyncio.gather(*(encode(cache, phrase, tokens=True, deadline=FAR) for phrase in ("x", "y", "x")))
    assert model.asked == ["x", "y"]


async def test_cache_cancelling_one_of_two_does_not_cancel_the_other(batcher: Batcher, model: Model) -> None:
    before = await held(batcher, model)
    cache = cache_of(batcher)
    one, other = (asyncio.create_task(encode(cache, "x", tokens=True, deadline=FAR)) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    await asyncio.sleep(0)
    model.open.set()
    cancelled, found = await settled(one, other)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert isinstance(found, tuple)
    assert number(found) == (2, Source.MODEL)
    await before


async def test_cache_cancelling_all_cancels_the_work(batcher: Batcher, model: Model) -> None:
    before = await held(batcher, model)
    cache = cache_of(batcher)
    tasks = [asyncio.create_task(encode(cache, "x", tokens=True, deadline=FAR)) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert batcher.waiting == 1
    for task in tasks:
        task.cancel()
    assert all(isinstance(answer, asyncio.CancelledError) for answer in await settled(*tasks))
    model.open.set()
    await before
    await encode(cache, "y", tokens=True, deadline=FAR)
    assert model.asked == ["before", "y"]
    assert batcher.dropped == 1


async def test_cache_a_caller_who_comes_as_the_last_one_leaves_is_served(
    batcher: Batcher, model: Model
) -> None:
    """The flight is being cancelled and has not landed yet: nobody may board it."""
    before = await held(batcher, model)
    cache = cache_of(batcher)
    leaving = asyncio.create_task(encode(cache, "x", tokens=True, deadline=FAR))
    await asyncio.sleep(0.01)
    leaving.cancel()
    coming = asyncio.create_task(encode(cache, "x", tokens=True, deadline=FAR))
    await asyncio.sleep(0.01)
    model.open.set()
    cancelled, found = await settled(leaving, coming)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert isinstance(found, tuple)
    assert found[1] is Source.MODEL
    await before


async def test_cache_a_flight_that_was_left_does_not_end_its_successor(
    batcher: Batcher, model: Model
) -> None:
    """While the successor flies, callers still share it."""
    before = await held(batcher, model)
    cache = cache_of(batcher)
    leaving = asyncio.create_task(encode(cache, "x", tokens=True, deadline=FAR))
    await asyncio.sleep(0.01)
    leaving.cancel()
    coming = asyncio.create_task(encode(cache, "x", tokens=True, deadline=FAR))
    await asyncio.sleep(0.01)
    third = asyncio.create_task(encode(cache, "x", tokens=True, deadline=FAR))
    await asyncio.sleep(0.01)
    model.open.set()
    await settled(leaving, coming, third)
    assert model.asked == ["before", "x"]
    await before


async def test_cache_work_goes_on_while_one_caller_can_still_use_it(batcher: Batcher, model: Model) -> None:
    before = await held(batcher, model)
    cache = cache_of(batcher)
    hurried = asyncio.create_task(encode(cache, "x", tokens=True, deadline=time.monotonic() + 0.1))
    await asyncio.sleep(0)
    patient = asyncio.create_task(encode(cache, "x", tokens=True, deadline=FAR))
    await asyncio.sleep(0.12)
    model.open.set()
    assert [type(answer) for answer in await settled(hurried, patient)] == [TooLate, tuple]
    await before


async def test_cache_says_too_late_where_no_caller_can_use_it(batcher: Batcher, model: Model) -> None:
    before = await held(batcher, model)
    cache = cache_of(batcher)
    tasks = [
        asyncio.create_task(encode(cache, "x", tokens=True, deadline=time.monotonic() + 0.1))
        for _ in range(2)
    ]
    await asyncio.sleep(0.12)
    model.open.set()
    assert [type(answer) for answer in await settled(*tasks)] == [TooLate, TooLate]
    assert model.asked == ["before"]
    await before


async def test_cache_a_failure_reaches_every_caller_and_is_not_kept(
    batcher: Batcher, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "nlu.batcher")
    cache = cache_of(batcher)
    tasks = [asyncio.create_task(encode(cache, "poison", tokens=True, deadline=FAR)) for _ in range(3)]
    assert [type(answer) for answer in await settled(*tasks)] == [EncodeFailed] * 3
    assert model.asked == ["poison"]
    with pytest.raises(EncodeFailed):
        await encode(cache, "poison", tokens=True, deadline=FAR)
    assert model.asked == ["poison", "poison"]


async def test_cache_passes_on_that_the_queue_is_full(batcher: Batcher, model: Model) -> None:
    before = await held(batcher, model)
    cache = cache_of(batcher)
    tasks = [asyncio.create_task(encode(cache, f"{i}", tokens=True, deadline=FAR)) for i in range(6)]
    await asyncio.sleep(0.01)
    model.open.set()
    assert [type(answer) for answer in await settled(*tasks)] == [tuple] * 4 + [Overloaded] * 2
    await before


async def test_cache_passes_on_that_the_server_stops(batcher: Batcher) -> None:
    await batcher.close()
    with pytest.raises(Draining):
        await encode(cache_of(batcher), "x", tokens=True, deadline=FAR)


async def test_cache_hits_need_no_model(batcher: Batcher, tmp_path: Path) -> None:
    await batcher.close()
    cache = cache_of(batcher, cold=table(tmp_path, "x", full(7)))
    assert number(await encode(cache, "x", tokens=True, deadline=FAR)) == (7, Source.COLD)


async def test_cache_same_phrase_with_and_without_tokens_keeps_the_tokens(
    batcher: Batcher, model: Model
) -> None:
    """Both fly at once; the bare answer comes last and must not cost the next caller another run."""
    cache = cache_of(batcher)
    await asyncio.gather(*(encode(cache, "x", tokens=tokens, deadline=FAR) for tokens in (True, False)))
    assert (await encode(cache, "x", tokens=True, deadline=FAR))[1] is Source.LRU


# --- the phrases of one request ---


async def test_cache_answers_a_request_in_order_wherever_its_phrases_are(
    batcher: Batcher, model: Model, tmp_path: Path
) -> None:
    cache = cache_of(batcher, cold=table(tmp_path, "cold", full(7)))
    await encode(cache, "known", tokens=True, deadline=FAR)
    found = await cache.encode(["new", "cold", "known", "new"], tokens=True, deadline=FAR)
    assert [number(one) for one in found] == [
        (2, Source.MODEL),
        (7, Source.COLD),
        (1, Source.LRU),
        (2, Source.MODEL),
    ]
    assert model.asked == ["known", "new"]


async def test_cache_refuses_a_request_before_its_first_phrase_is_computed(
    batcher: Batcher, model: Model
) -> None:
    """There is room for four phrases, and none of the five is taken."""
    cache = cache_of(batcher)
    with pytest.raises(Overloaded):
        await cache.encode(["a", "b", "c", "d", "e"], tokens=True, deadline=FAR)
    assert model.asked == []
    found = await cache.encode(["a", "b", "c", "d"], tokens=True, deadline=FAR)  # the control
    assert len(found) == len(model.asked) == 4


async def test_cache_asks_for_no_place_for_what_is_known_or_under_way(batcher: Batcher, model: Model) -> None:
    cache = cache_of(batcher)
    await encode(cache, "known", tokens=True, deadline=FAR)
    before = await held(batcher, model)
    under_way = asyncio.create_task(cache.encode(["a", "b", "c", "d"], tokens=True, deadline=FAR))
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded):
        await encode(cache, "e", tokens=True, deadline=FAR)  # the control: the queue is full
    again = asyncio.create_task(cache.encode(["known", "a", "b", "c", "d"], tokens=True, deadline=FAR))
    await asyncio.sleep(0.01)
    model.open.set()
    await before
    assert len(await under_way) == 4
    assert len(await again) == 5
    assert model.asked == ["known", "before", "a", "b", "c", "d"]


async def test_cache_a_failed_phrase_takes_its_siblings_from_the_queue(
    batcher: Batcher, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "nlu.batcher")
    cache = cache_of(batcher)
    with pytest.raises(EncodeFailed):
        await cache.encode(["poison", "a", "b", "c"], tokens=True, deadline=FAR)
    await encode(cache, "y", tokens=True, deadline=FAR)
    assert "c" not in model.asked  # "a" may have been begun when the failure was heard of
    assert len(model.asked) <= 3
    assert batcher.waiting == 0


async def test_cache_siblings_that_others_wait_for_are_computed(
    batcher: Batcher, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "nlu.batcher")
    cache = cache_of(batcher)
    before = await held(batcher, model)
    failing = asyncio.create_task(cache.encode(["poison", "a", "b"], tokens=True, deadline=FAR))
    await asyncio.sleep(0.01)
    other = asyncio.create_task(encode(cache, "b", tokens=True, deadline=FAR))
    await asyncio.sleep(0.01)
    model.open.set()
    await before
    failed, found = await asyncio.gather(failing, other, return_exceptions=True)
    assert isinstance(failed, EncodeFailed)
    assert isinstance(found, tuple)
    assert found[1] is Source.MODEL


async def test_cache_a_request_that_is_cancelled_leaves_nothing_in_the_queue(
    batcher: Batcher, model: Model
) -> None:
    cache = cache_of(batcher)
    before = await held(batcher, model)
    request = asyncio.create_task(cache.encode(["a", "b", "c"], tokens=True, deadline=FAR))
    await asyncio.sleep(0.01)
    assert batcher.waiting == 3
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await asyncio.sleep(0)
    assert batcher.waiting == 0
    model.open.set()
    await before
    await encode(cache, "y", tokens=True, deadline=FAR)
    assert model.asked == ["before", "y"]


async def test_cache_nobody_waits_past_the_deadline_for_a_model_that_hangs(
    batcher: Batcher, model: Model
) -> None:
    cache = cache_of(batcher)
    model.open.clear()
    with pytest.raises(TooLate):
        await encode(cache, "a", tokens=True, deadline=time.monotonic() + 0.1)


async def test_cache_what_redis_has_needs_no_place_in_the_queue(
    batcher: Batcher, model: Model, redis: RedisTier
) -> None:
    """Under overload, what another server computed is still served."""
    await from_redis(batcher, redis, tokens=True)
    before = await held(batcher, model)
    full_up = asyncio.create_task(cache_of(batcher).encode(["a", "b", "c", "d"], tokens=True, deadline=FAR))
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded):
        await encode(cache_of(batcher), "x", tokens=True, deadline=FAR)  # the control
    for _ in range(100):
        redis.breaker.succeeded()
        try:
            found = await encode(cache_of(batcher, redis=redis), "x", tokens=True, deadline=FAR)
            break
        except Overloaded:  # its 20 ms were missed
            await asyncio.sleep(0.05)
    assert found[1] is Source.REDIS
    model.open.set()
    await asyncio.gather(before, full_up)
