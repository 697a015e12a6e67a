"""Releases that are published: their history, going back to one, taking one to another channel.

A channel only goes forward, for pods refuse a lower seq. So going back is a new release too: the components of an old
one in a manifest of their own, signed and numbered like any other. No blob is written for it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from statics import document, pointer, signing
from statics.bundle import Change, diff
from statics.document import Document, invalid
from statics.errors import (
    ChannelMismatch,
    DigestMismatch,
    Expired,
    FormatTooNew,
    ManifestInvalid,
    NotFound,
    SignatureMissing,
    SizeMismatch,
    StaticsError,
)
from statics.locate import open_store
from statics.manifest import (
    MANIFEST,
    MANIFEST_LIMIT,
    SIGNATURE,
    Count,
    Manifest,
    Name,
    Note,
    Sha256,
    Time,
    dump,
    is_name,
    manifest_digest,
    parse,
)
from statics.pointer import POINTER_LIMIT, Pointer, pointer_to
from statics.publish import enter, free_seq, move, put_document, put_manifest, standing
from statics.signing import SIGNATURE_LIMIT, Keyring
from statics.store import Store, audit_key, blob_key, channel_key, manifest_key, release_key, signature_key
from statics.version import FORMAT

LATEST = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # that a manifest can say
PATIENCE = 100  # seqs in a row without an entry, after which a history is taken to begin above them

What = Literal["rollback", "promote"]


@dataclass(frozen=True)
class Published:
    """A release as its store has it: the bytes are those of its digest, and who signed them is only said."""

    pointer: Pointer
    raw: bytes
    signature: bytes | None
    manifest: Manifest


@dataclass(frozen=True)
class Gap:
    """Seqs of a channel, `first` to `last`, of which nothing can be told, and why."""

    first: int
    last: int
    why: str


@dataclass(frozen=True)
class Draft:
    """A release that is still to be made: the components of `source` under a new seq.

    `old` is what the channel points to, with its token, and `replaces` its manifest, where that can be read.
    """

    what: What
    source: Published
    manifest: Manifest
    old: Pointer | None
    token: str | None
    replaces: Manifest | None

    @property
    def changes(self) -> list[Change]:
        """What a pod meets that follows the channel."""
        nothing = self.manifest.model_copy(update={"components": ()})
        return diff(self.replaces or nothing, self.manifest)


class Audit(Document):
    """Who took a channel elsewhere, when, what for; a line for people, which nobody has signed."""

    format: int
    channel: Name
    seq: Count
    manifest: Sha256
    what: What
    source: Sha256
    who: Note
    when: Time
    why: Note | None


# What there is


def current(store: Store, channel: str) -> Published:
    """The release a channel points to."""
    return _read(store, _pointer(store, channel))


def history(store: Store, channel: str, *, limit: int = 20) -> Iterator[Published | Gap]:
    """The last `limit` releases of a channel, newest first, one read after the other: nothing is listed.

    Releases from before the history was kept, and those whose manifests are collected, are a Gap.
    """
    newest = _pointer(store, channel)
    yield _told(store, newest)
    told, seq, top = 1, newest.seq, 0  # top: where the gap begins that we are in, 0 outside of gaps
    while told < limit and seq > 1 and top - seq < PATIENCE:
        seq -= 1
        found = _entry(store, channel, seq)
        if found is None:
            top = top or seq
            continue
        if top:
            yield Gap(seq + 1, top, "no entry in the history")
        yield found
        told, top = told + 1, 0
    if top:
        yield Gap(seq, top, "no entry in the history" + ("; nobody looked further back" if seq > 1 else ""))


def find(store: Store, channel: str, which: str) -> Published:
    """The release of a channel with this seq or this digest."""
    if re.fullmatch(r"[0-9a-f]{64}", which):
        found = by_digest(store, which)
        if found.manifest.channel != channel:
            raise _other_channel(found.manifest.channel, channel)
        return found
    if not re.fullmatch(r"[0-9]{1,15}", which):
        raise ValueError(f"release {which!r}: expected a seq, or the 64 characters of a digest")
    entry = _entry(store, channel, int(which))
    if entry is None and (pointed := _pointer(store, channel)).seq == int(which):
        return _read(store, pointed)
    if isinstance(entry, Published):
        return entry
    raise NotFound(
        part=release_key(channel, int(which)),
        found=entry.why if entry is not None else "no entry in the history",
        expected=f"a release with seq {which} of channel {channel}",
        remedy="look for it with nlu bundle list; one without an entry can be named by its digest",
    )


def by_digest(store: Store, digest: str) -> Published:
    """The release with this digest, of whatever channel."""
    raw = _checked(store, digest, MANIFEST_LIMIT)
    manifest = parse(raw)
    return Published(pointer_to(manifest, digest, len(raw)), raw, _signature(store, digest), manifest)


def locate(reference: str) -> tuple[Store, Published]:
    """The store and the release that `STORE#CHANNEL`, `STORE#CHANNEL@SEQ` or `STORE#DIGEST` names."""
    url, _, which = reference.rpartition("#")
    channel, at, seq = which.partition("@")
    if not url or not is_name(channel):
        raise ValueError(
            f"release {reference!r}: expected STORE#CHANNEL, STORE#CHANNEL@SEQ or STORE#DIGEST, e.g. s3://bucket#prod@12"
        )
    store = open_store(url)
    if at:
        return store, find(store, channel, seq)
    whole = re.fullmatch(r"[0-9a-f]{64}", channel)
    return store, by_digest(store, channel) if whole else current(store, channel)


# What is made of it


def check_source(
    source: Published,
    keyring: Keyring,
    *,
    now: datetime,
    signatures: int = 1,
    even_expired: bool = False,
    even_unsigned: bool = False,
) -> None:
    """Whether a release may be made of an older one: as many trusted keys vouch for it as pods ask for, or one stolen
    key would do where they want two; and it has not expired.

    `even_unsigned` lets pass what too few keys have signed, never what bears a trusted key's wrong signature.
    """
    signers = signing.signers(source.raw, source.signature, keyring) if source.signature is not None else ()
    if not even_unsigned or any(signer.vouches is not None for signer in signers):
        if source.signature is None:
            raise SignatureMissing(
                part=signature_key(source.pointer.manifest),
                found="no signature",
                expected="one by a trusted key: whoever can write to the store could have put it there",
                remedy="choose a signed release; --even-unsigned takes this one all the same",
            )
        signing.verify(source.raw, source.signature, keyring, 1 if even_unsigned else signatures)
    expires = source.manifest.expires
    if expires is not None and expires <= now and not even_expired:
        raise Expired(
            part=f"{MANIFEST} of seq {source.manifest.seq}",
            found=f"a release that expired at {expires:%Y-%m-%d %H:%M} UTC",
            expected="one that may still be served",
            remedy="choose a newer one; --even-expired takes this one all the same, with a new time to expire",
        )


def rollback(
    store: Store,
    channel: str,
    source: Published,
    *,
    note: str,
    now: datetime,
    expires: datetime | None = None,
) -> Draft:
    """The draft of the release that goes back to `source`, an older one of this channel.

    Without `expires` it lives as long as the old one was given to live.
    """
    if source.manifest.channel != channel:
        raise _other_channel(source.manifest.channel, channel)
    old, token = standing(store, channel)
    if old is not None and old.manifest == source.pointer.manifest:
        raise ValueError(
            f"rollback: found seq {old.seq}, which channel {channel} points to already; expected an older release"
        )
    return _draft("rollback", store, channel, source, old, token, note=note, now=now, expires=expires)


def promote(
    store: Store,
    source: Published,
    channel: str,
    *,
    note: str | None,
    now: datetime,
    expires: datetime | None = None,
) -> Draft:
    """The draft of the release that takes `source`, of another channel, to `channel`."""
    if source.manifest.channel == channel:
        raise ValueError(
            f"promote: found a release of channel {channel}, expected one of another channel; roll back instead"
        )
    old, token = standing(store, channel)
    return _draft("promote", store, channel, source, old, token, note=note, now=now, expires=expires)


def make(
    store: Store,
    draft: Draft,
    *,
    keys: Sequence[Ed25519PrivateKey],
    keyring: Keyring,
    signatures: int = 1,
    who: str,
) -> Pointer:
    """Sign a draft and let its channel point to it; Conflict if the channel moved since the draft was made.

    The new release is held against `keyring` and `signatures` first: what pods would refuse is not published.
    """
    raw = dump(draft.manifest)
    parse(raw)  # the limits of the reader hold for the writer too
    signature: bytes | None = None
    for key in keys:
        signature = signing.sign(raw, key, signature)
    if signature is None:
        raise SignatureMissing(
            part=SIGNATURE, found="no key", expected="one to sign the new release with", remedy="give --key"
        )
    signing.verify(raw, signature, keyring, signatures)
    new = pointer_to(draft.manifest, manifest_digest(raw), len(raw))
    put_manifest(store, raw, signature)
    _check_blobs(store, draft.manifest)  # only now: what a manifest names is not collected any more
    enter(store, new)
    line = Audit(
        format=FORMAT,
        channel=new.channel,
        seq=new.seq,
        manifest=new.manifest,
        what=draft.what,
        source=draft.source.pointer.manifest,
        who=who,
        when=draft.manifest.created,
        why=draft.manifest.note,
    )
    put_document(store, audit_key(new.channel, new.seq), document.dump(line), if_absent=True)
    move(store, draft.old, new, draft.token)
    return new


def _draft(
    what: What,
    store: Store,
    channel: str,
    source: Published,
    old: Pointer | None,
    token: str | None,
    *,
    note: str | None,
    now: datetime,
    expires: datetime | None,
) -> Draft:
    was = source.manifest
    if expires is None and was.expires is not None:
        expires = now + min(was.expires - was.created, LATEST - now)
    try:
        manifest = Manifest(
            format=FORMAT,
            channel=channel,
            seq=free_seq(store, channel, old),
            created=now,
            expires=expires,
            restores=source.pointer.manifest if what == "rollback" else None,
            note=note,
            requires_service=was.requires_service,
            components=was.components,
        )
    except ValidationError as error:
        raise invalid(error, MANIFEST) from error
    return Draft(what, source, manifest, old, token, _replaced(store, old))


def _replaced(store: Store, old: Pointer | None) -> Manifest | None:
    """What the channel serves; a release that cannot be read must not stand in the way of a better one."""
    told = _told(store, old) if old is not None else None
    return told.manifest if isinstance(told, Published) else None


def _check_blobs(store: Store, manifest: Manifest) -> None:
    missing = [file for _, file in manifest.files() if not store.exists(blob_key(file.sha256))]
    if missing:
        raise NotFound(
            part=blob_key(missing[0].sha256),
            found=f"{len(missing)} files of this release that are no longer in the store",
            expected="all of them",
            remedy="choose a newer release, or publish a bundle that has these files again",
        )


# Reading


def _pointer(store: Store, channel: str) -> Pointer:
    found = standing(store, channel)[0]
    if found is None:
        raise NotFound(
            part=channel_key(channel),
            found="no pointer",
            expected=f"a channel {channel} with a release",
            remedy="publish to it first, or correct the store's address and the channel",
        )
    return found


def _entry(store: Store, channel: str, seq: int) -> Published | Gap | None:
    """The release with an entry in the history; a Gap where it cannot be read."""
    key = release_key(channel, seq)
    try:
        raw = store.read(key, POINTER_LIMIT)[0]
    except NotFound:
        return None
    try:
        entry = pointer.parse(raw, key)
    except (ManifestInvalid, FormatTooNew) as error:
        return Gap(seq, seq, str(error))
    if (entry.channel, entry.seq) != (channel, seq):
        return Gap(seq, seq, f"an entry of channel {entry.channel}, seq {entry.seq}")
    return _told(store, entry)


def _told(store: Store, entry: Pointer) -> Published | Gap:
    try:
        return _read(store, entry)
    except NotFound:
        return Gap(entry.seq, entry.seq, f"its manifest {entry.manifest[:12]} is not in the store any more")
    except (ManifestInvalid, FormatTooNew, ChannelMismatch, DigestMismatch, SizeMismatch) as error:
        return Gap(entry.seq, entry.seq, str(error))


def _read(store: Store, entry: Pointer) -> Published:
    """The release of an entry or a pointer, neither of which is signed: the manifest must tell the same story."""
    raw = _checked(store, entry.manifest, entry.size)
    manifest = parse(raw)
    if manifest.channel != entry.channel:
        raise _other_channel(manifest.channel, entry.channel)
    if manifest.seq != entry.seq:
        raise ManifestInvalid(
            part=manifest_key(entry.manifest),
            found=f"seq {manifest.seq}",
            expected=f"seq {entry.seq}, as the store says",
            remedy="do not use it: find out who changed the store",
        )
    return Published(entry, raw, _signature(store, entry.manifest), manifest)


def _checked(store: Store, digest: str, limit: int) -> bytes:
    raw = store.read(manifest_key(digest), limit)[0]
    if manifest_digest(raw) != digest:
        raise DigestMismatch(
            part=manifest_key(digest),
            found=f"sha256 {manifest_digest(raw)}",
            expected=f"sha256 {digest}",
            remedy="delete this manifest in the store and publish the bundle again",
        )
    return raw


def _signature(store: Store, digest: str) -> bytes | None:
    try:
        return store.read(signature_key(digest), SIGNATURE_LIMIT)[0]
    except NotFound:
        return None


def _other_channel(found: str, expected: str) -> StaticsError:
    return ChannelMismatch(
        part=MANIFEST,
        found=f"a release of channel {found}",
        expected=f"one of channel {expected}",
        remedy="a release of another channel is taken over with nlu bundle promote",
    )
