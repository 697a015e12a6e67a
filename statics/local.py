"""The local root, where pulled bundles live; several processes, and crashes at any moment, may share it.

    bundles/<digest>/        manifest and signature of one bundle (of older versions: a whole bundle)
    components/<digest>/     the files of one component, whichever bundles have it; digests as manifests say them
    blobs/                   what pulls fetch, whole or in part; its lock is shared by all pulls that live
    staging/                 what is being put together; used by the holder of `.lock` alone
    quarantine/              what was found broken and has been replaced, for whoever wants to know why
    current.json             the release of the channel that this machine follows
    pin.json                 the bundle it is held to instead, if any
    state.json               the seq of the newest release followed of each channel
    audit.jsonl              what happened to releases here

Names appear by a rename of something whole, so every file has one name and is never half there.
"""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from statics import disk, document, pointer
from statics.audit import AUDIT, note
from statics.blobs import Blobs, from_disk
from statics.bundle import BUNDLES, COMPONENTS, Bundle
from statics.document import Document
from statics.errors import DiskFull, FileMissing, SeqTooOld, StaticsError
from statics.manifest import (
    MANIFEST,
    SIGNATURE,
    Component,
    Count,
    File,
    Manifest,
    Name,
    Sha256,
    manifest_digest,
    parse,
)
from statics.pointer import POINTER_LIMIT, Pointer
from statics.store import channel_key
from statics.verify import Trust, check_components, read_manifest, verify_bundle
from statics.version import FORMAT

log = logging.getLogger(__name__)

STATE_LIMIT = 64 * 1024  # bytes
MARGIN = 1024 * 1024  # bytes that stay free beyond the bundle, for folders and our own small files
LOCK_WAIT_S = 30.0


class State(Document):
    """The seq floor of each channel: nothing older is accepted any more, whatever the store says."""

    format: int = FORMAT
    floors: dict[Name, Count] = {}


class Pin(Document):
    """The bundle that a machine is held to."""

    format: int = FORMAT
    bundle: Sha256


@dataclass(frozen=True)
class Missing:
    """A component that is not here, or not whole; `seen` tells whether another pull replaced it since."""

    component: Component
    seen: tuple[int, int] | None


@dataclass(frozen=True)
class Collected:
    """What `collect` removed: digests of bundles and of components, and the bytes that freed."""

    bundles: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    bytes: int = 0


def pin(root: Path, digest: str) -> None:
    """Hold this machine to one bundle, here or not yet, whatever its channel says, until `unpin`.

    Expiry and floor are not held against it. Raises ValueError where `digest` is none.
    """
    Local(root).pin(digest)


def unpin(root: Path) -> bool:
    """Let this machine follow its channel again; whether it was held. A pin that cannot be read goes too."""
    return Local(root).unpin()


def pinned(root: Path) -> str:
    """The digest of the bundle that this machine is held to; empty: none."""
    return Local(root).pinned()


def collect(root: Path, keep: int = 2, *, also: Iterable[str] = (), dry_run: bool = False) -> Collected:
    """Remove the bundles that are neither current, nor pinned, nor among the newest `keep`, nor named in `also`.

    Components go with the last bundle that has them, quarantined ones too. Does nothing while a pull lives. A process
    that has mapped or opened what is removed keeps it until it lets go; only then is the room free (unlink(2)).
    """
    return Local(root).collect(keep, frozenset(also), dry_run)


@dataclass(frozen=True)
class Local:
    """A root folder."""

    root: Path

    # What is here

    def current(self) -> Pointer | None:
        try:
            raw = disk.read_small(self._current, str(self._current), POINTER_LIMIT)
        except FileMissing:
            return None
        return pointer.parse(raw, str(self._current))

    def pinned(self) -> str:
        try:
            raw = disk.read_small(self._pin, str(self._pin), STATE_LIMIT)
        except FileMissing:
            return ""
        remedy = "nlu bundle unpin or pin for this folder writes it anew"
        return document.load(Pin, raw, part=str(self._pin), limit=STATE_LIMIT, remedy=remedy).bundle

    def present(self, digest: str, trust: Trust) -> Bundle | None:
        """The bundle of this digest, if it is here and whole."""
        path = self._bundles / digest
        if not os.path.lexists(path):
            return None
        try:
            bundle = verify_bundle(path, trust)
        except StaticsError as error:
            log.warning("local bundle %s cannot be used: %s", digest, error)
            return None
        if bundle.digest != digest:
            log.warning("local bundle %s cannot be used: it is %s", digest, bundle.digest)
            return None
        return bundle

    def missing(self, components: Iterable[Component]) -> list[Missing]:
        """Those that have to be brought, each once; all others are whole."""
        missing = []
        for component in {component.digest: component for component in components}.values():
            seen = self._seen(component)  # before the look at the bytes
            if seen is None or not self._whole(component):
                missing.append(Missing(component, seen))
        return missing

    def held(self) -> dict[str, Path]:
        """Where which content lies, as the manifests here say: whoever copies it hashes it again."""
        held: dict[str, Path] = {}
        for bundle in self._readable():
            for component, file in bundle.manifest.files():
                held.setdefault(file.sha256, bundle.folder(component) / file.name)
        return held

    def check_floor(self, target: Pointer, min_seq: int = 0) -> None:
        """Raises SeqTooOld for a release older than one already followed, or than the deployment allows."""
        check_seq(target.channel, target.seq, min_seq, "as the deployment says")
        followed = self._state().floors.get(target.channel, 0)
        check_seq(target.channel, target.seq, followed, "which was already pulled here")

    def check_room(self, missing: Iterable[Missing], blobs: Blobs) -> None:
        files = [file for each in missing for file in each.component.files]
        here = {file.sha256: blobs.here(file) for file in files}
        needed = sum(file.size for file in files) - sum(here.values()) + MARGIN
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise DiskFull(
                part=str(self.root),
                found=f"{free} bytes free",
                expected=f"{needed} bytes for what is missing of this bundle",
                remedy="remove old bundles under this folder (nlu bundle gc), or enlarge the volume",
            )

    # What a pull does

    @contextmanager
    def pulling(self, wanted: Manifest) -> Iterator[Blobs]:
        """Where one pull keeps its blobs. Those of pulls that died are removed first, but for what is `wanted`."""
        with disk.local_errors(str(self._blobs)):
            self._blobs.mkdir(parents=True, exist_ok=True)
        self.sweep({file.sha256 for _, file in wanted.files()})
        with disk.directory(self._blobs, str(self._blobs)) as descriptor:
            disk.lock(descriptor, str(self._blobs), LOCK_WAIT_S, shared=True)
            try:
                yield Blobs(self._blobs)
            except DiskFull:
                if disk.try_lock(descriptor):  # what we leave for the next try may be what fills the disk
                    Blobs(self._blobs).sweep(set())
                raise

    def settle(self, missing: Missing, blobs: Blobs, placed: dict[str, Path]) -> bool:
        """Put a component together and reveal it, unless another pull was faster; False: a blob of it is gone.

        `placed` says where this pull has put which content: a blob is moved to its first place, and copied to others.
        """
        component = missing.component
        with self._locked():
            if self._seen(component) == missing.seen and not self._assemble(component, blobs, placed):
                return False
        check_components(self._components, [component])
        return True

    def is_settled(self, missing: Missing) -> bool:
        """Whether another pull has brought it."""
        return self._seen(missing.component) != missing.seen

    def reveal(self, manifest: Manifest, raw: bytes, signature: bytes | None) -> Bundle:
        """Give a bundle, all components of which are here, its name."""
        digest = manifest_digest(raw)
        final = self._bundles / digest
        with self._locked():
            if not _holds(final, raw, signature):
                staged = self._stage(folder=True)
                disk.write_file(staged / MANIFEST, [raw])
                if signature is not None:
                    disk.write_file(staged / SIGNATURE, [signature])
                self._place(staged, final, manifest.seq)
                log.info("bundle %s is here", digest)
        return Bundle(final, manifest, digest)

    def follow(self, target: Pointer) -> None:
        """Make a revealed release the current one.

        The floor rises before the pointer moves: a crash in between leaves no way to an older release.
        """
        if self._follows(target):
            return  # nothing to write, so a read-only volume that is up to date will do
        with self._locked():
            self.check_floor(target)  # again, for another pull may have come first
            if not os.path.lexists(self._bundles / target.manifest):
                raise FileMissing(
                    part=str(self._bundles / target.manifest),
                    found="a bundle that was removed since it was pulled",
                    expected="the bundle to follow",
                    remedy="pull again, and keep more bundles",
                )
            floors = {**self._state().floors, target.channel: target.seq}
            self._replace(self._floors, document.dump(State(floors=floors)))
            self._replace(self._current, pointer.dump(target))
            note(self.root, "follow", digest=target.manifest, seq=target.seq)
        self.sweep(set())

    def sweep(self, wanted: set[str]) -> None:
        """Remove blobs of pulls that ended, but for what is wanted; nothing while a pull lives."""
        with self._alone() as alone:
            if alone:
                Blobs(self._blobs).sweep(wanted)  # where there is no such folder, there is nothing to remove

    # What operators do

    def pin(self, digest: str) -> None:
        try:
            held = Pin(bundle=digest)
        except ValidationError as error:
            raise ValueError(
                f"pin: found {digest!r:.80}, expected the digest of a bundle, 64 of 0-9 a-f; remedy: see nlu bundle list"
            ) from error
        with disk.local_errors(str(self.root)):
            self.root.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._replace(self._pin, document.dump(held))
            note(self.root, "pin", digest=digest)

    def unpin(self) -> bool:
        if not os.path.lexists(self._pin):
            return False
        with self._locked(), disk.local_errors(str(self._pin)):
            self._pin.unlink(missing_ok=True)
            disk.sync_directory(self.root)
            note(self.root, "unpin", digest="")
        return True

    def collect(self, keep: int, also: frozenset[str], dry_run: bool) -> Collected:
        with disk.local_errors(str(self._blobs)):
            self._blobs.mkdir(exist_ok=True)  # its lock is what keeps pulls out
        with self._alone() as alone:
            if not alone:
                log.info("nothing is collected in %s: a pull is under way", self.root)
                return Collected()
            with self._locked():
                return self._collect(keep, also, dry_run)

    def _collect(self, keep: int, also: frozenset[str], dry_run: bool) -> Collected:
        current = self.current()
        kept = also | {self.pinned(), current.manifest if current else ""}
        here = {path.name: path for path in _folders(self._bundles)}
        newest = sorted(here, key=lambda digest: here[digest].stat().st_mtime_ns, reverse=True)
        kept |= set(newest[:keep])
        old = [path for digest, path in here.items() if digest not in kept]
        readable = {bundle.path.name: bundle for bundle in self._readable()}
        used = {
            component.digest
            for digest in kept & readable.keys()
            for component in readable[digest].manifest.components
        }
        # Of a bundle whose manifest cannot be read it is not known which components are its.
        unknown = (kept & here.keys()) - readable.keys()
        loose = [path for path in _folders(self._components) if path.name not in used] if not unknown else []
        broken = [path for path in _folders(self._quarantine) if path.name not in used | kept]
        freed = sum(_size(path) for path in (*old, *loose, *broken))
        if not dry_run:
            for path in (*old, *loose, *broken):  # bundles first: none is seen without its components
                log.info("removing %s", path)
                self._remove(path)
        return Collected(tuple(path.name for path in old), tuple(path.name for path in loose), freed)

    # Steps of the above; those that change names need the lock

    def _readable(self) -> Iterator[Bundle]:
        """The bundles that are here, as their manifests say; no file of them was looked at."""
        for path in _folders(self._bundles):
            try:
                manifest = parse(read_manifest(path)[0])
            except StaticsError:
                continue
            yield Bundle(path, manifest, path.name)

    def _whole(self, component: Component) -> bool:
        try:
            check_components(self._components, [component])
        except StaticsError as error:
            log.warning("local component %s cannot be used: %s", component.digest, error)
            return False
        return True

    def _seen(self, component: Component) -> tuple[int, int] | None:
        try:
            status = os.lstat(self._components / component.digest)
        except OSError:
            return None
        return status.st_ino, status.st_ctime_ns

    def _assemble(self, component: Component, blobs: Blobs, placed: dict[str, Path]) -> bool:
        if not all(blobs.has(file.sha256) or file.sha256 in placed for file in component.files):
            return False
        staged, final = self._stage(folder=True), self._components / component.digest
        for file in component.files:
            if blobs.has(file.sha256):
                blobs.take(file, staged / file.name)
                placed[file.sha256] = staged / file.name
            else:
                _copy(placed[file.sha256], staged / file.name, file)
        self._place(staged, final)
        placed.update({file.sha256: final / file.name for file in component.files})
        log.debug("component %s is here", component.folder)
        return True

    def _stage(self, *, folder: bool = False) -> Path:
        """A name to prepare something under; what is in staging was left by a process that died with the lock."""
        shutil.rmtree(self._staging, ignore_errors=True)
        staged = self._staging / "staged"
        with disk.local_errors(str(staged)):
            (staged if folder else self._staging).mkdir(parents=True)
        return staged

    def _place(self, staged: Path, final: Path, seq: int = 0) -> None:
        """Reveal a folder under its name; what may be there is broken, and moves away."""
        disk.sync_directory(staged)
        with disk.local_errors(str(final)):
            self._bundles.mkdir(exist_ok=True)
            self._components.mkdir(exist_ok=True)
            if os.path.lexists(final):
                self._put_aside(final, seq)
            os.rename(staged, final)
        disk.sync_directory(final.parent)
        disk.sync_directory(self.root)

    def _replace(self, path: Path, raw: bytes) -> None:
        """Readers see the old document or the new one, and a crash leaves nothing that nobody removes."""
        staged = self._stage()
        disk.write_file(staged, [raw])
        with disk.local_errors(str(path)):
            os.replace(staged, path)
        disk.sync_directory(self.root)

    def _put_aside(self, path: Path, seq: int) -> None:
        """Keep the latest broken one of each: if all were kept, a bad disk would fill up."""
        place = self._quarantine / path.name
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        os.rename(path, place)
        log.warning("moved what is broken to %s", place)
        note(self.root, "quarantine", digest=path.name, seq=seq)

    def _remove(self, path: Path) -> None:
        """Take a folder away in one step, then delete it."""
        staged = self._stage()
        with disk.local_errors(str(path)):
            os.rename(path, staged)
        self._stage()

    def _follows(self, target: Pointer) -> bool:
        try:
            return self._state().floors.get(target.channel) == target.seq and self.current() == target
        except StaticsError:
            return False  # what cannot be read is written anew, or says why it cannot be

    def _state(self) -> State:
        try:
            raw = disk.read_small(self._floors, str(self._floors), STATE_LIMIT)
        except FileMissing:
            return State()
        remedy = (
            f"set NLU_MIN_SEQ to the newest seq that was followed here ({AUDIT} tells), then remove this file"
        )
        return document.load(State, raw, part=str(self._floors), limit=STATE_LIMIT, remedy=remedy)

    def _locked(self) -> AbstractContextManager[None]:
        return disk.locked(self.root / ".lock", LOCK_WAIT_S)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no pull lives, and none begins meanwhile."""
        if not self._blobs.is_dir():
            yield False
            return
        with disk.directory(self._blobs, str(self._blobs)) as descriptor:
            yield disk.try_lock(descriptor)

    @property
    def _bundles(self) -> Path:
        return self.root / BUNDLES

    @property
    def _components(self) -> Path:
        return self.root / COMPONENTS

    @property
    def _blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def _staging(self) -> Path:
        return self.root / "staging"

    @property
    def _quarantine(self) -> Path:
        return self.root / "quarantine"

    @property
    def _current(self) -> Path:
        return self.root / "current.json"

    @property
    def _floors(self) -> Path:
        return self.root / "state.json"

    @property
    def _pin(self) -> Path:
        return self.root / "pin.json"


def check_seq(channel: str, seq: int, floor: int, why: str) -> None:
    if seq < floor:
        raise SeqTooOld(
            part=channel_key(channel),
            found=f"seq {seq}",
            expected=f"seq {floor} or newer, {why}",
            remedy="publish what you want to go back to as a new release, with a higher seq; or pin that one",
        )


def _holds(path: Path, raw: bytes, signature: bytes | None) -> bool:
    """Whether a bundle folder has just this manifest and this signature."""
    expected = {MANIFEST} if signature is None else {MANIFEST, SIGNATURE}
    try:
        return read_manifest(path) == (raw, signature) and set(os.listdir(path)) == expected
    except (StaticsError, OSError):
        return False


def _copy(source: Path, target: Path, file: File) -> None:
    with from_disk(source, 0) as chunks:
        disk.write_file(target, disk.checked(chunks, str(source), size=file.size, sha256=file.sha256))


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    return sum(each.lstat().st_size for each in (path, *path.rglob("*")) if not each.is_dir())
