"""Hot swaps under load between two bundles that disagree on every probe.

Every answer is compared, bit for bit, with what its bundle said alone. Volume comes from callers that ask batch after
batch; latency from a paced caller beside them, in windows around each flip and away from all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.chaos.load import Load, Loaded, Order, judged
from benchmarks.chaos.rig import Server
from benchmarks.chaos.section import Section
from benchmarks.chaos.toys import Releases, Toy, make_toys, oracle
from benchmarks.result import at_least, at_most
from statics.store import FolderStore

RATE = 100.0  # calls a second of the paced caller, far from what the server could do
WINDOW_S = 0.25  # after a flip: what counts as during the swap


def run(section: Section) -> None:
    """One process with many swaps; then several processes that flip together."""
    work = section.rig.work
    toys = make_toys(work / "toys")
    known = judged(oracle(toys, work / "alone"))
    _one_process(section, toys, known)
    _several(section, toys, known)


def _one_process(section: Section, toys: Sequence[Toy], known: dict[str, dict[str, str]]) -> None:
    rig, swaps = section.rig, section.scale(200, 12)
    releases = Releases(rig.work / "releases", FolderStore(rig.work / "store"))
    releases.release(toys[0])
    server = rig.serve("one", **_settings(releases)).wait_ready()
    _warm(server, releases, toys)
    # First alone: the volume, and nothing but swaps may fail a call.
    before = server.process.rss
    asking = Load(rig, Order((server.target,), callers=2, deadline_s=5.0, known=known)).begun()
    flips = _swap(section, server, releases, toys, swaps, pause_s=0.4)
    least = section.scale(1_000_000, 20_000)
    while _answered(server) < least and asking.process.popen.poll() is None:
        time.sleep(0.5)
    volume = asking.result(stop=True)
    time.sleep(1.0)
    after = server.process.rss
    # Then the paced caller, for latency.
    paced = _paced(section, server, releases, toys, known)
    tallies = _judge(section, releases, volume, paced[0])
    codes = volume.codes() + paced[0].codes()
    section.say(f"calls ended {dict(codes)}; answers were {dict(tallies)}")
    lost = sum(count for name, count in codes.items() if name != "OK")
    during, away = _split(*paced)
    ratio = float(np.percentile(during, 99) / np.percentile(away, 99))
    section.figures |= {
        "swaps": float(len(flips) + len(paced[1])),
        "answers": float(tallies.total()),
        "wrong_or_mixed": float(tallies["nobody's"] + tallies["other's"]),
        "failed_calls": float(lost),
        "p99_ms_away_from_swaps": float(np.percentile(away, 99)),
        "p99_ms_during_swaps": float(np.percentile(during, 99)),
        "p99_ratio": ratio,
        "swap_s_p50": float(np.median([took for _, took in flips])),
        "rss_mb_before": before / 2**20,
        "rss_mb_grown": (after - before) / 2**20,
    }
    section.bars += [
        at_least("hot swaps", len(flips) + len(paced[1]), section.scale(200, 12)),
        at_least("answers judged", tallies.total(), least),
        at_most("wrong-version or mixed answers", tallies["nobody's"] + tallies["other's"], 0),
        at_most("calls failed", lost, 0),
        at_most("resident memory grown over the swaps, MB", (after - before) / 2**20, 5.0),
        at_least("bundles that answered", len(volume.answers), len(flips) * 0.9),
    ]
    section.timed.append(at_most("p99 during swaps / away from them", ratio, 2.0))
    server.process.end()


def _several(section: Section, toys: Sequence[Toy], known: dict[str, dict[str, str]]) -> None:
    """Two workers on one port: after a flip no worker answers with the bundle before."""
    rig = section.rig
    releases = Releases(rig.work / "releases-2", FolderStore(rig.work / "store-2"))
    releases.release(toys[0])
    server = rig.serve("two", **_settings(releases), processes=2, core=None).wait_ready()
    order = Order(
        (server.target,), rates=((RATE, section.scale(60, 8)),), deadline_s=5.0, known=known, channels=8
    )
    asking = Load(rig, order).begun()
    flips = _swap(section, server, releases, toys, section.scale(40, 4), pause_s=0.5)
    found = asking.result()
    tallies = _judge(section, releases, found)
    lost = sum(count for name, count in found.codes().items() if name != "OK")
    overlap = _overlap_ms(found)
    section.figures |= {
        "workers_swaps": float(len(flips)),
        "workers_answers": float(tallies.total()),
        "workers_wrong_or_mixed": float(tallies["nobody's"] + tallies["other's"]),
        "workers_failed_calls": float(lost),
        "workers_overlap_ms_p99": overlap,
    }
    section.bars += [
        at_most(
            "several workers: wrong-version or mixed answers", tallies["nobody's"] + tallies["other's"], 0
        ),
        at_most("several workers: calls failed", lost, 0),
    ]
    section.timed.append(
        at_most("several workers: ms by which an old answer was begun after a new one", overlap, 100.0)
    )
    server.process.end()


def _settings(releases: Releases) -> dict[str, object]:
    return {
        "store": releases.store.root if isinstance(releases.store, FolderStore) else "",
        "statics": releases.work / "root",
        "keyring": releases.keyring,
        "require_signature": True,
    }


def _warm(server: Server, releases: Releases, toys: Sequence[Toy]) -> None:
    """A few swaps before memory is looked at: allocators have their first growth behind them."""
    for i in range(6):
        releases.release(toys[(i + 1) % 2])
        server.swap()


def _swap(
    section: Section, server: Server, releases: Releases, toys: Sequence[Toy], count: int, *, pause_s: float
) -> list[tuple[float, float]]:
    """(moment, seconds it took) of each."""
    flips = []
    for i in range(count):
        bundle = releases.release(toys[(i + 1) % 2])
        began = time.monotonic()
        reply = server.swap()
        if reply.release.bundle != bundle.digest:
            raise RuntimeError(f"swap {i}: serves {reply.release.bundle}: {reply.release.reason}")
        flips.append((time.monotonic(), time.monotonic() - began))
        if i % 20 == 19:
            section.say(f"{i + 1} swaps, {server.process.rss / 2**20:.1f} MB")
        time.sleep(pause_s)
    return flips


def _paced(
    section: Section,
    server: Server,
    releases: Releases,
    toys: Sequence[Toy],
    known: dict[str, dict[str, str]],
) -> tuple[Loaded, list[tuple[float, float]]]:
    swaps, pause = section.scale(40, 4), 1.0
    order = Order((server.target,), rates=((RATE, swaps * (pause + 0.5)),), deadline_s=5.0, known=known)
    asking = Load(section.rig, order).begun()
    flips = _swap(section, server, releases, toys, swaps, pause_s=pause)
    return asking.result(stop=True), flips


def _split(
    found: Loaded, flips: Sequence[tuple[float, float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latencies of calls meant for a time in which a swap was under way, or had just flipped; and of all others."""
    during = np.zeros(len(found.at), np.bool_)
    for end, took in flips:
        during |= (found.at >= end - took) & (found.at <= end + WINDOW_S)
    return found.ms[during & found.ok], found.ms[~during & found.ok]


def _judge(section: Section, releases: Releases, *loaded: Loaded) -> Counter[str]:
    """Whose answers they were: the right toy's, the other's, nobody's."""
    tallies: Counter[str] = Counter()
    for found in loaded:
        for digest, whose in found.answers.items():
            for name, count in whose.items():
                right = name == releases.toys.get(digest)
                tallies["right" if right else name if name in ("nobody's", "partial") else "other's"] += count
    return tallies


def _overlap_ms(found: Loaded) -> float:
    """How long after the first answer of a bundle one of the bundle before was still begun; the worst of all flips."""
    firsts = {
        bundle: float(found.at[found.bundle == bundle].min())
        for bundle in set(found.bundle.tolist())
        if bundle >= 0
    }
    order = sorted(firsts, key=lambda bundle: firsts[bundle])
    worst = 0.0
    for old, new in zip(order, order[1:], strict=False):
        begun = found.at[found.bundle == old]
        # An answer arrives at at + ms; the new bundle answered first at:
        arrived = float((found.at + found.ms / 1000)[found.bundle == new].min())
        worst = max(worst, 1000 * float(begun.max() - arrived))
    return max(worst, 0.0)


def _answered(server: Server) -> float:
    metrics = server.metrics()
    return 32 * sum(
        value
        for name, value in metrics.items()
        if name == 'nlu_calls_total{code="OK",method="UnderstandBatch"}'
    )
