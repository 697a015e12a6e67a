"""SIGKILL at random moments of pulls and swaps: is what is left ever anything but an old or a new bundle?

Half are processes that pull release after release into one folder; after each kill a cold start looks at the folder, and
every file of the bundle it finds is hashed again. The others are whole servers that swap; after each kill one is started
on the same folder without a store, and what it says is compared with what its bundle says alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import grpc

from benchmarks.chaos.rig import Server
from benchmarks.chaos.section import Section
from benchmarks.chaos.toys import CHANNEL, PROBES, Releases, Toy, facts, make_toys, oracle, request
from benchmarks.result import at_least, at_most
from nlu.v1 import control_pb2
from nlu.v1.control_pb2_grpc import ControlStub
from nlu.v1.nlu_pb2_grpc import NluStub
from statics.bundle import Bundle
from statics.errors import StaticsError
from statics.pull import current, pull
from statics.signing import Keyring
from statics.store import FolderStore
from statics.verify import Trust
from statics.version import service_version


def run(section: Section) -> None:
    """Pulls, then servers."""
    toys = make_toys(section.rig.work / "toys", shape=64)
    pulls, bad_pulls = _pulls(section, toys)
    swaps, bad_swaps = _servers(section, toys)
    section.figures |= {"killed_pulls": float(pulls), "killed_servers": float(swaps)}
    section.bars += [
        at_least("SIGKILLs", pulls + swaps, section.scale(500, 39)),
        at_most("bad states after a killed pull", bad_pulls, 0),
        at_most("bad states after a killed server", bad_swaps, 0),
    ]


def _pulls(section: Section, toys: tuple[Toy, Toy]) -> tuple[int, int]:
    work, chance = section.rig.work, random.Random(5)
    releases = Releases(work / "releases", FolderStore(work / "store"))
    first = releases.release(toys[0])
    root, keyring = work / "root", Keyring.load(releases.keyring)
    trust = Trust(service_version(), keyring, require_signature=True)
    _pull(releases, root, keyring)
    steps: Counter[str] = Counter()
    killed = bad = 0
    seq = 1
    lasts_s = 0.05
    with Zygote(releases, root) as zygote:
        while killed < section.scale(420, 36):
            latest = releases.release(toys[(releases.seq + chance.randrange(2)) % 2])
            ended = zygote.killed_after(chance.uniform(0.0, lasts_s))
            steps[ended] += 1
            killed += ended == "while-pulling"
            lasts_s *= 1.05 if ended == "while-pulling" else 0.9  # about as long as a pull takes here
            try:
                found = current(root, trust=trust)
            except StaticsError:
                found = None
            if (
                found is None
                or not seq <= found.manifest.seq <= latest.manifest.seq
                or found.digest not in releases.toys
            ):
                bad += 1
                section.say(f"bad state after kill {killed}: {found and found.manifest.seq}")
            else:
                seq = found.manifest.seq
    last = _pull(releases, root, keyring)
    if releases.latest is None or last.digest != releases.latest.digest:
        bad += 1
    left = [path.name for path in (root / "staging").glob("*")] if (root / "staging").exists() else []
    bad += len(left) > 1
    section.figures |= {f"killed_{step}": float(count) for step, count in sorted(steps.items())}
    section.figures["releases_left_behind"] = float(seq - first.manifest.seq)
    section.say(f"{killed} pulls killed, {dict(steps)}")
    return killed, bad


def _pull(releases: Releases, root: Path, keyring: Keyring) -> Bundle:
    return pull(
        releases.store,
        root,
        channel=CHANNEL,
        service=service_version(),
        keyring=keyring,
        require_signature=True,
    )


class Zygote:
    """A process with everything imported, which forks one that pulls; so a kill costs milliseconds, not an interpreter."""

    def __init__(self, releases: Releases, root: Path) -> None:
        store = releases.store
        if not isinstance(store, FolderStore):
            raise TypeError("expected a store in a folder")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.chaos.puller",
                str(store.root),
                str(root),
                str(releases.keyring),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def killed_after(self, seconds: float) -> str:
        """Have one pull, kill it so much later, and say whether it was still pulling."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("a zygote without pipes; this is a bug")
        stdin.write("pull\n")
        stdin.flush()
        pid = int(stdout.readline())
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(pid, signal.SIGKILL)
        return stdout.readline().strip()


def _servers(section: Section, toys: tuple[Toy, Toy]) -> tuple[int, int]:
    rig, chance = section.rig, random.Random(6)
    known = oracle(toys, rig.work / "alone")
    releases = Releases(rig.work / "releases-2", FolderStore(rig.work / "store-2"))
    releases.release(toys[0])
    bad = 0
    count = section.scale(90, 3)
    settings = {
        "statics": rig.work / "root-2", "keyring": releases.keyring, "require_signature": True, "core": None,
        "trial": "never",
    }  # fmt: skip
    server = rig.serve("swapping", store=rig.work / "store-2", **settings).wait_ready()
    for i in range(count):
        releases.release(toys[(i + 1) % 2])
        _kill_in_swap(server, chance.uniform(0.0, 0.25))
        # The store is gone: only what the folder holds can be served.
        gone = rig.work / "store-2-away"
        (rig.work / "store-2").rename(gone)
        again = rig.serve("swapping", store=rig.work / "store-2", **settings)
        try:
            again.wait_ready(30)
            bad += not _right(again, releases, known, chance)
        except RuntimeError as error:
            bad += 1
            section.say(f"server {i} did not come back: {error}")
        gone.rename(rig.work / "store-2")
        server = again
        if i % 20 == 19:
            section.say(f"{i + 1} servers killed")
    server.process.end()
    return count, bad


def _kill_in_swap(server: Server, kill_after_s: float) -> None:
    """Ask for a swap, and kill the server so much later, however far it is."""
    with grpc.insecure_channel(server.control) as channel:
        future = ControlStub(channel).Swap.future(control_pb2.SwapRequest(), timeout=60)  # type: ignore[no-untyped-call]
        time.sleep(kill_after_s)
        # The server is killed while this channel is open: cancelling would be one more thing that happens to it.
        server.process.kill()
        future.cancel()


def _right(
    server: Server, releases: Releases, known: dict[str, dict[str, bytes]], chance: random.Random
) -> bool:
    with grpc.insecure_channel(server.target) as channel:
        stub = NluStub(channel)  # type: ignore[no-untyped-call]
        for probe in chance.sample(PROBES, 5):
            reply = stub.Understand(request(probe), timeout=5)
            toy = releases.toys.get(reply.versions.bundle)
            if toy is None or facts(reply) != known[toy][probe]:
                return False
    return True
