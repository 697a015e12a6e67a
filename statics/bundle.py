"""A bundle: one manifest and a flat folder for each component; built once, never changed.

As it is built, all of it is one folder. Under the root of a machine its folder has only the manifest and the signature;
its components lie beside those of other bundles, each once, under their digests.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from statics import disk, signing
from statics.document import invalid
from statics.errors import FileMissing, FileUnexpected, FileUnsafe, ManifestInvalid
from statics.manifest import (
    MANIFEST,
    MANIFEST_LIMIT,
    SIGNATURE,
    Component,
    File,
    Manifest,
    check_chain,
    dump,
    files_digest,
    is_name,
    manifest_digest,
    parse,
)
from statics.version import FORMAT

BUNDLES, COMPONENTS = "bundles", "components"  # folders of a root


@dataclass(frozen=True)
class Bundle:
    """A local bundle; one from `build`, `verify`, `pull` or `current` was whole when they returned it."""

    path: Path
    manifest: Manifest
    digest: str

    def folder(self, component: Component) -> Path:
        """Where the files of a component lie: the only way to them."""
        shared = components_of(self.path, self.manifest)
        return self.path / component.folder if shared is None else shared / component.digest

    def component(self, kind: str, name: str) -> Component:
        return self.manifest.component(kind, name)

    def of_kind(self, kind: str) -> tuple[Component, ...]:
        return self.manifest.of_kind(kind)


@dataclass(frozen=True)
class Part:
    """What a component is built from: every file directly in `folder`."""

    kind: str
    name: str
    folder: Path
    requires: Mapping[str, str] = field(default_factory=dict)
    provides: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name of its folder in the bundle."""
        return f"{self.kind}.{self.name}"


@dataclass(frozen=True)
class Change:
    """What happens to one component between two manifests, and how much a holder of the old one fetches."""

    folder: str
    what: Literal["added", "removed", "changed", "same"]
    old: Component | None
    new: Component | None
    bytes_to_pull: int


def components_of(path: Path, manifest: Manifest) -> Path | None:
    """The folder of components, by their digests, that the bundle at `path` shares with others; None: it has its own.

    Roots of older versions have whole bundles, so what lies in the bundle's own folder decides.
    """
    components = path.parent.parent / COMPONENTS
    if path.parent.name != BUNDLES or not components.is_dir():
        return None
    whole = any(os.path.lexists(path / component.folder) for component in manifest.components)
    return None if whole else components


def build(
    parts: Sequence[Part],
    out: Path,
    *,
    channel: str = "dev",
    seq: int = 1,
    created: datetime | None = None,
    expires: datetime | None = None,
    requires_service: str,
    signing_key: Ed25519PrivateKey | None = None,
    check: Callable[[Bundle], object] = lambda bundle: None,
) -> Bundle:
    """Copy the parts into a new bundle at `out`, in one step, in place of the bundle that may be there.

    With `created` given, the same inputs give the same digest. `check` sees the finished bundle under another name; when
    it raises, nothing is at `out` that was not there before.
    """
    _refuse_twins(parts)
    _refuse_foreign(out)
    with disk.local_errors(str(out.parent)):
        out.parent.mkdir(parents=True, exist_ok=True)
    with disk.staged(out) as staging:
        with disk.local_errors(str(staging)):
            staging.mkdir()
        try:
            manifest = Manifest(
                format=FORMAT,
                channel=channel,
                seq=seq,
                created=created or datetime.now(UTC),
                expires=expires,
                requires_service=requires_service,
                components=tuple(
                    sorted((_copy(part, staging) for part in parts), key=lambda each: each.folder)
                ),
            )
        except ValidationError as error:
            raise invalid(error, MANIFEST) from error
        check_chain(manifest)
        raw = dump(manifest)
        parse(raw)  # the limits of the reader hold for the writer too
        disk.write_file(staging / MANIFEST, [raw])
        if signing_key is not None:
            disk.write_file(staging / SIGNATURE, [signing.sign(raw, signing_key)])
        disk.sync_directory(staging)
        check(Bundle(staging, manifest, manifest_digest(raw)))
        _reveal(staging, out)
    return Bundle(out, manifest, manifest_digest(raw))


def diff(old: Manifest, new: Manifest) -> list[Change]:
    """One entry for each component folder of the two, by name; a blob that several need is counted once."""
    olds = {component.folder: component for component in old.components}
    news = {component.folder: component for component in new.components}
    held = {file.sha256 for _, file in old.files()}
    changes = []
    for folder in sorted(olds.keys() | news.keys()):
        before, after = olds.get(folder), news.get(folder)
        to_pull = {file.sha256: file.size for file in after.files if file.sha256 not in held} if after else {}
        held |= to_pull.keys()
        changes.append(Change(folder, _what(before, after), before, after, sum(to_pull.values())))
    return changes


def _what(old: Component | None, new: Component | None) -> Literal["added", "removed", "changed", "same"]:
    if old is None:
        return "added"
    if new is None:
        return "removed"
    return "same" if old == new else "changed"


def _copy(part: Part, staging: Path) -> Component:
    label = part.label
    if not (is_name(part.kind) and is_name(part.name)):
        raise FileUnsafe(
            part=label,
            found=f"kind {part.kind!r}, name {part.name!r}",
            expected="1 to 64 of a-z 0-9 . _ - each",
            remedy="rename the part",
        )
    target = staging / label
    with disk.directory(part.folder, f"{label} ({part.folder})") as source, disk.local_errors(label):
        names = sorted(os.listdir(source))
        target.mkdir()
        files = tuple(_copy_file(name, f"{label}/{name}", source, target) for name in names)
    if not files:
        raise FileMissing(
            part=f"{label} ({part.folder})",
            found="an empty folder",
            expected="files",
            remedy="save the part first",
        )
    disk.sync_directory(target)
    return Component(
        name=part.name,
        kind=part.kind,
        digest=files_digest(files),
        files=files,
        requires=dict(part.requires),
        provides=dict(part.provides),
    )


def _copy_file(name: str, label: str, source: int, target: Path) -> File:
    if not is_name(name):
        raise FileUnsafe(
            part=label,
            found=f"the name {name!r}",
            expected="1 to 64 of a-z 0-9 . _ -",
            remedy="rename the file",
        )
    size, hashed = 0, hashlib.sha256()

    def hashing(chunks: Iterable[bytes]) -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            size += len(chunk)
            hashed.update(chunk)
            yield chunk

    # A source with several names is fine: package installers link files, and the bundle gets its own copy.
    with disk.plain_file(name, label, inside=source, shared=True) as descriptor:
        disk.write_file(target / name, hashing(disk.read_chunks(descriptor, label)))
    return File(name=name, size=size, sha256=hashed.hexdigest())


def _refuse_twins(parts: Sequence[Part]) -> None:
    for label, count in Counter(part.label for part in parts).items():
        if count > 1:
            raise ManifestInvalid(
                part=label,
                found=f"{count} parts for this folder",
                expected="one part for each kind and name",
                remedy="rename one of them",
            )


def _refuse_foreign(out: Path) -> None:
    """Building deletes what was at `out`, so that must be a bundle."""
    if not os.path.lexists(out):
        return
    try:
        with disk.directory(out, str(out)) as inside:
            parse(disk.read_small(MANIFEST, MANIFEST, MANIFEST_LIMIT, inside=inside))
    except (FileMissing, FileUnsafe, ManifestInvalid) as error:
        raise FileUnexpected(
            part=str(out),
            found="something that is no bundle",
            expected="nothing, or a bundle to replace",
            remedy="choose another output folder, or remove this one yourself",
        ) from error


def _reveal(staging: Path, out: Path) -> None:
    if out.exists():
        disk.exchange(staging, out)  # the old bundle is now under the staging name, and goes with it
    else:
        with disk.local_errors(str(out)):
            os.rename(staging, out)
    disk.sync_directory(out.parent)
