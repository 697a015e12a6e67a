"""One serving process: its listeners, and the engine behind them, which a swap changes whole.

settings -> listen (HOLDING) -> prepare -> flip (SERVING) -> ... -> drain. Which bundle is prepared, and when, is for the
steward to say; nothing else reads the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from annotators.annotator import Encoding
from nlu import guard, health, loading, memory, metrics, scrapes, steward, tls, tracing
from nlu.batcher import Batcher
from nlu.cache import EncodingCache
from nlu.callers import Callers
from nlu.desk import Desk
from nlu.engine import Engine
from nlu.errand import errand
from nlu.health import Health
from nlu.lru import Lru
from nlu.pipeline import Kept, Pipeline
from nlu.redis_tier import RedisTier
from nlu.rpc import SERVICE, NluServicer, server_options
from nlu.settings import Settings
from nlu.shadow import Sample
from nlu.steward import stewarded
from nlu.types import Release
from nlu.watchdog import Watchdog
from statics.bundle import Bundle

if TYPE_CHECKING:
    from nlu.listener import Listener

logger = logging.getLogger(__name__)

_BEAT_S = 0.5  # between two words on liveness
_REFUSING_S = 0.4  # of a stop: longer than calls wait in gRPC on a busy machine
_WARM_UP_S = 60.0  # a model that takes longer for a phrase, after a load in which it read dozens, is stuck
_M_ARENA_MAX = -8  # malloc.h of glibc
_TRACES_S = 1.0  # for the last traces to leave


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises StaticsError or EngineRefused where what was named is not fit to serve."""
    settle(settings)
    await steward.keep(settings, Alone(settings))


def settle(settings: Settings) -> None:
    """Once in a process that serves, before it listens."""
    guard.arm()
    # An arena for each thread that encodes, and two for all others: glibc would make eight a core, and every load would
    # leave its scraps in another one.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, settings.workers + 2)
    gc.freeze()  # what was imported stays; a swap's collection takes a few ms, and not a hundred, when it need not look there


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[int]:
    """A serving server, as its port; draining on the way out."""
    async with stewarded(settings, Alone(settings)) as (port, watching, running):
        ready = asyncio.create_task(watching.serving.wait())
        await asyncio.wait([ready, running], return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if running.done():
            running.result()
        yield port


class Server:
    """The listeners and the engine of one process. All its methods are for the event loop's thread.

    `port` 0 takes any free one; `reuse_port` lets several processes share it.
    """

    def __init__(self, settings: Settings, *, port: int | None = None, reuse_port: bool = False) -> None:
        self.port = settings.port if port is None else port
        self.http_port: int | None = None  # once it listens, where the settings ask for it
        self.health = Health()
        self.desk = Desk(
            in_flight=settings.in_flight,
            deadline_s=settings.deadline_s,
            max_deadline_s=settings.max_deadline_s,
            callers=None if settings.callers is None else Callers.load(settings.callers),
        )
        self._settings, self._reuse_port = settings, reuse_port
        self._watchdog = Watchdog()
        self._tiers = Tiers(settings, lag_s=lambda: self._watchdog.lag_s)
        self._live: Served | None = None
        self._prepared: Served | None = None
        self._grpc: grpc.aio.Server | None = None
        self._http: Listener | None = None
        self._open = contextlib.AsyncExitStack()  # listeners beside gRPC's, closed in the opposite order

    async def start(self) -> int:
        """Listen, and refuse every call with Holding until the first flip; the port. Raises OSError where it is taken."""
        try:
            await self._start()
        except BaseException:
            await self.drain()
            raise
        what = "" if self._live is not None else "; nothing is served yet"
        logger.info("listening on %s:%d%s", self._settings.host, self.port, what)
        return self.port

    async def _start(self) -> None:
        self._grpc = self._listener()
        self.health.set(("", SERVICE, "ready"), self._live is not None)  # a worker may load before it listens
        metrics.IN_FLIGHT.set_function(lambda: self.desk.in_flight)
        metrics.MEMORY_LIMIT.set(memory.limit_bytes(self._settings))
        await self._grpc.start()
        for task in (self._watchdog.run(), self._beat()):
            self._open.push_async_callback(_ended, asyncio.create_task(task))
        if self._settings.http_port is not None:
            self._http = await self._gateway()
            self.http_port = self._http.port
        if self._settings.metrics:
            self._open.callback(scrapes.listen(self._settings))

    async def prepare(self, bundle: Bundle) -> None:
        """Load beside what serves, in a thread, and warm up. Raises EngineRefused where the parts do not belong together."""
        settings, live = self._settings, self._live
        began = time.monotonic()
        engine = await errand(
            loading.load,
            bundle,
            before=None if live is None else live.engine,
            placement=settings.index_placement,
            pages=settings.index_pages,
            milvus=settings.milvus,
        )
        self._prepared = self._tiers.serve(engine)
        async with asyncio.timeout(_WARM_UP_S):
            await self._prepared.batcher.warm(loading.WARM_UP)
        logger.info("loaded bundle %s in %.1f s", bundle.digest[:12], time.monotonic() - began)

    async def flip(self, at: float | None = None) -> None:
        """What was prepared answers every call from the moment `at` of time.monotonic() on, None being now.

        Returns when the calls that use what served before have ended, and its memory is given back.
        """
        served, self._prepared = self._prepared, None
        if served is None:
            raise RuntimeError("nothing is prepared; this is a bug")
        if at is not None:
            await asyncio.sleep(at - time.monotonic())
        before, self._live = self._live, served
        self._watchdog.batchers.add(served.batcher)
        self._show(served, None if before is None else before.engine)
        await self.desk.flip(served.pipeline)
        if before is not None:
            self._watchdog.batchers.discard(before.batcher)
            await before.batcher.close()
            del before
            await errand(give_back)

    async def abandon(self) -> None:
        """Drop what was prepared, and what a refused load left behind."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            await prepared.batcher.close()
            del prepared
        await errand(gc.collect)  # a load that failed leaves cycles behind; one that served leaves none
        await errand(give_back)

    def tell(self, release: Release) -> None:
        """What Describe says from now on."""
        self.desk.release = release

    async def drain(self) -> None:
        """NOT_SERVING at once; after `linger_s` no new calls; an end when the last call ended, or `drain_s` is over."""
        settings = self._settings
        self.health.shut()
        linger = min(settings.linger_s, settings.drain_s)
        await asyncio.sleep(linger if self._live is not None else 0)
        self.desk.draining = True
        self.health.end()
        # What gRPC has taken in but not handed to us ends as CANCELLED when it stops, and few callers try that elsewhere. So
        # for a moment we go on taking calls, to refuse them.
        refusing = min(_REFUSING_S, settings.drain_s - linger)
        await asyncio.sleep(refusing if self._live is not None else 0)
        grace_s = settings.drain_s - linger - refusing
        await asyncio.gather(
            *([self._grpc.stop(grace_s)] if self._grpc is not None else []),
            *([self._http.close(grace_s)] if self._http is not None else []),
        )
        await self._open.aclose()
        for served in (self._live, self._prepared):
            if served is not None:
                await served.batcher.close()
        await self._tiers.close()
        with contextlib.suppress(TimeoutError):  # a collector that is gone does not keep us
            await asyncio.wait_for(errand(tracing.close), _TRACES_S)

    async def _gateway(self) -> Listener:
        """The same desk over HTTP. Raises ValueError where the http extra is not installed."""
        try:
            from nlu.gateway import app, serve_http
        except ModuleNotFoundError as error:
            raise ValueError(
                f"NLU_HTTP_PORT: found no module {error.name}, expected the 'http' extra; pip install 'chorus-nlu[http]'"
            ) from error
        application = app(self.desk, self._settings, health=self.health)
        return await serve_http(application, self._settings, reuse_port=self._reuse_port)

    def _listener(self) -> grpc.aio.Server:
        settings = self._settings
        server = grpc.aio.server(
            options=server_options(reuse_port=self._reuse_port), interceptors=tracing.interceptors(settings)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        server.add_generic_rpc_handlers((NluServicer(self.desk).handler(),))
        if settings.reflection:
            reflection.enable_server_reflection((SERVICE, health.SERVICE, reflection.SERVICE_NAME), server)
        address, credentials = f"{settings.host}:{self.port}", tls.server_credentials(settings)
        try:
            if credentials is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, credentials)
        except (
            RuntimeError
        ) as error:  # what grpc raises for a port that is taken or an address that is not ours
            raise OSError(
                f"address: found {address} taken or not of this machine, expected a free one; use --host and --port, or stop the other server"
            ) from error
        return server

    async def _beat(self) -> None:
        """Liveness is the watchdog's word, and nobody else's: starting again mends no store and no Redis."""
        while True:
            self.health.set((health.LIVE,), self._watchdog.healthy)
            await asyncio.sleep(_BEAT_S)

    def _show(self, served: Served, before: Engine | None) -> None:
        """Health by component, and what is served; parts that went are NOT_SERVING, for whoever watches them."""
        self._tiers.watch(served)
        engine = served.engine
        names = {*health_names(engine), "ready"}
        if before is not None:
            self.health.set(set(health_names(before)) - names, False)
        self.health.set(names, True)
        versions = engine.versions
        metrics.SERVING.show(versions.bundle, versions.vectorizer, versions.service)


class Alone:
    """A Crew of one: this process."""

    size = 1

    def __init__(self, settings: Settings) -> None:
        self.server = Server(settings)

    async def start(self) -> int:
        return await self.server.start()

    async def prepare(self, bundle: Bundle) -> None:
        await self.server.prepare(bundle)

    async def flip(self) -> None:
        await self.server.flip()

    async def abandon(self) -> None:
        await self.server.abandon()

    async def tell(self, release: Release) -> None:
        self.server.tell(release)

    def rss_bytes(self) -> int:
        return memory.rss_bytes()

    async def drain(self) -> None:
        await self.server.drain()


@dataclass(frozen=True)
class Served:
    """An engine at work: its pipeline, and the batcher that ends with it."""

    engine: Engine
    pipeline: Pipeline
    batcher: Batcher


class Tiers:
    """What outlives an engine: the tiers that hold Encodings, under keys that name their vectorizer, and the sample."""

    def __init__(self, settings: Settings, *, lag_s: Callable[[], float] = lambda: 0.0) -> None:
        self._settings, self._lag_s = settings, lag_s
        self._lru: Lru[Encoding] = Lru(settings.lru_bytes)
        url, secret = settings.redis.get_secret_value(), settings.cache_secret.get_secret_value()
        self._redis = RedisTier(url, secret=secret.encode()) if url else None
        self._sample: Sample | None = None

    def serve(self, engine: Engine) -> Served:
        """An engine with a batcher and kept answers of its own; needs a running event loop."""
        settings, vectorizer = self._settings, engine.vectorizer
        batcher = Batcher(
            lambda phrases, tokens: vectorizer.encode(phrases, tokens=tokens),
            workers=settings.workers,
            limit=settings.queue,
            max_batch=vectorizer.max_batch,
            queue_s=settings.queue_s,
            lag_s=self._lag_s,
        )
        cache = EncodingCache(
            vectorizer.fingerprint,
            dim=vectorizer.dim,
            token_dim=vectorizer.token_dim,
            cold=engine.cold,
            lru=self._lru,
            redis=self._redis,
            batcher=batcher,
        )
        shadowed = bool(engine.fleet.shadows)
        # A shadow is to see repeated questions too, so beside one no answer is given again.
        answers: Lru[Kept] | None = (
            Lru(settings.answers_bytes) if settings.answers_bytes and not shadowed else None
        )
        sample = self._sampled() if shadowed else None
        pipeline = Pipeline(engine, cache, answers, settings.persona, sample, settings.drops)
        return Served(engine, pipeline, batcher)

    def watch(self, served: Served) -> None:
        """Show the tiers, and the queue and the answers of what serves now, in the metrics."""
        lru, redis, batcher, answers = self._lru, self._redis, served.batcher, served.pipeline.answers
        metrics.QUEUE.set_function(lambda: batcher.waiting)
        metrics.LRU_BYTES.set_function(lambda: lru.nbytes)
        metrics.ANSWERS_BYTES.set_function(lambda: 0 if answers is None else answers.nbytes)
        if redis is not None:
            metrics.REDIS_OPEN.set_function(lambda: redis.breaker.open)

    async def close(self) -> None:
        """Write what is to be written, and hang up."""
        if self._sample is not None:
            await self._sample.close()
        if self._redis is not None:
            await self._redis.close()

    def _sampled(self) -> Sample | None:
        settings = self._settings
        if self._sample is None and settings.shadow_sample is not None:
            self._sample = Sample(settings.shadow_sample, settings.shadow_sample_rows)
        return self._sample


@asynccontextmanager
async def pipeline_of(engine: Engine, settings: Settings) -> AsyncIterator[Pipeline]:
    """A Pipeline over a loaded engine, with its caches and its batcher running; without a server around it."""
    tiers = Tiers(settings)
    served = tiers.serve(engine)
    tiers.watch(served)
    try:
        yield served.pipeline
    finally:
        await served.batcher.close()
        await tiers.close()


def health_names(engine: Engine) -> list[str]:
    """What grpc.health.v1 answers for: the server, the service, and every part."""
    parts = [f"{component.kind}/{component.name}" for component in engine.bundle.manifest.components]
    return ["", SERVICE, *parts]


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def give_back() -> None:
    """Hand free pages of the heap to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; other systems do without
    if trim is not None:
        trim(0)
