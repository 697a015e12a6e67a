"""What can go wrong while serving.

NluError
  x InvalidInput      the caller sent something we will not process      -> INVALID_ARGUMENT
  x Unauthenticated   no valid token or certificate                      -> UNAUTHENTICATED
  x NotAllowed        a known caller asks for what it may not            -> PERMISSION_DENIED
  x Overloaded        no room, or over its rate; try again after a pause -> RESOURCE_EXHAUSTED
  x TooLate           the deadline passed before the work was begun      -> DEADLINE_EXCEEDED
  x Draining          this process is stopping                           -> UNAVAILABLE
  x Holding           there is no bundle fit to serve yet                -> UNAVAILABLE
  x EncodeFailed      the vectorizer raised on this phrase               -> INTERNAL
  x Stuck             the vectorizer does not come back from a phrase    -> UNAVAILABLE
  x EngineRefused     a bundle's parts load but do not belong together   (never reaches a caller)
  x WorkerFailed      a worker process ended, kept silent or failed      (never reaches a caller)
  x VectorizerRefused an exported vectorizer missed a gate               (never reaches a caller)

The mapping to status codes is applied in one place, desk.py.
"""

from __future__ import annotations


class NluError(Exception):
    """Root of the tree."""


class InvalidInput(NluError, ValueError):
    """Bad input; the message carries what was found, what was expected and what to do, never the text itself."""

    def __init__(self, field: str, *, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{field}: found {found}, expected {expected}; {remedy}")
        self.field = field


class Unauthenticated(NluError):
    """The call says not who calls, or says it wrongly; the message never repeats what it said."""


class NotAllowed(NluError):
    """A known caller asks for something that is not for it."""


class Overloaded(NluError):
    """No room, or more than this caller may ask. `retry_after_ms` is what the caller should wait at least."""

    def __init__(self, message: str, *, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class TooLate(NluError):
    """The caller's deadline passed before any compute was spent on the request."""


class Draining(NluError):
    """The process no longer accepts work."""


class Holding(NluError):
    """The process runs but has no bundle fit to serve; it goes on trying."""


class EncodeFailed(NluError):
    """The vectorizer raised on a phrase."""


class Stuck(NluError):
    """The vectorizer has not come back for so long that its thread was given up."""


class EngineRefused(NluError):
    """Parts that verify one by one but do not fit together (canaries, golden phrases, shapes)."""

    def __init__(self, part: str, *, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{part}: found {found}, expected {expected}; {remedy}")
        self.part, self.found, self.expected, self.remedy = part, found, expected, remedy


class WorkerFailed(NluError):
    """A worker process ended, kept silent, or failed at what it was asked in a way that no bundle explains."""


class VectorizerRefused(NluError):
    """A vectorizer folder that is malformed, or an export that missed one of its gates."""
