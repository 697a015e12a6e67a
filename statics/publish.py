"""One release: blobs, then the manifest, then the channel's pointer, so that no reader sees half of it."""

import logging
from collections.abc import Callable
from pathlib import Path

from statics import pointer
from statics.bundle import Bundle
from statics.errors import ChannelMismatch, Conflict, DigestMismatch, NotFound, SeqTooOld
from statics.manifest import MANIFEST, check_chain, manifest_digest, parse
from statics.pointer import POINTER_LIMIT, Pointer, pointer_to
from statics.store import Store, blob_key, channel_key, manifest_key, signature_key
from statics.verify import check_files, read_manifest

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


def publish(
    bundle: Bundle, store: Store, *, channel: str | None = None, progress: Progress | None = None
) -> str:
    """Publish to the bundle's channel and return the bundle digest; the current release is left alone.

    `channel` only says which one the caller means: the manifest names it, and the signature covers that.
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
    old, token = _published(store, new.channel)
    if old is not None and old.manifest == new.manifest:
        return bundle.digest
    if old is not None and new.seq <= old.seq:
        raise SeqTooOld(
            part=channel_key(new.channel),
            found=f"seq {new.seq}",
            expected=f"a seq above {old.seq}, which is published",
            remedy=f"build the bundle again with seq {old.seq + 1}",
        )
    _put_blobs(bundle, store, progress or (lambda what, done, total: None))
    if signature is not None:
        store.put(signature_key(bundle.digest), signature)
    _put_once(store, manifest_key(bundle.digest), raw)
    _move(store, old, new, token)
    log.info("published %s as seq %d of channel %s", bundle.digest, new.seq, new.channel)
    return bundle.digest


def _check_same(bundle: Bundle, digest: str) -> None:
    if digest != bundle.digest:
        raise DigestMismatch(
            part=str(bundle.path / MANIFEST),
            found=f"bundle {digest}",
            expected=f"bundle {bundle.digest}",
            remedy="the folder changed since it was built or verified: do that again",
        )


def _published(store: Store, channel: str) -> tuple[Pointer | None, str | None]:
    key = channel_key(channel)
    try:
        raw, token = store.read(key, POINTER_LIMIT)
    except NotFound:
        return None, None
    return pointer.parse(raw, key), token


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


def _move(store: Store, old: Pointer | None, new: Pointer, token: str | None) -> None:
    key = channel_key(new.channel)
    try:
        store.put(key, pointer.dump(new), if_absent=old is None, if_match=token)
    except Conflict:
        # A client that repeats a request whose answer was lost conflicts with itself.
        if _published(store, new.channel)[0] != new:
            raise
