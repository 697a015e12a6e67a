"""statics.blobs: bytes on their way in, whoever brings them and however often."""

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from statics.blobs import Blobs, From, Part, from_disk
from statics.errors import DigestMismatch, FileUnsafe, SizeMismatch
from statics.manifest import File

DATA = bytes(range(256)) * 10
FILE = File(name="w", size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    (tmp_path / "blobs").mkdir()
    return Blobs(tmp_path / "blobs")


@contextmanager
def part_of(blobs: Blobs) -> Iterator[Part]:
    with blobs.arriving(FILE, lambda: blobs.has(FILE.sha256), no_wait) as part:
        assert part is not None
        yield part


def no_wait() -> None:
    raise AssertionError("waited")


def silent(written: int) -> None:
    """Nobody listens."""


def giving(data: bytes, asked: list[int]) -> From:
    @contextmanager
    def origin(offset: int) -> Iterator[Iterator[bytes]]:
        asked.append(offset)
        yield (data[at : at + 100] for at in range(offset, len(data), 100))

    return origin


def bytes_of(blobs: Blobs) -> bytes:
    return (blobs.folder / f"{FILE.sha256}.part").read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 1000, len(DATA) - 1, len(DATA)])
def test_blobs_go_on_where_they_ended(blobs: Blobs, kept: int) -> None:
    (blobs.folder / f"{FILE.sha256}.part").write_bytes(DATA[:kept])
    asked: list[int] = []
    heard: list[int] = []
    assert blobs.here(FILE) == kept
    with part_of(blobs) as part:
        part.fill(giving(DATA, asked), "w", heard.append)
        part.finish()
    assert asked == ([kept] if kept < len(DATA) else [])
    assert (heard, heard[-1]) == (sorted(heard), len(DATA))
    assert blobs.path(FILE.sha256).read_bytes() == DATA
    assert [path.name for path in blobs.folder.iterdir()] == [FILE.sha256]


@pytest.mark.parametrize("kept", [b"x" + DATA[1:1000], DATA + b"more", b"x" * len(DATA)])
def test_blobs_hash_again_what_was_kept(blobs: Blobs, kept: bytes) -> None:
    (blobs.folder / f"{FILE.sha256}.part").write_bytes(kept)
    with part_of(blobs) as part:
        if len(kept) <= len(DATA):  # longer ones are no beginning of it, and are dropped at once
            with pytest.raises(DigestMismatch):
                part.fill(giving(DATA, []), "w", silent)
            part.empty()
        part.fill(giving(DATA, []), "w", silent)
    assert bytes_of(blobs) == DATA


@pytest.mark.parametrize(("given", "error"), [(DATA + b"x" * 500, SizeMismatch), (DATA[:-1], SizeMismatch)])
def test_blobs_take_no_byte_too_many(blobs: Blobs, given: bytes, error: type[Exception]) -> None:
    with part_of(blobs) as part, pytest.raises(error):
        part.fill(giving(given, []), "w", silent)
    assert DATA.startswith(bytes_of(blobs))
    assert not blobs.has(FILE.sha256)


def test_blobs_are_waited_for_while_another_brings_them(blobs: Blobs) -> None:
    waiting, brought = threading.Event(), threading.Event()
    outcome: list[Part | None] = []

    def another() -> None:
        with blobs.arriving(FILE, lambda: blobs.has(FILE.sha256), waiting.set) as part:
            outcome.append(part)

    with part_of(blobs) as part:
        thread = threading.Thread(target=another)
        thread.start()
        assert waiting.wait(10)
        part.fill(giving(DATA, []), "w", silent)
        part.finish()
        brought.set()
    thread.join(10)
    assert outcome == [None]
    assert [path.name for path in blobs.folder.iterdir()] == [FILE.sha256]


def test_blobs_whose_bringer_gave_up_are_brought_on(blobs: Blobs) -> None:
    waiting = threading.Event()
    asked: list[int] = []

    def another() -> None:
        with blobs.arriving(FILE, lambda: blobs.has(FILE.sha256), waiting.set) as part:
            assert part is not None
            part.fill(giving(DATA, asked), "w", silent)

    with part_of(blobs) as part:
        thread = threading.Thread(target=another)
        thread.start()
        assert waiting.wait(10)
        with pytest.raises(SizeMismatch):
            part.fill(giving(DATA[:700], []), "w", silent)
    thread.join(10)
    assert asked == [700]
    assert bytes_of(blobs) == DATA


def test_blobs_stop_waiting_when_told(blobs: Blobs) -> None:
    class Enough(Exception):
        pass

    def enough() -> None:
        raise Enough

    with part_of(blobs), pytest.raises(Enough), blobs.arriving(FILE, lambda: False, enough):
        pass
    with part_of(blobs):
        pass  # and the lock is free


def test_blobs_lock_is_of_the_file_that_has_the_name(blobs: Blobs) -> None:
    """Locking what was renamed while we waited would be locking nothing."""
    path = blobs.folder / f"{FILE.sha256}.part"
    path.write_bytes(b"old")
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    def swap() -> None:
        path.rename(blobs.folder / "moved")
        os.close(descriptor)

    with blobs.arriving(FILE, lambda: False, swap) as part:
        assert part is not None and part.is_ours()
        assert os.fstat(part.descriptor).st_size == 0


@pytest.mark.parametrize("what", ["link", "folder"])
def test_blobs_write_to_plain_files_alone(blobs: Blobs, tmp_path: Path, what: str) -> None:
    path, precious = blobs.folder / f"{FILE.sha256}.part", tmp_path / "precious"
    precious.write_bytes(b"precious")
    path.symlink_to(precious) if what == "link" else path.mkdir()
    with pytest.raises(FileUnsafe), part_of(blobs):
        pass
    assert precious.read_bytes() == b"precious"


def test_blobs_nobody_wants_are_swept(blobs: Blobs) -> None:
    for name in ("a" * 64, "b" * 64 + ".part", "c" * 64, "d" * 64 + ".part"):
        (blobs.folder / name).write_bytes(b"")
    blobs.sweep({"a" * 64, "b" * 64})
    assert {path.name[0] for path in blobs.folder.iterdir()} == {"a", "b"}


def test_blobs_come_from_the_disk_too(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(DATA)
    with from_disk(tmp_path / "w", 2000) as chunks:
        assert b"".join(chunks) == DATA[2000:]
