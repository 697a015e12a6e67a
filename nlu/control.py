"""The control service: what an operator may ask of a running server, on a listener of its own.

It takes a digest and nothing else, and the bytes behind it come from the configured store through every check, so the
worst a caller can do is to choose among releases that are signed for this channel. Every call leaves one line in the
audit log. docs/processes.md says who gets in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol

import grpc
from grpc import StatusCode

from nlu import metrics, tls, wire
from nlu.errors import InvalidInput, NotAllowed
from nlu.settings import Settings
from nlu.types import Release
from nlu.v1 import control_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Control"].full_name
MAX_REQUEST_BYTES = 1024

audit = logging.getLogger("nlu.audit")
audit.setLevel(logging.INFO)  # whatever NLU_LOG_LEVEL says

_OPTIONS = (
    (
        "grpc.max_receive_message_length",
        2**16,
    ),  # above our own cap, so that what is refused is refused in our words
    ("grpc.so_reuseport", 0),
)
_DIGEST = re.compile(r"([0-9a-f]{64})?")
_SOCKET_PATH = 107  # bytes; sun_path of unix(7)

Context = grpc.aio.ServicerContext[bytes, bytes]
Answer = Callable[[bytes], Awaitable[tuple[bytes, str]]]


class Steward(Protocol):
    """Whom the calls reach; nlu/steward.py."""

    release: Release

    async def swap(self, digest: str = "") -> tuple[Release, bool]:
        """Serve this release, or whatever the channel points to; whether that changed what is served."""


@asynccontextmanager
async def controlled(settings: Settings, steward: Steward) -> AsyncIterator[str]:
    """The service at the address that the settings name, as that address; without one, nothing.

    Raises ValueError for an address that is not safe, OSError for one that is taken.
    """
    if not settings.control:
        yield ""
        return
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((Control(steward, settings.control_names).handler(),))
    address = _listen(server, settings)
    await server.start()
    audit.info("control: listening on %s", address)
    try:
        yield address
    finally:
        await server.stop(None)


class Control:
    """Its handlers. Over a network only callers with one of these names in their certificate are heard: the client CA
    also lets in those who may only ask questions."""

    def __init__(self, steward: Steward, names: Collection[str] = ()) -> None:
        self._steward, self._names = steward, frozenset(names)

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """What a grpc.aio server is given."""
        methods = {"Swap": self._swap, "State": self._state}
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                name: grpc.unary_unary_rpc_method_handler(self._audited(name, answer))
                for name, answer in methods.items()
            },
        )

    def _audited(self, method: str, answer: Answer) -> Callable[[bytes, Context], Awaitable[bytes]]:
        """One line for every call, however it ends: who asked for what, and what came of it."""

        async def handle(raw: bytes, context: Context) -> bytes:
            who, code, result = who_calls(context), StatusCode.OK, ""
            try:
                self._admit(context)
                reply, result = await answer(raw)
                return reply
            except asyncio.CancelledError:
                code, result = StatusCode.CANCELLED, "the caller left; what was begun goes on"
                raise
            except (InvalidInput, NotAllowed) as error:
                bad = isinstance(error, InvalidInput)
                code, result = (
                    StatusCode.INVALID_ARGUMENT if bad else StatusCode.PERMISSION_DENIED,
                    str(error),
                )
                await context.abort(code, result)
            except Exception as error:
                code, result = StatusCode.INTERNAL, "an error on our side; the server's log has it"
                audit.error("%s failed", method, exc_info=error)
                await context.abort(code, result)
            finally:
                metrics.CONTROL_CALLS.labels(method, code.name).inc()
                audit.info("control: %s asked %s%s: %s, %s", who, method, _asked(raw), code.name, result)

        return handle

    def _admit(self, context: Context) -> None:
        if not _local(context) and self._names.isdisjoint(tls.peer_of(context.auth_context()).split()):
            raise NotAllowed(
                "control: found a certificate without a name that may do this, expected an operator's; "
                "ask for one, or for its name in NLU_CONTROL_NAMES"
            )

    async def _swap(self, raw: bytes) -> tuple[bytes, str]:
        request = wire.parse(pb.SwapRequest(), raw, limit=MAX_REQUEST_BYTES)
        if not _DIGEST.fullmatch(request.digest):
            raise InvalidInput(
                "digest",
                found=f"{len(request.digest)} characters that are none",
                expected="64 of 0-9 a-f, or nothing",
                remedy="name a release by the digest that `nlu bundle` shows",
            )
        release, changed = await self._steward.swap(request.digest)
        reply = pb.SwapReply(release=wire.release_message(release), changed=changed)
        return reply.SerializeToString(), _told(release, changed)

    async def _state(self, raw: bytes) -> tuple[bytes, str]:
        wire.parse(pb.StateRequest(), raw, limit=MAX_REQUEST_BYTES)
        release = self._steward.release
        return wire.release_message(release).SerializeToString(), release.state


def who_calls(context: Context) -> str:
    """The caller, for the log. gRPC shows no credentials of a socket's peer; its mode says who that can be."""
    if _local(context):
        return f"unix uid {os.geteuid()} or root"
    return f"{context.peer()} {tls.peer_of(context.auth_context()) or 'without a name'}"


def _local(context: Context) -> bool:
    return context.peer().startswith("unix:")


def _asked(raw: bytes) -> str:
    """The digest of a request, as far as it is one; nothing that a caller chose goes into the log otherwise."""
    try:
        digest = wire.parse(pb.SwapRequest(), raw, limit=MAX_REQUEST_BYTES).digest
    except InvalidInput:
        return " (malformed)"
    if not _DIGEST.fullmatch(digest):
        return " (no digest)"
    return f" {digest}" if digest else ""


def _told(release: Release, changed: bool) -> str:
    serves = f"{'now serves' if changed else 'serves'} {release.bundle[:12] or 'nothing'}"
    return f"{serves}; {release.wanted[:12]} refused: {release.reason}" if release.reason else serves


def _listen(server: grpc.aio.Server, settings: Settings) -> str:
    address = settings.control
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        with _place(path):
            _bound(server.add_insecure_port, f"unix:{path}")
        os.chmod(path, 0o600)
        return f"unix:{path}"
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"NLU_CONTROL: found {address!r}, expected unix:/path or host:port; set one of the two"
        )
    if not settings.control_names:
        raise ValueError(
            f"NLU_CONTROL_NAMES: found none for {address}, expected the names of operators, as their certificates have them; "
            "set it, or NLU_CONTROL=unix:/path"
        )
    credentials = tls.server_credentials(settings) if settings.tls_client_ca is not None else None
    if credentials is None:
        raise ValueError(
            f"NLU_CONTROL: found {address} and no client CA, expected certificates of both sides wherever a network can reach; "
            "set NLU_TLS_CERT, NLU_TLS_KEY and NLU_TLS_CLIENT_CA, or NLU_CONTROL=unix:/path"
        )
    return f"{host}:{_bound(lambda to: server.add_secure_port(to, credentials), address)}"


def _bound(bind: Callable[[str], int], address: str) -> int:
    try:
        return bind(address)
    except RuntimeError as error:
        raise OSError(
            f"NLU_CONTROL: found {address} taken or not of this machine, expected a free one; set another"
        ) from error


@contextmanager
def _place(path: Path) -> Iterator[None]:
    """A free place for a socket in a folder that only we write, and a mask under which it is ours from the first moment."""
    if not path.is_absolute() or len(os.fsencode(path)) > _SOCKET_PATH:
        raise ValueError(
            f"NLU_CONTROL: found the path {path}, expected an absolute one of at most {_SOCKET_PATH} bytes; set another"
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = path.parent.stat()
    if folder.st_uid != os.geteuid() or folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"NLU_CONTROL: found {path.parent} of uid {folder.st_uid} with mode {stat.S_IMODE(folder.st_mode):o}, "
            f"expected a folder of uid {os.geteuid()} that nobody else may write; set a path in one"
        )
    _clear(path)
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _clear(path: Path) -> None:
    """Remove a socket that a dead server left, and nothing else."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ValueError(
            f"NLU_CONTROL: found something that is no socket at {path}, expected nothing; remove it or set another path"
        )
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise OSError(
                f"NLU_CONTROL: found another server at {path}, expected nobody; stop it or set another path"
            )
    path.unlink()
