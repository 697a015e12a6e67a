"""statics.publish: the order of a release, and who wins."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

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
from statics.publish import countersign, free_seq, publish, standing
from statics.s3 import S3Store
from statics.signing import Keyring, generate_key, sign, verify
from statics.store import (
    FolderStore,
    Store,
    blob_key,
    channel_key,
    manifest_key,
    release_key,
    signature_key,
)
from statics.verify import read_manifest


class Watched(FolderStore):
    """Notes what is put, and does `before` first."""

    def __init__(self, root: Path, before: Callable[[str], None] = lambda key: None) -> None:
        super().__init__(root)
        self.before, self.written = before, list[str]()

    def put(
        self, key: str, source: bytes | Path, *, if_absent: bool = False, if_match: str | None = None
    ) -> None:
        self.before(key)
        super().put(key, source, if_absent=if_absent, if_match=if_match)
        self.written.append(key)


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


def test_publish_puts_blobs_manifest_entry_and_last_the_pointer(
    make_bundle: Callable[..., Bundle], key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    store, bundle = Watched(tmp_path / "store"), make_bundle(signing_key=key)
    publish(bundle, store)
    assert all(each.startswith("blobs/sha256/") for each in store.written[:-4])
    assert len(store.written[:-4]) == 8
    assert store.written[-4:] == [
        signature_key(bundle.digest),
        manifest_key(bundle.digest),
        "releases/dev/1.json",
        "channels/dev.json",
    ]


def test_publish_enters_the_pointers_bytes_into_the_history(
    make_bundle: Callable[..., Bundle], store: FolderStore
) -> None:
    for seq in (3, 7):
        publish(make_bundle(seq=seq), store)
        pointer = store.read(channel_key("dev"), 1000)[0]
        assert store.read(release_key("dev", seq), 1000)[0] == pointer
    assert parse(store.read(release_key("dev", 3), 1000)[0], "entry").seq == 3


def test_publish_says_how_far_it_is(bundle: Bundle, store: FolderStore) -> None:
    heard: list[tuple[str, int, int]] = []
    publish(bundle, store, progress=lambda *step: heard.append(step))
    assert len(heard) == 8
    assert heard[0] == ("head.emotion/head.json", 19, bundle.manifest.size)
    assert heard[-1][1:] == (bundle.manifest.size, bundle.manifest.size)


def test_publish_again_changes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    store = Watched(tmp_path / "store")
    publish(bundle, store)
    store.written.clear()
    assert publish(bundle, store) == bundle.digest
    assert store.written == []


def test_publish_puts_only_new_blobs(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    store = Watched(tmp_path / "store")
    publish(make_bundle(), store)
    store.written.clear()
    publish(make_bundle(seq=2, files={"head.intent": {"head.json": b"new"}}), store)
    assert [key.split("/")[0] for key in store.written] == ["blobs", "manifests", "releases", "channels"]


def test_publish_again_mends_what_the_store_lost(bundle: Bundle, store: FolderStore) -> None:
    publish(bundle, store)
    lost = [
        blob_key(next(file.sha256 for _, file in bundle.manifest.files())),
        manifest_key(bundle.digest),
        release_key("dev", 1),
    ]
    for key in lost:
        store.delete(key)
    assert publish(bundle, store) == bundle.digest
    assert all(store.exists(key) for key in lost)


def test_publish_again_mends_a_pointer_that_somebody_changed(bundle: Bundle, store: FolderStore) -> None:
    publish(bundle, store)
    pointer = store.read(channel_key("dev"), 1000)[0]
    store.put(channel_key("dev"), pointer.replace(b'"seq": 1', b'"seq": 9'))
    publish(bundle, store)
    assert store.read(channel_key("dev"), 1000)[0] == pointer


def test_publish_puts_blobs_again_that_were_collected_meanwhile(bundle: Bundle, tmp_path: Path) -> None:
    """They lay there since a publication that died, and nothing needed them until this manifest came."""
    plain = FolderStore(tmp_path / "store")
    content = {
        blob_key(file.sha256): bundle.folder(component) / file.name
        for component, file in bundle.manifest.files()
    }
    for key, path in content.items():
        plain.put(key, path)

    def collect(key: str) -> None:
        if key == manifest_key(bundle.digest):
            for blob in content:
                plain.delete(blob)

    store = Watched(tmp_path / "store", collect)
    publish(bundle, store)
    assert all(store.exists(key) for key in content)
    assert store.written.index(manifest_key(bundle.digest)) < min(store.written.index(key) for key in content)


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

    with pytest.raises(Conflict, match="channels/dev.json: found seq 7.*expected seq 1,.*again with seq 8"):
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


def test_publish_two_of_one_seq_cannot_both_win(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """The other one has its place in the history, and not yet the pointer."""
    plain = FolderStore(tmp_path / "store")
    publish(make_bundle(seq=1), plain)
    first = make_bundle(seq=2, files={"head.intent": {"x": b"first"}})
    second = make_bundle(seq=2, files={"head.intent": {"x": b"second"}})

    def rival(key: str) -> None:
        if key == channel_key("dev"):
            with pytest.raises(Conflict, match="releases/dev/2.json.*with seq 3"):
                publish(second, plain)

    assert publish(first, Watched(tmp_path / "store", rival)) == first.digest
    assert published(plain) == (2, first.digest)


def test_publish_takes_no_seq_of_a_publication_that_died(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    plain = FolderStore(tmp_path / "store")
    publish(make_bundle(seq=1), plain)

    def die(key: str) -> None:
        if key == channel_key("dev"):
            raise KeyboardInterrupt

    dead = make_bundle(seq=2, files={"head.intent": {"x": b"dead"}})
    with pytest.raises(KeyboardInterrupt):
        publish(dead, Watched(tmp_path / "store", die))
    assert published(plain)[0] == 1
    assert free_seq(plain, "dev", standing(plain, "dev")[0]) == 3
    with pytest.raises(Conflict, match="another release with seq 2.*with seq 3"):
        publish(make_bundle(seq=2), plain)
    assert publish(dead, plain) == dead.digest  # who takes up the same bundle again goes on
    assert published(plain) == (2, dead.digest)


def test_publish_many_at_once_has_one_winner(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """All have seen the same pointer when they come to move it."""
    root, count = tmp_path / "store", 4
    publish(make_bundle(seq=1), FolderStore(root))
    together = Barrier(count)

    def wait(key: str) -> None:
        if key == channel_key("dev"):
            together.wait(timeout=30)

    def one(bundle: Bundle) -> str:
        try:
            return publish(bundle, Watched(root, wait))
        except Conflict as error:
            assert "make it again with seq" in error.remedy
            return ""

    bundles = [make_bundle(seq=2 + each) for each in range(count)]
    with ThreadPoolExecutor(count) as pool:
        won = [digest for digest in pool.map(one, bundles) if digest]
    assert won == [published(FolderStore(root))[1]]


def test_publish_without_conditions_loses_a_release(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    """The negative control: a store that ignores If-Match tells both publishers that they won."""

    class Careless(Watched):
        def put(
            self, key: str, source: bytes | Path, *, if_absent: bool = False, if_match: str | None = None
        ) -> None:
            super().put(key, source)

    root = tmp_path / "store"
    publish(make_bundle(seq=1), FolderStore(root))

    def rival(key: str) -> None:
        if key == channel_key("dev"):
            publish(make_bundle(seq=7), FolderStore(root))

    publish(make_bundle(seq=2), Careless(root, rival))
    assert published(FolderStore(root))[0] == 2


def test_publish_adds_new_signatures_to_those_in_the_store(
    make_bundle: Callable[..., Bundle], store: FolderStore, key: Ed25519PrivateKey
) -> None:
    other = generate_key()[0]
    both = Keyring.of(key.public_key(), other.public_key())
    bundle = make_bundle(signing_key=key)
    publish(bundle, store)
    raw = read_manifest(bundle.path)[0]
    (bundle.path / "manifest.sig").write_bytes(sign(raw, other))
    publish(bundle, store)
    verify(raw, store.read(signature_key(bundle.digest), 10**5)[0], both, signatures=2)


def test_publish_replaces_signatures_that_cannot_be_read(
    make_bundle: Callable[..., Bundle], store: FolderStore, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    bundle = make_bundle(signing_key=key)
    publish(bundle, store)
    store.put(signature_key(bundle.digest), b"{}")
    publish(bundle, store)
    verify(read_manifest(bundle.path)[0], store.read(signature_key(bundle.digest), 10**5)[0], keyring)


def test_publish_countersign_adds_a_signature(
    make_bundle: Callable[..., Bundle], key: Ed25519PrivateKey
) -> None:
    bundle, other = make_bundle(signing_key=key), generate_key()[0]
    countersign(bundle.path, other)
    raw, signature = read_manifest(bundle.path)
    assert signature is not None
    verify(raw, signature, Keyring.of(key.public_key(), other.public_key()), signatures=2)


def test_publish_countersign_refuses_a_harmed_bundle(
    make_bundle: Callable[..., Bundle], key: Ed25519PrivateKey
) -> None:
    bundle = make_bundle()
    (bundle.path / "head.intent" / "head.json").write_bytes(b'{"task": "intenT"}')
    with pytest.raises(DigestMismatch):
        countersign(bundle.path, key)
    assert not (bundle.path / "manifest.sig").exists()


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
    for failing in ("blobs/", "manifests/", "releases/", "channels/"):

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


def test_publish_to_s3_has_one_winner(
    make_bundle: Callable[..., Bundle], bucket: str, s3_endpoint: str
) -> None:
    plain = S3Store(bucket, endpoint=s3_endpoint)
    publish(make_bundle(seq=1), plain)

    class Raced(S3Store):
        def put(
            self, key: str, source: bytes | Path, *, if_absent: bool = False, if_match: str | None = None
        ) -> None:
            if key == channel_key("dev"):
                publish(make_bundle(seq=7), plain)
            super().put(key, source, if_absent=if_absent, if_match=if_match)

    with pytest.raises(Conflict, match="found seq 7.*expected seq 1,.*again with seq 8"):
        publish(make_bundle(seq=2), Raced(bucket, endpoint=s3_endpoint))
    assert published(plain)[0] == 7
    with pytest.raises(Conflict, match="another release with seq 8.*with seq 9"):
        plain.put(release_key("dev", 8), b"{}")
        publish(make_bundle(seq=8), plain)
