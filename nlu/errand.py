"""Blocking work in a thread that holds nothing up: neither the calls beside it nor the end of the process.

Threads of asyncio's own executor are joined at exit, however long they take; these are daemons, and `leave` ends a
process in which one still runs without tearing the runtime down under it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_NAME = "errand"
# Added to nice(2), of the thread and those it starts. Measured with callers on the same core: a load at 0 costs their median a
# quarter, at 5 nothing; from 10 on their tail suffers, as a thread that hardly runs keeps the interpreter's lock longer.
_GIVES_WAY = 5


async def errand(
    work: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Result:
    """What `work` returns or raises. A caller that is cancelled stops waiting; the thread goes on, and nobody asks for
    what it brings back."""
    loop = asyncio.get_running_loop()
    brought: asyncio.Future[Result] = loop.create_future()

    def run() -> None:
        with contextlib.suppress(OSError, AttributeError):  # where threads have no priority of their own
            ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, ours + _GIVES_WAY))
        try:
            result = work(*args, **kwargs)
        except BaseException as error:
            _hand_over(loop, brought, None, error)
        else:
            _hand_over(loop, brought, result, None)

    threading.Thread(target=run, name=_NAME, daemon=True).start()
    return await brought


def _hand_over(
    loop: asyncio.AbstractEventLoop,
    brought: asyncio.Future[Result],
    result: Result | None,
    error: BaseException | None,
) -> None:
    def settle() -> None:
        if brought.done():
            return
        if error is None:
            brought.set_result(result)  # type: ignore[arg-type]  # None only where Result is None
        else:
            brought.set_exception(error)

    with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends, and nobody waits
        loop.call_soon_threadsafe(settle)


def under_way() -> int:
    """How many errands still run."""
    return sum(thread.name == _NAME for thread in threading.enumerate())


def leave(status: int = 0) -> None:
    """End the process now if an errand still runs, and else return: native code that works on while the interpreter is
    taken down crashes, and a clean stop must not end in a signal."""
    if under_way():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
