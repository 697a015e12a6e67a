"""statics.gc: what no release needs is found and deleted, and nothing else ever."""

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from statics.bundle import Bundle
from statics.disk import check_content
from statics.errors import Conflict, DigestMismatch, ManifestInvalid, NotFound, StaticsError
from statics.gc import GRACE, garbage, remove
from statics.manifest import Manifest
from statics.publish import publish
from statics.releases import Published, by_digest, current, find, history, make, rollback
from statics.s3 import S3Store
from statics.signing import Keyring
from statics.store import FolderStore, Store, blob_key, channel_key, manifest_key, release_key, signature_key

Release = Callable[..., Bundle]


class Watched(FolderStore):
    """Does `before` first."""

    def __init__(
        self,
        root: Path,
        put: Callable[[str], None] = lambda key: None,
        delete: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(root)
        self.before_put, self.before_delete = put, delete

    def put(
        self, key: str, source: bytes | Path, *, if_absent: bool = False, if_match: str | None = None
    ) -> None:
        self.before_put(key)
        super().put(key, source, if_absent=if_absent, if_match=if_match)

    def delete(self, key: str) -> None:
        self.before_delete()
        super().delete(key)


@pytest.fixture(params=["folder", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A folder, and a real S3-compatible server."""
    if request.param == "folder":
        return FolderStore(tmp_path / "store")
    return S3Store(request.getfixturevalue("bucket"), "prod", endpoint=request.getfixturevalue("s3_endpoint"))


@pytest.fixture
def release(make_bundle: Callable[..., Bundle], key: Ed25519PrivateKey) -> Release:
    """Publish a signed release whose intent head says which it is."""

    def made(store: Store, seq: int, channel: str = "prod") -> Bundle:
        bundle = make_bundle(seq=seq, channel=channel, files=intent(channel, seq), signing_key=key)
        publish(bundle, store)
        return bundle

    return made


def intent(channel: str, seq: int) -> dict[str, dict[str, bytes]]:
    return {"head.intent": {"head.json": f'"{channel} {seq}"'.encode()}}


def later() -> datetime:
    """When everything that is there now has grown old."""
    return datetime.now(UTC) + GRACE + timedelta(minutes=1)


def age(store: FolderStore, prefix: str = "") -> None:
    """Make what is there eight days old."""
    for key, _, _ in store.keys(prefix):
        os.utime(store.root / key, (time.time() - 8 * 86400,) * 2)


def own(bundle: Bundle) -> str:
    """The blob that only this release has."""
    return blob_key(bundle.manifest.component("head", "intent").files[0].sha256)


def keys(store: Store) -> set[str]:
    return {key for key, _, _ in store.keys("")}


def assert_whole(store: Store, manifest: Manifest) -> None:
    for _, file in manifest.files():
        with store.open(blob_key(file.sha256)) as chunks:
            check_content(chunks, file.name, size=file.size, sha256=file.sha256)


def collect(
    store: Store, *, keep: int = 10, grace: timedelta = GRACE, now: datetime | None = None
) -> set[str]:
    now = now or later()
    return {
        each.key
        for each in remove(
            store, garbage(store, keep=keep, grace=grace, now=now), keep=keep, grace=grace, now=now
        )
    }


def test_gc_takes_what_only_older_releases_needed(anywhere: Store, release: Release) -> None:
    made = [release(anywhere, seq) for seq in (1, 2, 3, 4)]
    assert garbage(anywhere, keep=4, now=later()) == []
    before = keys(anywhere)
    gone = collect(anywhere, keep=2)
    assert gone == {
        key
        for bundle in made[:2]
        for key in (manifest_key(bundle.digest), signature_key(bundle.digest), own(bundle))
    }
    assert keys(anywhere) == before - gone
    for bundle in made[2:]:
        assert_whole(anywhere, by_digest(anywhere, bundle.digest).manifest)
    assert [isinstance(each, Published) for each in history(anywhere, "prod")] == [True, True, False, False]
    assert garbage(anywhere, keep=2, now=later()) == []


def test_gc_says_sizes_and_puts_manifests_before_their_blobs(store: FolderStore, release: Release) -> None:
    first = release(store, 1)
    release(store, 2)
    found = garbage(store, keep=1, now=later())
    assert [each.key for each in found] == [
        manifest_key(first.digest),
        signature_key(first.digest),
        own(first),
    ]
    assert found[2].size == len(b'"prod 1"')


def test_gc_never_takes_what_is_young(anywhere: Store, release: Release) -> None:
    for seq in (1, 2):
        release(anywhere, seq)
    assert collect(anywhere, keep=1, now=datetime.now(UTC)) == set()
    assert collect(anywhere, keep=1, now=datetime.now(UTC) + GRACE - timedelta(minutes=1)) == set()
    assert len(collect(anywhere, keep=1)) == 3  # the negative control: age alone protected them


def test_gc_keeps_each_channels_own(store: FolderStore, release: Release) -> None:
    made = [release(store, seq, channel) for channel in ("canary", "prod") for seq in (1, 2)]
    assert collect(store, keep=1) >= {own(made[0]), own(made[2])}
    for channel in ("canary", "prod"):
        assert_whole(store, current(store, channel).manifest)


def test_gc_takes_what_a_dead_publisher_left(
    make_bundle: Callable[..., Bundle], tmp_path: Path, release: Release, key: Ed25519PrivateKey
) -> None:
    plain = FolderStore(tmp_path / "store")
    release(plain, 1)
    before = keys(plain)
    bundle = make_bundle(seq=2, channel="prod", files=intent("prod", 2), signing_key=key)

    def die(wanted: str) -> Callable[[str], None]:
        def dying(key: str) -> None:
            if key.startswith(wanted):
                raise KeyboardInterrupt

        return dying

    for step in ("manifests/", "releases/", "channels/"):
        with pytest.raises(KeyboardInterrupt):
            publish(bundle, Watched(tmp_path / "store", die(step)))
        left = {key for key in keys(plain) - before if not key.startswith("releases/")}
        assert own(bundle) in left
        assert current(plain, "prod").manifest.seq == 1  # the old release is as it was
        assert collect(plain, now=datetime.now(UTC)) == set()  # perhaps it is still under way
        assert collect(plain) == left
    publish(bundle, plain)
    assert_whole(plain, current(plain, "prod").manifest)


def under_way(
    root: Path, make_bundle: Callable[..., Bundle], release: Release, grace: timedelta
) -> Manifest | None:
    """Publish while a store is collected before each step, over aged blobs of nobody; what came of it."""
    plain = FolderStore(root)
    release(plain, 1)
    bundle = make_bundle(seq=2, channel="prod", files=intent("prod", 2))
    with open(bundle.path / "head.intent" / "head.json", "rb") as file:
        plain.put(own(bundle), file.read())
    age(plain)
    time.sleep(0.002)

    def clean(key: str) -> None:
        time.sleep(0.002)  # so that what was put just now is older than no time at all
        collect(plain, grace=grace, now=datetime.now(UTC))

    publish(bundle, Watched(root, clean))
    try:
        return current(plain, "prod").manifest
    except NotFound:
        return None


def test_gc_loses_nothing_of_a_publication_under_way(
    tmp_path: Path, make_bundle: Callable[..., Bundle], release: Release
) -> None:
    manifest = under_way(tmp_path / "store", make_bundle, release, GRACE)
    assert manifest is not None and manifest.seq == 2
    assert_whole(FolderStore(tmp_path / "store"), manifest)


def test_gc_without_grace_loses_a_publication_under_way(
    tmp_path: Path, make_bundle: Callable[..., Bundle], release: Release
) -> None:
    """The negative control."""
    manifest = under_way(tmp_path / "store", make_bundle, release, timedelta(0))
    assert manifest is None


def test_gc_keeps_old_blobs_that_a_young_manifest_names(
    store: FolderStore, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    first = release(store, 1)
    release(store, 2)
    age(store)
    draft = rollback(store, "prod", find(store, "prod", "1"), note="back", now=datetime.now(UTC))
    make(store, draft, keys=[key], keyring=keyring, who="anna@desk")
    gone = collect(store, keep=1, now=datetime.now(UTC))
    assert manifest_key(first.digest) in gone and own(first) not in gone
    assert_whole(store, current(store, "prod").manifest)


def test_gc_spares_what_a_release_needs_that_was_made_meanwhile(
    store: FolderStore, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    first = release(store, 1)
    release(store, 2)
    age(store)
    found = garbage(store, keep=1, now=datetime.now(UTC))
    assert own(first) in {each.key for each in found}
    draft = rollback(store, "prod", find(store, "prod", "1"), note="back", now=datetime.now(UTC))
    make(store, draft, keys=[key], keyring=keyring, who="anna@desk")
    gone = remove(store, found, keep=1, now=datetime.now(UTC))
    assert own(first) not in {each.key for each in gone}
    assert_whole(store, current(store, "prod").manifest)


def test_gc_says_so_when_it_was_a_moment_too_late(
    tmp_path: Path, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    plain = FolderStore(tmp_path / "store")
    first = release(plain, 1)
    release(plain, 2)
    age(plain)
    draft = rollback(plain, "prod", find(plain, "prod", "1"), note="back", now=datetime.now(UTC))
    made: list[object] = []

    def between() -> None:
        if not made:
            made.append(make(plain, draft, keys=[key], keyring=keyring, who="anna@desk"))

    store, now = Watched(tmp_path / "store", delete=between), datetime.now(UTC)
    with pytest.raises(Conflict, match="1 objects deleted.*publish that bundle again"):
        remove(store, garbage(store, keep=1, now=now), keep=1, now=now)
    assert not plain.exists(own(first))


def test_gc_goes_by_the_manifests_where_there_is_no_history(store: FolderStore, release: Release) -> None:
    made = [release(store, seq) for seq in (1, 2, 3)]
    for seq in (1, 2, 3):
        store.delete(release_key("prod", seq))
    assert own(made[0]) in collect(store, keep=2)
    for bundle in made[1:]:
        assert_whole(store, bundle.manifest)


def test_gc_leaves_alone_what_is_not_its_business(store: FolderStore, release: Release) -> None:
    release(store, 1)
    release(store, 2)
    foreign = {"manifests/readme", "blobs/sha256/short", "notes.json", "audit/prod/1.json"}
    for key in foreign:
        store.put(key, b"x")
    collect(store, keep=1)
    assert keys(store) >= foreign | {release_key("prod", 1), release_key("prod", 2), channel_key("prod")}


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (lambda store, digest: store.put(manifest_key(digest), b"{}"), DigestMismatch),
        (lambda store, digest: store.delete(manifest_key(digest)), NotFound),
        (lambda store, digest: store.put(channel_key("prod"), b"{}"), ManifestInvalid),
        (lambda store, digest: store.put(release_key("prod", 2), b"{}"), ManifestInvalid),
    ],
    ids=["current manifest changed", "current manifest gone", "pointer", "entry"],
)
def test_gc_touches_nothing_where_it_cannot_tell_what_is_needed(
    harm: Callable[[FolderStore, str], None], kind: type[StaticsError], store: FolderStore, release: Release
) -> None:
    release(store, 1)
    release(store, 2)
    harm(store, release(store, 3).digest)
    before = keys(store)
    with pytest.raises(kind):
        collect(store, keep=2)
    assert keys(store) == before


def test_gc_takes_an_old_manifest_that_cannot_be_read(store: FolderStore, release: Release) -> None:
    first = release(store, 1)
    release(store, 2)
    store.put(manifest_key(first.digest), b"{}")
    assert manifest_key(first.digest) in collect(store, keep=1)


def test_gc_keeps_at_least_the_current_release(store: FolderStore, release: Release) -> None:
    release(store, 1)
    with pytest.raises(ValueError, match="expected at least 1"):
        garbage(store, keep=0, now=later())
