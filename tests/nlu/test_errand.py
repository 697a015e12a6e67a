"""nlu.errand: blocking work that holds nothing up, least of all the end of the process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

import pytest

from nlu import errand


async def test_errand_brings_back_what_was_returned_or_raised() -> None:
    assert await errand.errand(int, "11", base=2) == 3
    with pytest.raises(ValueError):
        await errand.errand(int, "eleven")


async def test_errand_of_a_caller_that_is_cancelled_goes_on_unheard() -> None:
    may_end = threading.Event()
    task = asyncio.create_task(errand.errand(may_end.wait))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert errand.under_way() == 1
    may_end.set()
    while errand.under_way():
        await asyncio.sleep(0.001)


STUCK = """
import asyncio, time
from nlu.errand import errand, leave

async def main():
    task = asyncio.create_task({waiting})
    await asyncio.sleep(0.1)
    task.cancel()

asyncio.run(main())
{leaving}
print("not reached" if {leaving!r} else "reached")
"""


def run(waiting: str, leaving: str, timeout: float) -> subprocess.CompletedProcess[str]:
    program = STUCK.format(waiting=waiting, leaving=leaving)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=timeout)


def test_errand_that_never_ends_does_not_keep_a_process_from_leaving() -> None:
    left = run("errand(time.sleep, 600)", "leave(0)", 60)
    assert (left.returncode, left.stdout) == (0, "")


def test_errand_control_a_thread_of_the_executor_keeps_the_process() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run("asyncio.to_thread(time.sleep, 600)", "", 5)


def test_errand_leave_returns_where_nothing_is_under_way() -> None:
    done = run("asyncio.sleep(0)", "leave(3)", 60)
    assert (done.returncode, done.stdout) == (0, "not reached\n")


async def test_errand_gives_way_to_calls_and_so_does_what_it_starts() -> None:
    def niceness() -> list[int]:
        found: list[int] = []

        def look() -> None:
            found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

        look()
        another = threading.Thread(target=look)
        another.start()
        another.join()
        return found

    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert all(each > ours for each in await errand.errand(niceness))
    assert os.getpriority(os.PRIO_PROCESS, 0) == ours
