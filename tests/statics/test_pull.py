"""statics.pull: a whole bundle or none, and no byte too many."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from statics import local as roots
from statics import s3
from statics.bundle import Bundle, Part, build, diff
from statics.errors import (
    ChannelMismatch,
    DigestMismatch,
    DiskFull,
    FileUnexpected,
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
from statics.publish import publish
from statics.pull import current, pull
from statics.s3 import S3Store
from statics.signing import Keyring, generate_key
from statics.store import FolderStore, Store, blob_key, manifest_key, signature_key
from statics.verify import verify

SERVICE = "1.2.3"
POINTER = "channels/dev.json"


class Seen(FolderStore):
    """Notes which objects are opened, and does `before` first."""

    def __init__(self, root: Path, before: Callable[[str], None] = lambda key: None) -> None:
        super().__init__(root)
        self.before, self.keys = before, list[str]()

    @contextmanager
    def open(self, key: str) -> Iterator[Iterator[bytes]]:
        self.before(key)
        self.keys.append(key)
        with super().open(key) as chunks:
            yield chunks

    def blobs(self) -> list[str]:
        return [key for key in self.keys if key.startswith("blobs/")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def get(store: Store, root: Path, **options: Any) -> Bundle:
    return pull(store, root, **{"channel": "dev", "service": SERVICE, **options})


def now(root: Path, **options: Any) -> str | None:
    found = current(root, service=SERVICE, **options)
    return found.digest if found else None


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


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
    assert current(root, service=SERVICE) == pulled
    assert names(root) == [".lock", "bundles", "current.json", "staging", "state.json"]
    assert names(root / "staging") == []


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
    assert sorted(seen.blobs()) == sorted({blob_key(file.sha256) for _, file in bundle.manifest.files()})


def test_pull_says_how_far_it_is(bundle: Bundle, store: FolderStore, root: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    publish(bundle, store)
    get(store, root, progress=lambda *step: heard.append(step))
    assert heard[0] == ("head.emotion/head.json", 19, bundle.manifest.size)
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
    assert heard[-1] == ("vectorizer.main/vectorizer.json", bundle.manifest.size, bundle.manifest.size)


def test_pull_of_what_is_here_fetches_the_pointer_alone(
    bundle: Bundle, store: FolderStore, root: Path
) -> None:
    publish(bundle, store)
    first, seen = get(store, root), Seen(store.root)
    assert get(seen, root) == first
    assert seen.keys == [POINTER]


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
    harmed = get(store, root).path / "head.emotion" / "weights.safetensors"
    publish(make_bundle(seq=2), store)
    harmed.write_bytes(harmed.read_bytes()[::-1])
    seen = Seen(store.root)
    verify(get(seen, root).path, service=SERVICE)
    assert len(seen.blobs()) == 1


# What is refused


def test_pull_asks_for_a_signature_where_one_is_required(
    bundle: Bundle, store: FolderStore, root: Path, keyring: Keyring
) -> None:
    publish(bundle, store)
    for options in ({"require_signature": True}, {"keyring": keyring}):
        with pytest.raises(SignatureMissing):
            get(store, root, **options)
    assert names(root) == []
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
    assert names(root) == []


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
    assert names(root) == []


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
    assert names(root) == []


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
    shutil.rmtree(root / "bundles")  # and not even where nothing else is left
    seen = Seen(store.root)
    with pytest.raises(SeqTooOld):
        get(seen, root)
    assert seen.blobs() == []


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
    with pytest.raises(DiskFull, match=f"{needed} bytes for this bundle"):
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
    assert names(root / "staging") == []


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
    assert (names(root / "bundles"), names(root / "staging"), now(root)) == ([], [], None)
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
    class Endless(FolderStore):
        given = 0

        @contextmanager
        def open(self, key: str) -> Iterator[Iterator[bytes]]:
            if not key.startswith("blobs/"):
                with super().open(key) as chunks:
                    yield chunks
            else:
                yield self.endless()

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
    path = get(store, root).path
    (path / "head.intent" / "head.json").write_bytes(b"harmed")
    assert now(root) is None
    seen = Seen(store.root)
    assert get(seen, root).path == path
    assert len(seen.blobs()) == 1  # the rest of it was good, and is hashed again on the way
    assert now(root) == bundle.digest
    assert (root / "quarantine" / bundle.digest / "head.intent" / "head.json").read_bytes() == b"harmed"


def test_pull_keeps_one_broken_bundle_of_each(bundle: Bundle, store: FolderStore, root: Path) -> None:
    publish(bundle, store)
    for harm in (b"first", b"second"):
        (get(store, root).path / "head.intent" / "head.json").write_bytes(harm)
    get(store, root)
    assert names(root / "quarantine") == [bundle.digest]
    assert (root / "quarantine" / bundle.digest / "head.intent" / "head.json").read_bytes() == b"second"


def test_pull_leaves_a_broken_bundle_in_place_until_there_is_a_better_one(
    bundle: Bundle, store: FolderStore, root: Path
) -> None:
    publish(bundle, store)
    path = get(store, root).path
    (path / "head.intent" / "head.json").write_bytes(b"harmed")
    shutil.rmtree(store.root / "blobs")
    with pytest.raises(NotFound):
        get(store, root)
    assert names(root / "bundles") == [bundle.digest]
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
    (root / "staging" / "dead" / "x.part").write_bytes(b"half")
    get(store, root)
    assert names(root / "staging") == []


def test_pull_never_removes_what_a_living_pull_writes(bundle: Bundle, store: FolderStore, root: Path) -> None:
    """In the middle of one pull another one into the same root begins, sweeps and ends."""
    publish(bundle, store)
    inner: list[Bundle] = []

    def another(what: str, done: int, total: int) -> None:
        if not inner:
            inner.append(get(store, root))
            assert len(names(root / "staging")) == 1

    assert get(store, root, progress=another) == inner[0]
    assert names(root / "bundles") == [bundle.digest]
    assert names(root / "staging") == []
    assert not (root / "quarantine").exists()  # the bundle of the faster one stays where it is


def test_pull_verifies_the_whole_before_anybody_sees_it(
    bundle: Bundle, store: FolderStore, root: Path
) -> None:
    def meddle(what: str, done: int, total: int) -> None:
        if done == total:
            (next((root / "staging").iterdir()) / "bundle" / "head.intent" / "extra").write_bytes(b"")

    publish(bundle, store)
    with pytest.raises(FileUnexpected, match="head.intent/extra"):
        get(store, root, progress=meddle)
    assert names(root / "bundles") == []


def test_pull_that_is_overtaken_by_a_newer_one_yields(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    publish(make_bundle(seq=1), store)
    newer: list[Bundle] = []

    def overtake(what: str, done: int, total: int) -> None:
        if not newer:
            publish(make_bundle(seq=2), store)
            newer.append(get(store, root))

    with pytest.raises(SeqTooOld, match="found seq 1, expected seq 2"):
        get(store, root, progress=overtake)
    assert now(root) == newer[0].digest


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
    assert current(root, service=SERVICE) is None


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
    assert current(root, service="3.0") is None
    assert now(root) == bundle.digest


def test_pull_current_is_what_its_folder_is_called(
    make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    publish(make_bundle(), store)
    path, other = get(store, root).path, make_bundle(seq=2)
    shutil.rmtree(path)
    shutil.copytree(other.path, path)
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
    before: tuple[Path, str, str], store: FolderStore, tmp_path: Path
) -> None:
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
    before: tuple[Path, str, str], store: FolderStore, tmp_path: Path
) -> None:
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
