"""What this package does to a disk: reading without following links, writing that survives a crash, locks."""

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from statics.errors import (
    DigestMismatch,
    DiskFull,
    FileMissing,
    FileUnsafe,
    Forbidden,
    SizeMismatch,
    StaticsError,
    StoreUnavailable,
)

CHUNK = 1024 * 1024

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


# Reading


@contextmanager
def local_errors(part: str) -> Iterator[None]:
    """Turn what the operating system says about `part` into our errors."""
    try:
        yield
    except OSError as error:
        raise from_os(error, part) from error


def from_os(error: OSError, part: str) -> StaticsError:
    found = error.strerror or str(error)
    if error.errno in {errno.ENOENT}:
        return FileMissing(
            part=part, found="nothing", expected="a file or folder", remedy="pull or build it again"
        )
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFull(
            part=part, found=found, expected="room on the disk", remedy="free space or enlarge the volume"
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return Forbidden(
            part=part,
            found=found,
            expected="leave to do so",
            remedy="correct owner and mode, or mount it writable",
        )
    return FileUnsafe(
        part=part,
        found=found,
        expected="a plain file or folder, no link",
        remedy="remove it, then pull or build again",
    )


@contextmanager
def directory(path: Path | str, part: str, *, inside: int | None = None) -> Iterator[int]:
    """A descriptor of a real directory; names opened `inside` it stay in it, whatever moves."""
    with local_errors(part):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=inside)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def plain_file(
    name: Path | str, part: str, *, inside: int | None = None, shared: bool = False
) -> Iterator[int]:
    """A descriptor of a regular file that no other name points to (unless `shared`).

    The checks hold for the descriptor that is read, not only for a name that may since mean something else.
    """
    with local_errors(part):
        check_plain(os.stat(name, dir_fd=inside, follow_symlinks=False), part, shared=shared)
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=inside)
    try:
        check_plain(os.fstat(descriptor), part, shared=shared)
        yield descriptor
    finally:
        os.close(descriptor)


def check_plain(status: os.stat_result, part: str, *, shared: bool = False) -> None:
    if not stat.S_ISREG(status.st_mode):
        found = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "something that is no regular file"
    elif status.st_nlink > 1 and not shared:  # one that was replaced since we opened it has none
        found = f"a file with {status.st_nlink} names"
    else:
        return
    raise FileUnsafe(
        part=part,
        found=found,
        expected="a regular file with one name",
        remedy="put a plain copy in its place",
    )


def read_chunks(descriptor: int, part: str) -> Iterator[bytes]:
    while True:
        with local_errors(part):
            chunk = os.read(descriptor, CHUNK)
        if not chunk:
            return
        yield chunk


def read_small(
    name: Path | str, part: str, limit: int, *, inside: int | None = None, shared: bool = False
) -> bytes:
    with plain_file(name, part, inside=inside, shared=shared) as descriptor:
        return collect(read_chunks(descriptor, part), part, limit)


def collect(chunks: Iterable[bytes], part: str, limit: int) -> bytes:
    """All of a small object, and never much more than `limit` bytes of a large one."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > limit:
            raise SizeMismatch(
                part=part,
                found=f"more than {limit} bytes",
                expected=f"at most {limit} bytes",
                remedy="build and publish it again",
            )
    return bytes(data)


def check_content(chunks: Iterable[bytes], part: str, *, size: int, sha256: str) -> None:
    """Hash a stream of bytes; stops at the first byte too many."""
    for _ in checked(chunks, part, size=size, sha256=sha256):
        pass


def checked(chunks: Iterable[bytes], part: str, *, size: int, sha256: str) -> Iterator[bytes]:
    """Pass the bytes on; in the end SizeMismatch or DigestMismatch, unless they were the declared ones."""
    seen, hashed = 0, hashlib.sha256()
    for chunk in chunks:
        seen += len(chunk)
        if seen > size:
            break
        hashed.update(chunk)
        yield chunk
    check_size(seen, part, size)
    if hashed.hexdigest() != sha256:
        raise DigestMismatch(
            part=part,
            found=f"sha256 {hashed.hexdigest()}",
            expected=f"sha256 {sha256}",
            remedy=f"pull again; if that fails, delete blobs/sha256/{sha256} in the store and publish again",
        )


def check_size(found: int, part: str, size: int) -> None:
    if found != size:
        raise SizeMismatch(
            part=part,
            found=f"{found} bytes" if found < size else f"{found} bytes or more",
            expected=f"{size} bytes",
            remedy="pull again; if that fails, delete it in the store and publish again",
        )


# Writing


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """A new file, on the disk when this returns."""
    with local_errors(str(path)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        for chunk in chunks:
            with local_errors(str(path)):
                write_all(descriptor, chunk)
        with local_errors(str(path)):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Readers see the old file or the new one, after a crash too."""
    with staged(path) as temporary:
        write_file(temporary, chunks)
        with local_errors(str(path)):
            os.replace(temporary, path)
    sync_directory(path.parent)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A name beside `path` to prepare its content under; whatever is left there in the end is removed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    with directory(path, str(path)) as descriptor, local_errors(str(path)):
        os.fsync(descriptor)


def exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step, so that `old` never goes missing; where the system cannot, in three."""
    with local_errors(str(old)):
        if not _exchanged(new, old):
            aside = old.with_name(f".{old.name}.{uuid.uuid4().hex}")
            os.rename(old, aside)
            try:
                os.rename(new, old)
            except OSError:
                os.rename(aside, old)
                raise
            os.rename(aside, new)


def _exchanged(new: Path, old: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    failed = rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
    code = ctypes.get_errno()
    if failed and code not in {errno.EINVAL, errno.ENOSYS}:  # those two: the file system has no such call
        raise OSError(code, os.strerror(code))
    return not failed


# Locks


@contextmanager
def locked(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock file `path`, which the kernel releases when its holder dies, however it dies."""
    with local_errors(str(path)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        lock(descriptor, str(path), wait_s)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, part: str, wait_s: float, *, shared: bool = False) -> None:
    end = time.monotonic() + wait_s
    while not try_lock(descriptor, shared=shared):
        if time.monotonic() >= end:
            raise StoreUnavailable(
                part=part,
                found=f"a lock that another process holds for more than {wait_s:.0f} s",
                expected="a free lock",
                remedy="find the process that holds it (lsof), end it, try again",
            )
        time.sleep(0.01)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Whether the lock of an open file or folder is ours now; one that we have changes its kind."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
