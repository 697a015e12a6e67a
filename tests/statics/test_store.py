"""statics.store: one suite for every store, then what is particular to folders."""

import hashlib
import os
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from statics.errors import Conflict, Forbidden, NotFound, SizeMismatch, StoreUnavailable
from statics.locate import open_store
from statics.s3 import S3Store
from statics.store import FolderStore, Store, blob_key, channel_key, manifest_key, signature_key

KEY = "channels/dev.json"


@pytest.fixture(params=["folder", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return FolderStore(tmp_path / "store")
    return S3Store(
        request.getfixturevalue("bucket"), "some/prefix", endpoint=request.getfixturevalue("s3_endpoint")
    )


def stream(store: Store, key: str, offset: int = 0) -> bytes:
    with store.open(key, offset) as chunks:
        return b"".join(chunks)


def test_store_returns_what_was_put(any_store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"file" * 100_000)
    any_store.put(KEY, b"bytes")
    any_store.put("manifests/x.json", tmp_path / "file")
    assert any_store.read(KEY, 5)[0] == b"bytes"
    assert stream(any_store, "manifests/x.json") == b"file" * 100_000


def test_store_keeps_empty_objects(any_store: Store) -> None:
    any_store.put(blob_key(hashlib.sha256(b"").hexdigest()), b"")
    assert stream(any_store, blob_key(hashlib.sha256(b"").hexdigest())) == b""


def test_store_knows_what_exists(any_store: Store) -> None:
    assert not any_store.exists(KEY)
    any_store.put(KEY, b"x")
    assert any_store.exists(KEY)
    assert not any_store.exists("channels/dev")


def test_store_has_nothing_under_an_unknown_key(any_store: Store) -> None:
    with pytest.raises(NotFound, match="channels/dev.json"):
        any_store.read(KEY, 10)
    with pytest.raises(NotFound), any_store.open(KEY) as chunks:
        list(chunks)


def test_store_reads_no_more_than_the_limit(any_store: Store) -> None:
    any_store.put(KEY, b"x" * 11)
    with pytest.raises(SizeMismatch, match="more than 10 bytes"):
        any_store.read(KEY, 10)


def test_store_puts_if_absent_once(any_store: Store) -> None:
    any_store.put(KEY, b"first", if_absent=True)
    with pytest.raises(Conflict):
        any_store.put(KEY, b"second", if_absent=True)
    assert any_store.read(KEY, 10)[0] == b"first"


def test_store_puts_over_the_version_named(any_store: Store) -> None:
    any_store.put(KEY, b"first")
    token = any_store.read(KEY, 10)[1]
    any_store.put(KEY, b"second", if_match=token)
    with pytest.raises(Conflict):
        any_store.put(KEY, b"third", if_match=token)
    assert any_store.read(KEY, 10)[0] == b"second"


def test_store_conflicts_over_a_version_of_nothing(any_store: Store) -> None:
    with pytest.raises(Conflict):
        any_store.put(KEY, b"x", if_match='"0123456789abcdef"')
    assert not any_store.exists(KEY)


@pytest.mark.parametrize(("offset", "left"), [(0, 10), (1, 9), (9, 1), (10, 0), (11, 0)])
def test_store_streams_from_any_byte_on(any_store: Store, offset: int, left: int) -> None:
    any_store.put(KEY, b"0123456789")
    assert stream(any_store, KEY, offset) == b"0123456789"[10 - left :]
    with pytest.raises(NotFound):
        stream(any_store, "channels/other.json", offset)


def test_store_lists_what_is_under_a_prefix(any_store: Store) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    for key, size in (("manifests/b.json", 2), ("manifests/a.json", 1), ("channels/dev.json", 3)):
        any_store.put(key, bytes(size))
    found = list(any_store.keys("manifests/"))
    assert [(key, size) for key, size, _ in found] == [("manifests/a.json", 1), ("manifests/b.json", 2)]
    assert all(before < changed <= datetime.now(UTC) + timedelta(seconds=2) for _, _, changed in found)
    assert len(list(any_store.keys(""))) == 3
    assert list(any_store.keys("blobs/")) == []


def test_store_lists_more_than_one_page(bucket: str, s3_endpoint: str) -> None:
    store = S3Store(bucket, "p", endpoint=s3_endpoint)
    for number in range(1003):
        store.put(f"blobs/{number:04}", b"")
    assert [key for key, _, _ in store.keys("blobs/")] == [f"blobs/{number:04}" for number in range(1003)]


def test_store_deletes(any_store: Store) -> None:
    any_store.put(KEY, b"x")
    any_store.put("channels/other.json", b"x")
    any_store.delete(KEY)
    any_store.delete(KEY)  # gone already
    assert [key for key, _, _ in any_store.keys("")] == ["channels/other.json"]


def test_store_lists_nothing_of_a_folder_that_is_not_there(store: FolderStore) -> None:
    assert list(store.keys("")) == []


def test_store_folder_lists_neither_its_lock_nor_what_is_being_written(store: FolderStore) -> None:
    store.put(KEY, b"x")
    (store.root / "channels" / ".dev.json.0123").write_bytes(b"half")
    assert [key for key, _, _ in store.keys("")] == [KEY]


def test_store_keys_are_these() -> None:
    assert blob_key("ab") == "blobs/sha256/ab"
    assert manifest_key("ab") == "manifests/ab.json"
    assert signature_key("ab") == "manifests/ab.sig"
    assert channel_key("dev") == "channels/dev.json"


def test_store_takes_the_longest_names(any_store: Store) -> None:
    for key in (manifest_key("a" * 64), signature_key("a" * 64), channel_key("c" * 64)):
        any_store.put(key, b"x")
        assert any_store.exists(key)


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "", "a//b", "A", "a\0", ".."])
def test_store_folder_keeps_keys_inside(store: FolderStore, key: str) -> None:
    with pytest.raises(ValueError, match="expected names"):
        store.put(key, b"x")
    with pytest.raises(ValueError, match="expected names"):
        store.exists(key)


def test_store_folder_lets_one_of_many_writers_win(store: FolderStore) -> None:
    store.put(KEY, b"0")
    token = store.read(KEY, 10)[1]
    outcomes: list[str] = []

    def write(number: int) -> None:
        try:
            store.put(KEY, f"{number}".encode(), if_match=token)
            outcomes.append("won")
        except Conflict:
            outcomes.append("lost")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 7 + ["won"]


def test_store_folder_leaves_the_old_object_when_writing_fails(store: FolderStore, tmp_path: Path) -> None:
    store.put(KEY, b"old")
    with pytest.raises(Exception, match="nothing"):
        store.put(KEY, tmp_path / "nothing")
    assert store.read(KEY, 10)[0] == b"old"
    assert [path.name for path in (store.root / "channels").iterdir()] == ["dev.json"]


def test_store_folder_does_not_wait_at_a_pipe(store: FolderStore) -> None:
    (store.root / "channels").mkdir(parents=True)
    os.mkfifo(store.root / KEY)
    told = list[BaseException]()

    def read() -> None:
        try:
            store.read(KEY, 10)
        except StoreUnavailable as error:
            told.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(10.0)
    assert not reader.is_alive() and told


@pytest.mark.parametrize(
    ("error", "kind"), [(PermissionError(13, "no"), Forbidden), (OSError(5, "I/O"), StoreUnavailable)]
)
def test_store_folder_names_what_the_system_says(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[Exception]
) -> None:
    def refuse(*args: object) -> bytes:
        raise error

    store.put(KEY, b"x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", refuse)
        with pytest.raises(kind, match=KEY):
            store.read(KEY, 10)
    assert store.read(KEY, 10)[0] == b"x"


@pytest.mark.parametrize("url", ["{}", "file://{}", "file://localhost{}"])
def test_store_opens_folders(tmp_path: Path, url: str) -> None:
    store = open_store(url.format(tmp_path))
    assert isinstance(store, FolderStore)
    assert store.root == tmp_path


def test_store_opens_folders_with_spaces() -> None:
    store = open_store("file:///a%20b")
    assert isinstance(store, FolderStore)
    assert store.root == Path("/a b")


@pytest.mark.parametrize("url", ["s3://models/nlu/prod/", "s3://models/nlu/prod"])
def test_store_opens_buckets(url: str) -> None:
    store = open_store(url)
    assert isinstance(store, S3Store)
    assert (store.bucket, store.prefix) == ("models", "nlu/prod")


@pytest.mark.parametrize("url", ["", "http://example.org/x", "gs://bucket", "s3://", "file://host/share"])
def test_store_refuses_other_places(url: str) -> None:
    with pytest.raises(ValueError, match="expected s3://bucket/prefix"):
        open_store(url)


def test_store_of_folders_needs_no_boto3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "statics.s3", raising=False)
    open_store(str(tmp_path)).put(KEY, b"x")
    with pytest.raises(ImportError):
        open_store("s3://bucket")
