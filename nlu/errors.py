"""What can go wrong while serving.

NluError
  x InvalidInput      the caller sent something we will not process      -> INVALID_ARGUMENT
  x Overloaded        the queue is full; try again after a pause         -> RESOURCE_EXHAUSTED
  x TooLate           the deadline passed before the work was begun      -> DEADLINE_EXCEEDED
  x Draining          this process is stopping                           -> UNAVAILABLE
  x EncodeFailed      the vectorizer raised on this phrase               -> INTERNAL
  x EngineRefused     a bundle's parts load but do not belong together   (never reaches a caller)
  x VectorizerRefused an exported vectorizer missed a gate               (never reaches a caller)

The mapping to status codes is applied in one place, rpc.py.
"""

from __future__ import annotations


class NluError(Exception):
    """Root of the tree."""


class InvalidInput(NluError, ValueError):
    """Bad input; the message carries what was found, what was expected and what to do, never the text itself."""

    def __init__(self, field: str, *, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{field}: found {found}, expected {expected}; {remedy}")
        self.field = field


class Overloaded(NluError):
    """No room in the queue. `retry_after_ms` is what the caller should wait at least."""

    def __init__(self, message: str, *, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class TooLate(NluError):
    """The caller's deadline passed before any compute was spent on the request."""


class Draining(NluError):
    """The process no longer accepts work."""


class EncodeFailed(NluError):
    """The vectorizer raised on a phrase."""


class EngineRefused(NluError):
    """Parts that verify one by one but do not fit together (canaries, golden phrases, shapes)."""

    def __init__(self, part: str, *, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{part}: found {found}, expected {expected}; {remedy}")
        self.part = part


class VectorizerRefused(NluError):
    """A vectorizer folder that is malformed, or an export that missed one of its gates."""
