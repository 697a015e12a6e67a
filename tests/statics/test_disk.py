"""statics.disk: reading what is checked, writing what survives."""

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from statics import disk
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


def test_disk_reads_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert disk.read_small(tmp_path / "a", "a", 3) == b"abc"


def test_disk_reads_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "CHUNK", 2)
    (tmp_path / "a").write_bytes(b"abcde")
    with disk.plain_file(tmp_path / "a", "a") as descriptor:
        assert list(disk.read_chunks(descriptor, "a")) == [b"ab", b"cd", b"e"]


def test_disk_refuses_more_than_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(SizeMismatch, match="more than 2 bytes"):
        disk.read_small(tmp_path / "a", "a", 2)


@pytest.mark.parametrize("kind", ["symlink", "dangling", "hardlink", "folder", "fifo", "socket", "device"])
def test_disk_opens_nothing_but_plain_files(tmp_path: Path, kind: str) -> None:
    target, name = tmp_path / "target", tmp_path / "name"
    target.write_bytes(b"abc")
    server = socket.socket(socket.AF_UNIX)
    if kind == "symlink":
        name.symlink_to(target)
    elif kind == "dangling":
        name.symlink_to(tmp_path / "nothing")
    elif kind == "hardlink":
        name.hardlink_to(target)
    elif kind == "folder":
        name.mkdir()
    elif kind == "fifo":
        os.mkfifo(name)
    elif kind == "socket":
        server.bind(str(name))
    else:
        name = Path("/dev/zero")
    with server, pytest.raises(FileUnsafe, match="regular file with one name"):
        disk.read_small(name, "name", 10)


def test_disk_opens_linked_files_where_they_are_only_copied(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    with disk.plain_file(tmp_path / "b", "b", shared=True) as descriptor:
        assert os.read(descriptor, 10) == b"abc"


def test_disk_reads_on_in_a_file_that_is_replaced_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pin is written anew in the very moment that a pull looks at it."""
    (tmp_path / "pin").write_bytes(b"old")
    with monkeypatch.context() as patch:

        def open_and_lose(*args: Any, **kwargs: Any) -> int:
            patch.undo()
            descriptor = os.open(*args, **kwargs)
            disk.replace_file(tmp_path / "pin", [b"new"])
            return descriptor

        patch.setattr(os, "open", open_and_lose)
        assert disk.read_small(tmp_path / "pin", "pin", 10) == b"old"
    assert disk.read_small(tmp_path / "pin", "pin", 10) == b"new"


def test_disk_does_not_follow_a_link_put_there_after_the_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "a").write_bytes(b"abc")
    look = os.stat

    def look_then_swap(*args: object, **options: object) -> os.stat_result:
        status = look(*args, **options)  # type: ignore[arg-type]
        (tmp_path / "a").unlink()
        (tmp_path / "a").symlink_to(tmp_path / "secret")
        return status

    monkeypatch.setattr(os, "stat", look_then_swap)
    with pytest.raises(FileUnsafe, match="symbolic links"), disk.plain_file(tmp_path / "a", "a"):
        pass


def test_disk_stays_in_the_directory_it_opened(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"real")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").write_bytes(b"other")
    with disk.directory(tmp_path / "real", "real") as inside:
        (tmp_path / "real").rename(tmp_path / "moved")
        (tmp_path / "real").symlink_to(tmp_path / "other")
        assert disk.read_small("a", "a", 10, inside=inside) == b"real"


@pytest.mark.parametrize(
    ("code", "kind"), [(2, FileMissing), (5, FileUnsafe), (13, Forbidden), (28, DiskFull)]
)
def test_disk_names_what_the_system_says(code: int, kind: type[StaticsError]) -> None:
    with pytest.raises(kind), disk.local_errors("a"):
        raise OSError(code, os.strerror(code))


def test_disk_content_is_as_declared() -> None:
    disk.check_content([b"ab", b"", b"c"], "a", size=3, sha256=hashlib.sha256(b"abc").hexdigest())


@pytest.mark.parametrize(
    ("content", "kind"), [(b"abd", DigestMismatch), (b"ab", SizeMismatch), (b"abcd", SizeMismatch)]
)
def test_disk_content_is_not_as_declared(content: bytes, kind: type[StaticsError]) -> None:
    with pytest.raises(kind):
        disk.check_content([content], "a", size=3, sha256=hashlib.sha256(b"abc").hexdigest())


def test_disk_stops_reading_at_the_first_byte_too_many() -> None:
    asked = []

    def endless() -> Iterator[bytes]:
        while True:
            asked.append(1)
            yield b"ab"

    with pytest.raises(SizeMismatch):
        disk.check_content(endless(), "a", size=3, sha256="")
    assert len(asked) == 2


def test_disk_writes_no_byte_too_many(tmp_path: Path) -> None:
    with pytest.raises(SizeMismatch):
        disk.write_file(tmp_path / "a", disk.checked([b"ab", b"cd"], "a", size=3, sha256=""))
    assert (tmp_path / "a").read_bytes() == b"ab"


def test_disk_never_writes_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileUnsafe, match="File exists"):
        disk.write_file(tmp_path / "a", [b"new"])
    assert (tmp_path / "a").read_bytes() == b"old"


def test_disk_replaces_a_file_or_leaves_it(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionError

    disk.replace_file(tmp_path / "a", [b"old"])
    with pytest.raises(ConnectionError):
        disk.replace_file(tmp_path / "a", broken())
    assert (tmp_path / "a").read_bytes() == b"old"
    disk.replace_file(tmp_path / "a", [b"n", b"ew"])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


def test_disk_waits_for_the_file_then_its_name_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        assert (tmp_path / "a").exists() == synced[-1].is_dir()  # the content first, and only then the name

    monkeypatch.setattr(os, "fsync", note)
    disk.replace_file(tmp_path / "a", [b"abc"])
    assert [path.parent if path != tmp_path else path for path in synced] == [tmp_path, tmp_path]


def test_disk_writes_all_when_the_system_takes_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:2]))
    disk.write_file(tmp_path / "a", [b"abcde"])
    assert (tmp_path / "a").read_bytes() == b"abcde"


@pytest.mark.parametrize("native", [True, False])
def test_disk_exchanges_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    if not native:
        monkeypatch.setattr(disk, "_exchanged", lambda new, old: False)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    disk.exchange(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "content").read_text() == "new"
    assert (tmp_path / "new" / "content").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_disk_exchange_puts_the_old_back_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_exchanged", lambda new, old: False)
    (tmp_path / "old").mkdir()
    with pytest.raises(FileMissing):
        disk.exchange(tmp_path / "nothing", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_disk_locks_are_shared_or_not(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    assert disk.try_lock(first, shared=True) and disk.try_lock(second, shared=True)
    assert not disk.try_lock(first)
    os.close(second)
    assert disk.try_lock(first)
    third = os.open(tmp_path, os.O_RDONLY)
    assert not disk.try_lock(third, shared=True)
    with pytest.raises(StoreUnavailable, match="a lock that another process holds"):
        disk.lock(third, "the folder", 0.02, shared=True)
    os.close(first)
    os.close(third)


def test_disk_lock_excludes_and_says_so(tmp_path: Path) -> None:
    with disk.locked(tmp_path / "lock", 1):
        with pytest.raises(StoreUnavailable, match="a lock that another process holds"):
            with disk.locked(tmp_path / "lock", 0.05):
                raise AssertionError("two hold one lock")
    with disk.locked(tmp_path / "lock", 0):
        pass
