"""grpc.health.v1 over plain statuses: `set` waits for nobody, so that health changes together with what serves.

The servicer of grpcio-health-checking writes to its watchers under the lock that its `set` waits for, and has no way to
let them go: each would keep a server that drains until its last second.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
LIVE = "live"  # not stuck; every other name says whether calls are answered
MAX_WATCHERS = 1000  # a watcher holds a stream for as long as it likes

_Status: TypeAlias = health_pb2.HealthCheckResponse
Context = grpc.aio.ServicerContext[bytes, bytes]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types
    """One status a name; only the event loop's thread may touch it."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._changed = asyncio.Event()
        self._watchers = 0
        self._shut = self._ended = False

    def set(self, names: Iterable[str], serving: bool) -> None:
        """From now on these are SERVING, or NOT_SERVING; after `shut` nothing is SERVING again."""
        self._serving.update(dict.fromkeys(names, serving and not self._shut))
        self._tell()

    def shut(self) -> None:
        """Everything is NOT_SERVING from now on, except that the process lives."""
        self._shut = True
        self._serving.update(dict.fromkeys(self._serving.keys() - {LIVE}, False))
        self._tell()

    def end(self) -> None:
        """Let the watchers go, who would keep the server's last moments waiting."""
        self._ended = True
        self._tell()

    def serving(self, name: str) -> bool | None:
        """Whether it is; None where nothing has this name."""
        return self._serving.get(name)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> _Status:
        """NOT_FOUND for a name that never was."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, "nothing here has this name")
        return self._status(request.service)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> AsyncIterator[_Status]:
        """The status now, and whenever it is another; what changed twice while nobody read is told once."""
        if self._watchers >= MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} watch already")
        self._watchers += 1
        try:
            told = None
            while True:
                changed, status = self._changed, self._status(request.service)
                if status != told:
                    yield status
                    told = status
                if self._ended:
                    return
                await changed.wait()
        finally:
            self._watchers -= 1

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, name: str) -> _Status:
        serving = self._serving.get(name)
        if serving is None:
            return _Status(status=_Status.SERVICE_UNKNOWN)
        return _Status(status=_Status.SERVING if serving else _Status.NOT_SERVING)
