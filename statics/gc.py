"""Keeping a store clean: manifests and blobs that no release needs any more, found and deleted.

What is needed: the last releases of every channel, and whatever is young, for a publication that is under way has put
its blobs and not yet its pointer. A store where anything that is needed cannot be read is left alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from statics import pointer
from statics.errors import Conflict, DigestMismatch, FormatTooNew, ManifestInvalid, NotFound, SizeMismatch
from statics.manifest import MANIFEST_LIMIT, Manifest, manifest_digest, parse
from statics.pointer import POINTER_LIMIT, Pointer
from statics.store import Store, blob_key, manifest_key, signature_key

GRACE = timedelta(days=7)
KEEP = 10  # releases of each channel

_MANIFEST = re.compile(r"manifests/([0-9a-f]{64})\.(json|sig)")
_ENTRY = re.compile(r"releases/[^/]+/([0-9]{1,16})\.json")
_BLOB = re.compile(r"blobs/sha256/[0-9a-f]{64}")


@dataclass(frozen=True)
class Garbage:
    """An object that no release needs; `size` in bytes."""

    key: str
    size: int
    modified: datetime


def garbage(store: Store, *, keep: int = KEEP, grace: timedelta = GRACE, now: datetime) -> list[Garbage]:
    """What may be deleted, manifests before the blobs they name; objects younger than `grace` never are.

    Kept are the last `keep` seqs of each channel that has a pointer. Raises the StaticsError of a kept manifest or a pointer
    that cannot be read: what it needs is not known.
    """
    if keep < 1:
        raise ValueError(f"keep: found {keep}, expected at least 1, the release that pods serve")
    old = [each for each in _objects(store) if now - each.modified > grace]
    needed = _needed(store, keep, {each.key for each in old})
    return [each for each in old if each.key not in needed]


def remove(
    store: Store, found: Sequence[Garbage], *, keep: int = KEEP, grace: timedelta = GRACE, now: datetime
) -> list[Garbage]:
    """Delete what was found and is garbage still, and return it.

    Raises Conflict where a release was made meanwhile that needs some of it: publishing its bundle again mends that.
    """
    still = {each.key for each in garbage(store, keep=keep, grace=grace, now=now)}
    gone = [each for each in found if each.key in still]
    for each in gone:
        store.delete(each.key)
    missed = _needed(store, keep, set()) & {each.key for each in gone}
    if missed:
        raise Conflict(
            part=min(missed),
            found=f"{len(missed)} objects deleted that a release made in this moment needs",
            expected="no release while a store is cleaned",
            remedy="publish that bundle again: it puts what is missing",
        )
    return gone


def _objects(store: Store) -> Iterator[Garbage]:
    """All manifests, signatures and blobs; what else lies in the store is none of our business."""
    for prefix, pattern in (("manifests/", _MANIFEST), ("blobs/", _BLOB)):
        for key, size, modified in store.keys(prefix):
            if pattern.fullmatch(key):
                yield Garbage(key, size, modified)


def _needed(store: Store, keep: int, old: set[str]) -> set[str]:
    """The keys of the last releases and of every manifest that is not `old`, and of their blobs."""
    digests = [match[1] for key, _, _ in store.keys("manifests/") if (match := _MANIFEST.fullmatch(key))]
    manifests = {digest: _readable(store, digest) for digest in digests}
    kept = {digest for digest in digests if manifest_key(digest) not in old}
    for key, _, _ in store.keys("channels/"):
        kept |= _last(store, pointer.parse(store.read(key, POINTER_LIMIT)[0], key), manifests, keep)
    needed = set()
    for digest in kept:
        manifest = manifests.get(digest) or _manifest(store, digest)  # which says why it cannot be read
        needed |= {manifest_key(digest), signature_key(digest)}
        needed |= {blob_key(file.sha256) for _, file in manifest.files()}
    return needed


def _last(store: Store, pointed: Pointer, manifests: Mapping[str, Manifest | None], keep: int) -> set[str]:
    """The manifests with the last `keep` seqs of a channel: those in its history, and those that say so themselves,
    for older stores have no history."""
    entries = {
        int(match[1]): key
        for key, _, _ in store.keys(f"releases/{pointed.channel}/")
        if (match := _ENTRY.fullmatch(key)) and int(match[1]) <= pointed.seq
    }
    ours = {
        digest: manifest.seq
        for digest, manifest in manifests.items()
        if manifest is not None and manifest.channel == pointed.channel and manifest.seq <= pointed.seq
    }
    last = sorted({pointed.seq, *entries, *ours.values()}, reverse=True)[:keep]
    kept = {digest for digest, seq in ours.items() if seq in last}
    for key in (entries[seq] for seq in last if seq in entries):
        entered = pointer.parse(store.read(key, POINTER_LIMIT)[0], key).manifest
        kept |= {entered} & manifests.keys()  # what an earlier, stricter collection took is gone
    return kept | {pointed.manifest}


def _readable(store: Store, digest: str) -> Manifest | None:
    try:
        return _manifest(store, digest)
    except (NotFound, ManifestInvalid, FormatTooNew, DigestMismatch, SizeMismatch):
        return None


def _manifest(store: Store, digest: str) -> Manifest:
    raw = store.read(manifest_key(digest), MANIFEST_LIMIT)[0]
    if manifest_digest(raw) != digest:
        raise DigestMismatch(
            part=manifest_key(digest),
            found=f"sha256 {manifest_digest(raw)}",
            expected=f"sha256 {digest}",
            remedy="delete this manifest in the store and publish the bundle again",
        )
    return parse(raw)
