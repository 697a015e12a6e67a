"""What a supervisor and its worker say to each other: JSON objects, one a line, over a socket that only the two hold."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from nlu.errors import EngineRefused, WorkerFailed
from nlu.types import Release
from statics.bundle import Bundle
from statics.document import strict_json
from statics.errors import StaticsError

LIMIT = 4 * 2**20  # bytes of one message; the longest are metrics

Body = dict[str, Any]

_RELEASE = TypeAdapter(Release)
_REFUSALS: dict[str, type[EngineRefused] | type[StaticsError]] = {
    EngineRefused.__name__: EngineRefused,
    **{kind.__name__: kind for kind in StaticsError.__subclasses__()},
}
_FIELDS = ("part", "found", "expected", "remedy")


class Lines:
    """One end of the socket. Of one event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def over(cls, end: socket.socket) -> Lines:
        """Takes the socket over."""
        return cls(*await asyncio.open_connection(sock=end, limit=LIMIT))

    def send(self, message: Mapping[str, object]) -> None:
        """Hand a message over; what the other end does not read any more is lost without a word."""
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> Body | None:
        """The next message, None where the other end is gone; ValueError for what is no message."""
        try:
            raw = await self._reader.readline()
        except ConnectionError:
            return None
        if not raw.endswith(b"\n"):  # the end, or a message it cut in two
            return None
        return strict_json(raw, LIMIT)

    def close(self) -> None:
        """The other end sees the end of the stream, after all that was sent."""
        self._writer.close()

    async def closed(self) -> None:
        """Until all that was sent is on its way."""
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


def bundle_out(bundle: Bundle) -> Body:
    """A bundle by place and digest; the other end reads its manifest again and compares."""
    return {"path": str(bundle.path), "digest": bundle.digest}


def bundle_in(body: Body) -> tuple[Path, str]:
    """Place and digest."""
    return Path(body["path"]), str(body["digest"])


def release_out(release: Release) -> Body:
    """A release as JSON."""
    body: Body = _RELEASE.dump_python(release, mode="json")
    return body


def release_in(body: Body) -> Release:
    """A release from JSON."""
    return _RELEASE.validate_json(json.dumps(body), strict=True)


def error_out(error: Exception) -> Body:
    """What went wrong; refusals with what makes them whole again, anything else by kind and text."""
    kind = type(error).__name__
    if kind in _REFUSALS:
        return {"kind": kind, **{field: getattr(error, field) for field in _FIELDS}}
    return {"kind": kind, "text": str(error)}


def error_in(body: Body, *, worker: int) -> Exception:
    """The refusal that was sent; what is none was the worker's own trouble."""
    refusal = _REFUSALS.get(str(body["kind"]))
    if refusal is None:
        return WorkerFailed(f"worker {worker}: {body['text'] or body['kind']}")
    part, found, expected, remedy = (str(body[field]) for field in _FIELDS)
    return refusal(part=part, found=found, expected=expected, remedy=remedy)
