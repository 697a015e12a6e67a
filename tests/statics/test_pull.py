"""statics.pull: a whole bundle or none, and no byte too many."""

import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from statics import disk, pointer, s3, source
from statics import local as roots
from statics import pull as pulls
from statics.blobs import Blobs
from statics.bundle import Bundle, Part, build, diff
from statics.errors import (
    ChannelMismatch,
    DigestMismatch,
    DiskFull,
    Expired,
    Forbidden,
    FormatTooNew,
    ManifestInvalid,
    NotFound,
    SeqTooOld,
    ServiceMismatch,
    SignatureInvalid,
    SignatureMissing,
    SizeMismatch,
    StaticsError,
    StoreUnavailable,
)
from statics.pointer import pointer_to
from statics.publish import publish
from statics.pull import current, fetch, follow, look, pull
from statics.s3 import S3Store
from statics.signing import Keyring, generate_key
from statics.store import FolderStore, Store, blob_key, manifest_key, signature_key
from statics.verify import Trust, verify
from tests.statics.conftest import Front

SERVICE = "1.2.3"
EXPIRES = datetime(2026, 3, 1, tzinfo=UTC)
POINTER = "channels/dev.json"


class Seen(FolderStore):
    """Notes which objects are opened, and does `before` first."""

    def __init__(self, root: Path, before: Callable[[str], None] = lambda key: None) -> None:
        super().__init__(root)
        self.before, self.opened = before, list[str]()

    @contextmanager
    def open(self, key: str, offset: int = 0) -> Iterator[Iterator[bytes]]:
        self.before(key)
        self.opened.append(key)
        with super().open(key, offset) as chunks:
            yield chunks

    def blobs(self) -> list[str]:
        return [key for key in self.opened if key.startswith("blobs/")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def get(store: Store, root: Path, **options: Any) -> Bundle:
    return pull(store, root, **{"channel": "dev", "service": SERVICE, **options})


def now(root: Path, service: str = SERVICE, **options: Any) -> str | None:
    found = current(root, trust=Trust(service, **options))
    return found.digest if found else None


def at(time: datetime, **options: Any) -> Trust:
    return Trust(SERVICE, now=lambda: time, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def path_of(bundle: Bundle, kind: str, name: str, file: str) -> Path:
    return bundle.folder(bundle.component(kind, name)) / file


def blob_path(store: FolderStore, bundle: Bundle, kind: str, name: str, file: str) -> Path:
    found = next(each for each in bundle.component(kind, name).files if each.name == file)
    return store.root / blob_key(found.sha256)


# What arrives


def test_pull_brings_the_release(bundle: Bundle, store: FolderStore, root: Path) -> None:
    publish(bundle, store)
    pulled = get(store, root)
    assert (pulled.digest, pulled.manifest) == (bundle.digest, bundle.manifest)
    assert pulled.path == root / "bundles" / bundle.digest
    assert verify(pulled.path, service=SERVICE) == pulled
    assert current(root, trust=Trust(SERVICE)) == pulled
    assert names(root) == [
        ".lock", "audit.jsonl", "blobs", "bundles", "components", "current.json", "staging", "state.json"
    ]  # fmt: skip
    assert (names(root / "blobs"), names(root / "staging")) == ([], [])
    assert names(pulled.path) == ["manifest.json"]
    assert names(root / "components") == sorted(each.digest for each in bundle.manifest.components)


def test_pull_from_s3_brings_the_same(
    make_bundle: Callable[..., Bundle], bucket: str, s3_endpoint: str, root: Path,
    key: Ed25519PrivateKey, keyring: Keyring,
) -> None:  # fmt: skip
    store, bundle = S3Store(bucket, "prod", endpoint=s3_endpoint), make_bundle(signing_key=key)
    publish(bundle, store)
    pulled = get(store, root, keyring=keyring, require_signature=True)
    assert verify(pulled.path, service=SERVICE, keyring=keyring).digest == bundle.digest


def test_pull_fetches_each_blob_once(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    bundle = make_bundle(files={"head.twin": {"a": b"same" * 99, "b": b"same" * 99}})
    publish(bundle, store)
    seen = Seen(store.root)
    get(seen, root)
    wanted = {blob_key(file.sha256) for _, file in bundle.manifest.files() if file.size}
    assert sorted(seen.blobs()) == sorted(wanted)  # and nothing is asked for an empty file
    assert (bundle.folder(bundle.component("head", "twin")) / "b").read_bytes() == b"same" * 99


def test_pull_says_how_far_it_is(bundle: Bundle, store: FolderStore, root: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    publish(bundle, store)
    get(store, root, progress=lambda *step: heard.append(step))
    files = {f"{component.folder}/{file.name}" for component, file in bundle.manifest.files()}
    assert {what for what, _, _ in heard} == files
    assert {total for _, _, total in heard} == {bundle.manifest.size}
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
    assert heard[-1][1] == bundle.manifest.size


def test_pull_of_what_is_here_fetches_the_pointer_alone(
    bundle: Bundle, store: FolderStore, root: Path
) -> None:
    publish(bundle, store)
    first, seen = get(store, root), Seen(store.root)
    assert get(seen, root) == first
    assert seen.opened == [POINTER]


def test_pull_of_what_is_here_needs_no_writable_disk(
    bundle: Bundle, store: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*args: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    publish(bundle, store)
    first = get(store, root)
    for call in ("mkdir", "rename", "replace", "write", "fsync"):
        monkeypatch.setattr(os, call, read_only)
    assert get(store, root) == first


def test_pull_of_one_new_head_fetches_that_head(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    old = make_bundle()
    new = make_bundle(
        seq=2, files={"head.intent": {"head.json": b'{"task": "intent"}', "weights.safetensors": b"new" * 50}}
    )
    publish(old, store)
    get(store, root)
    publish(new, store)
    seen = Seen(store.root)
    assert get(seen, root).digest == new.digest
    weights = next(file for file in new.component("head", "intent").files if file.size == 150)
    assert seen.blobs() == [blob_key(weights.sha256)]
    assert sum(change.bytes_to_pull for change in diff(old.manifest, new.manifest)) == 150
    assert names(root / "bundles") == sorted([old.digest, new.digest])
    verify(root / "bundles" / old.digest, service=SERVICE)


def test_pull_fetches_what_the_old_bundle_holds_wrongly(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    publish(make_bundle(), store)
    harmed = path_of(get(store, root), "head", "emotion", "weights.safetensors")
    publish(make_bundle(seq=2), store)
    harmed.write_bytes(harmed.read_bytes()[::-1])
    seen = Seen(store.root)
    verify(get(seen, root).path, service=SERVICE)
    assert len(seen.blobs()) == 1


def test_pull_keeps_what_bundles_share_once(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    pulled = []
    for seq in (1, 2):
        publish(make_bundle(seq=seq, files={"head.intent": {"head.json": b"%d" % seq}}), store)
        pulled.append(get(store, root))
    first, second = (bundle.folder(bundle.component("vectorizer", "main")) for bundle in pulled)
    assert first == second  # so the kernel keeps its pages once, too
    assert len(names(root / "components")) == 5  # four, and one new head
    files = [path for path in (root / "components").rglob("*") if path.is_file()]
    assert [path.stat().st_nlink for path in files] == [1] * 8
    for bundle in pulled:
        verify(bundle.path, service=SERVICE)


def test_pull_takes_what_a_root_of_whole_bundles_has(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    """As older versions left it."""
    old, new = make_bundle(), make_bundle(seq=2, files={"head.intent": {"w": b"new" * 50}})
    shutil.copytree(old.path, root / "bundles" / old.digest)
    raw = (old.path / "manifest.json").read_bytes()
    (root / "current.json").write_bytes(pointer.dump(pointer_to(old.manifest, old.digest, len(raw))))
    assert now(root) == old.digest
    publish(new, store)
    seen = Seen(store.root)
    pulled = get(seen, root)
    assert len(seen.blobs()) == 1
    for digest in (old.digest, new.digest):
        verify(root / "bundles" / digest, service=SERVICE)
    assert names(root / "bundles" / old.digest) == names(old.path)
    assert names(pulled.path) == ["manifest.json"]


def test_pull_looks_at_the_pointer_alone(bundle: Bundle, store: FolderStore) -> None:
    publish(bundle, store)
    seen = Seen(store.root)
    assert look(seen, "dev").manifest == bundle.digest
    assert seen.opened == [POINTER]


# What is refused


def test_pull_asks_for_a_signature_where_one_is_required(
    bundle: Bundle, store: FolderStore, root: Path, keyring: Keyring
) -> None:
    publish(bundle, store)
    for options in ({"require_signature": True}, {"keyring": keyring}):
        with pytest.raises(SignatureMissing):
            get(store, root, **options)
    assert names(root) == ["audit.jsonl"]
    get(store, root)


def test_pull_refuses_other_keys(
    make_bundle: Callable[..., Bundle],
    store: FolderStore,
    root: Path,
    key: Ed25519PrivateKey,
    keyring: Keyring,
) -> None:
    publish(make_bundle(signing_key=key), store)
    with pytest.raises(SignatureInvalid, match="unknown keys"):
        get(store, root, keyring=Keyring.of(generate_key()[1]))
    get(store, root, keyring=keyring)


def test_pull_refuses_what_was_pulled_before_a_key_was_asked_for(
    bundle: Bundle, store: FolderStore, root: Path, keyring: Keyring
) -> None:
    publish(bundle, store)
    get(store, root)
    with pytest.raises(SignatureMissing):
        get(store, root, keyring=keyring)
    assert now(root, keyring=keyring) is None
    assert now(root) == bundle.digest  # and what is here stays as it is


def test_pull_refuses_a_manifest_other_than_the_pointers(
    bundle: Bundle, store: FolderStore, root: Path
) -> None:
    publish(bundle, store)
    path = store.root / manifest_key(bundle.digest)
    path.write_bytes(path.read_bytes().replace(b">=1,<2", b">=0,<2"))
    with pytest.raises(DigestMismatch, match="as the pointer says"):
        get(store, root)


def test_pull_reads_no_longer_manifest_than_the_pointer_says(
    bundle: Bundle, store: FolderStore, root: Path
) -> None:
    publish(bundle, store)
    with open(store.root / manifest_key(bundle.digest), "ab") as file:
        file.write(b" " * 1_000_000)
    with pytest.raises(SizeMismatch, match=manifest_key(bundle.digest)):
        get(store, root)


def test_pull_refuses_a_tampered_manifest_with_a_pointer_to_match(
    make_bundle: Callable[..., Bundle],
    store: FolderStore,
    root: Path,
    key: Ed25519PrivateKey,
    keyring: Keyring,
) -> None:
    """Who can write to the bucket can change everything there but the signature."""
    good, evil = make_bundle(signing_key=key), make_bundle(files={"head.intent": {"head.json": b"evil"}})
    publish(evil, store)
    shutil.copyfile(good.path / "manifest.sig", store.root / signature_key(evil.digest))
    with pytest.raises(SignatureInvalid, match="not over this manifest"):
        get(store, root, keyring=keyring)
    assert names(root) == ["audit.jsonl"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"seq": 9}, ManifestInvalid),  # freeze and replay: the unsigned pointer lies about what it points to
        ({"channel": "prod"}, ChannelMismatch),
        ({"format": 2}, FormatTooNew),
        ({"manifest": "0" * 64}, NotFound),
        ({"manifest": "../../x"}, ManifestInvalid),
        ({"size": 10}, SizeMismatch),
        ({"extra": 1}, ManifestInvalid),
    ],
)
def test_pull_refuses_pointers(
    bundle: Bundle, store: FolderStore, root: Path, change: dict[str, Any], kind: type[StaticsError]
) -> None:
    publish(bundle, store)
    path = store.root / POINTER
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(kind):
        get(store, root)
    assert set(names(root)) <= {"audit.jsonl"}


def test_pull_refuses_a_release_of_another_channel(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    publish(make_bundle(channel="prod"), store)
    path = store.root / "channels" / "prod.json"
    (store.root / POINTER).write_bytes(path.read_bytes().replace(b'"prod"', b'"dev"'))
    with pytest.raises(ChannelMismatch, match="found channel prod, expected channel dev"):
        get(store, root)
    get(store, root, channel="prod")


def test_pull_refuses_other_services(bundle: Bundle, store: FolderStore, root: Path) -> None:
    publish(bundle, store)
    with pytest.raises(ServiceMismatch):
        get(store, root, service="2.0")
    assert names(root) == ["audit.jsonl"]


def test_pull_finds_nothing_in_an_empty_store(store: FolderStore, root: Path) -> None:
    with pytest.raises(NotFound, match=POINTER):
        get(store, root)


def test_pull_refuses_an_older_release(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    publish(make_bundle(seq=4), store)
    old = (store.root / POINTER).read_bytes()
    get(store, root)
    publish(make_bundle(seq=5), store)
    new = get(store, root)
    (store.root / POINTER).write_bytes(old)
    with pytest.raises(SeqTooOld, match="found seq 4, expected seq 5 or newer"):
        get(store, root)
    assert now(root) == new.digest
    shutil.rmtree(root / "components")  # and not even where nothing else is left
    seen = Seen(store.root)
    with pytest.raises(SeqTooOld):
        get(seen, root)
    assert seen.blobs() == []


def test_pull_keeps_to_the_floor_of_the_deployment(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    publish(make_bundle(seq=4), store)
    with pytest.raises(SeqTooOld, match="found seq 4, expected seq 5 or newer, as the deployment says"):
        get(store, root, min_seq=5)
    assert now(root) is None
    served = get(store, root, min_seq=4)
    assert current(root, trust=Trust(SERVICE), min_seq=5) is None
    assert current(root, trust=Trust(SERVICE), min_seq=4) == served


def test_pull_refuses_an_expired_release(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    bundle = make_bundle(expires=EXPIRES)
    publish(bundle, store)
    for late in (timedelta(minutes=5, seconds=1), timedelta(days=900)):
        with pytest.raises(Expired, match="expired at 2026-03-01T00:00:00Z; it is 202"):
            fetch(store, root, trust=at(EXPIRES + late), channel="dev")
    assert now(root) is None
    follow(root, fetch(store, root, trust=at(EXPIRES + timedelta(minutes=5)), channel="dev"))  # clocks differ
    assert now(root, now=lambda: EXPIRES) == bundle.digest
    assert now(root, now=lambda: EXPIRES + timedelta(hours=1)) is None  # nor at a cold start
    with pytest.raises(Expired):  # nor where it is here already
        fetch(store, root, trust=at(EXPIRES + timedelta(hours=1)), channel="dev")


def test_pull_keeps_a_floor_for_each_channel(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    publish(make_bundle(seq=9), store)
    publish(make_bundle(seq=2, channel="prod"), store)
    get(store, root)
    assert get(store, root, channel="prod").manifest.seq == 2
    assert json.loads((root / "state.json").read_bytes())["floors"] == {"dev": 9, "prod": 2}


def test_pull_refuses_a_state_it_cannot_read(bundle: Bundle, store: FolderStore, root: Path) -> None:
    publish(bundle, store)
    root.mkdir()
    (root / "state.json").write_text('{"format": 1, "floors": {"dev": "none"}}')
    with pytest.raises(ManifestInvalid, match="state.json"):
        get(store, root)


def test_pull_refuses_a_bundle_larger_than_the_disk(
    bundle: Bundle, store: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(bundle, store)
    needed, seen = bundle.manifest.size + roots.MARGIN, Seen(store.root)
    usage = shutil.disk_usage(store.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(DiskFull, match=f"{needed} bytes for what is missing"):
        get(seen, root)
    assert seen.blobs() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    get(seen, root)


def test_pull_says_when_the_disk_fills_up(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(make_bundle(), store)
    old = get(store, root)
    publish(make_bundle(seq=2, files={"head.intent": {"x": b"new" * 1000}}), store)
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if bytes(data[:3]) == b"new":
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DiskFull):
            get(store, root)
    assert now(root) == old.digest
    assert names(root / "bundles") == [old.digest]
    assert (names(root / "staging"), names(root / "blobs")) == (
        [],
        [],
    )  # nothing fills the disk for us either


# Bytes that are not what they should be


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (lambda good: good[:-1], SizeMismatch),
        (lambda good: b"", SizeMismatch),
        (lambda good: good + b"\0", SizeMismatch),
        (lambda good: good[:1000] + bytes([good[1000] ^ 1]) + good[1001:], DigestMismatch),
    ],
)
def test_pull_refuses_a_blob_corrupt_at_rest(
    bundle: Bundle, store: FolderStore, root: Path, harm: Callable[[bytes], bytes], kind: type[StaticsError]
) -> None:
    publish(bundle, store)
    path = blob_path(store, bundle, "vectorizer", "main", "model.onnx")
    good, seen = path.read_bytes(), Seen(store.root)
    path.write_bytes(harm(good))
    with pytest.raises(kind, match=path.name):
        get(seen, root)
    assert seen.blobs().count(f"blobs/sha256/{path.name}") == 2
    assert (names(root / "bundles"), names(root / "components"), now(root)) == ([], [], None)
    path.write_bytes(good)
    assert get(store, root).digest == bundle.digest


def test_pull_names_a_missing_blob(bundle: Bundle, store: FolderStore, root: Path) -> None:
    publish(bundle, store)
    path = blob_path(store, bundle, "head", "intent", "head.json")
    path.unlink()
    with pytest.raises(NotFound, match=f"blobs/sha256/{path.name}"):
        get(store, root)
    assert names(root / "bundles") == []


def test_pull_stops_at_the_first_byte_too_many(bundle: Bundle, store: FolderStore, root: Path) -> None:
    small = blob_key(bundle.component("head", "emotion").files[0].sha256)

    class Endless(FolderStore):
        given = 0

        @contextmanager
        def open(self, key: str, offset: int = 0) -> Iterator[Iterator[bytes]]:
            with super().open(key, offset) as chunks:
                yield self.endless() if key == small else chunks

        def endless(self) -> Iterator[bytes]:
            while True:
                Endless.given += 1
                yield b"x" * 10

    publish(bundle, store)
    with pytest.raises(SizeMismatch):
        get(Endless(store.root), root)
    assert Endless.given == 4  # two tries at a file of 19 bytes


def test_pull_fetches_once_more_what_was_flipped_on_the_way(
    make_bundle: Callable[..., Bundle], bucket: str, s3_endpoint: str, root: Path,
    bad_network: Callable[..., str],
) -> None:  # fmt: skip
    """boto3 hands such bytes on without an error; ours is the only check."""
    bundle = make_bundle(files={"head.intent": {"weights.safetensors": b"intent" * 30_000}})
    publish(bundle, S3Store(bucket, endpoint=s3_endpoint))
    flips: list[int] = []

    def flip(client: socket.socket, data: bytes, sent: int) -> None:
        if sent > 60_000 and not flips:
            flips.append(sent)
            data = data[:100] + bytes([data[100] ^ 1]) + data[101:]
        client.sendall(data)

    assert get(S3Store(bucket, endpoint=bad_network(flip)), root).digest == bundle.digest
    assert len(flips) == 1


def test_pull_refuses_what_is_flipped_on_the_way_each_time(
    make_bundle: Callable[..., Bundle], bucket: str, s3_endpoint: str, root: Path,
    bad_network: Callable[..., str],
) -> None:  # fmt: skip
    publish(
        make_bundle(files={"head.intent": {"weights.safetensors": b"intent" * 30_000}}),
        S3Store(bucket, endpoint=s3_endpoint),
    )
    client_got = bad_network(lambda client, data, sent: client.sendall(data.replace(b"tintent", b"tintend")))
    with pytest.raises(DigestMismatch):
        get(S3Store(bucket, endpoint=client_got), root)
    assert names(root / "bundles") == []


def test_pull_fetches_once_more_when_the_connection_breaks(
    make_bundle: Callable[..., Bundle], bucket: str, s3_endpoint: str, root: Path,
    bad_network: Callable[..., str],
) -> None:  # fmt: skip
    bundle = make_bundle(files={"head.intent": {"weights.safetensors": b"intent" * 30_000}})
    publish(bundle, S3Store(bucket, endpoint=s3_endpoint))
    cuts: list[int] = []

    def cut(client: socket.socket, data: bytes, sent: int) -> None:
        if sent > 60_000 and not cuts:
            cuts.append(sent)
            raise OSError
        client.sendall(data)

    assert get(S3Store(bucket, endpoint=bad_network(cut)), root).digest == bundle.digest
    assert len(cuts) == 1


def test_pull_ends_at_its_deadline_however_slow_the_network(
    make_bundle: Callable[..., Bundle], bucket: str, s3_endpoint: str, root: Path,
    bad_network: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bundle = make_bundle(files={"head.intent": {"weights.safetensors": b"intent" * 30_000}})
    publish(bundle, S3Store(bucket, endpoint=s3_endpoint))

    def drip(client: socket.socket, data: bytes, sent: int) -> None:
        if sent < 30_000:
            client.sendall(data)
        else:
            for at in range(0, len(data), 16):
                client.sendall(data[at : at + 16])
                time.sleep(0.05)  # far more often than the read timeout

    begin = time.monotonic()
    with pytest.raises(StoreUnavailable, match="still running after 0.8 s"):
        get(S3Store(bucket, endpoint=bad_network(drip)), root, deadline_s=0.8)
    assert time.monotonic() - begin < 5
    assert names(root / "bundles") == []


def test_pull_does_not_wait_for_a_stalled_network(
    make_bundle: Callable[..., Bundle], bucket: str, s3_endpoint: str, root: Path,
    bad_network: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.4)
    monkeypatch.setattr(s3, "TRIES", 1)
    publish(
        make_bundle(files={"head.intent": {"weights.safetensors": b"intent" * 30_000}}),
        S3Store(bucket, endpoint=s3_endpoint),
    )

    def stall(client: socket.socket, data: bytes, sent: int) -> None:
        client.sendall(data) if sent < 30_000 else time.sleep(10)

    begin = time.monotonic()
    with pytest.raises(StoreUnavailable, match="ReadTimeout"):
        get(S3Store(bucket, endpoint=bad_network(stall)), root)
    assert time.monotonic() - begin < 5


# What lies under the root


def test_pull_moves_a_broken_bundle_away_and_brings_it_anew(
    bundle: Bundle, store: FolderStore, root: Path
) -> None:
    publish(bundle, store)
    harmed = path_of(get(store, root), "head", "intent", "head.json")
    harmed.write_bytes(b"harmed")
    assert now(root) is None
    seen = Seen(store.root)
    assert path_of(get(seen, root), "head", "intent", "head.json") == harmed
    assert len(seen.blobs()) == 1  # the rest of it was good, and is hashed again on the way
    assert now(root) == bundle.digest
    digest = bundle.component("head", "intent").digest
    assert (root / "quarantine" / digest / "head.json").read_bytes() == b"harmed"


def test_pull_keeps_one_broken_bundle_of_each(bundle: Bundle, store: FolderStore, root: Path) -> None:
    publish(bundle, store)
    for harm in (b"first", b"second"):
        path_of(get(store, root), "head", "intent", "head.json").write_bytes(harm)
    get(store, root)
    digest = bundle.component("head", "intent").digest
    assert names(root / "quarantine") == [digest]
    assert (root / "quarantine" / digest / "head.json").read_bytes() == b"second"


def test_pull_leaves_a_broken_bundle_in_place_until_there_is_a_better_one(
    bundle: Bundle, store: FolderStore, root: Path
) -> None:
    publish(bundle, store)
    harmed = path_of(get(store, root), "head", "intent", "head.json")
    harmed.write_bytes(b"harmed")
    shutil.rmtree(store.root / "blobs")
    with pytest.raises(NotFound):
        get(store, root)
    assert harmed.read_bytes() == b"harmed"
    assert not (root / "quarantine").exists()


def test_pull_takes_a_stray_file_in_the_bundles_place_away(
    bundle: Bundle, store: FolderStore, root: Path
) -> None:
    publish(bundle, store)
    (root / "bundles").mkdir(parents=True)
    (root / "bundles" / bundle.digest).write_text("stray")
    assert get(store, root).digest == now(root)


def test_pull_removes_what_dead_pulls_left(bundle: Bundle, store: FolderStore, root: Path) -> None:
    publish(bundle, store)
    (root / "staging" / "dead" / "bundle" / "head.intent").mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "blobs" / f"{'0' * 64}.part").write_bytes(b"half")
    (root / "blobs" / f"{'1' * 64}").write_bytes(b"whole")
    get(store, root)
    assert (names(root / "staging"), names(root / "blobs")) == ([], [])


def test_pull_that_is_overtaken_by_a_newer_one_yields(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    publish(make_bundle(seq=1), store)
    older = fetch(store, root, trust=Trust(SERVICE), channel="dev")
    assert now(root) is None  # it is here, and that is all
    publish(make_bundle(seq=2), store)
    newer = get(store, root)
    with pytest.raises(SeqTooOld, match="found seq 1, expected seq 2"):
        follow(root, older)
    assert now(root) == newer.digest


def test_pull_finishes_the_release_it_began(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    first = make_bundle(seq=1)
    publish(first, store)

    def publish_another(key: str) -> None:
        if key == manifest_key(first.digest):
            publish(make_bundle(seq=2, files={"head.intent": {"head.json": b"other"}}), store)

    assert get(Seen(store.root, publish_another), root).digest == first.digest
    verify(root / "bundles" / first.digest, service=SERVICE)


def test_pull_current_is_none_at_first(root: Path) -> None:
    assert now(root) is None


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"format": 2}', b"x" * 100_000])
def test_pull_current_is_none_where_it_cannot_be_read(
    bundle: Bundle, store: FolderStore, root: Path, raw: bytes
) -> None:
    publish(bundle, store)
    get(store, root)
    assert now(root) == bundle.digest
    (root / "current.json").write_bytes(raw)
    assert now(root) is None
    get(store, root)
    assert now(root) == bundle.digest


def test_pull_current_fits_the_service_or_is_none(bundle: Bundle, store: FolderStore, root: Path) -> None:
    publish(bundle, store)
    get(store, root)
    assert now(root, service="3.0") is None
    assert now(root) == bundle.digest


def test_pull_current_is_of_the_channel_or_is_none(bundle: Bundle, store: FolderStore, root: Path) -> None:
    """A machine that is moved to another channel does not go on with the old one when the store is down."""
    publish(bundle, store)
    pulled = get(store, root)
    for pin in ("", bundle.digest):
        trust = Trust(SERVICE, pinned=pin)
        assert current(root, trust=trust, channel="prod") is None
        assert current(root, trust=trust, channel="dev") == current(root, trust=trust) == pulled


def test_pull_current_is_what_its_folder_is_called(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    publish(make_bundle(), store)
    path, other = get(store, root).path, make_bundle(seq=2)
    shutil.copyfile(other.path / "manifest.json", path / "manifest.json")
    verify(path, service=SERVICE)
    assert now(root) is None


# Crashes and failures at every step


CHANGES = ("mkdir", "write", "fsync", "rename", "replace")


def at_step(
    number: int, happen: Callable[[], None], patch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """Let `happen` come before the numbered call among all of these names."""
    calls = iter(range(10_000))

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            if next(calls) == number:
                happen()
            return call(*args, **options)

        return step

    for name in names:
        patch.setattr(os, name, wrap(getattr(os, name)))


@pytest.fixture
def before(
    make_parts: Callable[..., list[Part]], store: FolderStore, tmp_path: Path
) -> tuple[Path, str, str]:
    """A root that follows release 1 while release 2 is published, and the digests of both."""

    def release(seq: int, head: bytes) -> Bundle:
        files = {
            "vectorizer.main": {"model.onnx": b"model"},
            "head.intent": {"head.json": head, "w": b"weights"},
        }
        parts = [part for part in make_parts(files=files) if part.label in files]
        return build(parts, tmp_path / f"release-{seq}", seq=seq, requires_service="")

    old, new = release(1, b"old"), release(2, b"new")
    publish(old, store)
    get(store, tmp_path / "before")
    publish(new, store)
    return tmp_path / "before", old.digest, new.digest


def check_after(root: Path, old: str, new: str) -> None:
    """Only whole bundles are visible, and one of them is current."""
    assert now(root) in {old, new}
    for digest in names(root / "bundles"):
        assert verify(root / "bundles" / digest, service=SERVICE).digest == digest


def test_pull_that_fails_at_any_step_leaves_old_or_new(
    before: tuple[Path, str, str], store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulls, "THREADS", 1)  # so that steps have numbers
    reached: list[int] = []

    def fail() -> None:
        reached.append(number)
        raise OSError(5, "Input/output error")

    origin, old, new = before
    refused = 0
    for number in range(1000):
        root = tmp_path / f"root-{number}"
        shutil.copytree(origin, root)
        with pytest.MonkeyPatch.context() as patch:
            at_step(number, fail, patch, (*CHANGES, "open"))
            try:
                get(store, root)
            except StaticsError:
                refused += 1
        if number not in reached:
            break
        check_after(root, old, new)
        get(store, root)
        assert (now(root), names(root / "staging")) == (new, [])
    assert len(reached) > refused > 15  # local copies that fail are fetched instead


def test_pull_that_is_killed_at_any_step_leaves_old_or_new(
    before: tuple[Path, str, str], store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulls, "THREADS", 1)
    origin, old, new = before
    outcomes = []
    for number in range(1000):
        root = tmp_path / f"root-{number}"
        shutil.copytree(origin, root)
        child = os.fork()
        if child == 0:
            try:
                at_step(number, lambda: os._exit(9), pytest.MonkeyPatch(), CHANGES)
                get(store, root)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in {0, 9}
        if code == 0:
            break
        check_after(root, old, new)
        outcomes.append(now(root))
        get(store, root)
        assert (now(root), names(root / "staging")) == (new, [])
    assert {old, new} == set(outcomes)
    assert outcomes == sorted(outcomes, key=lambda digest: digest == new)  # once new, never old again
    assert len(outcomes) > 30


# Pins


def test_pull_pinned_takes_that_very_release(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    old, new = make_bundle(expires=EXPIRES), make_bundle(seq=2)
    for bundle in (old, new):
        publish(bundle, store)
    get(store, root)
    late = EXPIRES + timedelta(days=1)
    with pytest.raises(SeqTooOld):  # by its name alone it is as old as by the pointer
        fetch(store, root, trust=at(late), channel="dev", digest=old.digest)
    for trust in (at(late, pinned=old.digest), at(late)):
        fetched = fetch(store, root, trust=trust, channel="dev")
        assert (fetched.bundle.digest, fetched.pinned) == (old.digest, True)
        follow(root, fetched)
        assert current(root, trust=trust) == fetched.bundle
        assert now(root, now=lambda: late) == (new.digest if trust.pinned else old.digest)
        roots.pin(root, old.digest)
    roots.unpin(root)
    assert now(root) == get(store, root).digest == new.digest  # what the channel said stayed on record


def test_pull_pinned_is_not_let_off_anything_else(
    make_bundle: Callable[..., Bundle],
    store: FolderStore,
    root: Path,
    key: Ed25519PrivateKey,
    keyring: Keyring,
) -> None:
    unsigned, other = make_bundle(), make_bundle(channel="prod", signing_key=key)
    for bundle in (unsigned, other):
        publish(bundle, store)
    for digest, error in (
        (unsigned.digest, SignatureMissing),
        (other.digest, ChannelMismatch),
        ("0" * 64, NotFound),
    ):
        roots.pin(root, digest)
        with pytest.raises(error):
            fetch(store, root, trust=Trust(SERVICE, keyring), channel="dev")
    roots.pin(root, other.digest)
    assert fetch(store, root, trust=Trust(SERVICE, keyring), channel="prod").bundle.digest == other.digest


def test_pull_by_digest_takes_another_release_of_the_channel(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    first, second = make_bundle(), make_bundle(seq=2)
    for bundle in (first, second):
        publish(bundle, store)
    assert get(store, root, digest=first.digest).digest == first.digest
    assert get(store, root).digest == second.digest
    shutil.rmtree(store.root)
    assert get(store, root, digest=second.digest).digest == second.digest  # what is here needs no store
    with pytest.raises(NotFound):
        get(store, root, digest="0" * 64)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to leave a file of another account")
def test_pull_goes_on_where_another_account_left_a_part(bundle: Bundle, store: FolderStore) -> None:
    """An operator's pull as root that was killed must not keep a pod from ever pulling again."""
    publish(bundle, store)
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other accounts
        shared = Path(folder)
        shutil.copytree(store.root, shared / "store")
        (shared / "root" / "blobs").mkdir(parents=True)
        for _, file in bundle.manifest.files():
            (shared / "root" / "blobs" / f"{file.sha256}.part").write_bytes(b"x")
        for path in (shared, shared / "root", shared / "root" / "blobs"):
            os.chown(path, NOBODY, NOBODY)

        def as_nobody() -> None:
            os.setuid(NOBODY)
            get(FolderStore(shared / "store"), shared / "root")

        assert code_of(forked(as_nobody)) == 0
        assert now(shared / "root") == bundle.digest


def test_pull_will_not_guess_a_pin_it_cannot_read(bundle: Bundle, store: FolderStore, root: Path) -> None:
    publish(bundle, store)
    get(store, root)
    roots.pin(root, bundle.digest)
    assert now(root) == bundle.digest
    (root / "pin.json").write_bytes(b"{")
    with pytest.raises(ManifestInvalid, match="pin.json"):
        get(store, root)
    assert now(root) is None


# Pulls that end early, and those that go on with what they left


NOBODY = 65534
BIG = {"head.intent": {"weights.safetensors": bytes(range(256)) * 2000}}
BIG_SIZE = 512_000


class Cut(Seen):
    """Ends each blob after `size` bytes as a broken connection would; counts the bytes it hands out."""

    def __init__(self, root: Path, size: int = 1 << 40) -> None:
        super().__init__(root)
        self.size, self.handed = size, 0

    @contextmanager
    def open(self, key: str, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with super().open(key, offset) as chunks:
            yield self.counted(chunks) if key.startswith("blobs/") else chunks

    def counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        left = self.size
        for chunk in chunks:
            self.handed += len(chunk[:left])
            yield chunk[:left]
            left -= len(chunk)
            if left < 0:
                raise StoreUnavailable(part="blob", found="a cut", expected="more", remedy="again")


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one blob at a time, the largest first."""
    monkeypatch.setattr(source, "TRIES", 1)
    monkeypatch.setattr(pulls, "THREADS", 1)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "PAUSE_S", 0.0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_pull_goes_on_where_the_last_one_ended(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path, share: float, one_try: None
) -> None:
    bundle = make_bundle(files=BIG)
    publish(bundle, store)
    cut = Cut(store.root, int(BIG_SIZE * share))
    with pytest.raises(StoreUnavailable):
        get(cut, root)
    assert [path.stat().st_size for path in (root / "blobs").glob("*.part")] == [int(BIG_SIZE * share)]
    again = Cut(store.root)
    assert get(again, root).digest == bundle.digest
    assert cut.handed + again.handed == bundle.manifest.size  # no byte came twice


@pytest.mark.parametrize("harm", [lambda part: part[:-1] + b"x", lambda part: part + bytes(BIG_SIZE)])
def test_pull_starts_anew_where_what_was_kept_is_wrong(
    make_bundle: Callable[..., Bundle],
    store: FolderStore,
    root: Path,
    harm: Callable[[bytes], bytes],
    one_try: None,
) -> None:
    bundle = make_bundle(files=BIG)
    publish(bundle, store)
    with pytest.raises(StoreUnavailable):
        get(Cut(store.root, 100_000), root)
    (part,) = (root / "blobs").glob("*.part")
    part.write_bytes(harm(part.read_bytes()))
    pulled = get(store, root)
    verify(pulled.path, service=SERVICE)
    assert pulled.digest == bundle.digest


def test_pull_goes_on_within_itself(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path, no_pause: None
) -> None:
    bundle = make_bundle(files=BIG)
    publish(bundle, store)
    cut = Cut(store.root, BIG_SIZE // 3)
    fetched = fetch(cut, root, trust=Trust(SERVICE), channel="dev")
    assert (fetched.bundle.digest, fetched.retries) == (bundle.digest, 3)
    assert cut.handed == bundle.manifest.size


def test_pull_over_s3_fetches_only_the_rest(
    make_bundle: Callable[..., Bundle], bucket: str, s3_endpoint: str, root: Path,
    bad_network: Callable[..., str], monkeypatch: pytest.MonkeyPatch, one_try: None,
) -> None:  # fmt: skip
    monkeypatch.setattr(s3, "TRIES", 1)
    bundle = make_bundle(files=BIG)
    publish(bundle, S3Store(bucket, endpoint=s3_endpoint))
    passed: list[int] = []

    def cut(client: socket.socket, data: bytes, sent: int) -> None:
        if sent > 400_000:
            raise OSError
        client.sendall(data)

    def count(client: socket.socket, data: bytes, sent: int) -> None:
        passed.append(len(data))
        client.sendall(data)

    with pytest.raises(StoreUnavailable):
        get(S3Store(bucket, endpoint=bad_network(cut)), root)
    kept = sum(path.stat().st_size for path in (root / "blobs").iterdir())
    assert kept > 350_000
    assert get(S3Store(bucket, endpoint=bad_network(count)), root).digest == bundle.digest
    assert sum(passed) < bundle.manifest.size - kept + 30_000  # headers, pointer and manifest


def test_pull_is_not_led_astray_by_a_server_without_ranges(
    make_bundle: Callable[..., Bundle],
    front: Callable[..., Front],
    store: FolderStore,
    root: Path,
    one_try: None,
) -> None:
    bundle = make_bundle(files=BIG)
    publish(bundle, store)
    with pytest.raises(StoreUnavailable):
        get(Cut(store.root, 100_000), root)
    server = front(store.root, ranges=False)
    pulled = get(S3Store("bucket", endpoint=server.url), root)
    verify(pulled.path, service=SERVICE)
    assert server.ranges_asked == ["bytes=100000-"]


def test_pull_outlasts_a_store_that_is_busy(
    bundle: Bundle, front: Callable[..., Front], store: FolderStore, root: Path,
    monkeypatch: pytest.MonkeyPatch, no_pause: None,
) -> None:  # fmt: skip
    monkeypatch.setattr(s3, "TRIES", 1)
    monkeypatch.setattr(pulls, "THREADS", 1)
    publish(bundle, store)
    server = front(store.root, busy=3)
    trust = Trust(SERVICE)
    fetched = fetch(S3Store("bucket", endpoint=server.url), root, trust=trust, channel="dev")
    assert (fetched.bundle.digest, fetched.retries, server.refused) == (bundle.digest, 3, 3)
    with pytest.raises(StoreUnavailable, match="HTTP 503 SlowDown"):  # but not one that stays so
        fetch(
            S3Store("bucket", endpoint=front(store.root, busy=99).url), root.with_name("other"),
            trust=trust, channel="dev",
        )  # fmt: skip


def test_pull_gives_up_on_a_store_that_drips(
    make_bundle: Callable[..., Bundle], bucket: str, s3_endpoint: str, root: Path,
    bad_network: Callable[..., str], monkeypatch: pytest.MonkeyPatch, one_try: None,
) -> None:  # fmt: skip
    bundle = make_bundle(files={"head.intent": {"weights.safetensors": b"intent" * 10_000}})
    publish(bundle, S3Store(bucket, endpoint=s3_endpoint))
    monkeypatch.setattr(source, "PATIENCE_S", 0.2)

    def drip(client: socket.socket, data: bytes, sent: int) -> None:
        for at in range(0, len(data), 1024):
            client.sendall(data[at : at + 1024])
            time.sleep(0.01)

    slow = S3Store(bucket, endpoint=bad_network(drip))
    with pytest.raises(StoreUnavailable, match="bytes/s over 0.2 s"):
        get(slow, root)
    monkeypatch.setattr(source, "SLOWEST", 1000)
    assert get(slow, root).digest == bundle.digest


def test_pull_needs_room_for_what_is_missing_alone(
    make_bundle: Callable[..., Bundle],
    store: FolderStore,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_try: None,
) -> None:
    publish(make_bundle(files=BIG), store)
    with pytest.raises(StoreUnavailable):
        get(Cut(store.root, 500_000), root)
    usage = shutil.disk_usage(store.root)
    missing = 12_000 + 4000 + roots.MARGIN  # of the one that was cut; of all others together, about
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=missing + 5000))
    get(store, root)
    publish(make_bundle(seq=2, files={**BIG, "head.emotion": {"w": b"x" * 2000}}), store)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000 + roots.MARGIN))
    get(store, root)
    publish(make_bundle(seq=3, files={**BIG, "head.emotion": {"w": b"y" * 2001}}), store)
    with pytest.raises(DiskFull, match=str(2001 + roots.MARGIN)):
        get(store, root)


# Real disks: needs root, to mount them


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 1 MiB and a half."""
    path = tmp_path / "volume"
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", path], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"needs leave to mount: {made.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def test_pull_into_a_full_volume_leaves_the_old_release(
    make_bundle: Callable[..., Bundle], store: FolderStore, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_bundle()
    publish(old, store)
    get(store, volume)
    free = shutil.disk_usage(volume).free
    new = make_bundle(
        seq=2, files={"head.intent": {"weights.safetensors": bytes(range(256)) * (free // 200)}}
    )
    publish(new, store)
    with pytest.raises(DiskFull, match="bytes free"):  # known before the first byte
        get(store, volume)
    usage = shutil.disk_usage(volume)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 40))
        with pytest.raises(DiskFull, match="No space left on device"):  # and when it fills up meanwhile
            get(store, volume)
    assert now(volume) == old.digest
    assert (names(volume / "bundles"), names(volume / "blobs")) == ([old.digest], [])
    subprocess.run(["mount", "-o", "remount,size=8m", volume], check=True)
    assert get(store, volume).digest == new.digest


def test_pull_into_a_read_only_volume_uses_what_is_there(
    make_bundle: Callable[..., Bundle], store: FolderStore, volume: Path
) -> None:
    publish(make_bundle(), store)
    old = get(store, volume)
    subprocess.run(["mount", "-o", "remount,ro", volume], check=True)
    assert get(store, volume) == old
    publish(make_bundle(seq=2, files={"head.intent": {"head.json": b"new"}}), store)
    with pytest.raises(Forbidden, match="Read-only file system"):
        get(store, volume)
    assert now(volume) == old.digest
    with pytest.raises(Forbidden):
        roots.pin(volume, old.digest)
    subprocess.run(["mount", "-o", "remount,rw", volume], check=True)
    assert get(store, volume).manifest.seq == 2


# Several processes


def forked(work: Callable[[], object]) -> int:
    """The id of a process that does `work`, and then ends with 0; with 1 where it raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Written(FolderStore):
    """Notes in a file which blobs are opened, by whichever process, and gives them in small pieces."""

    def __init__(self, root: Path, notes: Path) -> None:
        super().__init__(root)
        self.notes = notes

    @contextmanager
    def open(self, key: str, offset: int = 0) -> Iterator[Iterator[bytes]]:
        if key.startswith("blobs/"):
            with open(self.notes, "a") as file:
                file.write(f"{key}\n")
        with super().open(key, offset) as chunks:
            yield (chunk[at : at + 16_384] for chunk in chunks for at in range(0, len(chunk), 16_384))

    def opened(self) -> list[str]:
        return self.notes.read_text().split()


def many(store: FolderStore, root: Path) -> list[int]:
    return [
        code_of(child) for child in [forked(lambda: get(store, root, bytes_s=4_000_000)) for _ in range(4)]
    ]


def test_pull_of_many_processes_fetches_each_blob_once(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(
        files={**BIG, "head.twin": BIG["head.intent"], "head.emotion": {"w": b"emotion" * 30_000}}
    )
    publish(bundle, store)
    written = Written(store.root, tmp_path / "notes")
    assert many(written, root) == [0, 0, 0, 0]
    assert sorted(written.opened()) == sorted(
        {blob_key(file.sha256) for _, file in bundle.manifest.files() if file.size}
    )
    assert now(root) == bundle.digest
    assert (names(root / "blobs"), names(root / "bundles")) == ([], [bundle.digest])
    assert not (root / "quarantine").exists()


def test_pull_of_many_processes_without_locks_does_not(
    make_bundle: Callable[..., Bundle],
    store: FolderStore,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the test above would see if it were not for the locks."""
    bundle = make_bundle(files=BIG)
    publish(bundle, store)
    written = Written(store.root, tmp_path / "notes")
    monkeypatch.setattr(disk, "try_lock", lambda descriptor, shared=False: True)
    codes = many(written, root)
    assert codes != [0, 0, 0, 0] or len(written.opened()) > len(set(written.opened()))


def test_pull_that_is_killed_leaves_its_lock_and_its_bytes_to_the_next(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(files=BIG)
    publish(bundle, store)
    slow = Written(store.root, tmp_path / "notes")
    child = forked(lambda: get(slow, root, bytes_s=500_000))
    while Blobs(root / "blobs").here(bundle.component("head", "intent").files[0]) < 50_000:
        time.sleep(0.005)
    waits = forked(lambda: get(store, root))  # for the lock of the first one
    os.kill(child, signal.SIGKILL)
    assert (code_of(child), code_of(waits)) == (-signal.SIGKILL, 0)
    assert now(root) == bundle.digest


class Killer(logging.Handler):
    """Writes the number of each line that statics logs into a pipe."""

    def __init__(self, pipe: int) -> None:
        super().__init__(logging.DEBUG)
        self.pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        os.write(self.pipe, b".")


def killed_after(lines: int, work: Callable[[], object]) -> int:
    """The exit code of a process that is sent SIGKILL when it has logged so many lines, or 0 where it never does."""
    reader, writer = os.pipe()

    def logged() -> None:
        logger = logging.getLogger("statics")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(Killer(writer))
        work()

    child = forked(logged)
    os.close(writer)
    seen = b""
    while len(seen) < lines and (more := os.read(reader, 1)):
        seen += more
    if len(seen) == lines:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    return code_of(child)


def states_after_kills(before: tuple[Path, str, str], store: FolderStore, tmp_path: Path) -> list[str | None]:
    """What is current after a kill at each line that a pull logs, on a copy of the root each."""
    states = []
    for lines in range(1, 100):
        root = tmp_path / f"killed-{lines}"
        shutil.copytree(before[0], root)
        code = killed_after(lines, lambda root=root: get(store, root))  # type: ignore[misc]
        states.append(now(root))
        if code == 0:
            return states
    raise AssertionError("a pull that never ends")


def test_pull_that_is_killed_at_any_line_it_logs_leaves_old_or_new(
    before: tuple[Path, str, str], store: FolderStore, tmp_path: Path
) -> None:
    _, old, new = before
    states = states_after_kills(before, store, tmp_path)
    assert set(states) == {old, new}
    assert len(states) > 5
    for root in tmp_path.glob("killed-*"):
        check_after(root, old, new)
        assert get(store, root).digest == new


def test_pull_that_points_before_it_has_is_found_out(
    before: tuple[Path, str, str], store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would see of a pull that does things in another order."""
    bring = pulls._bring

    def careless(local: roots.Local, *rest: Any) -> Bundle:
        disk.replace_file(local.root / "current.json", [(store.root / POINTER).read_bytes()])
        return bring(local, *rest)

    monkeypatch.setattr(pulls, "_bring", careless)
    assert None in states_after_kills(before, store, tmp_path)


def test_pull_that_is_killed_at_any_time_leaves_old_or_new(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path, tmp_path: Path
) -> None:
    """One root through many deaths; the seed is fixed, what the clock makes of it is not."""
    chance = random.Random(20)
    old = make_bundle(files=BIG)
    publish(old, store)
    get(store, root)
    good, killed = {old.digest}, 0
    for seq in range(2, 42):
        bundle = make_bundle(seq=seq, files={**BIG, "head.intent": {"w": chance.randbytes(60_000)}})
        publish(bundle, store)
        good.add(bundle.digest)
        child = forked(lambda: get(store, root, bytes_s=3_000_000))
        time.sleep(chance.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
        killed += code_of(child) == -signal.SIGKILL
        served = now(root)
        assert served in good, f"seq {seq}"
        for digest in names(root / "bundles"):
            assert verify(root / "bundles" / digest, service=SERVICE).digest == digest
    assert killed > 20
    assert get(store, root).digest == bundle.digest
    roots.collect(root, 1)
    assert names(root / "components") == sorted(each.digest for each in bundle.manifest.components)
    assert names(root / "blobs") == []
