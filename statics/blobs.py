"""Blobs on their way into a root: `<sha256>.part` while bytes arrive, `<sha256>` once all are there and right.

Whoever holds the lock of a part writes it; others who want it wait, and find it done. The kernel releases the lock
of a process that dies. Its part stays, and the next one goes on where it ended.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from statics import disk
from statics.manifest import File

log = logging.getLogger(__name__)

From = Callable[[int], AbstractContextManager[Iterator[bytes]]]  # the content from this byte on
Tick = Callable[[int], None]  # hears how many bytes of a blob are there


@dataclass(frozen=True)
class Part:
    """A blob that we hold the lock of."""

    descriptor: int
    path: Path
    file: File

    def fill(self, origin: From, name: str, tick: Tick) -> None:
        """Add what is missing. What is here is hashed again with it; raises unless the whole is as declared."""
        here = os.fstat(self.descriptor).st_size
        if here > self.file.size:
            self.empty()
            here = 0
        with disk.local_errors(str(self.path)):
            os.lseek(self.descriptor, 0, os.SEEK_SET)
        kept, seen = disk.read_chunks(self.descriptor, str(self.path)), 0
        with origin(here) if here < self.file.size else nullcontext(iter(())) as rest:
            chunks = disk.checked(chain(kept, rest), name, size=self.file.size, sha256=self.file.sha256)
            for chunk in chunks:
                if seen >= here:
                    with disk.local_errors(str(self.path)):
                        disk.write_all(self.descriptor, chunk)
                seen += len(chunk)
                tick(seen)

    def empty(self) -> None:
        with disk.local_errors(str(self.path)):
            os.ftruncate(self.descriptor, 0)

    def finish(self) -> None:
        with disk.local_errors(str(self.path)):
            os.fsync(self.descriptor)
            os.rename(self.path, self.path.with_suffix(""))

    def is_ours(self) -> bool:
        """Whether the name still means what we have locked."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.lstat(self.path))
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class Blobs:
    """A folder of blobs, whole ones and parts."""

    folder: Path

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def has(self, sha256: str) -> bool:
        return os.path.lexists(self.path(sha256))

    def here(self, file: File) -> int:
        """Bytes of it that are here, right or not."""
        for path in (self.path(file.sha256), self._part(file)):
            try:
                return min(os.lstat(path).st_size, file.size)
            except FileNotFoundError:
                continue
        return 0

    @contextmanager
    def arriving(
        self, file: File, done: Callable[[], bool], wait: Callable[[], None]
    ) -> Iterator[Part | None]:
        """The part of a blob, locked; None where it is `done`, which is asked again when the lock is ours.

        `wait` is called again and again while another process has the lock.
        """
        path, flags = self._part(file), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        while not done():
            with disk.local_errors(str(path)):
                part = Part(os.open(path, flags, 0o644), path, file)
            try:
                disk.check_plain(os.fstat(part.descriptor), str(path), shared=True)
                while not disk.try_lock(part.descriptor):
                    wait()
                if part.is_ours():
                    if not done():
                        yield part
                        return
                    path.unlink()  # ours, and empty: whoever had it was done between our two looks
            finally:
                os.close(part.descriptor)
        yield None

    def take(self, file: File, target: Path) -> None:
        """Give a whole blob its place."""
        with disk.local_errors(str(target)):
            os.rename(self.path(file.sha256), target)

    def sweep(self, wanted: set[str]) -> None:
        """Remove all others, and those of another account that we could not go on with; for who knows that no pull lives."""
        for path in self.folder.glob("*"):
            if path.stem not in wanted or not os.access(path, os.R_OK | os.W_OK):
                log.info("removing %s, left by a pull that did not end", path)
                with disk.local_errors(str(path)):
                    path.unlink(missing_ok=True)

    def _part(self, file: File) -> Path:
        return self.folder / f"{file.sha256}.part"


@contextmanager
def from_disk(path: Path, offset: int) -> Iterator[Iterator[bytes]]:
    with disk.plain_file(path, str(path)) as descriptor:
        with disk.local_errors(str(path)):
            os.lseek(descriptor, offset, os.SEEK_SET)
        yield disk.read_chunks(descriptor, str(path))
