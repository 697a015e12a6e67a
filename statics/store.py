"""Where published bundles lie: a store of objects named by content, and one pointer for each channel."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from statics import disk
from statics.errors import Conflict, DiskFull, Forbidden, NotFound, StaticsError, StoreUnavailable
from statics.manifest import is_name

LOCK_WAIT_S = 60.0


class Store(Protocol):
    """Errors are NotFound, Forbidden, StoreUnavailable and Conflict; what is read is never trusted."""

    def open(self, key: str, offset: int = 0) -> AbstractContextManager[Iterator[bytes]]:
        """An object as a stream, read once, from byte `offset` on; nothing where it ends before that."""

    def read(self, key: str, limit: int) -> tuple[bytes, str | None]:
        """A small object (SizeMismatch beyond `limit` bytes) and its token for `put(if_match=...)`."""

    def exists(self, key: str) -> bool: ...

    def put(
        self, key: str, source: bytes | Path, *, if_absent: bool = False, if_match: str | None = None
    ) -> None:
        """Write an object whole or not at all; Conflict if it is there, or not as `if_match` says."""

    def keys(self, prefix: str) -> Iterator[tuple[str, int, datetime]]:
        """Key, size in bytes and time of the last change of each object under `prefix`, by key.

        For keeping house; a pull never lists.
        """

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is gone already."""


def blob_key(sha256: str) -> str:
    return f"blobs/sha256/{sha256}"


def manifest_key(digest: str) -> str:
    return f"manifests/{digest}.json"


def signature_key(digest: str) -> str:
    return f"manifests/{digest}.sig"


def channel_key(channel: str) -> str:
    return f"channels/{channel}.json"


def release_key(channel: str, seq: int) -> str:
    return f"releases/{channel}/{seq}.json"


def audit_key(channel: str, seq: int) -> str:
    return f"audit/{channel}/{seq}.json"


class FolderStore:
    """A store in a folder: for laptops, shared volumes and tests. Its writers exclude each other."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def open(self, key: str, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with _errors(key):
            file = open(self._path(key), "rb", buffering=0, opener=_at_once)
        with file:
            with _errors(key):
                file.seek(offset)
            yield _chunks(file.fileno(), key)

    def read(self, key: str, limit: int) -> tuple[bytes, str | None]:
        with self.open(key) as chunks:
            raw = disk.collect(chunks, key, limit)
        return raw, _token(raw)

    def exists(self, key: str) -> bool:
        with _errors(key):
            return self._path(key).is_file()

    def put(
        self, key: str, source: bytes | Path, *, if_absent: bool = False, if_match: str | None = None
    ) -> None:
        target = self._path(key)
        with _errors(key):
            target.parent.mkdir(parents=True, exist_ok=True)
        with disk.locked(self.root / ".lock", LOCK_WAIT_S):
            self._check(key, if_absent, if_match)
            if isinstance(source, bytes):
                disk.replace_file(target, [source])
            else:
                with disk.plain_file(source, str(source)) as descriptor:
                    disk.replace_file(target, disk.read_chunks(descriptor, str(source)))

    def keys(self, prefix: str) -> Iterator[tuple[str, int, datetime]]:
        with _errors(prefix):
            paths = [path for path in self.root.rglob("*") if path.is_file()]
        for key, path in sorted((path.relative_to(self.root).as_posix(), path) for path in paths):
            if key.startswith(prefix) and not path.name.startswith(
                "."
            ):  # our lock, and what is being written
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # deleted since
                yield key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC)

    def delete(self, key: str) -> None:
        target = self._path(key)
        with disk.locked(self.root / ".lock", LOCK_WAIT_S), _errors(key):
            target.unlink(missing_ok=True)

    def _check(self, key: str, if_absent: bool, if_match: str | None) -> None:
        exists = self.exists(key)
        if if_absent and exists:
            raise conflict(key, found="an object", expected="none")
        if if_match is not None:
            with _errors(key):
                found = _token(self._path(key).read_bytes()) if exists else "nothing"
            if found != if_match:
                raise conflict(key, found=f"version {found}", expected=f"version {if_match}")

    def _path(self, key: str) -> Path:
        steps = key.split("/")
        if not all(is_name(step) or _is_object(step) for step in steps):
            raise ValueError(f"key {key!r}: expected names of a-z 0-9 . _ - between slashes")
        return self.root.joinpath(*steps)


def conflict(key: str, *, found: str, expected: str) -> Conflict:
    return Conflict(
        part=key,
        found=found,
        expected=expected,
        remedy="look at what was written meanwhile, then decide again",
    )


def _is_object(step: str) -> bool:
    """Object names are a name and an ending: a digest is as long as a name may be."""
    stem, dot, ending = step.rpartition(".")
    return bool(dot) and ending in {"json", "sig"} and is_name(stem)


def _at_once(path: str, flags: int) -> int:
    """A pipe under this name must not hold us up."""
    return os.open(path, flags | os.O_NONBLOCK)


def _token(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _chunks(descriptor: int, key: str) -> Iterator[bytes]:
    while True:
        with _errors(key):
            chunk = os.read(descriptor, disk.CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def _errors(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise not_found(key) from error
    except OSError as error:
        kind: type[StaticsError] = type(disk.from_os(error, key))
        if kind not in {Forbidden, DiskFull}:
            kind = StoreUnavailable
        raise kind(
            part=key,
            found=error.strerror or str(error),
            expected="a store folder that can be used",
            remedy="look at the volume the store lies on",
        ) from error


def not_found(key: str) -> NotFound:
    return NotFound(
        part=key,
        found="nothing under this key",
        expected="an object",
        remedy="publish first, or correct the store's address and the channel",
    )
