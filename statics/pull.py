"""One pull: pointer, manifest, signature, room, missing blobs, every check again, and then a final name."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from statics import disk, pointer
from statics.bundle import Bundle
from statics.errors import (
    ChannelMismatch,
    DigestMismatch,
    DiskFull,
    ManifestInvalid,
    NotFound,
    SizeMismatch,
    StaticsError,
    StoreUnavailable,
)
from statics.local import Local
from statics.manifest import MANIFEST, SIGNATURE, Component, File, Manifest, manifest_digest
from statics.pointer import POINTER_LIMIT, Pointer
from statics.signing import SIGNATURE_LIMIT, Keyring
from statics.store import Store, blob_key, channel_key, manifest_key, signature_key
from statics.verify import Trust, admit, verify_bundle

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


def pull(
    store: Store,
    root: Path,
    *,
    channel: str,
    service: str,
    keyring: Keyring | None = None,
    require_signature: bool = False,
    progress: Progress | None = None,
    deadline_s: float = 120.0,
) -> Bundle:
    """Bring the channel's current release to `root`, make it the current bundle there, and return it.

    On a StaticsError the bundle that was current stays so. Several processes may pull into one root at once.
    """
    trust, local = Trust(service, keyring, require_signature), Local(root)
    source = _Source(store, _Deadline.after(deadline_s))
    target = _read_pointer(source, channel)
    bundle = local.present(target.manifest, trust)
    if bundle is not None:
        _check_release(target, bundle.manifest)
        local.check_floor(target)
    else:
        raw, signature = _read_manifest(source, target)
        manifest = admit(raw, signature, trust)
        _check_release(target, manifest)
        local.check_floor(target)
        with local.staging() as staging:
            local.check_room(manifest)
            staged = _stage_manifest(staging, raw, signature)
            _Fetch(source, local.held(), staging, progress or _silent).all_files(manifest, staged)
            bundle = local.reveal(verify_bundle(staged, trust), trust)
    local.follow(target)
    log.info("bundle %s, seq %d of channel %s, is current", bundle.digest, target.seq, channel)
    return bundle


def current(
    root: Path, *, service: str, keyring: Keyring | None = None, require_signature: bool = False
) -> Bundle | None:
    """The bundle that the last good pull left, verified again; None where there is none, or it is not whole.

    Needs no store and writes nothing.
    """
    local = Local(root)
    try:
        followed = local.current()
    except StaticsError as error:
        log.warning("no current bundle: %s", error)
        return None
    return local.present(followed.manifest, Trust(service, keyring, require_signature)) if followed else None


# What the store says


@dataclass(frozen=True)
class _Deadline:
    """A moment on the monotonic clock, looked at before each request and after each piece of a stream."""

    end: float
    limit_s: float

    @classmethod
    def after(cls, limit_s: float) -> "_Deadline":
        return cls(time.monotonic() + limit_s, limit_s)

    def check(self, part: str) -> None:
        if time.monotonic() >= self.end:
            raise StoreUnavailable(
                part=part,
                found=f"a pull still running after {self.limit_s:g} s",
                expected=f"one that ends within {self.limit_s:g} s",
                remedy="look at the network and the store, or allow more time",
            )

    def watch(self, chunks: Iterable[bytes], part: str) -> Iterator[bytes]:
        self.check(part)
        for chunk in chunks:
            yield chunk
            self.check(part)


@dataclass(frozen=True)
class _Source:
    """The store, for as long as the pull may last."""

    store: Store
    deadline: _Deadline

    @contextmanager
    def open(self, key: str) -> Iterator[Iterator[bytes]]:
        self.deadline.check(key)
        with self.store.open(key) as chunks:
            yield self.deadline.watch(chunks, key)

    def read(self, key: str, limit: int) -> bytes:
        with self.open(key) as chunks:
            return disk.collect(chunks, key, limit)


def _read_pointer(source: _Source, channel: str) -> Pointer:
    key = channel_key(channel)
    found = pointer.parse(source.read(key, POINTER_LIMIT), key)
    if found.channel != channel:
        raise _other_channel(key, found.channel, channel)
    return found


def _read_manifest(source: _Source, target: Pointer) -> tuple[bytes, bytes | None]:
    key = manifest_key(target.manifest)
    raw = source.read(key, target.size)
    if manifest_digest(raw) != target.manifest:
        raw = source.read(key, target.size)  # once more: bytes do change on the way
    if manifest_digest(raw) != target.manifest:
        raise DigestMismatch(
            part=key,
            found=f"sha256 {manifest_digest(raw)}",
            expected=f"sha256 {target.manifest}, as the pointer says",
            remedy="delete this manifest in the store and publish the bundle again",
        )
    try:
        return raw, source.read(signature_key(target.manifest), SIGNATURE_LIMIT)
    except NotFound:
        return raw, None


def _check_release(target: Pointer, manifest: Manifest) -> None:
    """The pointer is not signed, the manifest is: the two must tell the same story."""
    if manifest.channel != target.channel:
        raise _other_channel(MANIFEST, manifest.channel, target.channel)
    if manifest.seq != target.seq:
        raise ManifestInvalid(
            part=channel_key(target.channel),
            found=f"seq {target.seq}",
            expected=f"seq {manifest.seq}, as its manifest says",
            remedy="publish the release again",
        )


def _other_channel(part: str, found: str, expected: str) -> ChannelMismatch:
    return ChannelMismatch(
        part=part,
        found=f"channel {found}",
        expected=f"channel {expected}",
        remedy="follow the channel the bundle was built for, or build one for this channel",
    )


# The bytes


@dataclass(frozen=True)
class _Fetch:
    """Fills a staging folder with the files of a manifest: from the bundles here, else from the store."""

    source: _Source
    held: dict[str, Path]  # content that is here already; grows as files arrive
    staging: Path
    progress: Progress

    def all_files(self, manifest: Manifest, staged: Path) -> None:
        done = 0
        for component in manifest.components:
            folder = staged / component.folder
            with disk.local_errors(str(folder)):
                folder.mkdir()
            for file in component.files:
                self._one_file(component, file, folder / file.name, done, manifest.size)
                done += file.size
            disk.sync_directory(folder)
        disk.sync_directory(staged)

    def _one_file(self, component: Component, file: File, target: Path, done: int, total: int) -> None:
        part = f"{component.folder}/{file.name}"

        def tick(written: int) -> None:
            self.progress(part, done + written, total)

        if not self._copied(file, target, tick):
            self._fetched(file, target, tick)
        self.held[file.sha256] = target  # several components may hold the same file

    def _copied(self, file: File, target: Path, tick: Callable[[int], None]) -> bool:
        origin = self.held.get(file.sha256)
        if origin is None:
            return False
        try:
            with disk.plain_file(origin, str(origin)) as descriptor:
                chunks = self.source.deadline.watch(disk.read_chunks(descriptor, str(origin)), str(origin))
                self._receive(chunks, file, target, str(origin), tick)
        except (DiskFull, StoreUnavailable):
            raise
        except StaticsError as error:
            log.warning("fetching what is here but cannot be used: %s", error)
            return False
        return True

    def _fetched(self, file: File, target: Path, tick: Callable[[int], None]) -> None:
        key = blob_key(file.sha256)
        try:
            with self.source.open(key) as chunks:
                self._receive(chunks, file, target, key, tick)
        except (SizeMismatch, DigestMismatch, StoreUnavailable) as error:
            log.warning("fetching once more: %s", error)
            with self.source.open(key) as chunks:
                self._receive(chunks, file, target, key, tick)

    def _receive(
        self, chunks: Iterable[bytes], file: File, target: Path, part: str, tick: Callable[[int], None]
    ) -> None:
        """Through our own SHA-256 into a `.part` file outside the bundle; named when it is right."""
        arriving = self.staging / f"{file.sha256}.part"
        arriving.unlink(missing_ok=True)
        disk.write_file(arriving, disk.checked(chunks, part, size=file.size, sha256=file.sha256), tick)
        with disk.local_errors(str(target)):
            os.rename(arriving, target)


def _stage_manifest(staging: Path, raw: bytes, signature: bytes | None) -> Path:
    staged = staging / "bundle"
    with disk.local_errors(str(staged)):
        staged.mkdir()
    disk.write_file(staged / MANIFEST, [raw])
    if signature is not None:
        disk.write_file(staged / SIGNATURE, [signature])
    return staged


def _silent(what: str, done: int, total: int) -> None:
    """Nobody watches."""
