"""Whether a bundle may be used: who vouches for it, does it fit this service, is every byte as declared.

Nothing here parses what the files hold; nothing that parses them may run before this.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from statics import disk, signing
from statics.bundle import Bundle, components_of
from statics.errors import Expired, FileMissing, FileUnexpected, ServiceMismatch, SignatureMissing
from statics.manifest import (
    MANIFEST,
    MANIFEST_LIMIT,
    SIGNATURE,
    Component,
    File,
    Manifest,
    check_chain,
    manifest_digest,
    parse,
)
from statics.signing import SIGNATURE_LIMIT, Keyring
from statics.version import satisfies

CLOCKS_DIFFER = timedelta(minutes=5)


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Trust:
    """What the deployment accepts; with a keyring, only what its keys have signed."""

    service: str
    keyring: Keyring | None = None
    require_signature: bool = False
    shared: bool = False  # whether files may have other names too
    signatures: int = 1  # how many keys of the keyring must have signed
    now: Callable[[], datetime] = utc_now  # what expiry is judged by
    pinned: str = ""  # the digest of a bundle that is held to, expired or not, below the floor or not


def verify(
    path: Path,
    *,
    service: str,
    keyring: Keyring | None = None,
    require_signature: bool = False,
    shared: bool = False,
    signatures: int = 1,
) -> Bundle:
    """The bundle at `path`, or the StaticsError that says why it is not one; cheap checks first.

    `shared` admits files that have other names too, as package installers leave them. Expiry is not looked at: who
    names a folder means that bundle, and one that serves must not stop when its time is over.
    """
    return verify_bundle(path, Trust(service, keyring, require_signature, shared, signatures))


def verify_bundle(path: Path, trust: Trust) -> Bundle:
    raw, signature = read_manifest(path, shared=trust.shared)
    manifest = admit(raw, signature, trust)
    check_files(path, manifest, shared=trust.shared)
    return Bundle(path, manifest, manifest_digest(raw))


def read_manifest(path: Path, *, shared: bool = False) -> tuple[bytes, bytes | None]:
    """The raw manifest of the bundle at `path`, and its signature file where there is one."""
    with disk.directory(path, str(path)) as root:
        raw = disk.read_small(MANIFEST, MANIFEST, MANIFEST_LIMIT, inside=root, shared=shared)
        try:
            signature = disk.read_small(SIGNATURE, SIGNATURE, SIGNATURE_LIMIT, inside=root, shared=shared)
        except FileMissing:
            return raw, None
    return raw, signature


def admit(raw: bytes, signature: bytes | None, trust: Trust) -> Manifest:
    """The manifest, if it is vouched for and fits this service; the signature comes before any parsing."""
    if trust.keyring is not None or trust.require_signature:
        if signature is None:
            raise SignatureMissing(
                part=SIGNATURE,
                found="no signature",
                expected="one by a key this deployment trusts",
                remedy="sign the bundle when building it, and publish it again",
            )
        signing.verify(raw, signature, trust.keyring or Keyring({}), trust.signatures)
    manifest = parse(raw)
    if not satisfies(trust.service, manifest.requires_service):
        raise ServiceMismatch(
            part=MANIFEST,
            found=f"service {trust.service}",
            expected=f"service {manifest.requires_service}",
            remedy="run a service in that range, or publish a bundle built for this one",
        )
    check_chain(manifest)
    return manifest


def check_expiry(manifest: Manifest, trust: Trust) -> None:
    """Raises Expired where the bundle's time is over; clocks may differ by CLOCKS_DIFFER."""
    now = trust.now()
    if manifest.expires is not None and now - CLOCKS_DIFFER > manifest.expires:
        raise Expired(
            part=MANIFEST,
            found=f"a release that expired at {manifest.expires:%Y-%m-%dT%H:%M:%SZ}; it is {now:%Y-%m-%dT%H:%M:%SZ}",
            expected="one that may still be used",
            remedy="publish a new release, or pin this one; and look whether the clock is right",
        )


def check_files(path: Path, manifest: Manifest, *, shared: bool = False) -> None:
    """Exactly the files of the manifest with exactly their bytes; all names and sizes before any bytes."""
    apart = components_of(path, manifest)
    own = {component.folder for component in manifest.components} if apart is None else set[str]()
    with disk.directory(path, str(path)) as inside:
        _check_names(inside, str(path), {MANIFEST} | own, optional={SIGNATURE})
        if apart is None:
            _check_components(inside, {each.folder: each for each in manifest.components}, shared)
    if apart is not None:
        check_components(apart, manifest.components)


def check_components(components: Path, wanted: Iterable[Component]) -> None:
    """The same for components that lie in one folder by their digests."""
    with disk.directory(components, str(components)) as inside:
        _check_components(inside, {component.digest: component for component in wanted}, shared=False)


def _check_components(inside: int, named: Mapping[str, Component], shared: bool) -> None:
    for name, component in named.items():
        with disk.directory(name, component.folder, inside=inside) as folder:
            _check_names(folder, component.folder, {file.name for file in component.files})
            for file in component.files:
                _check_status(folder, component, file, shared)
    for name, component in named.items():
        with disk.directory(name, component.folder, inside=inside) as folder:
            for file in component.files:
                _check_bytes(folder, component, file, shared)


def _check_names(
    directory: int, part: str, expected: Collection[str], optional: Collection[str] = ()
) -> None:
    with disk.local_errors(part):
        found = set(os.listdir(directory))
    missing, extra = set(expected) - found, found - set(expected) - set(optional)
    if missing:
        raise FileMissing(
            part=f"{part}/{min(missing)}",
            found=f"{len(missing)} missing" + (f", and an unknown {min(extra)}" if extra else ""),
            expected="every file of the manifest",
            remedy="pull or build the bundle again",
        )
    if extra:
        raise FileUnexpected(
            part=f"{part}/{min(extra)}",
            found=f"{len(extra)} that the manifest does not name",
            expected="only what the manifest names",
            remedy="remove it, or pull the bundle again",
        )


def _check_status(folder: int, component: Component, file: File, shared: bool) -> None:
    part = f"{component.folder}/{file.name}"
    with disk.local_errors(part):
        status = os.stat(file.name, dir_fd=folder, follow_symlinks=False)
    disk.check_plain(status, part, shared=shared)
    disk.check_size(status.st_size, part, file.size)


def _check_bytes(folder: int, component: Component, file: File, shared: bool) -> None:
    part = f"{component.folder}/{file.name}"
    with disk.plain_file(file.name, part, inside=folder, shared=shared) as descriptor:
        disk.check_content(disk.read_chunks(descriptor, part), part, size=file.size, sha256=file.sha256)
