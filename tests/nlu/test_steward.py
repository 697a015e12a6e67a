"""nlu.steward: which release serves, against a real store, a real root and a real server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from nlu import metrics, origin, trial
from nlu.errors import InvalidInput
from nlu.serve import Alone
from nlu.settings import Settings
from nlu.steward import MAX_PAUSE_S, Steward, stewarded
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub
from statics.bundle import Bundle
from statics.bundle import build as build_bundle
from statics.errors import FileMissing, StaticsError
from statics.local import pin, unpin
from statics.publish import add_signatures, countersign, publish
from statics.signing import Keyring, generate_key, sign
from statics.store import FolderStore
from statics.verify import verify
from statics.version import service_version
from tests.test_one_utterance import turn
from tests.tiny import CREATED, Made

CHANNEL = "test"


@pytest.fixture(autouse=True)
def nobody_set_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables of whoever runs the tests."""
    import os

    for name in [name for name in os.environ if name.startswith("NLU_")]:
        monkeypatch.delenv(name)


@dataclass(frozen=True)
class Rig:
    """A store, the machine that follows it, and releases to publish."""

    folder: Path
    made: Made

    @property
    def store(self) -> FolderStore:
        return FolderStore(self.folder / "store")

    @property
    def root(self) -> Path:
        return self.folder / "pod"

    def settings(self, **fields: object) -> Settings:
        chosen: dict[str, object] = {"watch_s": 0.02, "trial": "never"} | fields
        return Settings(
            store=str(self.folder / "store"), channel=CHANNEL, statics=self.root, port=0, metrics=False,
            **chosen,  # type: ignore[arg-type]
        )  # fmt: skip

    def build(
        self,
        seq: int,
        *,
        made: Made | None = None,
        expires: datetime | None = None,
        edit: Callable[[Path], None] | None = None,
    ) -> Bundle:
        """Release `seq`, which differs from every other in its intent head."""
        copy = shutil.copytree((made or self.made).parts, self.folder / f"parts-{seq}")
        _edit_spec(copy / "head.intent", made_by=f"release {seq}")
        if edit is not None:
            edit(copy)
        from nlu import parts

        return build_bundle(
            parts.collect(copy), self.folder / f"bundle-{seq}", channel=CHANNEL, seq=seq, created=CREATED, expires=expires,
            requires_service=">=0.1.0.dev0,<1",
        )  # fmt: skip

    def publish(self, seq: int, **fields: object) -> Bundle:
        bundle = self.build(seq, **fields)  # type: ignore[arg-type]
        publish(bundle, self.store)
        return bundle


def _edit_spec(head: Path, **fields: object) -> None:
    spec = json.loads((head / "head.json").read_bytes())
    (head / "head.json").write_text(json.dumps(spec | fields))


def shuffle(folder: Path) -> None:
    """Honest digests, and an intent head that does not answer its own golden phrases."""
    labels = json.loads((folder / "head.intent" / "head.json").read_bytes())["labels"]
    _edit_spec(folder / "head.intent", labels=labels[1:] + labels[:1])


@pytest.fixture
def rig(tiny: Made, tmp_path: Path) -> Rig:
    return Rig(tmp_path, tiny)


@asynccontextmanager
async def followed(settings: Settings) -> AsyncIterator[tuple[Steward, NluStub]]:
    """A server with its steward, and a caller's stub; both may have nothing to serve yet."""
    async with (
        stewarded(settings, Alone(settings)) as (port, steward, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield steward, NluStub(channel)  # type: ignore[no-untyped-call]


async def until(holds: Callable[[], object]) -> None:
    """Wait for something that is to happen; the test's own timeout is the limit."""
    while not holds():
        await asyncio.sleep(0.005)


async def answered_by(stub: NluStub) -> str:
    reply: pb.UnderstandReply = await stub.Understand(turn("stop"))
    return reply.versions.bundle


def swaps(result: str) -> float:
    return metrics.REGISTRY.get_sample_value("nlu_swaps_total", {"result": result}) or 0.0


def looks() -> float:
    return metrics.REGISTRY.get_sample_value("nlu_channel_looks_total", {"result": "ok"}) or 0.0


async def looked(times: int) -> None:
    before = looks()
    await until(lambda: looks() >= before + times)


def last_good(settings: Settings) -> str:
    found = origin.last_good(settings)
    return "" if found is None else found.digest


async def test_steward_serves_the_channel_and_follows_it(rig: Rig) -> None:
    first, settings = rig.publish(1), rig.settings()
    async with followed(settings) as (steward, stub):
        await steward.serving.wait()
        assert await answered_by(stub) == first.digest
        second = rig.publish(2)
        await until(lambda: steward.release.bundle == second.digest)
        assert await answered_by(stub) == second.digest
        release = (await stub.Describe(pb.DescribeRequest())).release
        assert (release.state, release.channel, release.seq, release.reason) == ("SERVING", CHANNEL, 2, "")
        await until(lambda: last_good(settings) == second.digest)
        third = rig.publish(3)
        await until(lambda: steward.release.bundle == third.digest)
        await until(lambda: not (rig.root / "bundles" / first.digest).exists())
        assert (rig.root / "bundles" / second.digest).exists()  # the way back
    assert steward.release.state == "DRAINING"


async def test_steward_keeps_what_serves_and_says_why_it_refused_the_next(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    first, settings, refused = rig.publish(1), rig.settings(), swaps("engine-refused")
    async with followed(settings) as (steward, stub):
        await steward.serving.wait()
        bad = rig.publish(2, edit=shuffle)
        await until(lambda: steward.release.reason)
        assert steward.release.wanted == bad.digest
        assert "head intent" in steward.release.reason
        assert await answered_by(stub) == first.digest
        assert last_good(settings) == first.digest
        await looked(5)
        assert swaps("engine-refused") == refused + 1  # what lies in the bundle is not tried again
        assert sum("is not served" in record.message for record in caplog.records) == 1
        info = metrics.REGISTRY.get_sample_value(
            "nlu_swap_refused_info", {"bundle": bad.digest, "code": "engine-refused"}
        )
        assert info == 1
        steward.nudge()  # unless somebody asks
        await until(lambda: swaps("engine-refused") == refused + 2)
        good = rig.publish(3)
        await until(lambda: steward.release.bundle == good.digest)
        assert (steward.release.reason, steward.release.wanted) == ("", "")
        assert (
            metrics.REGISTRY.get_sample_value(
                "nlu_swap_refused_info", {"bundle": bad.digest, "code": "engine-refused"}
            )
            is None
        )


async def test_steward_tries_again_what_the_store_could_not_give(rig: Rig) -> None:
    first, settings = rig.publish(1), rig.settings()
    async with followed(settings) as (steward, stub):
        await steward.serving.wait()
        second = rig.build(2)
        changed = second.folder(second.component("head", "intent")) / "head.json"
        publish(second, rig.store)
        # What this pull needs is gone from the store for a while.
        blob = next(
            path for path in (rig.folder / "store").rglob("*")
            if path.is_file() and path.read_bytes() == changed.read_bytes()
        )  # fmt: skip
        content = blob.read_bytes()
        blob.unlink()
        await until(lambda: steward.release.reason or steward.release.bundle == second.digest)
        if steward.release.bundle == first.digest:
            assert "not-found" in steward.release.reason
            assert await answered_by(stub) == first.digest
        blob.write_bytes(content)
        await until(lambda: steward.release.bundle == second.digest)
        assert steward.release.reason == ""


async def test_steward_takes_a_release_once_it_is_signed(rig: Rig) -> None:
    """The channel does not move for a signature, or for a clock that is set right."""
    private, public = generate_key()
    Keyring.of(public).save(rig.folder / "trusted.json")
    second = rig.build(2)
    countersign(rig.build(1).path, private)
    publish(verify(rig.folder / "bundle-1", service=service_version()), rig.store)
    settings = rig.settings(keyring=rig.folder / "trusted.json", require_signature=True)
    async with followed(settings) as (steward, _):
        await steward.serving.wait()
        publish(second, rig.store)
        await until(lambda: "signature-missing" in steward.release.reason)
        await looked(3)
        raw = (second.path / "manifest.json").read_bytes()
        add_signatures(rig.store, second.digest, sign(raw, private))
        await until(lambda: steward.release.bundle == second.digest)


async def test_steward_holds_without_a_store_and_serves_once_there_is_one(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    async with followed(rig.settings()) as (steward, stub):
        await until(lambda: steward.release.reason)
        assert steward.release.state == "HOLDING"
        with pytest.raises(grpc.aio.AioRpcError) as held:
            await stub.Understand(turn("stop"))
        assert held.value.code() is grpc.StatusCode.UNAVAILABLE
        await until(lambda: sum("holding" in record.message for record in caplog.records) == 1)
        first = rig.publish(1)
        await until(lambda: steward.release.state == "SERVING")
        assert await answered_by(stub) == first.digest


async def test_steward_cold_start_without_the_store_serves_the_last_good_one(rig: Rig) -> None:
    first, settings = rig.publish(1), rig.settings()
    async with followed(settings) as (steward, _):
        await until(lambda: last_good(settings))
    (rig.folder / "store").rename(rig.folder / "away")
    async with followed(settings) as (steward, stub):
        await steward.serving.wait()
        assert await answered_by(stub) == first.digest
        await until(lambda: "not-found" in steward.release.reason)
        (rig.folder / "away").rename(rig.folder / "store")
        second = rig.publish(2)
        await until(lambda: steward.release.bundle == second.digest)


async def test_steward_cold_start_with_a_bad_release_serves_the_last_good_one(rig: Rig) -> None:
    first, settings = rig.publish(1), rig.settings()
    async with followed(settings):
        await until(lambda: last_good(settings))
    bad = rig.publish(2, edit=shuffle)
    async with followed(settings) as (steward, stub):
        await until(lambda: steward.release.state == "SERVING")
        assert await answered_by(stub) == first.digest
        assert steward.release.wanted == bad.digest and "head intent" in steward.release.reason
        assert last_good(settings) == first.digest


async def test_steward_pinned_machine_serves_exactly_that(rig: Rig) -> None:
    first, settings = rig.publish(1), rig.settings()
    async with followed(settings) as (steward, stub):
        await steward.serving.wait()
        second = rig.publish(2)
        await until(lambda: steward.release.bundle == second.digest)
        pin(rig.root, first.digest)
        await until(lambda: steward.release.bundle == first.digest)  # back, below the floor
        assert steward.release.pinned == first.digest
        with pytest.raises(InvalidInput, match="pinned"):
            await steward.swap(second.digest)
        assert await answered_by(stub) == first.digest
        unpin(rig.root)
        await until(lambda: steward.release.bundle == second.digest)
        assert steward.release.pinned == ""
    async with followed(rig.settings(pin=first.digest)) as (steward, stub):
        await steward.serving.wait()
        assert await answered_by(stub) == first.digest


async def test_steward_release_that_was_asked_for_stays_until_the_channel_moves(rig: Rig) -> None:
    """Two releases share a seq nowhere, so what is asked for is the channel's own, or one above its floor."""
    rig.publish(1)
    async with followed(rig.settings(watch_s=0)) as (steward, _):
        await steward.serving.wait()
        second = rig.publish(2)
        release, changed = await steward.swap(second.digest)
        assert changed and release.bundle == second.digest
        again, changed = await steward.swap(second.digest)
        assert not changed and again.bundle == second.digest and again.reason == ""
        release, changed = await steward.swap("0" * 64)
        assert not changed and release.wanted == "0" * 64 and "not-found" in release.reason
        assert release.bundle == second.digest


async def test_steward_of_many_who_ask_at_once_the_latest_wins_and_all_hear_of_it(rig: Rig) -> None:
    rig.publish(1)
    async with followed(rig.settings(watch_s=0)) as (steward, stub):
        await steward.serving.wait()
        done = swaps("ok")
        releases = [rig.publish(seq) for seq in range(2, 6)]
        asked = [releases[number % 3].digest for number in range(31)] + [releases[-1].digest]
        told = await asyncio.gather(*(steward.swap(digest) for digest in asked))
        assert told[-1][0].bundle == releases[-1].digest
        assert {release.bundle for release, _ in told} <= {asked[0], releases[-1].digest}
        assert swaps("ok") - done <= 2  # the one under way, and the latest of those who waited
        assert await answered_by(stub) == releases[-1].digest


async def test_steward_swap_goes_on_when_who_asked_for_it_leaves(rig: Rig) -> None:
    rig.publish(1)
    async with followed(rig.settings(watch_s=0)) as (steward, _):
        await steward.serving.wait()
        second = rig.publish(2)
        asking = asyncio.create_task(steward.swap())
        await asyncio.sleep(0)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        await until(lambda: steward.release.bundle == second.digest)


async def test_steward_named_folder_that_is_bad_ends_the_start(tmp_path: Path) -> None:
    settings = Settings(bundle=tmp_path, port=0, metrics=False)
    async with stewarded(settings, Alone(settings)) as (_, _, running):
        with pytest.raises(FileMissing):
            await running


async def test_steward_named_folder_is_read_again_when_told(rig: Rig) -> None:
    folder = rig.folder / "served"
    first, second = rig.build(1), rig.build(2)
    shutil.copytree(first.path, folder)
    settings = Settings(bundle=folder, port=0, metrics=False, trial="never")
    async with followed(settings) as (steward, stub):
        await steward.serving.wait()
        folder.rename(rig.folder / "old")
        shutil.copytree(second.path, folder)
        assert await answered_by(stub) == first.digest
        steward.nudge()
        await until(lambda: steward.release.bundle == second.digest)
        shutil.rmtree(folder)
        steward.nudge()
        await until(lambda: steward.release.reason)
        assert await answered_by(stub) == second.digest
        with pytest.raises(InvalidInput, match="follows no store"):
            await steward.swap(first.digest)


async def test_steward_bundle_that_expires_serves_on_with_an_alarm(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """Its time is over within the tolerance of clocks, so the start takes it; a later one would not."""
    past = datetime.now(UTC) - timedelta(minutes=1)
    old = rig.publish(1, expires=past)
    async with followed(rig.settings()) as (steward, stub):
        await steward.serving.wait()
        await until(lambda: "expired" in caplog.text)
        assert await answered_by(stub) == old.digest
        await until(lambda: steward.release.expires)
        told = metrics.REGISTRY.get_sample_value("nlu_bundle_expires_timestamp_seconds")
        assert told == pytest.approx(past.timestamp(), abs=1)


async def test_steward_expired_bundle_is_refused_at_a_cold_start_unless_pinned(rig: Rig) -> None:
    old = rig.publish(1, expires=CREATED + timedelta(days=1))
    async with followed(rig.settings()) as (steward, _):
        await until(lambda: steward.release.reason)
        assert steward.release.state == "HOLDING" and "expired" in steward.release.reason
    async with followed(rig.settings(pin=old.digest)) as (steward, stub):
        await steward.serving.wait()
        assert await answered_by(stub) == old.digest


async def test_steward_release_that_would_not_fit_is_refused_before_it_is_loaded(rig: Rig) -> None:
    first = rig.publish(1)
    loads = []
    async with followed(rig.settings()) as (steward, stub):
        await steward.serving.wait()
        prepare = steward._crew.prepare

        async def counted(bundle: Bundle) -> None:
            loads.append(bundle.digest)
            await prepare(bundle)

        steward._crew.prepare = counted  # type: ignore[method-assign]
        steward._settings = steward._settings.model_copy(update={"memory_bytes": 1})
        second = rig.publish(2)
        await until(lambda: steward.release.wanted == second.digest)
        assert "memory: found" in steward.release.reason and not loads
        assert await answered_by(stub) == first.digest
        steward._settings = steward._settings.model_copy(update={"memory_bytes": 0})  # the control
        steward.nudge()
        await until(lambda: steward.release.bundle == second.digest)
        assert loads == [second.digest]


async def test_steward_tries_a_bundle_in_a_child_first_where_nobody_signed_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nlu import steward as module

    tried: list[str] = []

    def tried_load(bundle: Bundle, settings: Settings) -> trial.Trial:
        tried.append(bundle.digest)
        return trial.try_load(bundle, settings)

    monkeypatch.setattr(module, "try_load", tried_load)
    first = rig.publish(1)
    async with followed(rig.settings(trial="unsigned")) as (steward, stub):
        await steward.serving.wait()
        assert tried == [first.digest]
        assert await answered_by(stub) == first.digest
    async with followed(rig.settings(trial="never")) as (steward, _):
        await steward.serving.wait()
    assert tried == [first.digest]


class Nobody:
    """No Crew: for questions that reach none."""


def paused(
    settings: Settings, *, failures: int, serves: Bundle | None = None, code: str = ""
) -> float | None:
    from nlu.steward import Refusal

    steward = Steward(settings, Nobody())  # type: ignore[arg-type]
    steward._failures, steward._served = failures, serves
    steward._refusal = Refusal("", code, "", False) if code else None
    return steward._pause()


async def test_steward_pauses_longer_from_failure_to_failure_and_never_asks_in_step(rig: Rig) -> None:
    settings = rig.settings(watch_s=30)
    for failures, least in ((1, 1.0), (2, 2.0), (5, 16.0), (40, MAX_PAUSE_S)):
        pauses = [paused(settings, failures=failures) or 0.0 for _ in range(50)]
        assert all(least <= pause <= 1.25 * least for pause in pauses)
        assert len(set(pauses)) > 25
    assert 30 <= (paused(settings, failures=0, serves=rig.made.bundle) or 0) <= 37.5
    assert (
        paused(settings, failures=1, code="forbidden") or 0
    ) >= 60  # who locks us out is not asked twice a minute
    assert paused(rig.settings(watch_s=0), failures=3, serves=rig.made.bundle) is None
    assert paused(Settings(bundle=rig.made.bundle.path), failures=0, serves=rig.made.bundle) is None


async def test_steward_release_of_somebody_elses_making_is_a_refusal_like_any_other(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw is logged with its traceback, tried again later, and ends nothing."""
    first = rig.publish(1)
    async with followed(rig.settings()) as (steward, stub):
        await steward.serving.wait()
        real, failing = origin.fetch_release, [True]

        def fetch(settings: Settings, digest: str = "") -> object:
            if failing:
                raise RuntimeError("somebody's secret")
            return real(settings, digest)

        monkeypatch.setattr(origin, "fetch_release", fetch)
        second = rig.publish(2)
        await until(lambda: steward.release.reason)
        assert steward.release.reason == "RuntimeError"  # a stranger's words go no further than the log
        assert await answered_by(stub) == first.digest
        failing.clear()
        await until(lambda: steward.release.bundle == second.digest)


def test_steward_errors_have_stable_codes() -> None:
    from nlu.errors import EngineRefused, WorkerFailed
    from nlu.steward import code_of

    refused = EngineRefused("head", found="a", expected="b", remedy="c")
    memory = EngineRefused("memory", found="a", expected="b", remedy="c")
    missing: StaticsError = FileMissing(part="p", found="a", expected="b", remedy="c")
    codes = [code_of(error) for error in (refused, memory, missing, WorkerFailed("w"), RuntimeError())]
    assert codes == ["engine-refused", "memory", "file-missing", "worker-failed", "error"]


async def test_steward_refusal_outlives_a_store_that_cannot_be_looked_at(rig: Rig) -> None:
    rig.publish(1)
    async with followed(rig.settings()) as (steward, _):
        await steward.serving.wait()
        bad = rig.publish(2, edit=shuffle)
        await until(lambda: steward.release.wanted == bad.digest)
        (rig.folder / "store").rename(rig.folder / "away")
        await until(lambda: steward._failures > 2)
        (rig.folder / "away").rename(rig.folder / "store")
        await until(lambda: not steward._failures)
        assert steward.release.wanted == bad.digest and "head intent" in steward.release.reason


async def test_steward_refused_releases_leave_nothing_behind(rig: Rig) -> None:
    rig.publish(1)
    async with followed(rig.settings(watch_s=0)) as (steward, _):
        await steward.serving.wait()
        rig.publish(2, edit=shuffle)

        async def refused(times: int) -> int:
            for _ in range(times):
                release, changed = await steward.swap()
                assert release.reason and not changed
            gc.collect()
            return len(gc.get_objects())

        before = await refused(3)
        assert await refused(10) - before < 100
