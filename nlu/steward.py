"""The steward: which release is served. It follows the channel, and swaps to what it finds there or says why not.

fetch (pulled and verified) -> trial in a limited child -> memory gate -> every process loads it beside what serves ->
all flip at one moment -> only now it is this machine's current release. Whatever fails on the way, what serves goes on.
docs/hot-swap.md tells the whole story.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from nlu import guard, memory, metrics, origin
from nlu.control import controlled
from nlu.errand import errand
from nlu.errors import EngineRefused, InvalidInput, NluError, WorkerFailed
from nlu.settings import Settings
from nlu.trial import try_load
from nlu.types import Release
from statics.bundle import Bundle
from statics.errors import (
    DigestMismatch,
    Expired,
    Forbidden,
    SignatureInvalid,
    SignatureMissing,
    SizeMismatch,
    StaticsError,
)
from statics.local import collect
from statics.pull import CIRCUMSTANCES, Fetched, follow

logger = logging.getLogger(__name__)

MAX_PAUSE_S = 60.0
KEPT = 2  # newest bundles on this machine's disk: what serves, and the way back

_FORESEEN = (StaticsError, NluError)
# Of these, what another try may mend although nothing new is published; the others lie in the bundle.
# A clock is set right, a keyring is rolled out, a second signature is added to a release that is there already.
_PASSING = (
    *CIRCUMSTANCES, SizeMismatch, DigestMismatch, Expired, SignatureMissing, SignatureInvalid, WorkerFailed,
)  # fmt: skip


class Crew(Protocol):
    """Who serves: this process alone, or several workers. All of them or none do what is asked."""

    @property
    def size(self) -> int:
        """How many processes load a bundle."""

    async def start(self) -> int:
        """Listen, and hold until there is something to serve; the port."""

    async def prepare(self, bundle: Bundle) -> None:
        """Load beside what serves. Raises EngineRefused, StaticsError or another NluError; then nothing is prepared."""

    async def flip(self) -> None:
        """What was prepared serves from one moment on; returns when what served before is freed."""

    async def abandon(self) -> None:
        """Drop what was prepared, if anything was."""

    async def tell(self, release: Release) -> None:
        """What Describe says from now on."""

    def rss_bytes(self) -> int:
        """Memory that the processes which load have now, all together."""

    async def drain(self) -> None:
        """NOT_SERVING, then no new calls, then an end: within `drain_s`, none that was accepted is lost."""


@dataclass(frozen=True)
class Refusal:
    """Why what should be served is not. `lasting`: no other try before the channel moves."""

    bundle: str  # digest, as far as it is known
    code: str
    words: str
    lasting: bool


def code_of(error: Exception) -> str:
    """A stable word for metrics and alarms."""
    if isinstance(error, StaticsError):
        return error.code
    if isinstance(error, EngineRefused):
        return "memory" if error.part == "memory" else "engine-refused"
    return "worker-failed" if isinstance(error, WorkerFailed) else "error"


class Steward:
    """One a machine, or a pod. All its methods are for the event loop's thread."""

    def __init__(self, settings: Settings, crew: Crew) -> None:
        self.release = Release()
        self.serving = asyncio.Event()  # set once something is served
        self._settings, self._crew = settings, crew
        self._served: Bundle | None = None
        self._refusal: Refusal | None = None
        self._pin = ""
        self._seen = ""  # what the channel pointed to when it was looked at last
        self._settled = ""  # what it pointed to when there was nothing left to do about it
        self._failures = 0  # in a row
        self._asked = ""
        self._running: asyncio.Task[tuple[Release, bool]] | None = None
        self._next: asyncio.Task[tuple[Release, bool]] | None = None
        self._nudged = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None
        self._complained = ""  # what was logged last of all that went wrong

    async def run(self) -> None:
        """Find something to serve, then follow the channel until cancelled.

        Raises StaticsError or EngineRefused where the bundle that was named, or shipped, is not fit: there is nothing to
        wait for then. From a store there is, and it goes on trying.
        """
        self._running = asyncio.create_task(self._begin(), name="swap")  # who asks meanwhile comes after it
        metrics.MEMORY_LIMIT.set(memory.limit_bytes(self._settings))
        await self._running
        while True:
            pause = self._pause()
            if self._served is None:
                logger.error("holding: nothing fit to serve; next try in %.1f s", pause or 0.0)
            if await self._nudge(pause):
                await self.swap()
            else:
                await self._look()

    async def _begin(self) -> tuple[Release, bool]:
        if self._follows:
            return await self._swap("")
        await self._serve(await errand(origin.named, self._settings))
        await self._settle()
        return self.release, True

    def nudge(self) -> None:
        """Look now, whatever was decided before."""
        self._nudged.set()

    async def swap(self, digest: str = "") -> tuple[Release, bool]:
        """Serve the release of this digest, or with none what the channel, the pin or the folder say; whether that changed
        what is served. A refusal is in `release.reason`; raises InvalidInput for a wish that cannot be one.

        One swap at a time: of those who ask while one is under way the latest wins, and all hear what became of it.
        """
        if digest:
            await self._check(digest)
        self._asked = digest
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._running), name="swap")
        return await asyncio.shield(self._next)

    async def stop(self) -> None:
        """No more swaps; one under way is left where it is, which nobody can see."""
        if self._alarm is not None:
            self._alarm.cancel()
        tasks = [task for task in (self._running, self._next) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._tell(replace(self.release, state="DRAINING"))

    async def _after(self, running: asyncio.Task[tuple[Release, bool]] | None) -> tuple[Release, bool]:
        if running is not None:
            await asyncio.wait([running])
        self._running, self._next = self._next, None  # who asks from here on asks for the next one
        return await self._swap(self._asked)

    async def _swap(self, digest: str) -> tuple[Release, bool]:
        wanted, changed = digest or self._seen, False
        refusal: Refusal | None = None
        try:
            bundle, fetched = await self._fetch(digest)
            wanted = bundle.digest
            changed = await self._serve(bundle)
        except Exception as error:
            refusal = _refusal(error, wanted)
        if refusal is None:
            await self._settle()
            if fetched is not None:
                await self._record(fetched)
        else:
            await self._crew.abandon()  # only now that the exception is gone can everything be freed
            self._refuse(refusal)
            changed = self._served is None and self._follows and await self._fall_back(wanted)
            await self._tell(self._state())
        return self.release, changed

    async def _check(self, digest: str) -> None:
        if not self._follows:
            raise InvalidInput(
                "digest", found=digest[:12], expected="none, as this server follows no store",
                remedy="set NLU_STORE; a server of one folder reads it again when it is asked for no digest",
            )  # fmt: skip
        pin = await errand(origin.pin_of, self._settings)
        if pin not in ("", digest):
            raise InvalidInput(
                "digest", found=digest[:12], expected=f"{pin[:12]}, to which this server is pinned",
                remedy="unset NLU_PIN, or `nlu bundle unpin`",
            )  # fmt: skip

    async def _fetch(self, digest: str) -> tuple[Bundle, Fetched | None]:
        if not self._follows:
            return await errand(origin.named, self._settings), None
        self._pin = await errand(origin.pin_of, self._settings)
        with _timed("fetch"):
            fetched = await errand(origin.fetch_release, self._settings, digest)
        if not digest:
            self._seen = fetched.bundle.digest
        return fetched.bundle, fetched

    async def _serve(self, bundle: Bundle) -> bool:
        """Through every check and into service; False where it is served already."""
        if self._served is not None and self._served.digest == bundle.digest:
            return False
        measured = await self._try(bundle)
        memory.gate(
            bundle,
            self._served,
            measured,
            used=self._crew.rss_bytes(),
            limit=memory.limit_bytes(self._settings),
            processes=self._crew.size,
        )
        with _timed("prepare"):
            await self._crew.prepare(bundle)
        with _timed("flip"):
            await self._crew.flip()
        metrics.SWAPS.labels("ok").inc()
        self._took(bundle)
        return True

    async def _settle(self) -> None:
        """Nothing is left to do about what the channel points to."""
        self._refusal, self._failures, self._settled = None, 0, self._seen
        metrics.REFUSED.hide()
        await self._tell(self._state())

    async def _try(self, bundle: Bundle) -> int | None:
        """What a whole load takes, measured in a child process; None where the settings ask for no trial.

        A bundle that was named at the start may take this process down with it: there is nothing else to serve, and
        whoever named it is looking.
        """
        signed = self._settings.keyring is not None
        wished = self._settings.trial == "always" or (self._settings.trial == "unsigned" and not signed)
        if not wished or (self._served is None and not self._follows):
            return None
        with _timed("trial"):
            return (await errand(try_load, bundle, self._settings)).rss_bytes

    async def _record(self, fetched: Fetched) -> None:
        """This machine's current release from now on; a disk that refuses costs the next cold start, not this service."""
        try:
            await errand(follow, self._settings.statics, fetched)
            await errand(collect, self._settings.statics, KEPT, also=(fetched.bundle.digest,))
        except (StaticsError, OSError) as error:
            logger.error(
                "bundle %s serves, but this machine could not note it: %s", fetched.bundle.digest[:12], error
            )

    async def _fall_back(self, refused: str) -> bool:
        """At a cold start without the store, or with a bad release in it: what this machine served last."""
        try:
            bundle = await errand(origin.last_good, self._settings)
            if bundle is None or bundle.digest == refused:
                return False
            await self._serve(bundle)
            logger.warning("serving the last good bundle %s", bundle.digest[:12])
        except Exception as error:
            logger.error("the last good bundle is not fit either: %s", _words(error))
            return False
        return True

    async def _look(self) -> None:
        """Ask the channel where it points, and swap if that is news."""
        try:
            self._pin = await errand(origin.pin_of, self._settings)
            self._seen = await errand(origin.wanted, self._settings)
        except Exception as error:
            refusal = _refusal(error, "")
            metrics.LOOKS.labels(refusal.code).inc()
            self._refuse(refusal)
            await self._tell(self._state())
            return
        metrics.LOOKS.labels("ok").inc()
        metrics.LOOKED.set_to_current_time()
        if self._seen != self._settled or self._served is None:
            await self.swap()
            return
        self._failures = 0
        if self._refusal is not None and not self._refusal.lasting:
            await self._settle()

    def _refuse(self, refusal: Refusal) -> None:
        self._failures += 1
        stands = self._refusal is not None and self._refusal.lasting and not refusal.bundle
        if not stands:  # a store that cannot be looked at says nothing about the bundle it had
            self._refusal = refusal
        if refusal.lasting and self._served is not None:
            self._settled = self._seen
        if refusal.bundle:
            metrics.SWAPS.labels(refusal.code).inc()
            metrics.REFUSED.show(refusal.bundle, refusal.code)
        if refusal.words != self._complained:
            self._complained = refusal.words
            what = f"bundle {refusal.bundle[:12]}" if refusal.bundle else "what the channel points to"
            logger.error("%s is not served: %s", what, refusal.words)

    def _took(self, bundle: Bundle) -> None:
        self._served = bundle
        self.release = replace(self.release, since=datetime.now(UTC))
        self.serving.set()
        manifest = bundle.manifest
        logger.info(
            "bundle %s serves, seq %d of channel %s", bundle.digest[:12], manifest.seq, manifest.channel
        )
        if self._alarm is not None:
            self._alarm.cancel()
        if manifest.expires is not None:
            left = (manifest.expires - datetime.now(UTC)).total_seconds()
            self._alarm = asyncio.get_running_loop().call_later(
                max(0.0, left),
                logger.error,
                "bundle %s, which serves, expired at %s: publish a release; a cold start would refuse this one",
                bundle.digest[:12],
                manifest.expires,
            )

    def _state(self) -> Release:
        served, refusal = self._served, self._refusal
        told = replace(
            self.release,
            pinned=self._pin,
            wanted="" if refusal is None else refusal.bundle,
            reason="" if refusal is None else refusal.words,
        )
        if served is None:
            return told
        manifest = served.manifest
        return replace(
            told,
            state="SERVING",
            bundle=served.digest,
            channel=manifest.channel,
            seq=manifest.seq,
            expires=manifest.expires,
        )

    async def _tell(self, release: Release) -> None:
        self.release = release
        metrics.RELEASE_STATE.state(release.state)
        metrics.RELEASE_SEQ.set(release.seq)
        metrics.RELEASE_SINCE.set(_seconds(release.since))
        metrics.BUNDLE_EXPIRES.set(_seconds(release.expires))
        metrics.BUNDLE_CREATED.set(_seconds(self._served.manifest.created if self._served else None))
        await self._crew.tell(release)

    @property
    def _follows(self) -> bool:
        """Whether there is a channel to follow."""
        return bool(self._settings.store) and self._settings.bundle is None

    def _pause(self) -> float | None:
        """Seconds to the next look, spread so that a fleet does not look at once; None: not before somebody asks."""
        every = 1.0 if self._served is None else self._settings.watch_s
        if not self._follows or not every:
            return None
        if self._refusal is not None and self._refusal.code == Forbidden.code:
            every = max(every, MAX_PAUSE_S)  # asking again is an attack in the eyes of whoever locked us out
        longest = max(every, MAX_PAUSE_S)
        return min(longest, every * 2.0 ** min(max(0, self._failures - 1), 30)) * random.uniform(1.0, 1.25)

    async def _nudge(self, pause: float | None) -> bool:
        """Wait; whether somebody asked meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._nudged.wait()
        nudged = self._nudged.is_set()
        self._nudged.clear()
        return nudged


async def keep(settings: Settings, crew: Crew) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP looks at the channel, or the folder, now."""
    for weakness in guard.self_check(settings):
        logger.warning("%s", weakness)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)  # sent again, it changes nothing
    loop.add_signal_handler(signal.SIGINT, _interrupted, loop, stop)
    async with stewarded(settings, crew) as (port, steward, running), controlled(settings, steward):
        loop.add_signal_handler(signal.SIGHUP, steward.nudge)
        stopped, ready = (asyncio.create_task(event.wait()) for event in (stop, steward.serving))
        await asyncio.wait([stopped, ready, running], return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            logger.info("serving on %s:%d", settings.host, port)
        await asyncio.wait([stopped, running], return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        stopped.cancel()
        if running.done():
            running.result()  # raises: what was named cannot be served
        logger.info("stopping: no new calls; up to %.0f s for those under way", settings.drain_s)


@asynccontextmanager
async def stewarded(settings: Settings, crew: Crew) -> AsyncIterator[tuple[int, Steward, asyncio.Task[None]]]:
    """A listening crew with its steward at work: the port, the steward, and the task that is its watch."""
    port = await crew.start()
    steward = Steward(settings, crew)
    running = asyncio.create_task(steward.run(), name="steward")
    try:
        yield port, steward, running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        try:
            await steward.stop()
        finally:
            await crew.drain()


def _interrupted(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    stop.set()
    loop.remove_signal_handler(signal.SIGINT)  # whoever presses Ctrl-C twice means now


@contextmanager
def _timed(phase: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    metrics.SWAP_SECONDS.labels(phase).observe(time.monotonic() - began)


def _seconds(moment: datetime | None) -> float:
    return 0.0 if moment is None else moment.timestamp()


def _refusal(error: Exception, bundle: str) -> Refusal:
    """The exception itself is let go: its frames hold what was loaded in vain."""
    foreseen = isinstance(error, _FORESEEN)
    if not foreseen:
        logger.error("a swap failed in a way that nobody foresaw", exc_info=error)
    return Refusal(bundle, code_of(error), _words(error), foreseen and not isinstance(error, _PASSING))


def _words(error: Exception) -> str:
    """Our own errors say what to do; of others the kind is told, and the log has the rest."""
    return str(error) if isinstance(error, _FORESEEN) else type(error).__name__
