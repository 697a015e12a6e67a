"""One pull: pointer, manifest, signature, room, missing blobs, components, the bundle; later it becomes the current one.

`fetch` brings a release and proves it, `follow` makes it the one this machine serves; between the two it is tried.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from statics import pointer
from statics.audit import note
from statics.blobs import Blobs, Part, from_disk
from statics.bundle import Bundle
from statics.errors import (
    ChannelMismatch,
    DigestMismatch,
    DiskFull,
    FileUnsafe,
    Forbidden,
    ManifestInvalid,
    NotFound,
    SizeMismatch,
    StaticsError,
    StoreUnavailable,
)
from statics.local import Local, Missing, check_seq
from statics.manifest import MANIFEST, MANIFEST_LIMIT, File, Manifest, manifest_digest
from statics.pointer import POINTER_LIMIT, Pointer, pointer_to
from statics.signing import SIGNATURE_LIMIT, Keyring
from statics.source import Source
from statics.store import Store, blob_key, channel_key, manifest_key, signature_key
from statics.verify import Trust, admit, check_expiry

log = logging.getLogger(__name__)

THREADS = 4  # blobs under way at once
POLL_S = 0.02  # how often we look whether another process is done with a blob
DEADLINE_S = 120.0

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all; called by one thread at a time

# These say nothing about a release: trying again later may work.
CIRCUMSTANCES = (NotFound, Forbidden, StoreUnavailable, DiskFull)


@dataclass(frozen=True)
class Fetched:
    """A release that is here and verified."""

    bundle: Bundle
    pointer: Pointer
    pinned: bool = False  # taken because a pin names it; then it says nothing about the channel
    retries: int = 0  # what had to be tried again on the way


def look(store: Store, channel: str) -> Pointer:
    """Which release the channel points to now: one small object, read once, of which nothing is believed yet."""
    return _read_pointer(Source(store, deadline_s=DEADLINE_S), channel)


def fetch(
    store: Store,
    root: Path,
    *,
    trust: Trust,
    channel: str,
    digest: str = "",
    min_seq: int = 0,
    progress: Progress | None = None,
    deadline_s: float = DEADLINE_S,
    bytes_s: int = 0,
) -> Fetched:
    """Bring a release of the channel to `root`, all of it verified, and leave the current one current.

    Which one: `digest`, else the one that `trust` or the root is pinned to, else the one the channel points to. It must
    be of this channel, signed as `trust` asks, not expired, and not older than the floor (of the root, and `min_seq`);
    the last two are not asked of a pinned one. Takes `deadline_s` at most, and `bytes_s` bytes a second (0: as fast as
    they come). Several processes may fetch into one root at once. Raises StaticsError.
    """
    local, source = Local(root), Source(store, deadline_s=deadline_s, bytes_s=bytes_s)
    trust = replace(trust, pinned=trust.pinned or local.pinned())
    wish = digest or trust.pinned
    pointed = None if wish else _read_pointer(source, channel)
    wanted = pointed.manifest if pointed else wish
    with _refusals_noted(root, wanted, pointed.seq if pointed else 0):
        bundle = local.present(wanted, trust)
        if bundle is not None:
            target = pointed or pointer_to(bundle.manifest, wanted, (bundle.path / MANIFEST).stat().st_size)
            _check_release(local, bundle.manifest, target, channel, trust, min_seq)
        else:
            raw, signature = _read_manifest(source, wanted, pointed.size if pointed else MANIFEST_LIMIT)
            manifest = admit(raw, signature, trust)
            target = pointed or pointer_to(manifest, wanted, len(raw))
            _check_release(local, manifest, target, channel, trust, min_seq)
            bundle = _bring(local, source, manifest, raw, signature, progress)
    return Fetched(bundle, target, wanted == trust.pinned, source.retries)


def follow(root: Path, fetched: Fetched) -> None:
    """Make a fetched release the current one of this machine, and the floor; a pinned one is neither.

    Raises SeqTooOld where a newer one was followed meanwhile.
    """
    if fetched.pinned:
        note(root, "follow", digest=fetched.bundle.digest, seq=fetched.pointer.seq, reason="pinned")
        return
    Local(root).follow(fetched.pointer)
    log.info(
        "bundle %s, seq %d of channel %s, is current",
        fetched.bundle.digest, fetched.pointer.seq, fetched.pointer.channel,
    )  # fmt: skip


def pull(
    store: Store,
    root: Path,
    *,
    channel: str,
    service: str,
    keyring: Keyring | None = None,
    require_signature: bool = False,
    signatures: int = 1,
    digest: str = "",
    min_seq: int = 0,
    progress: Progress | None = None,
    deadline_s: float = DEADLINE_S,
    bytes_s: int = 0,
) -> Bundle:
    """Fetch the channel's current release, follow it, and return it.

    On a StaticsError the bundle that was current stays so.
    """
    fetched = fetch(
        store,
        root,
        trust=Trust(service, keyring, require_signature, signatures=signatures),
        channel=channel,
        digest=digest,
        min_seq=min_seq,
        progress=progress,
        deadline_s=deadline_s,
        bytes_s=bytes_s,
    )
    follow(root, fetched)
    return fetched.bundle


def current(root: Path, *, trust: Trust, channel: str = "", min_seq: int = 0) -> Bundle | None:
    """The bundle to serve without a store: the pinned one, else the one last followed; verified again.

    None where there is none, it is not whole, of another channel than the one named, or too old and not pinned. Writes
    nothing.
    """
    local = Local(root)
    try:
        trust = replace(trust, pinned=trust.pinned or local.pinned())
        followed = local.current()
        digest = trust.pinned or (followed.manifest if followed else "")
        bundle = local.present(digest, trust) if digest else None
        if bundle is not None and channel and bundle.manifest.channel != channel:
            raise _other_channel(str(bundle.path / MANIFEST), bundle.manifest.channel, channel)
        if bundle is not None and not trust.pinned:
            # Not the root's own floor: it rises before the pointer moves, and a crash may have come between.
            check_seq(bundle.manifest.channel, bundle.manifest.seq, min_seq, "as the deployment says")
            check_expiry(bundle.manifest, trust)
    except StaticsError as error:
        log.warning("no current bundle: %s", error)
        return None
    return bundle


# What the store says


def _read_pointer(source: Source, channel: str) -> Pointer:
    key = channel_key(channel)
    found = pointer.parse(source.read(key, POINTER_LIMIT), key)
    if found.channel != channel:
        raise _other_channel(key, found.channel, channel)
    return found


def _read_manifest(source: Source, wanted: str, limit: int) -> tuple[bytes, bytes | None]:
    key = manifest_key(wanted)
    raw = source.again(partial(source.read, key, limit), key)
    if manifest_digest(raw) != wanted:
        raw = source.read(key, limit)  # once more: bytes do change on the way
    if manifest_digest(raw) != wanted:
        raise DigestMismatch(
            part=key,
            found=f"sha256 {manifest_digest(raw)}",
            expected=f"sha256 {wanted}, as the pointer says",
            remedy="delete this manifest in the store and publish the bundle again",
        )
    log.debug("manifest %s is read", wanted)
    key = signature_key(wanted)
    try:
        return raw, source.again(partial(source.read, key, SIGNATURE_LIMIT), key)
    except NotFound:
        return raw, None


def _check_release(
    local: Local, manifest: Manifest, target: Pointer, channel: str, trust: Trust, min_seq: int
) -> None:
    """The pointer is not signed, the manifest is: the two must tell the same story, and it must not be an old one."""
    if manifest.channel != channel:
        raise _other_channel(MANIFEST, manifest.channel, channel)
    if manifest.seq != target.seq:
        raise ManifestInvalid(
            part=channel_key(channel),
            found=f"seq {target.seq}",
            expected=f"seq {manifest.seq}, as its manifest says",
            remedy="publish the release again",
        )
    if target.manifest != trust.pinned:
        local.check_floor(target, min_seq)
        check_expiry(manifest, trust)


def _other_channel(part: str, found: str, expected: str) -> ChannelMismatch:
    return ChannelMismatch(
        part=part,
        found=f"channel {found}",
        expected=f"channel {expected}",
        remedy="follow the channel the bundle was built for, or build one for this channel",
    )


@contextmanager
def _refusals_noted(root: Path, digest: str, seq: int) -> Iterator[None]:
    try:
        yield
    except StaticsError as error:
        if not isinstance(error, CIRCUMSTANCES):
            note(root, "refuse", digest=digest, seq=seq, reason=error.code)
        raise


# The bytes


def _bring(
    local: Local,
    source: Source,
    manifest: Manifest,
    raw: bytes,
    signature: bytes | None,
    progress: Progress | None,
) -> Bundle:
    placed: dict[str, Path] = {}
    with local.pulling(manifest) as blobs:
        missing = local.missing(manifest.components)
        local.check_room(missing, blobs)
        log.info("pulling %d of %d components", len(missing), len(manifest.components))
        while missing:
            _Fetch(source, local, blobs, missing, progress).all_blobs()
            # Another pull may have used a blob for another bundle: then it is fetched once more.
            missing = [each for each in missing if not local.settle(each, blobs, placed)]
        return local.reveal(manifest, raw, signature)


class _Stopped(Exception):
    """Another thread of this pull has failed."""


class _Fetch:
    """Fetches the blobs of the components that are missing, several at once: from the bundles here, else from the store."""

    def __init__(
        self,
        source: Source,
        local: Local,
        blobs: Blobs,
        missing: Iterable[Missing],
        progress: Progress | None,
    ) -> None:
        self.source, self.local, self.blobs, self.progress = source, local, blobs, progress
        self.held = local.held()
        self.wanted: dict[
            str, tuple[str, File, list[Missing]]
        ] = {}  # by SHA-256: its first place, and who needs it
        for each in missing:
            for file in each.component.files:
                place = f"{each.component.folder}/{file.name}"
                self.wanted.setdefault(file.sha256, (place, file, []))[2].append(each)
        self.total = sum(file.size for _, file, _ in self.wanted.values())
        self.done = dict.fromkeys(self.wanted, 0)  # bytes of each
        self.failed: list[BaseException] = []
        self.lock = threading.Lock()

    def all_blobs(self) -> None:
        """On daemon threads: a process that is told to stop need not wait for them, and may be killed at any time."""
        largest_first = sorted(self.wanted.values(), key=lambda each: -each[1].size)
        waiting = deque(largest_first)
        threads = [
            threading.Thread(target=self._run, args=(waiting,), name=f"pull-{number}", daemon=True)
            for number in range(min(THREADS, len(waiting)))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:
            self.failed.append(error)
            raise
        if self.failed:
            raise self.failed[0]

    def _run(self, waiting: deque[tuple[str, File, list[Missing]]]) -> None:
        while not self.failed:
            try:
                place, file, needed_by = waiting.popleft()
            except IndexError:
                return
            try:
                self._one_blob(place, file, needed_by)
            except BaseException as error:  # whatever it is, the thread that called us raises it
                self.failed.append(error)

    def _one_blob(self, place: str, file: File, needed_by: list[Missing]) -> None:
        def done() -> bool:
            return self.blobs.has(file.sha256) or all(map(self.local.is_settled, needed_by))

        tick = partial(self._tick, place, file.sha256)
        with self.blobs.arriving(file, done, partial(self._wait, place)) as part:
            if part is not None:
                if not self._copied(part, tick):
                    self._fetched(part, tick)
                part.finish()
                log.debug("blob %s is here", file.sha256)
        tick(file.size)

    def _copied(self, part: Part, tick: Callable[[int], None]) -> bool:
        origin = self.held.get(part.file.sha256)
        if origin is None:
            return False
        try:
            part.fill(partial(from_disk, origin), str(origin), tick)
        except (DiskFull, StoreUnavailable):
            raise
        except StaticsError as error:
            log.warning("fetching what is here but cannot be used: %s", error)
            part.empty()
            return False
        return True

    def _fetched(self, part: Part, tick: Callable[[int], None]) -> None:
        key = blob_key(part.file.sha256)
        fill = partial(part.fill, partial(self.source.open, key), key, tick)
        try:
            self.source.again(fill, key)
        except (SizeMismatch, DigestMismatch, FileUnsafe) as error:
            log.warning("fetching once more, from the beginning: %s", error)
            part.empty()
            self.source.again(fill, key)

    def _wait(self, place: str) -> None:
        if self.failed:
            raise _Stopped
        self.source.deadline.wait(POLL_S, place)

    def _tick(self, place: str, sha256: str, written: int) -> None:
        if self.failed:
            raise _Stopped
        with self.lock:
            self.done[sha256] = written
            if self.progress is not None:
                self.progress(place, sum(self.done.values()), self.total)
