"""The local root, where pulled bundles live; several processes, and crashes at any moment, may share it.

`bundles/<digest>` are whole bundles, `current.json` is the pointer this machine follows, `state.json` has the
seq of the newest release pulled of each channel; `staging/` is where pulls work, `quarantine/` where broken
bundles wait for whoever wants to know why.
"""

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from statics import disk, document, pointer
from statics.bundle import Bundle
from statics.document import Document
from statics.errors import DiskFull, FileMissing, FileUnsafe, SeqTooOld, StaticsError
from statics.manifest import Count, Manifest, Name, parse
from statics.pointer import POINTER_LIMIT, Pointer
from statics.store import channel_key
from statics.verify import Trust, read_manifest, verify_bundle
from statics.version import FORMAT

log = logging.getLogger(__name__)

STATE_LIMIT = 64 * 1024  # bytes
MARGIN = 1024 * 1024  # bytes that stay free beyond the bundle, for folders and our own small files
LOCK_WAIT_S = 30.0


class State(Document):
    """The seq floor of each channel: nothing older is accepted any more, whatever the store says."""

    format: int = FORMAT
    floors: dict[Name, Count] = {}


@dataclass(frozen=True)
class Local:
    """A root folder. Only `staging`, `reveal` and `follow` write."""

    root: Path

    def current(self) -> Pointer | None:
        try:
            raw = disk.read_small(self._current, str(self._current), POINTER_LIMIT)
        except FileMissing:
            return None
        return pointer.parse(raw, str(self._current))

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

    def held(self) -> dict[str, Path]:
        """Where which content lies, as the manifests here say: whoever copies it hashes it again."""
        held: dict[str, Path] = {}
        for path in sorted(self._bundles.glob("*/")):
            try:
                manifest = parse(read_manifest(path)[0])
            except StaticsError:
                continue
            for component, file in manifest.files():
                held.setdefault(file.sha256, path / component.folder / file.name)
        return held

    def check_floor(self, target: Pointer) -> None:
        """Raises SeqTooOld for a release older than one already pulled."""
        floor = self._state().floors.get(target.channel, 0)
        if target.seq < floor:
            raise SeqTooOld(
                part=channel_key(target.channel),
                found=f"seq {target.seq}",
                expected=f"seq {floor} or newer, which was already pulled here",
                remedy="publish what you want to go back to as a new release, with a higher seq",
            )

    def check_room(self, manifest: Manifest) -> None:
        free, needed = shutil.disk_usage(self.root).free, manifest.size + MARGIN
        if free < needed:
            raise DiskFull(
                part=str(self.root),
                found=f"{free} bytes free",
                expected=f"{needed} bytes for this bundle",
                remedy="remove old bundles under this folder, or enlarge the volume",
            )

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder for one pull. Its lock says that the pull lives; those of pulls that died are removed."""
        area = self.root / "staging"
        folder = area / uuid.uuid4().hex
        with disk.local_errors(str(area)):
            area.mkdir(parents=True, exist_ok=True)
        with self._locked():  # so that nobody sees the folder between its birth and its lock
            self._sweep()
            with disk.local_errors(str(folder)):
                folder.mkdir()
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)

    def reveal(self, staged: Bundle, trust: Trust) -> Bundle:
        """Give a verified bundle its final name, unless another pull was faster; a broken one moves away."""
        final = self._bundles / staged.digest
        with self._locked():
            theirs = self.present(staged.digest, trust)
            if theirs is not None:
                return theirs
            with disk.local_errors(str(final)):
                self._bundles.mkdir(exist_ok=True)
                if os.path.lexists(final):
                    self._quarantine(final)
                os.rename(staged.path, final)
            disk.sync_directory(self._bundles)
            disk.sync_directory(self.root)
        return Bundle(final, staged.manifest, staged.digest)

    def follow(self, target: Pointer) -> None:
        """Make a revealed release the current one.

        The floor rises before the pointer moves: a crash in between leaves no way to an older release.
        """
        if self._follows(target):
            return  # nothing to write, so a read-only volume that is up to date will do
        with self._locked():
            self.check_floor(target)  # again, for another pull may have come first
            self._sweep()
            floors = {**self._state().floors, target.channel: target.seq}
            disk.replace_file(self._floors, [document.dump(State(floors=floors))])
            disk.replace_file(self._current, [pointer.dump(target)])

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
        return document.load(State, raw, part=str(self._floors), limit=STATE_LIMIT)

    def _sweep(self) -> None:
        for folder in (self.root / "staging").glob("*"):
            _remove_dead(folder)

    def _quarantine(self, path: Path) -> None:
        """Keep the latest broken one of each bundle: if all were kept, a bad disk would fill up."""
        place = self.root / "quarantine" / path.name
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        os.rename(path, place)
        log.warning("moved the broken bundle to %s", place)

    def _locked(self) -> AbstractContextManager[None]:
        return disk.locked(self.root / ".lock", LOCK_WAIT_S)

    @property
    def _bundles(self) -> Path:
        return self.root / "bundles"

    @property
    def _current(self) -> Path:
        return self.root / "current.json"

    @property
    def _floors(self) -> Path:
        return self.root / "state.json"


def _remove_dead(folder: Path) -> None:
    try:
        with disk.directory(folder, str(folder)) as descriptor:
            if disk.try_lock(descriptor):
                log.info("removing %s, left by a pull that died", folder)
                shutil.rmtree(folder, ignore_errors=True)
    except (FileMissing, FileUnsafe):
        return  # its pull has just ended, or it is no staging folder
