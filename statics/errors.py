"""What can be wrong with statics; every error says what was found, what was expected and what to do.

StaticsError
├── the manifest          ManifestInvalid · FormatTooNew · ServiceMismatch · FingerprintMismatch
├── the files             FileMissing · FileUnexpected · FileUnsafe · SizeMismatch · DigestMismatch
├── who vouches for it    SignatureMissing · SignatureInvalid
├── which release it is   SeqTooOld · ChannelMismatch · Expired
├── the store             NotFound · Forbidden · StoreUnavailable · Conflict
└── the local disk        DiskFull (and Forbidden, where the disk refuses)
"""

from typing import ClassVar

LONGEST = 400  # characters of one field in a message: a hostile manifest must not flood the log


class StaticsError(Exception):
    """`code` is stable and meant for metrics and alarms, the text is meant for people."""

    code: ClassVar[str] = "statics"

    def __init__(self, *, part: str, found: str, expected: str, remedy: str) -> None:
        self.part, self.found = _line(part), _line(found)
        self.expected, self.remedy = _line(expected), _line(remedy)
        super().__init__(
            f"{self.code}: {self.part}: found {self.found}, expected {self.expected}; remedy: {self.remedy}"
        )


def _line(text: str) -> str:
    """File names and manifest texts come from outside: one printable line, so that logs cannot be forged."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: LONGEST + 1])
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


class ManifestInvalid(StaticsError):
    """The manifest, or another of our JSON documents, is not what it must be."""

    code = "manifest-invalid"


class FormatTooNew(StaticsError):
    """The bundle format is newer than this code."""

    code = "format-too-new"


class ServiceMismatch(StaticsError):
    """The bundle asks for other versions of the service than the one that runs."""

    code = "service-mismatch"


class FingerprintMismatch(StaticsError):
    """A component was made with another vectorizer than the bundle's."""

    code = "fingerprint-mismatch"


class FileMissing(StaticsError):
    """A file or component the manifest (or the caller) names is not there."""

    code = "file-missing"


class FileUnexpected(StaticsError):
    """A file or folder is there that the manifest does not name."""

    code = "file-unexpected"


class FileUnsafe(StaticsError):
    """A link, something that is not a plain file, a bad name, or a file that cannot be read."""

    code = "file-unsafe"


class SizeMismatch(StaticsError):
    """More or fewer bytes than declared."""

    code = "size-mismatch"


class DigestMismatch(StaticsError):
    """The right number of bytes, but other ones."""

    code = "digest-mismatch"


class SignatureMissing(StaticsError):
    """A signature is required and there is none."""

    code = "signature-missing"


class SignatureInvalid(StaticsError):
    """No trusted key vouches for these bytes, or the keys themselves cannot be used."""

    code = "signature-invalid"


class SeqTooOld(StaticsError):
    """A release older than one already published or pulled: a rollback or a stale pointer."""

    code = "seq-too-old"


class ChannelMismatch(StaticsError):
    """A release of another channel."""

    code = "channel-mismatch"


class Expired(StaticsError):
    """A release past its `expires`, by the clock of this machine."""

    code = "expired"


class NotFound(StaticsError):
    """The store has no such pointer, manifest or blob."""

    code = "not-found"


class Forbidden(StaticsError):
    """The store or the disk refuses us."""

    code = "forbidden"


class StoreUnavailable(StaticsError):
    """The store cannot be reached, fails, or is too slow; trying again later may work."""

    code = "store-unavailable"


class Conflict(StaticsError):
    """Somebody else wrote first."""

    code = "conflict"


class DiskFull(StaticsError):
    """No room for the bundle."""

    code = "disk-full"
