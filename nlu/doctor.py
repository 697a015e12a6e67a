"""`nlu doctor`: is this installation whole, and if not, what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from nlu import guard
from nlu.settings import Settings
from statics.version import service_version

if TYPE_CHECKING:
    from statics.bundle import Bundle

State = Literal["ok", "note", "bad"]

MIN_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was found, and for anything but ok what to do."""

    check: str
    state: State
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def examine(settings: Settings) -> Iterator[Finding]:
    """Run every check; each yields at least one finding and none raises."""
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("python", _python),
        ("onnxruntime", _onnxruntime),
        ("faiss", _faiss),
        ("redis", lambda: _redis(settings)),
        ("store", lambda: _store(settings)),
        ("signatures", lambda: _signatures(settings)),
        ("safety", lambda: _safety(settings)),
        ("bundle", lambda: _bundle(settings)),
    )
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # a doctor who faints helps nobody
            yield Finding(
                name,
                "bad",
                f"{type(error).__name__}: {error}",
                "mend this first, then run `nlu doctor` again",
            )


def _python() -> Iterator[Finding]:
    yield Finding(
        "service",
        "ok",
        f"chorus-nlu {service_version()} on Python {platform.python_version()}, {platform.machine()}",
    )
    simd = _simd_flags()
    if simd is None:
        yield Finding(
            "cpu",
            "note",
            "no /proc/cpuinfo on this system",
            "int8 speed is best measured: python -m benchmarks.latency",
        )
    elif "avx512_vnni" in simd or "avx_vnni" in simd:
        yield Finding(
            "cpu",
            "ok",
            f"int8 dot products in hardware ({'AVX-512 VNNI' if 'avx512_vnni' in simd else 'AVX VNNI'})",
        )
    elif "avx2" in simd:
        yield Finding(
            "cpu",
            "note",
            "AVX2 without VNNI",
            "int8 runs, slower and with saturating sums; prefer a CPU with VNNI, or export fp32",
        )
    else:
        yield Finding("cpu", "bad", "no AVX2", "expect several times the latency; use a newer CPU")


def _simd_flags() -> set[str] | None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return None
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features")))
    return set(next(lines, "").split())


def _onnxruntime() -> Iterator[Finding]:
    both = _installed("onnxruntime", "onnxruntime-gpu")
    if not both:
        yield Finding("onnxruntime", "bad", "not installed", "pip install 'chorus-nlu[cpu]' (or [gpu])")
        return
    if len(both) > 1:
        yield Finding(
            "onnxruntime",
            "bad",
            "onnxruntime and onnxruntime-gpu together; one shadows the other",
            "pip uninstall both, install one",
        )
    import onnxruntime

    providers = ", ".join(
        name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()
    )
    yield Finding("onnxruntime", "ok", f"{onnxruntime.__version__}; providers {providers}")


def _faiss() -> Iterator[Finding]:
    if not _installed("faiss-cpu", "faiss-gpu-cu12"):
        yield Finding("faiss", "bad", "not installed", "pip install 'chorus-nlu[cpu]' (or [gpu])")
        return
    faiss = importlib.import_module("faiss")
    yield Finding(
        "faiss",
        "ok",
        f"{faiss.__version__}; {faiss.get_compile_options().strip()}; {faiss.omp_get_max_threads()} threads",
    )


def _installed(*distributions: str) -> list[str]:
    found = []
    for name in distributions:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def _redis(settings: Settings) -> Iterator[Finding]:
    url = settings.redis.get_secret_value()
    if not url:
        yield Finding(
            "redis", "ok", "not configured; phrases are cached in this process only (NLU_REDIS sets it)"
        )
        return
    import redis

    where = urlsplit(url).hostname or "redis"  # never the password
    client = redis.Redis.from_url(url, socket_timeout=1.0, socket_connect_timeout=1.0)
    try:
        began = time.perf_counter()
        client.ping()
        took = (time.perf_counter() - began) * 1000
    except redis.RedisError as error:
        yield Finding(
            "redis",
            "note",
            f"{where}: {error}",
            "serving goes on without it; start it or unset NLU_REDIS",
        )
        return
    finally:
        client.close()
    yield Finding("redis", "ok", f"{where} answers in {took:.1f} ms")


def _store(settings: Settings) -> Iterator[Finding]:
    if not settings.store:
        yield Finding(
            "store", "ok", "not configured; the bundle comes from a folder or the package (NLU_STORE sets it)"
        )
        return
    from statics.errors import NotFound, StaticsError
    from statics.locate import open_store

    key = f"channels/{settings.channel}.json"
    try:
        raw, _ = open_store(settings.store).read(key, 64 * 1024)
    except NotFound:
        yield Finding(
            "store",
            "bad",
            f"{settings.store} has no channel {settings.channel}",
            "nlu bundle publish, or set NLU_CHANNEL",
        )
    except (StaticsError, ValueError) as error:
        yield Finding(
            "store", "bad", str(error), "check NLU_STORE, the credentials and the endpoint (AWS_ENDPOINT_URL)"
        )
    else:
        yield Finding(
            "store", "ok", f"{settings.store}, channel {settings.channel}, pointer of {len(raw)} bytes"
        )


def _signatures(settings: Settings) -> Iterator[Finding]:
    if settings.require_signature:
        yield Finding("signatures", "ok", f"required; trusted keys in {settings.keyring}")
    else:
        yield Finding(
            "signatures",
            "note",
            "not required",
            "in production set NLU_KEYRING and NLU_REQUIRE_SIGNATURE=1; then only signed bundles load",
        )


def _safety(settings: Settings) -> Iterator[Finding]:
    warnings = guard.self_check(settings)
    for warning in warnings:
        found, _, remedy = warning.rpartition("; ")
        yield Finding("safety", "note", found, remedy)
    if not warnings:
        yield Finding("safety", "ok", "no root, and no file that others may change")


def _bundle(settings: Settings) -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as scratch:  # a doctor changes nothing, a pull included
        yield from _examined(settings.model_copy(update={"statics": Path(scratch)}))


def _memory(settings: Settings, loaded: Bundle) -> Finding:
    """Whether a release of which every part is new could be loaded beside this one."""
    from nlu import memory
    from nlu.errors import EngineRefused

    used, limit = memory.rss_bytes(), memory.limit_bytes(settings)
    room = f"{used / 2**20:.0f} MiB with this bundle loaded, of {limit / 2**20:.0f} MiB"
    try:
        memory.gate(
            loaded, None, None, used=used * settings.processes, limit=limit, processes=settings.processes
        )
    except EngineRefused as error:
        return Finding("memory", "note", f"{room}: a swap would be refused ({error.found})", error.remedy)
    return Finding("memory", "ok", f"{room}: enough to swap")


def _examined(settings: Settings) -> Iterator[Finding]:
    from nlu import loading
    from nlu.errors import EngineRefused
    from nlu.origin import find_bundle
    from statics.errors import StaticsError

    began = time.perf_counter()
    try:
        found = find_bundle(settings)
        verified = time.perf_counter()
        engine = loading.load(found, milvus=settings.milvus)
    except (StaticsError, EngineRefused) as error:
        yield Finding(
            "bundle", "bad", str(error), "nlu bundle verify says more; name, publish or pull a whole bundle"
        )
        return
    loaded = time.perf_counter()
    size = sum(file.size for _, file in found.manifest.files())
    origin = "named" if settings.bundle else "pulled" if settings.store else "shipped with the package"
    yield Finding(
        "bundle",
        "ok",
        f"{found.digest[:12]}, {origin} (channel {found.manifest.channel}, seq {found.manifest.seq}, {size / 2**20:.1f} MiB): "
        f"verified in {verified - began:.2f} s, loaded and checked in {loaded - verified:.2f} s",
    )
    yield _memory(settings, found)
    phrase = "what's the weather like tomorrow"
    engine.vectorizer.encode([phrase])
    began = time.perf_counter()
    for _ in range(20):
        engine.vectorizer.encode([phrase])
    yield Finding(
        "vectorizer",
        "ok",
        f"{(time.perf_counter() - began) / 20 * 1000:.2f} ms for a phrase of six words, one thread",
    )
