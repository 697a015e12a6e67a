"""A channel's pointer: the one small object that says which manifest is the current release."""

from typing import Annotated

from pydantic import Field

from statics import document
from statics.document import Document
from statics.manifest import MANIFEST_LIMIT, Count, Manifest, Name, Sha256
from statics.version import FORMAT

POINTER_LIMIT = 16 * 1024  # bytes

REMEDY = "delete it, then publish its release again (in a store), or pull again (on a machine)"


class Pointer(Document):
    """`manifest` is the bundle digest, and `size` the manifest's length: no more than that is ever read."""

    format: int
    channel: Name
    seq: Count
    manifest: Sha256
    size: Annotated[int, Field(ge=1, le=MANIFEST_LIMIT)]


def pointer_to(manifest: Manifest, digest: str, size: int) -> Pointer:
    return Pointer(format=FORMAT, channel=manifest.channel, seq=manifest.seq, manifest=digest, size=size)


def dump(pointer: Pointer) -> bytes:
    return document.dump(pointer)


def parse(raw: bytes, part: str) -> Pointer:
    """Raises FormatTooNew and ManifestInvalid, naming `part`."""
    return document.load(Pointer, raw, part=part, limit=POINTER_LIMIT, remedy=REMEDY)
