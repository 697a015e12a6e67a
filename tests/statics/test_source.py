"""statics.source: a store as one pull may use it; the clock is ours."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from statics import source
from statics.errors import Forbidden, NotFound, StaticsError, StoreUnavailable
from statics.source import Source
from statics.store import FolderStore


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(source, "time", clock)
    return clock


class Paced(FolderStore):
    """Gives pieces of 1000 bytes, each after so many seconds."""

    def __init__(self, store: FolderStore, clock: Clock, seconds: float) -> None:
        super().__init__(store.root)
        self.clock, self.seconds = clock, seconds

    @contextmanager
    def open(self, key: str, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with super().open(key, offset) as chunks:
            yield self.paced(b"".join(chunks))

    def paced(self, data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), 1000):
            self.clock.now += self.seconds
            yield data[at : at + 1000]


@pytest.fixture
def full(store: FolderStore) -> FolderStore:
    store.put("blobs/x", bytes(50_000))
    return store


def test_source_tries_again_what_is_unavailable(store: FolderStore, clock: Clock) -> None:
    asked: list[int] = []

    def work() -> str:
        asked.append(1)
        if len(asked) < source.TRIES:
            raise StoreUnavailable(part="x", found="503", expected="200", remedy="again")
        return "answer"

    random.seed(5)
    tried = Source(store, deadline_s=60)
    assert tried.again(work, "x") == "answer"
    assert (len(asked), tried.retries) == (source.TRIES, source.TRIES - 1)
    limits = [source.PAUSE_S * 2**number for number in range(source.TRIES - 1)]
    assert all(0 <= pause <= limit for pause, limit in zip(clock.slept, limits, strict=True))
    assert len(set(clock.slept)) == len(limits)  # drawn, not counted out: pods must not come back together


@pytest.mark.parametrize(
    ("error", "tries"), [(StoreUnavailable, source.TRIES), (NotFound, 1), (Forbidden, 1)]
)
def test_source_gives_up(store: FolderStore, clock: Clock, error: type[StaticsError], tries: int) -> None:
    asked: list[int] = []

    def work() -> None:
        asked.append(1)
        raise error(part="x", found="no", expected="yes", remedy="none")

    with pytest.raises(error):
        Source(store, deadline_s=60).again(work, "x")
    assert len(asked) == tries


def test_source_does_not_pause_beyond_its_deadline(
    store: FolderStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    tried = Source(store, deadline_s=source.PAUSE_S * 2)

    def work() -> None:
        raise StoreUnavailable(part="x", found="no", expected="yes", remedy="none")

    with pytest.raises(StoreUnavailable, match="still running after 0.5 s"):
        tried.again(work, "x")
    assert sum(clock.slept) < source.PAUSE_S * 2


def test_source_ends_at_its_deadline(full: FolderStore, clock: Clock) -> None:
    with Source(Paced(full, clock, 1.0), deadline_s=5).open("blobs/x") as chunks:
        with pytest.raises(StoreUnavailable, match="still running after 5 s"):
            list(chunks)
    with Source(Paced(full, clock, 1.0), deadline_s=60).open("blobs/x", 45_000) as chunks:
        assert len(b"".join(chunks)) == 5000


def test_source_keeps_to_the_rate_allowed(full: FolderStore, clock: Clock) -> None:
    limited = Source(Paced(full, clock, 0.0), deadline_s=60, bytes_s=5000)
    for _ in range(2):  # over all its streams
        with limited.open("blobs/x") as chunks:
            assert len(b"".join(chunks)) == 50_000
    assert clock.now - 1000 == pytest.approx(20)
    began = clock.now
    with Source(Paced(full, clock, 0.0), deadline_s=60).open("blobs/x") as chunks:
        list(chunks)
    assert clock.now == began


@pytest.mark.parametrize(("seconds", "enough"), [(0.0009, True), (0.0011, False)])
def test_source_asks_for_a_least_rate(
    full: FolderStore, clock: Clock, seconds: float, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "PATIENCE_S", 0.02)
    with Source(Paced(full, clock, seconds), deadline_s=60).open("blobs/x") as chunks:
        if enough:
            assert len(b"".join(chunks)) == 50_000
        else:
            with pytest.raises(StoreUnavailable, match="bytes/s over 0.02 s, expected 1000000 bytes/s"):
                list(chunks)


def test_source_asks_each_of_many_streams_for_its_share(
    full: FolderStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "PATIENCE_S", 0.02)
    shared = Source(Paced(full, clock, 0.0019), deadline_s=60)
    with shared.open("blobs/x") as chunks, shared.open("blobs/x"):
        assert len(b"".join(chunks)) == 50_000
    with shared.open("blobs/x") as chunks, pytest.raises(StoreUnavailable):
        list(chunks)


def test_source_never_calls_its_own_limit_slow(
    full: FolderStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "PATIENCE_S", 0.02)
    with Source(Paced(full, clock, 0.0), deadline_s=60, bytes_s=10_000).open("blobs/x") as chunks:
        assert len(b"".join(chunks)) == 50_000
