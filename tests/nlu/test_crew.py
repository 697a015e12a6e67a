"""nlu.crew with real worker processes: one release at any moment, whoever dies when."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from nlu.crew import Hand, Patience, Workers, environment, of_worker, reserve
from nlu.errors import EngineRefused, WorkerFailed
from nlu.settings import Settings
from nlu.types import Release
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub
from statics.bundle import Bundle
from statics.errors import DigestMismatch, StaticsError
from tests.conftest import free_port
from tests.test_one_utterance import turn
from tests.tiny import Made

QUICK = Patience(pause=0.02, longest_pause=0.1, beat=0.2, answer=20.0, follow=0.5)


@asynccontextmanager
async def crewed(
    *, kind: type[Workers] = Workers, patience: Patience = QUICK, **settings: object
) -> AsyncIterator[tuple[Workers, int]]:
    """Two workers on a free port, which hold, and that port."""
    chosen = {"processes": 2, "port": 0, "metrics": False, "drain_s": 5.0, "lru_bytes": 0, **settings}
    workers = kind(Settings(**chosen), patience=patience)  # type: ignore[arg-type]
    port = await workers.start()
    try:
        yield workers, port
    finally:
        await workers.drain()


async def swap(workers: Workers, bundle: Bundle) -> None:
    """Both phases, as a steward does them."""
    try:
        await workers.prepare(bundle)
        await workers.flip()
    except BaseException:
        await workers.abandon()
        raise


async def served(port: int, *, times: int = 24) -> set[str]:
    """Digests of the bundles that answer, each time over a connection of its own, so that every worker is met."""
    found = set()
    for _ in range(times):
        async with stub_of(port) as stub:
            found.add((await stub.Understand(turn("play music"))).versions.bundle)
    return found


@asynccontextmanager
async def stub_of(port: int) -> AsyncIterator[NluStub]:
    options = (("grpc.use_local_subchannel_pool", 1),)  # else channels share a connection, and so a worker
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield NluStub(channel)  # type: ignore[no-untyped-call]


async def until(what: str, holds: object, *, within_s: float = 60.0) -> None:
    """Wait for something that has to come."""
    assert callable(holds)
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, f"waited in vain until {what}"
        await asyncio.sleep(0.01)


# -- the port -----------------------------------------------------------------------------------------------------


def listener(port: int, *, shared: bool) -> socket.socket:
    """A plain server of somebody else."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    found.bind(("127.0.0.1", port))
    found.listen()
    return found


def port_of(held: socket.socket) -> int:
    return int(held.getsockname()[1])


def test_crew_refuses_a_port_that_somebody_serves() -> None:
    with listener(0, shared=True) as other, pytest.raises(OSError, match=r"found 127.0.0.1:\d+ taken"):
        reserve("127.0.0.1", port_of(other))


def test_crew_refuses_a_port_that_another_crew_holds() -> None:
    with reserve("127.0.0.1", 0) as held:
        with pytest.raises(OSError, match="taken"):
            reserve("127.0.0.1", port_of(held))


def test_crew_port_would_be_shared_without_the_check() -> None:
    """The negative control of the two above: SO_REUSEPORT alone lets a second server in, which gets half the calls."""
    with reserve("127.0.0.1", 0) as held, listener(port_of(held), shared=True) as first:
        listener(port_of(first), shared=True).close()


def test_crew_takes_a_port_with_remains_of_old_connections() -> None:
    with listener(0, shared=False) as server:
        port = port_of(server)
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()  # who closes first keeps the remains
            client.recv(1)
    with reserve("127.0.0.1", port) as held, listener(port, shared=True):
        assert port_of(held) == port


# -- settings -----------------------------------------------------------------------------------------------------


def test_crew_hands_settings_on_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        processes=3, port=1, bundle=tmp_path / "a b", redis=SecretStr("redis://:p@h/0"), drops=("token",),
        require_signature=False, http_port=None, deadline_s=0.25, shadow_sample=tmp_path / "flips.jsonl",
    )  # fmt: skip
    mine = of_worker(settings, 2)
    for name in [name for name in os.environ if name.startswith("NLU_")]:
        monkeypatch.delenv(name)
    for name, value in environment(mine).items():
        monkeypatch.setenv(name, value)
    assert Settings() == mine
    assert mine.shadow_sample == tmp_path / "flips-2.jsonl"
    assert (mine.metrics, mine.control) == (False, "")


def test_crew_divides_the_cores_and_shares_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for name in ("NLU_WORKERS", "NLU_INDEX_PAGES", "NLU_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    alone, four, many = (Settings(processes=count) for count in (1, 4, 16))
    assert (alone.workers, four.workers, many.workers) == (8, 2, 1)
    assert (alone.index_pages, four.index_pages) == ("own", "shared")
    chosen = Settings(processes=4, workers=5, index_pages="own")
    assert (chosen.workers, chosen.index_pages) == (5, "own")


# -- swaps --------------------------------------------------------------------------------------------------------


async def test_crew_holds_then_serves_one_release_and_then_the_next(tiny: Made, stranger: Made) -> None:
    async with crewed() as (workers, port):
        async with stub_of(port) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as holding:
                await stub.Understand(turn("play music"))
        assert holding.value.code() is grpc.StatusCode.UNAVAILABLE
        await swap(workers, tiny.bundle)
        assert await served(port) == {tiny.bundle.digest}
        await swap(workers, stranger.bundle)
        assert await served(port) == {stranger.bundle.digest}
        assert workers.size == len(workers.pids) == 2
        assert workers.rss_bytes() > 2 * 10 * 2**20


def broken(made: Made, folder: Path) -> Bundle:
    """A bundle whose manifest is as it was and one of whose heads is not."""
    copied = Bundle(shutil.copytree(made.bundle.path, folder), made.bundle.manifest, made.bundle.digest)
    weights = copied.folder(copied.component("head", "intent")) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    return copied


async def test_crew_refused_bundle_changes_nothing(tiny: Made, stranger: Made, tmp_path: Path) -> None:
    async with crewed() as (workers, port):
        await swap(workers, tiny.bundle)
        before = workers.pids
        with pytest.raises(EngineRefused, match="head intent"):
            await swap(workers, broken(stranger, tmp_path / "broken"))
        assert await served(port) == {tiny.bundle.digest}
        with pytest.raises(WorkerFailed, match="nothing prepared"):
            await workers.flip()
        assert await served(port) == {tiny.bundle.digest}
        assert workers.pids == before, "a refusal costs no process"
        await swap(workers, stranger.bundle)  # and nothing of it is left
        assert await served(port) == {stranger.bundle.digest}


async def test_crew_folder_that_changed_is_refused(tiny: Made, stranger: Made, tmp_path: Path) -> None:
    """What the supervisor verified is what workers load, or nothing is."""
    folder = shutil.copytree(stranger.bundle.path, tmp_path / "moved")
    async with crewed() as (workers, port):
        await swap(workers, tiny.bundle)
        with pytest.raises(DigestMismatch):
            await swap(workers, Bundle(folder, stranger.bundle.manifest, "0" * 64))
        assert await served(port) == {tiny.bundle.digest}


class Dying(Workers):
    """Kills one worker at a moment that a test names."""

    moment = ""
    victims: tuple[int, ...] = (1,)

    async def _load(self, hand: Hand, bundle: Bundle, *, whole: bool = False) -> None:
        if self.moment == "loading" and hand.number in self.victims:
            self.strike()
        await super()._load(hand, bundle, whole=whole)
        if self.moment == "loaded" and hand.number in self.victims:
            self.strike()

    async def _flip(self, hand: Hand, at: float) -> None:
        if self.moment == "flipping" and hand.number in self.victims:
            self.strike()
        await super()._flip(hand, at)

    def strike(self) -> None:
        self.moment = ""
        for number in self.victims:
            os.kill(self.pids[number], signal.SIGKILL)


@pytest.mark.parametrize("moment", ["loading", "loaded"])
async def test_crew_worker_that_dies_while_all_prepare_ends_the_swap(
    tiny: Made, stranger: Made, moment: str
) -> None:
    async with crewed(kind=Dying) as (workers, port):
        assert isinstance(workers, Dying)
        await swap(workers, tiny.bundle)
        workers.moment = moment
        with pytest.raises(WorkerFailed, match="worker 1"):
            await swap(workers, stranger.bundle)
        assert await served(port) == {tiny.bundle.digest}
        await until("it is replaced", lambda: len(workers.pids) == 2)
        assert await served(port) == {tiny.bundle.digest}, "also by the new worker"
        with pytest.raises(WorkerFailed, match="nothing prepared"):
            await workers.flip()


async def test_crew_worker_that_dies_around_a_flip_comes_back_with_the_new_release(
    tiny: Made, stranger: Made
) -> None:
    async with crewed(kind=Dying) as (workers, port):
        assert isinstance(workers, Dying)
        await swap(workers, tiny.bundle)

        await workers.prepare(stranger.bundle)
        workers.strike()  # before it
        await workers.flip()
        assert await served(port) == {stranger.bundle.digest}
        await until("it is replaced", lambda: len(workers.pids) == 2)
        assert await served(port) == {stranger.bundle.digest}

        workers.moment = "flipping"
        await swap(workers, tiny.bundle)
        assert await served(port) == {tiny.bundle.digest}
        await until("it is replaced", lambda: len(workers.pids) == 2)
        assert await served(port) == {tiny.bundle.digest}

        await workers.prepare(stranger.bundle)
        workers.strike()
        await until("it is gone", lambda: len(workers.pids) == 1)
        await until("it is replaced", lambda: len(workers.pids) == 2)  # and has not prepared
        await workers.flip()
        assert await served(port) == {stranger.bundle.digest}


async def test_crew_that_lost_all_workers_does_not_flip(tiny: Made, stranger: Made) -> None:
    async with crewed(kind=Dying, patience=replace(QUICK, pause=1.0)) as (workers, port):
        assert isinstance(workers, Dying)
        await swap(workers, tiny.bundle)
        await workers.prepare(stranger.bundle)
        workers.victims = (1, 2)
        workers.strike()
        await until("they are gone", lambda: not workers.pids)
        with pytest.raises(WorkerFailed, match="no worker alive"):
            await workers.flip()
        await workers.abandon()
        await until("they are replaced", lambda: len(workers.pids) == 2)
        assert await served(port) == {tiny.bundle.digest}


async def test_crew_worker_that_stands_still_at_a_flip_never_serves_the_old_release(
    tiny: Made, stranger: Made
) -> None:
    async with crewed(patience=replace(QUICK, beat=60.0)) as (workers, port):
        await swap(workers, tiny.bundle)
        await workers.prepare(stranger.bundle)
        stuck = psutil.Process(workers.pids[1])
        stuck.suspend()
        await workers.flip()
        await until("it is gone", lambda: not stuck.is_running() or stuck.status() == psutil.STATUS_ZOMBIE)
        await until("it is replaced", lambda: len(workers.pids) == 2)
        assert await served(port) == {stranger.bundle.digest}


# -- any moment ---------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Callers without a break, and what was served when: an answer of another release than the one, or at a flip the
    two, that served while it was made is wrong."""

    port: int
    spans: list[tuple[str, float, float]] = field(
        default_factory=list
    )  # digest, first and last possible moment
    answers: list[tuple[str, float, float]] = field(default_factory=list)  # digest, asked, answered
    failed: int = 0

    @asynccontextmanager
    async def calling(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._call()) for _ in range(3)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _call(self) -> None:
        while True:
            async with stub_of(self.port) as stub:
                for _ in range(10):
                    asked = time.monotonic()
                    try:
                        reply = await stub.Understand(turn("play music"), timeout=10)
                    except grpc.aio.AioRpcError as error:
                        assert error.code() is grpc.StatusCode.UNAVAILABLE, error
                        self.failed += 1
                        await asyncio.sleep(0.01)
                        break
                    self.answers.append((reply.versions.bundle, asked, time.monotonic()))

    async def swap(self, workers: Workers, bundle: Bundle) -> bool:
        """A swap, noted; False where it came to nothing."""
        before = time.monotonic()
        try:
            await swap(workers, bundle)
        except (WorkerFailed, StaticsError):
            return False
        if self.spans:
            digest, first, _ = self.spans[-1]
            self.spans[-1] = (digest, first, time.monotonic())
        self.spans.append((bundle.digest, before, float("inf")))
        return True

    def wrong(self) -> int:
        """Answers of a release that served at no moment between question and answer."""
        return sum(
            not any(found == digest and asked <= last and first <= told for digest, first, last in self.spans)
            for found, asked, told in self.answers
        )


async def test_crew_never_serves_two_releases_whoever_is_killed_when(tiny: Made, stranger: Made) -> None:
    chance = random.Random(7)
    async with crewed() as (workers, port):
        watch = Watch(port)
        await watch.swap(workers, tiny.bundle)
        kills = done = 0

        async def strike() -> None:
            nonlocal kills
            await asyncio.sleep(chance.uniform(0.0, 0.15))
            if workers.pids:
                os.kill(chance.choice(list(workers.pids.values())), signal.SIGKILL)
                kills += 1

        async with watch.calling():
            for number in range(10):
                bundle = (stranger if number % 2 == 0 else tiny).bundle
                striking = asyncio.create_task(strike())
                done += await watch.swap(workers, bundle)
                await striking
                await until("all are back", lambda: len(workers.pids) == 2)
        assert await served(port) == {watch.spans[-1][0]}
    assert kills >= 8 and done >= 1 and len(watch.answers) > 100, (kills, done, len(watch.answers))
    assert watch.wrong() == 0


async def test_crew_swaps_without_a_failed_call(tiny: Made, stranger: Made) -> None:
    async with crewed() as (workers, port):
        watch = Watch(port)
        await watch.swap(workers, tiny.bundle)
        async with watch.calling():
            for number in range(20):
                assert await watch.swap(workers, (stranger if number % 2 == 0 else tiny).bundle)
    assert (watch.failed, watch.wrong()) == (0, 0) and len(watch.answers) > 100


class Careless(Workers):
    """Lets one worker go on with the old release."""

    async def _flip(self, hand: Hand, at: float) -> None:
        if hand.number == 1 or self._serving is None:
            await super()._flip(hand, at)

    async def _follows(self, hand: Hand, digest: str) -> None:
        pass


async def test_crew_watch_sees_a_worker_that_does_not_follow(tiny: Made, stranger: Made) -> None:
    """The negative control of the two above."""
    async with crewed(kind=Careless) as (workers, port):
        watch = Watch(port)
        watch.spans.append((stranger.bundle.digest, 0.0, float("inf")))
        await workers.prepare(tiny.bundle)
        await Workers._flip(workers, workers._hands[2], time.monotonic())
        workers._serving = workers._prepared
        await workers.prepare(stranger.bundle)
        await Workers._flip(workers, workers._hands[1], time.monotonic())
        async with watch.calling():
            await until("some answers came", lambda: len(watch.answers) > 100)
    assert watch.wrong() > 0


# -- life and death -----------------------------------------------------------------------------------------------


async def test_crew_replaces_a_worker_that_stands_still(tiny: Made) -> None:
    async with crewed(patience=replace(QUICK, answer=1.0)) as (workers, port):
        await swap(workers, tiny.bundle)
        old = workers.pids[2]
        psutil.Process(old).suspend()
        await until("it is replaced", lambda: workers.pids.get(2, old) != old)
        assert await served(port) == {tiny.bundle.digest}


async def test_crew_replaced_worker_refuses_a_bundle_that_was_changed_on_disk(
    tiny: Made, stranger: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Hours may lie between; every byte is read again."""
    copied = Bundle(
        shutil.copytree(tiny.bundle.path, tmp_path / "served"), tiny.bundle.manifest, tiny.bundle.digest
    )
    async with crewed() as (workers, port):
        await swap(workers, copied)
        golden = copied.folder(copied.component("head", "intent")) / "head.json"
        golden.write_bytes(
            golden.read_bytes().replace(b" ", b"\n", 1)
        )  # loads as before, but is not what was signed
        os.kill(workers.pids[1], signal.SIGKILL)
        await until("a new worker refused", lambda: "worker 1 cannot serve: digest-mismatch" in caplog.text)
        assert list(workers.pids) == [2]
        assert await served(port) == {tiny.bundle.digest}, "the others go on"
        await swap(workers, stranger.bundle)
        await until("the next release mends it", lambda: len(workers.pids) == 2)
        assert await served(port) == {stranger.bundle.digest}


async def test_crew_pauses_longer_from_death_to_death(
    tiny: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if asyncio.current_task() in workers._keepers[:2]:
            pauses.append(seconds)
            seconds = 0.0
        await real(seconds)

    async with crewed(patience=replace(QUICK, pause=1.0, longest_pause=30.0, beat=3600.0)) as (workers, _):
        monkeypatch.setattr(asyncio, "sleep", sleep)
        monkeypatch.setattr(random, "uniform", lambda low, high: low)
        for _ in range(7):
            old = workers.pids[1]
            os.kill(old, signal.SIGKILL)
            await until("it is replaced", lambda old=old: workers.pids.get(1, old) != old)
        monkeypatch.undo()
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


async def test_crew_that_cannot_start_says_so_and_leaves_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workers = Workers(Settings(processes=2, port=0, metrics=False, callers=tmp_path / "nowhere"))
    with pytest.raises(WorkerFailed, match="NLU_CALLERS: found nothing to read"):
        await workers.start()
    await workers.drain()
    assert not psutil.Process().children()
    assert "Traceback" not in capfd.readouterr().err


async def test_crew_workers_say_what_they_serve_also_those_to_come(tiny: Made) -> None:
    async with crewed() as (workers, port):

        async def said() -> set[tuple[int, str]]:
            """Health and Describe, of every worker."""
            found = set()
            for _ in range(16):
                options = (("grpc.use_local_subchannel_pool", 1),)
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
                    health = health_pb2_grpc.HealthStub(channel)
                    status = (await health.Check(health_pb2.HealthCheckRequest())).status
                    described = await NluStub(channel).Describe(pb.DescribeRequest())  # type: ignore[no-untyped-call]
                    found.add((status, described.release.reason))
            return found

        assert await said() == {(health_pb2.HealthCheckResponse.NOT_SERVING, "")}
        await swap(workers, tiny.bundle)
        await workers.tell(Release(state="SERVING", reason="told"))
        assert await said() == {(health_pb2.HealthCheckResponse.SERVING, "told")}
        old = workers.pids[1]
        os.kill(old, signal.SIGKILL)
        await until("it is replaced", lambda: workers.pids.get(1, old) != old)
        assert await said() == {(health_pb2.HealthCheckResponse.SERVING, "told")}


# -- metrics ------------------------------------------------------------------------------------------------------


def scrape(port: int) -> dict[tuple[str, str], float]:
    """Finished calls as the one listener tells them, by worker and code."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
        text = page.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all("worker" in sample.labels for sample in samples)
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    return {
        (sample.labels["worker"], sample.labels["code"]): sample.value
        for sample in samples
        if sample.name == "nlu_calls_total" and sample.labels["method"] == "Understand"
    }


async def test_crew_counts_of_all_workers_are_exact_and_survive_a_worker(tiny: Made) -> None:
    metrics_port = free_port()
    async with crewed(metrics=True, metrics_port=metrics_port) as (workers, port):
        await swap(workers, tiny.bundle)

        async def call(times: int) -> None:
            for number in range(times):
                async with stub_of(port) as stub:
                    await stub.Understand(turn("play music"))
                    if number % 2:
                        with pytest.raises(grpc.aio.AioRpcError):
                            await stub.Understand(turn(""))

        def total(code: str, found: dict[tuple[str, str], float]) -> float:
            return sum(value for (_, each), value in found.items() if each == code)

        await call(40)
        first = await asyncio.to_thread(scrape, metrics_port)
        assert (total("OK", first), total("INVALID_ARGUMENT", first)) == (40, 20)
        assert first["1", "OK"] > 0 and first["2", "OK"] > 0
        await call(20)  # not scraped before one ends
        old = workers.pids[1]
        os.kill(old, signal.SIGTERM)
        await until("it is replaced", lambda: workers.pids.get(1, old) != old)
        then = await asyncio.to_thread(scrape, metrics_port)
        assert (total("OK", then), total("INVALID_ARGUMENT", then)) == (60, 30)
        await call(20)
        last = await asyncio.to_thread(scrape, metrics_port)
        assert (total("OK", last), total("INVALID_ARGUMENT", last)) == (80, 40)
        assert last["1", "OK"] >= then["1", "OK"] >= first["1", "OK"]


async def test_crew_metrics_port_that_is_taken_costs_the_metrics_only(
    tiny: Made, caplog: pytest.LogCaptureFixture
) -> None:
    with listener(0, shared=False) as other:
        async with crewed(metrics=True, metrics_port=port_of(other)) as (workers, port):
            await swap(workers, tiny.bundle)
            assert await served(port) == {tiny.bundle.digest}
    assert "NLU_METRICS_PORT" in caplog.text
