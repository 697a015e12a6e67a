"""Calls that end early and servers that are told to stop: what is left over, and what is lost?"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter

import grpc

from benchmarks.chaos.load import Load, Order
from benchmarks.chaos.rig import Rig, Server, free_port
from benchmarks.chaos.section import Section
from benchmarks.chaos.toys import SERVICE, Releases, Toy, make_toys, request
from benchmarks.result import at_least, at_most
from nlu import parts
from nlu.v1 import control_pb2
from nlu.v1.control_pb2_grpc import ControlStub
from nlu.v1.nlu_pb2_grpc import NluStub
from statics.bundle import build
from statics.store import FolderStore
from tests.tiny import CREATED

GAUGES = ("nlu_in_flight", "nlu_queue")
AT_ONCE = 6  # more, and most are cancelled before the server has looked at them


def run(section: Section) -> None:
    """Cancelled calls, then SIGTERMs."""
    toys = make_toys(section.rig.work / "toys")
    _cancelled(section, toys[0])
    _terminated(section, toys)


def _cancelled(section: Section, toy: Toy) -> None:
    rig = section.rig
    bundle = build(parts.collect(toy.folder), rig.work / "bundle", created=CREATED, requires_service=SERVICE)
    redis = rig.redis()
    server = rig.serve(
        "cancelled", bundle=bundle.path, redis=redis.url, answers_bytes=0, lru_bytes=0
    ).wait_ready()
    calls = section.scale(100_000, 2_000)
    asyncio.run(_cancel(server, calls // 4, seed=1))
    before, seen = _settled(server), sum(server.calls().values())
    codes = asyncio.run(_cancel(server, calls, seed=2))
    after = _settled(server)
    gauges = sum(server.metrics().get(name, 0.0) for name in GAUGES)
    told = sum(server.calls().values()) - seen
    calls = codes.total()
    section.say(f"{calls} calls, {dict(codes)}; {(after - before) / 2**20:+.1f} MB")
    section.figures |= {"cancelled": float(codes["CANCELLED"]), "answered": float(codes["OK"])}
    # gRPC itself refuses streams of a caller that resets them faster than the server comes to see them.
    section.figure("calls_refused_by_the_transport", codes["UNAVAILABLE"])
    section.figures |= {"cancelled_rss_mb": (after - before) / 2**20, "calls_the_server_saw": float(told)}
    section.bars += [
        at_least("calls cancelled at random moments", codes["CANCELLED"], section.scale(100_000, 2_000)),
        at_most("live-state gauges afterwards", gauges, 0),
        at_most("memory grown, MB", (after - before) / 2**20, 10.0),
        at_most(
            "calls that ended otherwise", calls - codes["CANCELLED"] - codes["OK"] - codes["UNAVAILABLE"], 0
        ),
    ]
    server.process.end()


async def _cancel(server: Server, count: int, *, seed: int) -> Counter[str]:
    """Until so many are cancelled: begin calls and cancel each after a moment of 0 to 8 ms; most are then somewhere inside the server."""
    chance, codes, room = random.Random(seed), Counter[str](), asyncio.Semaphore(AT_ONCE)

    async def one(i: int) -> None:
        async with room:
            call = stub.Understand(request(f"call {seed} {i} of many"), timeout=10)
            await asyncio.sleep(chance.random() * 0.008)
            call.cancel()
            try:
                await call
                codes["OK"] += 1
            except asyncio.CancelledError:
                codes["CANCELLED"] += 1
            except grpc.aio.AioRpcError as error:
                codes[error.code().name] += 1

    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = NluStub(channel)  # type: ignore[no-untyped-call]
        begun = 0
        while codes["CANCELLED"] < count:
            await asyncio.gather(*(one(begun + i) for i in range(1000)))
            begun += 1000
    return codes


def _settled(server: Server) -> int:
    """Resident bytes, once nothing is under way."""
    end = time.monotonic() + 10
    while time.monotonic() < end and any(server.metrics().get(name, 0.0) for name in GAUGES):
        time.sleep(0.1)
    return server.process.rss


def _terminated(section: Section, toys: tuple[Toy, Toy]) -> None:
    """One of two pods is told to stop, again and again, at every phase of its life; callers try the other once."""
    rig, count, chance = section.rig, section.scale(100, 4), random.Random(3)
    releases = Releases(rig.work / "releases", FolderStore(rig.work / "store"))
    releases.release(toys[0])
    settings: dict[str, object] = {
        "store": rig.work / "store", "keyring": releases.keyring, "require_signature": True, "core": None,
    }  # fmt: skip
    steady = rig.serve("steady", **settings, statics=rig.work / "root-steady").wait_ready()
    port = free_port()
    first = _start(rig, settings, port).wait_ready()
    order = Order((first.target, steady.target), rates=((60.0, 3600.0),), deadline_s=5.0, retries=1)
    asking = Load(rig, order, core=None).begun()
    codes: Counter[int] = Counter()
    longest, server = 0.0, first
    for i in range(count):
        phase = PHASES[i % len(PHASES)]
        if phase == "starting":
            time.sleep(chance.uniform(0.05, 1.5))
        else:
            server.wait_ready()
            _disturb(phase, server, releases, toys, chance)
        began = time.monotonic()
        server.process.popen.send_signal(signal.SIGTERM)
        status = server.process.popen.wait(60)
        # Before Python has come to our first line, SIGTERM does what it does to every process.
        codes[
            0
            if phase == "starting" and "listening" not in server.process.says() and status == -15
            else status
        ] += 1
        longest = max(longest, time.monotonic() - began)
        if i % 20 == 19:
            section.say(f"{i + 1} SIGTERMs, longest {longest:.1f} s")
        server = _start(rig, settings, port)
    server.wait_ready()
    found = asking.result(stop=True)
    lost = sum(number for name, number in found.codes().items() if name != "OK")
    section.say(f"{count} SIGTERMs, {len(found.at)} calls, {dict(found.codes())}, torn: {found.torn}")
    section.figures |= {
        "sigterms": float(count),
        "calls_meanwhile": float(len(found.at)),
        "longest_stop_s": longest,
        "first_tries_refused": float(found.retried),
    }
    section.bars += [
        at_least("SIGTERMs", count, section.scale(100, 4)),
        at_most("calls that failed with one retry", lost, 0),
        at_most("accepted calls whose connection broke", found.torn, 0),
        at_most("exit statuses other than 0", count - codes[0], 0),
    ]
    section.timed.append(at_most("longest stop, s", longest, 25.0))
    steady.process.end()


PHASES = ("serving", "swapping", "starting", "busy")


def _start(rig: Rig, settings: dict[str, object], port: int) -> Server:
    return rig.serve("stopped", **settings, statics=rig.work / "root-stopped", port=port)


def _disturb(
    phase: str, server: Server, releases: Releases, toys: tuple[Toy, Toy], chance: random.Random
) -> None:
    """Be somewhere in this phase when it returns."""
    if phase == "swapping":
        releases.release(toys[releases.seq % 2])
        with grpc.insecure_channel(server.control) as channel:
            ControlStub(channel).Swap.future(control_pb2.SwapRequest(), timeout=30)  # type: ignore[no-untyped-call]
            time.sleep(chance.uniform(0.0, 0.4))
    elif phase == "busy":
        with grpc.insecure_channel(server.target) as channel:
            stub = NluStub(channel)  # type: ignore[no-untyped-call]
            for i in range(50):
                stub.Understand.future(request(f"busy {i} {time.monotonic_ns()}"), timeout=5)
    else:
        time.sleep(chance.uniform(0.0, 0.3))
