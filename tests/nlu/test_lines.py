"""nlu.lines: what is sent arrives as it was, and what is no message is refused."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest

from nlu import lines
from nlu.errors import EngineRefused, WorkerFailed
from nlu.lines import Lines
from nlu.types import Release
from statics.errors import DigestMismatch, StaticsError


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Lines, socket.socket]]:
    """One end, and the bare socket of the other."""
    here, there = socket.socketpair()
    one = await Lines.over(here)
    with there:
        yield one, there
        one.close()
        await one.closed()


async def test_lines_bring_messages_whole_and_in_order() -> None:
    ours, theirs = socket.socketpair()
    one, other = await Lines.over(ours), await Lines.over(theirs)
    sent: list[dict[str, object]] = [{"id": number, "text": "слово\n" * 50_000} for number in range(3)]
    for message in sent:
        one.send(message)
    assert [await other.receive() for _ in sent] == sent
    one.close()
    assert await other.receive() is None
    other.close()
    await asyncio.gather(one.closed(), other.closed())


@pytest.mark.parametrize(
    "raw",
    [
        b'{"id": 1, "id": 2}\n',
        b'{"id": 1.5}\n',
        b'{"id": NaN}\n',
        b"[]\n",
        b"nonsense\n",
        b"\xff\n",
        b'{"a":' * 20 + b"1" + b"}" * 20 + b"\n",
    ],
)
async def test_lines_refuse_what_is_no_message(raw: bytes) -> None:
    async with pair() as (one, there):
        there.sendall(raw)
        with pytest.raises(ValueError):
            await one.receive()
        there.sendall(b'{"id": 1}\n')  # the check is not simply on everything
        assert await one.receive() == {"id": 1}


async def test_lines_cap_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LIMIT", 1000)
    async with pair() as (one, there):
        there.sendall(json.dumps({"text": "x" * 900}).encode() + b"\n")
        assert await one.receive() == {"text": "x" * 900}
        there.sendall(json.dumps({"text": "x" * 5000}).encode() + b"\n")
        with pytest.raises(ValueError):
            await one.receive()


async def test_lines_take_a_message_cut_in_two_for_the_end() -> None:
    async with pair() as (one, there):
        there.sendall(b'{"id": 1}\n{"id": 2')
        there.shutdown(socket.SHUT_WR)
        assert await one.receive() == {"id": 1}
        assert await one.receive() is None


@pytest.mark.parametrize(
    "error",
    [
        EngineRefused("head intent", found="x", expected="y", remedy="z"),
        *(kind(part="p", found="f", expected="e", remedy="r") for kind in StaticsError.__subclasses__()),
    ],
    ids=lambda error: type(error).__name__,
)
def test_lines_bring_refusals_as_what_they_are(error: EngineRefused | StaticsError) -> None:
    came = lines.error_in(json.loads(json.dumps(lines.error_out(error))), worker=2)
    assert type(came) is type(error) and str(came) == str(error)


def test_lines_bring_other_errors_as_the_workers_own() -> None:
    came = lines.error_in(lines.error_out(MemoryError("no room")), worker=2)
    assert isinstance(came, WorkerFailed) and "worker 2" in str(came) and "no room" in str(came)
    assert not isinstance(came, EngineRefused | DigestMismatch)


def test_lines_bring_a_release_whole() -> None:
    release = Release(
        state="SERVING",
        bundle="ab" * 32,
        channel="prod",
        seq=7,
        since=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        wanted="cd" * 32,
        reason="голова: found «x»\nand more",
    )
    for each in (Release(), release):
        assert lines.release_in(json.loads(json.dumps(lines.release_out(each)))) == each
