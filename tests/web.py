"""HTTP by hand over real sockets, for tests of what a client library would never send."""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Any, NamedTuple

JSON = {"content-type": "application/json"}


class Answer(NamedTuple):
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


def request(
    verb: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, *, keep: bool = False
) -> bytes:
    """A request with its length and `connection: close`, unless it is to be kept."""
    fields = {"host": "test", "content-length": str(len(body)), **(headers or {})}
    if not keep:
        fields["connection"] = "close"
    lines = [f"{verb} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


async def exchange(port: int, raw: bytes, *, secure: ssl.SSLContext | None = None) -> Answer | None:
    """Send bytes, read to the end; None where the server hung up without an answer."""
    host = "127.0.0.1" if secure is None else "localhost"
    reader, writer = await asyncio.open_connection(host, port, ssl=secure)
    try:
        writer.write(raw)
        await writer.drain()
        return parsed(await reader.read())
    except ConnectionError:
        return None
    finally:
        writer.close()


async def get(port: int, path: str, headers: dict[str, str] | None = None, **options: Any) -> Answer:
    """GET, which must be answered."""
    return _there(await exchange(port, request("GET", path, headers=headers), **options))


async def post(
    port: int, path: str, body: Any, headers: dict[str, str] | None = None, **options: Any
) -> Answer:
    """POST of JSON, or of bytes as they are, which must be answered."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return _there(await exchange(port, request("POST", path, raw, {**JSON, **(headers or {})}), **options))


def parsed(raw: bytes) -> Answer | None:
    """The first answer in what was read; None where there is none."""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    if not first.startswith("HTTP/1.1 "):
        return None
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(first.split()[1]), headers, body)


def _there(answer: Answer | None) -> Answer:
    assert answer is not None, "the server hung up without an answer"
    return answer
