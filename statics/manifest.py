"""The manifest: the one document that names every file of a bundle, its size and its SHA-256."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Annotated

from packaging.specifiers import SpecifierSet
from pydantic import (
    AfterValidator,
    BeforeValidator,
    FailFast,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from statics import document
from statics.document import LARGEST, Document
from statics.errors import FileMissing, FingerprintMismatch

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
MANIFEST_LIMIT = 4 * 1024 * 1024  # bytes

NAME = re.compile(r"[a-z0-9._-]{1,64}")


def is_name(text: str) -> bool:
    """Whether `text` may name a file, a kind, a component or a channel."""
    return NAME.fullmatch(text) is not None and text not in {".", ".."}


def _name(text: str) -> str:
    if not is_name(text):
        raise ValueError("a name is 1 to 64 of a-z 0-9 . _ - and neither '.' nor '..'")
    return text


def _utc(value: object) -> datetime:
    if isinstance(value, str):
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", value):
            raise ValueError("a time is written YYYY-MM-DDThh:mm:ssZ")
        value = datetime.fromisoformat(value)
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError("a time needs its zone")
    return value.astimezone(UTC).replace(microsecond=0)


def _note(text: str) -> str:
    if not (1 <= len(text) <= 256 and text.isprintable()):
        raise ValueError("a note is one line of 1 to 256 printable characters")
    return text


def _range(text: str) -> str:
    if len(text) > 256:
        raise ValueError("a version range has at most 256 characters")
    SpecifierSet(text)  # its InvalidSpecifier is a ValueError
    return text


Name = Annotated[str, AfterValidator(_name)]
Text = Annotated[str, Field(pattern=r"^[ -~]{1,256}$")]
Note = Annotated[str, AfterValidator(_note)]  # what a person wrote, in any language
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=LARGEST)]
Time = Annotated[
    datetime,
    BeforeValidator(_utc),
    PlainSerializer(lambda time: time.isoformat().replace("+00:00", "Z"), return_type=str, when_used="json"),
]


class File(Document):
    """One plain file of a component."""

    name: Name
    size: Count
    sha256: Sha256


class Component(Document):
    """One part of a bundle; `digest` names its content, so equal digests need no reload."""

    name: Name
    kind: Name
    digest: Sha256
    files: Annotated[tuple[File, ...], FailFast()] = Field(min_length=1)
    requires: dict[Name, Text] = {}
    provides: dict[Name, Text] = {}

    @property
    def folder(self) -> str:
        return f"{self.kind}.{self.name}"

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @model_validator(mode="after")
    def _consistent(self) -> "Component":
        if self.folder in {MANIFEST, SIGNATURE}:
            raise ValueError(f"the folder {self.folder} would hide the bundle's own file")
        _refuse_twins("file", (file.name for file in self.files))
        if self.digest != files_digest(self.files):
            raise ValueError(f"digest {self.digest} is not that of the files, {files_digest(self.files)}")
        return self


class Manifest(Document):
    """What a bundle is. The SHA-256 of its raw bytes is the bundle digest.

    `restores` is the digest of the release that a rollback went back to, `note` why this release was made.
    """

    format: int
    channel: Name
    seq: Count
    created: Time
    expires: Time | None = None
    restores: Sha256 | None = None
    note: Note | None = None
    requires_service: Annotated[str, AfterValidator(_range)]
    components: Annotated[tuple[Component, ...], FailFast()]

    @property
    def size(self) -> int:
        return sum(component.size for component in self.components)

    def component(self, kind: str, name: str) -> Component:
        for component in self.components:
            if (component.kind, component.name) == (kind, name):
                return component
        raise FileMissing(
            part=f"{kind}.{name}",
            found=f"only {', '.join(component.folder for component in self.components) or 'an empty bundle'}",
            expected=f"a component {name} of kind {kind}",
            remedy="build a bundle that has it, or ask for one of those found",
        )

    def of_kind(self, kind: str) -> tuple[Component, ...]:
        return tuple(component for component in self.components if component.kind == kind)

    def files(self) -> Iterator[tuple[Component, File]]:
        return ((component, file) for component in self.components for file in component.files)

    @model_serializer(mode="wrap")
    def _fields(self, plainly: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Two fields came later: written only where they are set, they leave older manifests their digest."""
        fields: dict[str, object] = plainly(self)
        unset = {name for name in ("restores", "note") if fields.get(name) is None}
        return {name: value for name, value in fields.items() if name not in unset}

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        _refuse_twins("component folder", (component.folder for component in self.components))
        if self.expires is not None and self.expires <= self.created:
            raise ValueError("the bundle expires before it was created")
        return self


def dump(manifest: Manifest) -> bytes:
    return document.dump(manifest)


def parse(raw: bytes) -> Manifest:
    """The only way in; raises FormatTooNew before anything but the format is read, and ManifestInvalid."""
    return document.load(Manifest, raw, part=MANIFEST, limit=MANIFEST_LIMIT)


def manifest_digest(raw: bytes) -> str:
    """The bundle digest: over the bytes as they are, so that nothing has to be parsed to check it."""
    return hashlib.sha256(raw).hexdigest()


def files_digest(files: Iterable[File]) -> str:
    """The component digest: SHA-256 over `name size sha256` lines sorted by name."""
    lines = (f"{file.name} {file.size} {file.sha256}\n" for file in sorted(files, key=lambda file: file.name))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_chain(manifest: Manifest) -> None:
    """The fingerprint chain: whatever was made with a vectorizer was made with the one in this bundle.

    A head read with vectors of another vectorizer of the same width answers nonsense without any error.
    """
    vectorizers = manifest.of_kind("vectorizer")
    if len(vectorizers) > 1:
        raise FingerprintMismatch(
            part=", ".join(vectorizer.folder for vectorizer in vectorizers),
            found=f"{len(vectorizers)} vectorizers",
            expected="at most one in a bundle",
            remedy="build one bundle for each vectorizer",
        )
    provided = vectorizers[0].provides.get("vectorizer") if vectorizers else None
    for component in manifest.components:
        required = component.requires.get("vectorizer")
        if required is not None and required != provided:
            raise FingerprintMismatch(
                part=component.folder,
                found=f"made with vectorizer {required}",
                expected=f"vectorizer {provided}, the bundle's" if provided else "a vectorizer in the bundle",
                remedy="make it again with the bundle's vectorizer, or bundle the one it was made with",
            )


def _refuse_twins(what: str, names: Iterable[str]) -> None:
    twins = [name for name, count in Counter(names).items() if count > 1]
    if twins:
        raise ValueError(f"{what} {twins[0]} twice")
