"""One release: blobs, manifest, a place in the history, and last the channel's pointer, so that no reader sees half.

Whoever dies on the way leaves the old release as it was, and objects that nobody needs (`statics/gc.py` finds them). Of
two who publish at once one wins: the pointer moves only from what its publisher saw.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from statics import disk, pointer, signing
from statics.bundle import Bundle
from statics.errors import ChannelMismatch, Conflict, DigestMismatch, NotFound, SeqTooOld, SignatureInvalid
from statics.manifest import MANIFEST, SIGNATURE, check_chain, manifest_digest, parse
from statics.pointer import POINTER_LIMIT, Pointer, pointer_to
from statics.signing import SIGNATURE_LIMIT
from statics.store import Store, blob_key, channel_key, manifest_key, release_key, signature_key
from statics.verify import check_files, read_manifest

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


def countersign(path: Path, private: Ed25519PrivateKey) -> None:
    """Add a signature to the bundle at `path`, whose files are checked first; those of other keys stay."""
    raw, signature = read_manifest(path)
    manifest = parse(raw)
    check_chain(manifest)
    check_files(path, manifest)
    disk.replace_file(path / SIGNATURE, [signing.sign(raw, private, signature)])


def publish(
    bundle: Bundle, store: Store, *, channel: str | None = None, progress: Progress | None = None
) -> str:
    """Publish to the bundle's channel and return the bundle digest.

    `channel` only says which one the caller means: the manifest names it, and the signature covers that. To publish the
    current release again mends what is missing in the store, and adds the signatures that are new.
    """
    raw, signature = read_manifest(bundle.path)
    manifest = parse(raw)
    _check_same(bundle, manifest_digest(raw))
    check_chain(manifest)
    check_files(bundle.path, manifest)
    if channel is not None and channel != manifest.channel:
        raise ChannelMismatch(
            part=MANIFEST,
            found=f"channel {manifest.channel}",
            expected=f"channel {channel}",
            remedy=f"build the bundle for channel {channel}; its name is part of what is signed",
        )
    new = pointer_to(manifest, bundle.digest, len(raw))
    old, token = standing(store, new.channel)
    if old is not None and old.manifest != new.manifest and new.seq <= old.seq:
        raise SeqTooOld(
            part=channel_key(new.channel),
            found=f"seq {new.seq}",
            expected=f"a seq above {old.seq}, which is published",
            remedy=f"build the bundle again with seq {free_seq(store, new.channel, old)}",
        )
    _put_blobs(bundle, store, progress or (lambda what, done, total: None))
    put_manifest(store, raw, signature)
    # Blobs that were here before may be old ones of nobody, collected since. From now on the manifest keeps them.
    _put_blobs(bundle, store, lambda what, done, total: None)
    enter(store, new)
    move(store, old, new, token)
    log.info("published %s as seq %d of channel %s", bundle.digest, new.seq, new.channel)
    return bundle.digest


def standing(store: Store, channel: str) -> tuple[Pointer | None, str | None]:
    """What a channel points to and the token for `move`; None and None before its first release."""
    key = channel_key(channel)
    try:
        raw, token = store.read(key, POINTER_LIMIT)
    except NotFound:
        return None, None
    return pointer.parse(raw, key), token


def free_seq(store: Store, channel: str, old: Pointer | None) -> int:
    """The next seq after `old` that no release has, nor a publication that died before its pointer moved."""
    seq = old.seq + 1 if old is not None else 1
    while store.exists(release_key(channel, seq)):
        seq += 1
    return seq


def put_manifest(store: Store, raw: bytes, signature: bytes | None) -> None:
    """Under its digest, and beside it the signatures, to those that are there already."""
    digest = manifest_digest(raw)
    if signature is not None:
        add_signatures(store, digest, signature)
    _put_once(store, manifest_key(digest), raw)


def add_signatures(store: Store, digest: str, signature: bytes) -> None:
    """Add to the signatures of a manifest; what is there and cannot be read is replaced."""
    key = signature_key(digest)
    theirs, token = _read(store, key)
    if theirs is not None:
        try:
            signature = signing.join(signature, theirs)
        except SignatureInvalid as error:
            log.warning("replacing the signatures of %s: %s", digest, error)
    if signature != theirs:
        put_document(store, key, signature, if_absent=theirs is None, if_match=token)


def enter(store: Store, new: Pointer) -> None:
    """Give a release its place in the history of its channel; Conflict where another has that seq."""
    key = release_key(new.channel, new.seq)
    try:
        put_document(store, key, pointer.dump(new), if_absent=True)
    except Conflict as error:
        raise Conflict(
            part=key,
            found=f"another release with seq {new.seq}, published, under way, or given up midway",
            expected="a seq that no other release has",
            remedy=f"begin again with seq {free_seq(store, new.channel, new)}, which is free",
        ) from error


def move(store: Store, old: Pointer | None, new: Pointer, token: str | None) -> None:
    """Let a channel point to `new`, if it still points to `old`; Conflict where somebody was faster."""
    if new == old:
        return
    key = channel_key(new.channel)
    try:
        put_document(store, key, pointer.dump(new), if_absent=old is None, if_match=token)
    except Conflict as error:
        theirs = standing(store, new.channel)[0]
        raise Conflict(
            part=key,
            found=f"seq {theirs.seq}, bundle {theirs.manifest[:12]}" if theirs else "no pointer any more",
            expected=f"seq {old.seq}, as when this began" if old else "no pointer yet, as when this began",
            remedy="look at what was released meanwhile (nlu bundle list, nlu bundle diff); if yours is still wanted, "
            f"make it again with seq {free_seq(store, new.channel, theirs)}",
        ) from error


def put_document(
    store: Store, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
) -> None:
    """Write a small object; Conflict if another is there, or not the one of `if_match`."""
    try:
        store.put(key, data, if_absent=if_absent, if_match=if_match)
    except Conflict:
        # A client that repeats a request whose answer was lost conflicts with itself.
        if _read(store, key)[0] != data:
            raise


def _check_same(bundle: Bundle, digest: str) -> None:
    if digest != bundle.digest:
        raise DigestMismatch(
            part=str(bundle.path / MANIFEST),
            found=f"bundle {digest}",
            expected=f"bundle {bundle.digest}",
            remedy="the folder changed since it was built or verified: do that again",
        )


def _put_blobs(bundle: Bundle, store: Store, progress: Progress) -> None:
    total, done, seen = bundle.manifest.size, 0, set[str]()
    for component, file in bundle.manifest.files():
        key = blob_key(file.sha256)
        if file.sha256 not in seen and not store.exists(key):
            _put_once(store, key, bundle.folder(component) / file.name)
        seen.add(file.sha256)
        done += file.size
        progress(f"{component.folder}/{file.name}", done, total)


def _put_once(store: Store, key: str, source: bytes | Path) -> None:
    try:
        store.put(key, source, if_absent=True)
    except Conflict:
        log.debug("%s is there already", key)  # its name is its content


def _read(store: Store, key: str) -> tuple[bytes | None, str | None]:
    try:
        return store.read(key, SIGNATURE_LIMIT)
    except NotFound:
        return None, None
