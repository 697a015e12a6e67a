"""statics.publish: the order of a release, and who wins."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from statics.bundle import Bundle
from statics.errors import (
    ChannelMismatch,
    Conflict,
    DigestMismatch,
    FileUnexpected,
    FingerprintMismatch,
    SeqTooOld,
    StaticsError,
    StoreUnavailable,
)
from statics.manifest import dump, manifest_digest
from statics.pointer import parse
from statics.publish import publish
from statics.s3 import S3Store
from statics.store import FolderStore, Store, blob_key, channel_key, manifest_key, signature_key


class Watched(FolderStore):
    """Notes what is put, and does `before` first."""

    def __init__(self, root: Path, before: Callable[[str], None] = lambda key: None) -> None:
        super().__init__(root)
        self.before, self.keys = before, list[str]()

    def put(
        self, key: str, source: bytes | Path, *, if_absent: bool = False, if_match: str | None = None
    ) -> None:
        self.before(key)
        super().put(key, source, if_absent=if_absent, if_match=if_match)
        self.keys.append(key)


def published(store: Store, channel: str = "dev") -> tuple[int, str]:
    pointer = parse(store.read(channel_key(channel), 1000)[0], "pointer")
    return pointer.seq, pointer.manifest


def test_publish_puts_every_file_under_its_digest(bundle: Bundle, store: FolderStore) -> None:
    assert publish(bundle, store) == bundle.digest
    for component, file in bundle.manifest.files():
        with store.open(blob_key(file.sha256)) as chunks:
            assert b"".join(chunks) == (bundle.folder(component) / file.name).read_bytes()
    assert store.read(manifest_key(bundle.digest), 10**6)[0] == dump(bundle.manifest)
    assert published(store) == (1, bundle.digest)
    assert not store.exists(signature_key(bundle.digest))


def test_publish_puts_blobs_then_manifest_then_pointer(
    make_bundle: Callable[..., Bundle], key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    store, bundle = Watched(tmp_path / "store"), make_bundle(signing_key=key)
    publish(bundle, store)
    assert all(each.startswith("blobs/sha256/") for each in store.keys[:-3])
    assert len(store.keys[:-3]) == 8
    assert store.keys[-3:] == [
        signature_key(bundle.digest),
        manifest_key(bundle.digest),
        "channels/dev.json",
    ]


def test_publish_says_how_far_it_is(bundle: Bundle, store: FolderStore) -> None:
    heard: list[tuple[str, int, int]] = []
    publish(bundle, store, progress=lambda *step: heard.append(step))
    assert len(heard) == 8
    assert heard[0] == ("head.emotion/head.json", 19, bundle.manifest.size)
    assert heard[-1][1:] == (bundle.manifest.size, bundle.manifest.size)


def test_publish_again_changes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    store = Watched(tmp_path / "store")
    publish(bundle, store)
    store.keys.clear()
    assert publish(bundle, store) == bundle.digest
    assert store.keys == []


def test_publish_puts_only_new_blobs(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    store = Watched(tmp_path / "store")
    publish(make_bundle(), store)
    store.keys.clear()
    publish(make_bundle(seq=2, files={"head.intent": {"head.json": b"new"}}), store)
    assert [key.split("/")[0] for key in store.keys] == ["blobs", "manifests", "channels"]


@pytest.mark.parametrize("seq", [4, 5])
def test_publish_refuses_a_seq_that_is_not_newer(
    make_bundle: Callable[..., Bundle], store: FolderStore, seq: int
) -> None:
    first = publish(make_bundle(seq=5), store)
    with pytest.raises(SeqTooOld, match=f"found seq {seq}, expected a seq above 5.*with seq 6"):
        publish(make_bundle(seq=seq, files={"head.intent": {"x": b"new"}}), store)
    assert published(store) == (5, first)
    publish(make_bundle(seq=6), store)
    assert published(store)[0] == 6


def test_publish_keeps_channels_apart(make_bundle: Callable[..., Bundle], store: FolderStore) -> None:
    publish(make_bundle(seq=5), store)
    publish(make_bundle(seq=1, channel="prod"), store, channel="prod")
    assert (published(store)[0], published(store, "prod")[0]) == (5, 1)


def test_publish_refuses_another_channel_than_the_bundles(bundle: Bundle, store: FolderStore) -> None:
    with pytest.raises(ChannelMismatch, match="found channel dev, expected channel prod"):
        publish(bundle, store, channel="prod")
    publish(bundle, store, channel="dev")


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (
            lambda path: (path / "head.intent" / "head.json").write_bytes(b'{"task": "intenT"}'),
            DigestMismatch,
        ),
        (lambda path: (path / "secrets.env").write_bytes(b""), FileUnexpected),
        (
            lambda path: (path / "manifest.json").write_bytes(
                (path / "manifest.json").read_bytes().replace(b'"seq": 1', b'"seq": 2')
            ),
            DigestMismatch,
        ),
    ],
)
def test_publish_refuses_a_harmed_bundle(
    bundle: Bundle, store: FolderStore, harm: Callable[[Path], object], kind: type[StaticsError]
) -> None:
    harm(bundle.path)
    with pytest.raises(kind):
        publish(bundle, store)
    assert not store.root.exists()


def test_publish_refuses_a_broken_chain(bundle: Bundle, store: FolderStore) -> None:
    raw = (bundle.path / "manifest.json").read_bytes().replace(b"f" * 64, b"e" * 64, 1)
    (bundle.path / "manifest.json").write_bytes(raw)
    with pytest.raises(FingerprintMismatch):
        publish(Bundle(bundle.path, bundle.manifest, manifest_digest(raw)), store)


def test_publish_that_loses_the_race_leaves_the_winner(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    publish(make_bundle(seq=1), FolderStore(tmp_path / "store"))

    def rival(key: str) -> None:
        if key == "channels/dev.json":
            publish(make_bundle(seq=7), FolderStore(tmp_path / "store"))

    with pytest.raises(Conflict, match="channels/dev.json"):
        publish(make_bundle(seq=2), Watched(tmp_path / "store", rival))
    assert published(FolderStore(tmp_path / "store"))[0] == 7


def test_publish_that_loses_the_first_race_leaves_the_winner(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    def rival(key: str) -> None:
        if key == "channels/dev.json":
            publish(make_bundle(seq=7), FolderStore(tmp_path / "store"))

    with pytest.raises(Conflict):
        publish(make_bundle(seq=8), Watched(tmp_path / "store", rival))
    assert published(FolderStore(tmp_path / "store"))[0] == 7


def test_publish_does_not_lose_against_itself(bundle: Bundle, tmp_path: Path) -> None:
    """A client repeats a write whose answer was lost, and is told that somebody wrote before."""

    def twin(key: str) -> None:
        if key == "channels/dev.json":
            publish(bundle, FolderStore(tmp_path / "store"))

    assert publish(bundle, Watched(tmp_path / "store", twin)) == bundle.digest


def test_publish_that_fails_midway_leaves_the_old_release(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    plain, new = FolderStore(tmp_path / "store"), make_bundle(seq=2, files={"head.intent": {"x": b"new"}})
    old = publish(make_bundle(), plain)
    for failing in ("blobs/", "manifests/", "channels/"):

        def fail(key: str, failing: str = failing) -> None:
            if key.startswith(failing):
                raise StoreUnavailable(part=key, found="", expected="", remedy="")

        with pytest.raises(StoreUnavailable):
            publish(new, Watched(tmp_path / "store", fail))
        assert published(plain) == (1, old)
    assert publish(new, plain) == new.digest
    assert published(plain) == (2, new.digest)


def test_publish_to_s3_is_the_same(
    make_bundle: Callable[..., Bundle], bucket: str, s3_endpoint: str, key: Ed25519PrivateKey
) -> None:
    store = S3Store(bucket, "prod", endpoint=s3_endpoint)
    first, second = make_bundle(seq=1), make_bundle(seq=2, signing_key=key)
    publish(first, store)
    publish(second, store)
    assert published(store) == (2, second.digest)
    assert store.exists(signature_key(second.digest))
    with pytest.raises(SeqTooOld):
        publish(first, store)


def test_publish_to_s3_loses_a_race(
    make_bundle: Callable[..., Bundle], bucket: str, s3_endpoint: str
) -> None:
    store = S3Store(bucket, endpoint=s3_endpoint)
    publish(make_bundle(seq=1), store)
    token = store.read("channels/dev.json", 1000)[1]
    publish(make_bundle(seq=2), store)
    with pytest.raises(Conflict):
        store.put("channels/dev.json", b"{}", if_match=token)
    assert published(store)[0] == 2
