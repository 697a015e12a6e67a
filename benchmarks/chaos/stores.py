"""What a server does when the store of releases is gone, slow, lying or full of holes.

Two S3 servers behind a proxy: one knows conditional writes, the other keeps objects as files that can be spoilt. For each
trouble a running server is asked for the next release, which it must refuse with the right reason while it goes on
serving; and a server without any release is started, which must hold, say why, and serve once the trouble is over.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from benchmarks.chaos.proxy import Plan, Proxy
from benchmarks.chaos.rig import BUCKET, S3, Server
from benchmarks.chaos.section import Section
from benchmarks.chaos.toys import Releases, Toy
from benchmarks.result import at_least, at_most
from statics.bundle import Bundle
from statics.s3 import S3Store
from tests.tiny import make_parts

PULL_S = 4.0  # a pull may take no longer, so that a slow store shows soon
HOLD_S = 12.0


@dataclass(frozen=True)
class Trouble:
    """What the network or the store does, and the reasons that are right."""

    name: str
    plan: Plan
    reasons: tuple[str, ...]  # codes of statics/errors.py; none: the release comes through all the same


BLOB, POINTER, MANIFEST = b"/blobs/", b"/channels/", b"/manifests/"
TROUBLES = (
    Trouble("refused", Plan("refuse"), ("store-unavailable",)),
    Trouble("black hole", Plan("hole"), ("store-unavailable",)),
    Trouble("403", Plan("status", status=403), ("forbidden",)),
    Trouble("404 pointer", Plan("status", status=404, where=POINTER), ("not-found",)),
    Trouble("404 blob", Plan("status", status=404, where=BLOB), ("not-found",)),
    Trouble("503 for ever", Plan("status", status=503), ("store-unavailable",)),
    Trouble("503 twice", Plan("status", status=503, times=2), ()),
    Trouble("slow drip", Plan("drip", where=BLOB), ("store-unavailable",)),
    Trouble("cut", Plan("cut", at=1500, where=BLOB), ("store-unavailable",)),
    Trouble("cut twice", Plan("cut", at=1500, where=BLOB, times=2), ()),
    Trouble("stalled", Plan("stall", at=1500, where=BLOB), ("store-unavailable",)),
    Trouble("one bit in transit, once", Plan("flip", at=1500, where=BLOB, times=1), ()),
    Trouble("one bit in transit", Plan("flip", at=1500, where=BLOB), ("digest-mismatch",)),
    Trouble(
        "one bit of the manifest",
        Plan("flip", at=1500, where=MANIFEST),
        ("digest-mismatch", "signature-invalid"),
    ),
)
FAST = ("403", "cut", "one bit in transit")


@dataclass
class _Stage:
    """One S3 server, its proxy, a running server and the next release."""

    section: Section
    s3: S3
    proxy: Proxy
    releases: Releases
    wrong: list[str] = field(default_factory=list)
    tried: int = 0

    def root(self, name: str) -> Path:
        """Where the server of this name keeps what it pulled."""
        return self.section.rig.work / name / "root"

    def server(self, name: str, **more: object) -> Server:
        return self.section.rig.serve(
            name, store=f"s3://{BUCKET}", statics=more.pop("statics", self.root(name)),
            keyring=self.releases.keyring, require_signature=True, pull_s=PULL_S, trial="never", core=None, **more,
        )  # fmt: skip

    def next(self) -> Bundle:
        """A release of which nobody holds any part."""
        name = f"{self.s3.name}-{self.releases.seq}"
        folder = make_parts(self.section.rig.work / "parts" / name, seed=100 + self.releases.seq, dim=64)
        return self.releases.release(Toy(name, folder))

    def check(self, what: str, holds: bool, found: object = "") -> None:
        self.tried += 1
        if not holds:
            self.wrong.append(f"{self.s3.name}: {what}: {found}")
            self.section.say(self.wrong[-1])


def run(section: Section) -> None:
    """All troubles with both servers."""
    rig = section.rig
    wrong: list[str] = []
    tried = 0
    for s3 in (rig.moto(), rig.rclone()):
        with Proxy(s3.port) as proxy:
            # Publishing goes to the store itself, reading through the proxy.
            store = S3Store(BUCKET, endpoint=f"http://127.0.0.1:{s3.port}")
            releases = Releases(rig.work / f"releases-{s3.name}", store)
            os.environ["AWS_ENDPOINT_URL_S3"] = proxy.url
            stage = _Stage(section, s3, proxy, releases)
            if s3.files is not None:
                _at_rest(stage, s3.files)
            if s3.files is None or not section.fast:
                _running(stage)
                _starting(stage)
                _moved(stage)
                _full(stage)
            wrong += stage.wrong
            tried += stage.tried
            section.say(f"{s3.name}: {stage.tried} checks, {len(stage.wrong)} wrong")
    del os.environ["AWS_ENDPOINT_URL_S3"]
    section.figures |= {"checks": float(tried), "wrong": float(len(wrong))}
    section.bars += [
        at_least("checks", tried, section.scale(200, 25)),
        at_most("troubles answered with another reason, a partial bundle or no answers", len(wrong), 0),
    ]


def _running(stage: _Stage) -> None:
    """A server that serves is asked for the next release through each trouble, then without it."""
    served = stage.next()
    server = stage.server(f"running-{stage.s3.name}").wait_ready()
    for trouble in TROUBLES:
        if stage.section.fast and trouble.name not in FAST:
            continue
        wanted = stage.next()
        stage.proxy.be(trouble.plan)
        reason = _swapped(server)
        if trouble.reasons:
            stage.check(
                f"{trouble.name}: reason", reason.startswith(trouble.reasons), reason or "it was swapped"
            )
            stage.check(f"{trouble.name}: keeps serving", _serves(server) == served.digest, _serves(server))
            stage.check(f"{trouble.name}: hurt something", stage.proxy.hurt + (not trouble.plan.where) > 0)
            told = server.describe().release
            stage.check(
                f"{trouble.name}: Describe says why", told.reason.startswith(trouble.reasons), told.reason
            )
            stage.proxy.be(Plan())
            reason = _swapped(server)
        stage.check(f"{trouble.name}: then swaps", reason == "" and _serves(server) == wanted.digest, reason)
        stage.proxy.be(Plan())
        served = wanted
    server.process.end()


def _starting(stage: _Stage) -> None:
    """A server without any release holds while the trouble lasts, and serves when it is over."""
    for trouble in TROUBLES:
        if not trouble.reasons or (stage.section.fast and trouble.name != "refused"):
            continue
        stage.proxy.be(trouble.plan)
        name = f"starting-{stage.s3.name}-{trouble.name.replace(' ', '-').replace(',', '')}"
        server = stage.server(name)
        state = _held(server, trouble.reasons)
        stage.check(f"start, {trouble.name}: holds and says why", state.startswith(trouble.reasons), state)
        stage.check(f"start, {trouble.name}: not ready", server.health() != 1)
        stage.check(f"start, {trouble.name}: no partial bundle", not _visible(stage.root(name)))
        stage.proxy.be(Plan())
        reason = _swapped(server)  # it would look by itself too, after a pause of up to a minute
        stage.check(f"start, {trouble.name}: serves later", reason == "" and server.health() == 1, reason)
        server.process.end()


def _at_rest(stage: _Stage, files: Path) -> None:
    """Objects spoilt in the store itself: one bit, half of it, gone."""
    spoil: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
        "one bit at rest": (_flip, ("digest-mismatch",)),
        "half of it at rest": (lambda path: os.truncate(path, path.stat().st_size // 2), ("size-mismatch", "store-unavailable")),
        "gone at rest": (lambda path: path.unlink(), ("not-found",)),
    }  # fmt: skip
    served = stage.next()
    server = stage.server(f"rest-{stage.s3.name}").wait_ready()
    for name, (harm, reasons) in spoil.items():
        wanted = stage.next()
        root = wanted.of_kind("vectorizer")[0]
        blob = next(files.rglob(max(root.files, key=lambda file: file.size).sha256))
        kept = blob.read_bytes()
        harm(blob)
        reason = _swapped(server)
        stage.check(f"{name}: reason", reason.startswith(reasons), reason or "it was swapped")
        stage.check(f"{name}: keeps serving", _serves(server) == served.digest)
        blob.write_bytes(kept)
        reason = _swapped(server)
        stage.check(f"{name}: then swaps", reason == "" and _serves(server) == wanted.digest, reason)
        served = wanted
    server.process.end()


def _moved(stage: _Stage) -> None:
    """The pointer moves while a release is being pulled: one of the two is served, whole."""
    stage.next()
    server = stage.server(f"moved-{stage.s3.name}").wait_ready()
    for _ in range(stage.section.scale(5, 1)):
        first = stage.next()
        stage.proxy.be(Plan("latency", at=150, where=BLOB))
        moving = threading.Timer(0.2, stage.next)
        moving.start()
        reason = _swapped(server)
        moving.join()
        stage.proxy.be(Plan())
        latest = stage.releases.latest
        stage.check(
            "pointer moves",
            reason == "" and _serves(server) in (first.digest, latest and latest.digest),
            reason,
        )
        reason = _swapped(server)
        stage.check(
            "pointer moved: the newest", latest is not None and _serves(server) == latest.digest, reason
        )
    server.process.end()


def _full(stage: _Stage) -> None:
    """The disk of the pulled bundles is full, as a file system of a few megabytes is."""
    folder = stage.section.rig.work / f"small-{stage.s3.name}"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        stage.section.skipped.append("disk full: needs leave to mount")
        return
    try:
        served = stage.next()
        server = stage.server(f"full-{stage.s3.name}", **{"statics": folder}).wait_ready()
        filler = folder / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        wanted = stage.next()
        reason = _swapped(server)
        stage.check("disk full: reason", reason.startswith("disk-full"), reason or "it was swapped")
        stage.check("disk full: keeps serving", _serves(server) == served.digest)
        filler.unlink()
        reason = _swapped(server)
        stage.check("disk full: then swaps", reason == "" and _serves(server) == wanted.digest, reason)
        server.process.end()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _swapped(server: Server) -> str:
    """Empty where the swap was made, else why it was not."""
    try:
        return server.swap(timeout_s=PULL_S + 25).release.reason
    except grpc.RpcError as error:
        return str(error.details())


def _serves(server: Server) -> str:
    return str(server.describe().versions.bundle)


def _held(server: Server, reasons: tuple[str, ...]) -> str:
    """What a server that holds says, once it says something."""
    end, told = time.monotonic() + HOLD_S + PULL_S, ""
    while time.monotonic() < end and not told.startswith(reasons):
        try:
            state = server.state()
            told = f"{state.reason}" if state.state == "HOLDING" else f"state {state.state}"
        except grpc.RpcError as error:
            told = f"no answer: {error.code().name}"
        time.sleep(0.1)
    return told


def _visible(root: Path) -> bool:
    """Whether any bundle has its final name."""
    return any(path.is_dir() for path in (root / "bundles").glob("*"))


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
