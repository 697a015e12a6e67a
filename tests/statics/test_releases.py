"""statics.releases: what was published, going back to it, and taking it to another channel."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from statics import document
from statics.bundle import Bundle
from statics.errors import (
    ChannelMismatch,
    Conflict,
    DigestMismatch,
    Expired,
    ManifestInvalid,
    NotFound,
    SignatureInvalid,
    SignatureMissing,
    StaticsError,
)
from statics.pointer import Pointer
from statics.publish import publish
from statics.releases import (
    LATEST,
    PATIENCE,
    Audit,
    Draft,
    Gap,
    Published,
    by_digest,
    check_source,
    current,
    find,
    history,
    locate,
    make,
    promote,
    rollback,
)
from statics.s3 import S3Store
from statics.signing import Keyring, generate_key, key_id, sign, verify
from statics.store import (
    FolderStore,
    Store,
    audit_key,
    blob_key,
    channel_key,
    manifest_key,
    release_key,
    signature_key,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Unlisted(FolderStore):
    """A store that lets nobody list, and notes what is put."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written = list[str]()

    def keys(self, prefix: str) -> Iterator[tuple[str, int, datetime]]:
        raise AssertionError(f"nobody may list {prefix}")

    def put(
        self, key: str, source: bytes | Path, *, if_absent: bool = False, if_match: str | None = None
    ) -> None:
        super().put(key, source, if_absent=if_absent, if_match=if_match)
        self.written.append(key)


@pytest.fixture(params=["folder", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A folder, and a real S3-compatible server."""
    if request.param == "folder":
        return Unlisted(tmp_path / "store")
    return S3Store(request.getfixturevalue("bucket"), "prod", endpoint=request.getfixturevalue("s3_endpoint"))


@pytest.fixture
def release(
    make_bundle: Callable[..., Bundle], key: Ed25519PrivateKey
) -> Callable[[Store, int, str], Bundle]:
    """Publish a signed release whose intent head says which it is."""

    def made(store: Store, seq: int, channel: str = "prod") -> Bundle:
        files = {"head.intent": {"head.json": f'"{channel} {seq}"'.encode()}}
        bundle = make_bundle(seq=seq, channel=channel, files=files, signing_key=key)
        publish(bundle, store)
        return bundle

    return made


Release = Callable[..., Bundle]


def back(store: Store, to: str, *, expires: datetime | None = None) -> Draft:
    older = find(store, "prod", to)
    return rollback(store, "prod", older, note="p99 вырос на 40 %", now=NOW, expires=expires)


def told(found: Published | Gap) -> tuple[int, int, str]:
    if isinstance(found, Gap):
        return found.first, found.last, found.why
    return found.manifest.seq, found.manifest.seq, found.pointer.manifest


# History


def test_releases_history_is_newest_first(anywhere: Store, release: Release) -> None:
    made = [release(anywhere, seq) for seq in (1, 2, 3)]
    assert [told(each) for each in history(anywhere, "prod")] == [
        (seq, seq, bundle.digest) for seq, bundle in zip((3, 2, 1), reversed(made), strict=True)
    ]
    newest = current(anywhere, "prod")
    assert newest.manifest == made[2].manifest and newest.signature is not None


def test_releases_history_ends_where_it_is_told_to(store: FolderStore, release: Release) -> None:
    for seq in range(1, 6):
        release(store, seq)
    assert [told(each)[0] for each in history(store, "prod", limit=2)] == [5, 4]


def test_releases_history_skips_what_older_stores_did_not_write(store: FolderStore, release: Release) -> None:
    for seq in (1, 2, 3, 5, 6):
        release(store, seq)
    store.delete(release_key("prod", 1))
    store.delete(release_key("prod", 2))
    found = [told(each) for each in history(store, "prod")]
    assert [each[:2] for each in found] == [(6, 6), (5, 5), (4, 4), (3, 3), (1, 2)]
    assert found[2][2] == found[4][2] == "no entry in the history"


def test_releases_history_tells_the_current_release_of_a_store_without_entries(
    store: FolderStore, release: Release
) -> None:
    digest = release(store, 1).digest
    store.delete(release_key("prod", 1))
    assert [told(each) for each in history(store, "prod")] == [(1, 1, digest)]
    assert find(store, "prod", "1").pointer.manifest == digest


def test_releases_history_does_not_look_back_for_ever(store: FolderStore, release: Release) -> None:
    release(store, 10_000)
    _, gap = history(store, "prod")
    assert told(gap) == (
        10_000 - PATIENCE - 1,
        9_999,
        "no entry in the history; nobody looked further back",
    )


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda store, digest: store.delete(manifest_key(digest)), "is not in the store any more"),
        (lambda store, digest: store.put(manifest_key(digest), b"{}"), "digest-mismatch"),
        (lambda store, digest: store.put(manifest_key(digest), b" " * 10**5), "size-mismatch"),
        (lambda store, digest: store.put(release_key("prod", 1), b"{}"), "manifest-invalid"),
        (
            lambda store, digest: store.put(
                release_key("prod", 1), store.read(release_key("prod", 2), 1000)[0]
            ),
            "an entry of channel prod, seq 2",
        ),
    ],
    ids=["collected", "changed", "too long", "no entry", "another's entry"],
)
def test_releases_history_goes_on_past_what_cannot_be_read(
    harm: Callable[[FolderStore, str], None], why: str, store: FolderStore, release: Release
) -> None:
    first = release(store, 1)
    release(store, 2)
    assert [told(each)[0] for each in history(store, "prod")] == [2, 1]
    harm(store, first.digest)
    newest, gap = history(store, "prod")
    assert told(newest)[0] == 2
    assert isinstance(gap, Gap) and (gap.first, gap.last) == (1, 1) and why in gap.why
    with pytest.raises(NotFound, match="nlu bundle list"):
        find(store, "prod", "1")


def test_releases_history_needs_a_channel(store: FolderStore) -> None:
    with pytest.raises(NotFound, match="channels/prod.json: found no pointer"):
        list(history(store, "prod"))


def test_releases_find_by_seq_and_by_digest(store: FolderStore, release: Release) -> None:
    digests = [release(store, seq).digest for seq in (1, 2)]
    for seq, digest in enumerate(digests, 1):
        assert find(store, "prod", str(seq)) == find(store, "prod", digest) == by_digest(store, digest)
    with pytest.raises(NotFound, match="seq 3"):
        find(store, "prod", "3")
    with pytest.raises(NotFound, match="manifests/"):
        find(store, "prod", "0" * 64)
    with pytest.raises(ChannelMismatch, match="promote"):
        find(store, "canary", digests[0])
    with pytest.raises(ValueError, match="expected a seq, or the 64 characters"):
        find(store, "prod", digests[0][:12])


def test_releases_find_does_not_believe_an_entry(store: FolderStore, release: Release) -> None:
    """Entries are not signed: one that leads to another release must not choose what is gone back to."""
    for seq in (1, 2, 3):
        release(store, seq)
    entry = json.loads(store.read(release_key("prod", 1), 1000)[0])
    other = json.loads(store.read(release_key("prod", 2), 1000)[0])
    store.put(release_key("prod", 1), json.dumps(entry | {"manifest": other["manifest"]}).encode())
    with pytest.raises(NotFound, match="found.*seq 2.*seq 1"):
        find(store, "prod", "1")


def test_releases_locate_reads_references(tmp_path: Path, release: Release) -> None:
    store = FolderStore(tmp_path / "store")
    first, second = release(store, 1), release(store, 2)
    for reference, bundle in {
        "#prod": second,
        "#prod@1": first,
        f"#prod@{first.digest}": first,
        f"#{first.digest}": first,
    }.items():
        assert locate(f"{tmp_path}/store{reference}")[1].manifest == bundle.manifest
    for reference in ("store", "#prod", "store#", "store#../x", "store#prod@"):
        with pytest.raises(ValueError, match="expected"):
            locate(reference)


# Going back


def test_releases_rollback_is_a_new_release_of_the_old_components(
    anywhere: Store, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    first, second = release(anywhere, 1), release(anywhere, 2)
    draft = back(anywhere, "1")
    assert [(each.folder, each.what) for each in draft.changes if each.what != "same"] == [
        ("head.intent", "changed")
    ]
    pointer = make(anywhere, draft, keys=[key], keyring=keyring, who="anna@desk")
    found = current(anywhere, "prod")
    assert found.pointer == pointer and pointer.seq == 3
    assert found.manifest.components == first.manifest.components != second.manifest.components
    assert (found.manifest.restores, found.manifest.note) == (first.digest, "p99 вырос на 40 %")
    assert found.manifest.created == NOW
    assert found.signature is not None
    verify(found.raw, found.signature, keyring)
    assert [told(each)[0] for each in history(anywhere, "prod")] == [3, 2, 1]


def test_releases_rollback_writes_no_blob_and_moves_the_pointer_last(
    tmp_path: Path, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    store = Unlisted(tmp_path / "store")
    release(store, 1)
    release(store, 2)
    draft = back(store, "1")
    store.written.clear()
    digest = make(store, draft, keys=[key], keyring=keyring, who="anna@desk").manifest
    assert store.written == [
        signature_key(digest),
        manifest_key(digest),
        release_key("prod", 3),
        audit_key("prod", 3),
        channel_key("prod"),
    ]


def test_releases_rollback_leaves_a_line_for_people(
    anywhere: Store, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    first = release(anywhere, 1)
    release(anywhere, 2)
    pointer = make(anywhere, back(anywhere, "1"), keys=[key], keyring=keyring, who="анна@desk")
    raw = anywhere.read(audit_key("prod", 3), 10_000)[0]
    assert document.load(Audit, raw, part="audit", limit=10_000) == Audit(
        format=1,
        channel="prod",
        seq=3,
        manifest=pointer.manifest,
        what="rollback",
        source=first.digest,
        who="анна@desk",
        when=NOW,
        why="p99 вырос на 40 %",
    )


@pytest.mark.parametrize(("lives", "given"), [(None, None), (None, 9), (30, None), (30, 9)])
def test_releases_rollback_lives_as_long_as_the_old_one_was_given(
    lives: int | None,
    given: int | None,
    store: FolderStore,
    make_bundle: Callable[..., Bundle],
) -> None:
    expires = None if lives is None else CREATED + timedelta(days=lives)
    publish(make_bundle(seq=1, channel="prod", created=CREATED, expires=expires), store)
    publish(make_bundle(seq=2, channel="prod"), store)
    wanted = None if given is None else NOW + timedelta(days=given)
    days = given or lives
    assert back(store, "1", expires=wanted).manifest.expires == (
        None if days is None else NOW + timedelta(days=days)
    )


def test_releases_rollback_lives_no_longer_than_the_calendar(
    store: FolderStore, make_bundle: Callable[..., Bundle]
) -> None:
    publish(make_bundle(seq=1, channel="prod", created=CREATED, expires=LATEST), store)
    publish(make_bundle(seq=2, channel="prod"), store)
    assert back(store, "1").manifest.expires == LATEST


def test_releases_rollback_of_a_rollback_goes_forth_again(
    store: FolderStore, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    release(store, 1)
    second = release(store, 2)
    make(store, back(store, "1"), keys=[key], keyring=keyring, who="anna@desk")
    make(store, back(store, "2"), keys=[key], keyring=keyring, who="anna@desk")
    found = current(store, "prod").manifest
    assert (found.seq, found.restores, found.components) == (4, second.digest, second.manifest.components)


def test_releases_rollback_refuses_what_it_would_not_change(store: FolderStore, release: Release) -> None:
    release(store, 1)
    with pytest.raises(ValueError, match="points to already"):
        back(store, "1")


def test_releases_rollback_refuses_a_note_that_could_forge_a_page(
    store: FolderStore, release: Release
) -> None:
    release(store, 1)
    release(store, 2)
    with pytest.raises(ManifestInvalid, match="note"):
        rollback(store, "prod", find(store, "prod", "1"), note="fine\nseq 9", now=NOW)


def test_releases_rollback_goes_through_when_the_current_release_is_broken(
    store: FolderStore, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    release(store, 1)
    store.put(manifest_key(release(store, 2).digest), b"{}")
    draft = back(store, "1")
    assert draft.replaces is None and {each.what for each in draft.changes} == {"added"}
    assert make(store, draft, keys=[key], keyring=keyring, who="anna@desk").seq == 3


def test_releases_rollback_refuses_a_release_whose_blobs_are_gone(
    anywhere: Store, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    lost = next(file for _, file in release(anywhere, 1).manifest.files() if file.name == "head.json")
    release(anywhere, 2)
    head = find(anywhere, "prod", "1").manifest.component("head", "intent").files[0]
    anywhere.delete(blob_key(head.sha256))
    with pytest.raises(NotFound, match="1 files of this release that are no longer in the store"):
        make(anywhere, back(anywhere, "1"), keys=[key], keyring=keyring, who="anna@desk")
    assert current(anywhere, "prod").pointer.seq == 2
    assert anywhere.exists(blob_key(lost.sha256)) and not anywhere.exists(audit_key("prod", 3))


def test_releases_rollback_that_loses_a_race_leaves_the_winner(
    anywhere: Store, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    release(anywhere, 1)
    release(anywhere, 2)
    draft = back(anywhere, "1")
    release(anywhere, 5)
    with pytest.raises(Conflict, match="channels/prod.json: found seq 5.*expected seq 2.*again with seq 6"):
        make(anywhere, draft, keys=[key], keyring=keyring, who="anna@desk")
    assert current(anywhere, "prod").pointer.seq == 5
    make(anywhere, back(anywhere, "1"), keys=[key], keyring=keyring, who="anna@desk")
    assert current(anywhere, "prod").pointer.seq == 6


def test_releases_rollback_is_not_stopped_by_a_publication_that_died(
    store: FolderStore, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    release(store, 1)
    release(store, 2)
    store.put(release_key("prod", 3), b"left by somebody")
    assert make(store, back(store, "1"), keys=[key], keyring=keyring, who="anna@desk").seq == 4


# Whom to believe


def source(bundle: Bundle, signature: bytes | None) -> Published:
    raw = (bundle.path / "manifest.json").read_bytes()
    pointer = Pointer(
        format=1,
        channel=bundle.manifest.channel,
        seq=bundle.manifest.seq,
        manifest=bundle.digest,
        size=len(raw),
    )
    return Published(pointer, raw, signature, bundle.manifest)


def test_releases_source_must_be_signed_unless_the_words_are_said(
    make_bundle: Callable[..., Bundle], key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    bundle = make_bundle()
    raw = (bundle.path / "manifest.json").read_bytes()
    check_source(source(bundle, sign(raw, key)), keyring, now=NOW)
    stranger = sign(raw, generate_key()[0])
    kinds: list[tuple[bytes | None, type[StaticsError]]] = [
        (None, SignatureMissing),
        (stranger, SignatureInvalid),
    ]
    for signature, kind in kinds:
        with pytest.raises(kind):
            check_source(source(bundle, signature), keyring, now=NOW)
        with pytest.raises(kind):
            check_source(source(bundle, signature), keyring, now=NOW, even_expired=True)
        check_source(source(bundle, signature), keyring, now=NOW, even_unsigned=True)


def test_releases_source_with_a_wrong_signature_is_never_taken(
    make_bundle: Callable[..., Bundle], key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    for words in (False, True):
        with pytest.raises(SignatureInvalid, match="not over this manifest"):
            check_source(
                source(make_bundle(), sign(b"else", key)), keyring, now=NOW, even_unsigned=words, even_expired=words
            )  # fmt: skip


def test_releases_source_must_not_have_expired_unless_the_words_are_said(
    make_bundle: Callable[..., Bundle], key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    bundle = make_bundle(expires=NOW)
    found = source(bundle, sign((bundle.path / "manifest.json").read_bytes(), key))
    check_source(found, keyring, now=NOW - timedelta(seconds=1))
    with pytest.raises(Expired, match="2026-03-01 12:00.*--even-expired"):
        check_source(found, keyring, now=NOW)
    with pytest.raises(Expired):
        check_source(found, keyring, now=NOW, even_unsigned=True)
    check_source(found, keyring, now=NOW, even_expired=True)


def test_releases_make_signs_with_as_many_keys_as_pods_ask_for(
    tmp_path: Path, release: Release, key: Ed25519PrivateKey
) -> None:
    store, second = Unlisted(tmp_path / "store"), generate_key()[0]
    release(store, 1)
    release(store, 2)
    both = Keyring.of(key.public_key(), second.public_key())
    draft = back(store, "1")
    store.written.clear()
    for keys in ([], [key], [key, key], [generate_key()[0]]):
        with pytest.raises((SignatureMissing, SignatureInvalid)):
            make(store, draft, keys=keys, keyring=both, signatures=2, who="anna@desk")
    assert store.written == []
    make(store, draft, keys=[key, second], keyring=both, signatures=2, who="anna@desk")
    found = current(store, "prod")
    assert found.signature is not None and key_id(second.public_key()).encode() in found.signature


# From channel to channel


def test_releases_promote_takes_a_release_to_a_channel(
    anywhere: Store, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    tried = release(anywhere, 41, "canary")
    for seq, note in ((1, None), (2, "held for a day")):
        draft = promote(anywhere, current(anywhere, "canary"), "prod", note=note, now=NOW)
        made = make(anywhere, draft, keys=[key], keyring=keyring, who="anna@desk")
        found = current(anywhere, "prod")
        assert (made.seq, found.manifest.channel, found.manifest.note) == (seq, "prod", note)
        assert found.manifest.components == tried.manifest.components
        assert found.manifest.restores is None
    assert current(anywhere, "canary").manifest == tried.manifest
    assert [told(each)[0] for each in history(anywhere, "prod")] == [2, 1]


def test_releases_promote_writes_manifests_alone(
    tmp_path: Path, release: Release, key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    store = Unlisted(tmp_path / "store")
    release(store, 1, "canary")
    store.written.clear()
    draft = promote(store, current(store, "canary"), "prod", note=None, now=NOW)
    assert {each.what for each in draft.changes} == {"added"}
    make(store, draft, keys=[key], keyring=keyring, who="anna@desk")
    assert [each.split("/")[0] for each in store.written] == [
        "manifests", "manifests", "releases", "audit", "channels",
    ]  # fmt: skip


def test_releases_promote_refuses_its_own_channel(store: FolderStore, release: Release) -> None:
    release(store, 1)
    with pytest.raises(ValueError, match="expected one of another channel"):
        promote(store, current(store, "prod"), "prod", note=None, now=NOW)


def test_releases_rollback_refuses_another_channel(store: FolderStore, release: Release) -> None:
    tried = release(store, 1, "canary")
    release(store, 1)
    with pytest.raises(ChannelMismatch, match="promote"):
        rollback(store, "prod", by_digest(store, tried.digest), note="no", now=NOW)


def test_releases_read_what_the_digest_promises(store: FolderStore, release: Release) -> None:
    digest = release(store, 1).digest
    raw = store.read(manifest_key(digest), 10**5)[0]
    store.put(manifest_key(digest), raw.replace(b'"seq": 1', b'"seq": 2'))
    with pytest.raises(DigestMismatch):
        by_digest(store, digest)
    with pytest.raises(DigestMismatch):
        current(store, "prod")
    store.put(manifest_key(digest), raw)  # the negative control
    assert current(store, "prod") == by_digest(store, digest)
