"""The life of the process: settings -> bundle -> load -> warm -> SERVING -> drain. Nothing else reads the environment."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from annotators.annotator import Encoding
from nlu import loading, metrics
from nlu.batcher import Batcher
from nlu.cache import EncodingCache
from nlu.engine import Engine
from nlu.lru import Lru
from nlu.pipeline import Pipeline
from nlu.redis_tier import RedisTier
from nlu.rpc import SERVER_OPTIONS, SERVICE, NluServicer
from nlu.settings import Settings, shipped_bundle
from nlu.shadow import Sample
from statics.bundle import Bundle
from statics.errors import NotFound, StaticsError
from statics.locate import open_store
from statics.pull import current, pull
from statics.signing import Keyring
from statics.verify import verify
from statics.version import service_version

logger = logging.getLogger(__name__)


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises StaticsError or EngineRefused where there is nothing fit to serve."""
    async with running(settings) as port:
        stop = asyncio.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        logger.info("serving on %s:%d", settings.host, port)
        await stop.wait()
        logger.info("stopping: no new calls; up to %.0f s for those under way", settings.drain_s)


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[int]:
    """A serving server, as its port; draining on the way out."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = _listen(server, f"{settings.host}:{settings.port}")
    await checks.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    if settings.metrics:
        start_metrics(settings)

    began = time.monotonic()
    bundle = await asyncio.to_thread(find_bundle, settings)
    engine = await asyncio.to_thread(
        loading.load,
        bundle,
        placement=settings.index_placement,
        pages=settings.index_pages,
        milvus=settings.milvus,
    )
    logger.info("ready in %.1f s: bundle %s", time.monotonic() - began, bundle.digest[:12])

    async with pipeline_of(engine, settings) as pipeline:
        servicer = NluServicer(
            pipeline,
            in_flight=settings.in_flight,
            deadline_s=settings.deadline_s,
            max_deadline_s=settings.max_deadline_s,
        )
        server.add_generic_rpc_handlers((servicer.handler(),))
        metrics.IN_FLIGHT.set_function(lambda: servicer.in_flight)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        await server.start()
        for name in health_names(engine):
            await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
        try:
            yield port
        finally:
            await checks.enter_graceful_shutdown()
            servicer.draining = True
            await server.stop(settings.drain_s)


@asynccontextmanager
async def pipeline_of(engine: Engine, settings: Settings) -> AsyncIterator[Pipeline]:
    """A Pipeline over a loaded engine, with its caches and its batcher running."""
    vectorizer = engine.vectorizer
    batcher = Batcher(
        lambda phrases, tokens: vectorizer.encode(phrases, tokens=tokens),
        workers=settings.workers,
        limit=settings.queue,
        max_batch=vectorizer.max_batch,
    )
    lru: Lru[Encoding] = Lru(settings.lru_bytes)
    shadowed = bool(engine.fleet.shadows)
    # A shadow is to see repeated questions too, so beside one no answer is given again.
    answers: Lru[bytes] | None = (
        Lru(settings.answers_bytes) if settings.answers_bytes and not shadowed else None
    )
    sample = (
        Sample(settings.shadow_sample, settings.shadow_sample_rows)
        if settings.shadow_sample is not None and shadowed
        else None
    )
    secret = settings.cache_secret.get_secret_value().encode()
    url = settings.redis.get_secret_value()
    redis = RedisTier(url, secret=secret) if url else None
    _watch(batcher, lru, redis)
    metrics.SERVING.labels(engine.versions.bundle, engine.versions.vectorizer, engine.versions.service).set(1)
    cache = EncodingCache(
        vectorizer.fingerprint,
        dim=vectorizer.dim,
        token_dim=vectorizer.token_dim,
        cold=engine.cold,
        lru=lru,
        redis=redis,
        batcher=batcher,
    )
    try:
        yield Pipeline(engine, cache, answers, settings.persona, sample)
    finally:
        if sample is not None:
            await sample.close()
        await batcher.close()
        if redis is not None:
            await redis.close()


def find_bundle(settings: Settings) -> Bundle:
    """The bundle folder that was named; else the channel's newest from the store, or the last good one where that fails;
    else the bundle shipped with the package."""
    keyring = Keyring.load(settings.keyring) if settings.keyring else None
    service = service_version()
    if settings.bundle is not None:
        return verify(
            settings.bundle, service=service, keyring=keyring, require_signature=settings.require_signature
        )
    if not settings.store:
        shipped = shipped_bundle()
        if not shipped.exists():
            raise NotFound(
                part="bundle",
                found=f"neither NLU_BUNDLE nor NLU_STORE, and no bundle inside the package ({shipped})",
                expected="one of them",
                remedy="pass --bundle or set NLU_BUNDLE to a bundle folder, set NLU_STORE to where bundles are published, "
                "or build one with `make starter VECTORIZER=...`",
            )
        logger.info("no bundle and no store named: taking the bundle shipped with the package, %s", shipped)
        # Installers hard-link the files of a package to their cache, so here other names are no sign of meddling.
        return verify(
            shipped,
            service=service,
            keyring=keyring,
            require_signature=settings.require_signature,
            shared=True,
        )
    try:
        return pull(
            open_store(settings.store),
            settings.statics,
            channel=settings.channel,
            service=service,
            keyring=keyring,
            require_signature=settings.require_signature,
        )
    except StaticsError as error:
        last_good = current(
            settings.statics, service=service, keyring=keyring, require_signature=settings.require_signature
        )
        if last_good is None:
            raise
        logger.error("could not pull (%s); serving the last good bundle %s", error, last_good.digest[:12])
        return last_good


def health_names(engine: Engine) -> list[str]:
    """What grpc.health.v1 answers for: the server, the service, and every part."""
    parts = [f"{component.kind}/{component.name}" for component in engine.bundle.manifest.components]
    return ["", SERVICE, *parts]


def start_metrics(settings: Settings) -> None:
    """Prometheus on its own port; a port that is taken costs the metrics, not the service."""
    try:
        start_http_server(settings.metrics_port, addr=settings.host, registry=metrics.REGISTRY)
    except OSError as error:
        logger.error(
            "no metrics: port %d cannot be had (%s); set NLU_METRICS_PORT", settings.metrics_port, error
        )


def _listen(server: grpc.aio.Server, address: str) -> int:
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:  # what grpc raises for a port that is taken or an address that is not ours
        raise OSError(
            f"address: found {address} taken or not of this machine, expected a free one; use --host and --port, or stop the other server"
        ) from error


def _watch(batcher: Batcher, lru: Lru[Encoding], redis: RedisTier | None) -> None:
    metrics.QUEUE.set_function(lambda: batcher.waiting)
    metrics.PHRASES.labels("computed").set_function(lambda: batcher.computed)
    metrics.PHRASES.labels("dropped").set_function(lambda: batcher.dropped)
    metrics.LRU_BYTES.set_function(lambda: lru.nbytes)
    if redis is not None:
        metrics.REDIS_EVENTS.labels("error").set_function(lambda: redis.errors)
        metrics.REDIS_EVENTS.labels("rejected").set_function(lambda: redis.rejected)
        metrics.REDIS_EVENTS.labels("dropped").set_function(lambda: redis.dropped)
