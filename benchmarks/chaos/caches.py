"""What callers notice of a Redis that dies, freezes, flaps, fills up, lies or changes its password.

The server keeps nothing of its own (no LRU, no answers), so every call asks Redis first. Latency is compared with the
same callers' calls while Redis is well.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.chaos.load import SOURCES, Load, Order, difference, judged, wrong
from benchmarks.chaos.rig import Redis, Server
from benchmarks.chaos.section import Section
from benchmarks.chaos.toys import SERVICE, make_toys, oracle
from benchmarks.result import Bar, at_most
from nlu import parts
from statics.bundle import build
from tests.tiny import CREATED

RATE = 200.0
FIRST_S, SLACK_S = 0.1, 0.05
FLAP_S = 0.5
REDIS = SOURCES.index("SOURCE_REDIS")


@dataclass(frozen=True)
class Trouble:
    """One kind of trouble: how it begins, how it ends. One that comes `times` times begins once a second."""

    name: str
    begin: Callable[[Redis], None]
    end: Callable[[Redis], None]
    times: int = 1


def run(section: Section) -> None:
    """Every kind, one after the other, against one server."""
    rig = section.rig
    toys = make_toys(rig.work / "toys")
    known = judged(oracle(toys, rig.work / "alone"))
    bundle = build(
        parts.collect(toys[0].folder), rig.work / "bundle", created=CREATED, requires_service=SERVICE
    )
    redis = rig.redis()
    server = rig.serve(
        "redis",
        bundle=bundle.path,
        redis=redis.url,
        cache_secret="a secret of this run",
        lru_bytes=0,
        answers_bytes=0,
    ).wait_ready()
    calls: Counter[str] = Counter()
    for trouble in TROUBLES[:: 2 if section.fast else 1]:
        calls += _one(section, trouble, redis, server, known)
    apart = difference(calls, server.calls())
    section.bars.append(at_most("difference of client's and server's tallies", apart, 0))
    server.process.end()
    _without(section, bundle.path)


def _one(
    section: Section, trouble: Trouble, redis: Redis, server: Server, known: dict[str, dict[str, str]]
) -> Counter[str]:
    well, ill, after = section.scale(8, 2), section.scale(8, 2), section.scale(5, 3)
    order = Order((server.target,), rates=((RATE, well + ill + after),), known=known, deadline_s=5.0)
    asking = Load(section.rig, order).begun()
    time.sleep(well)
    onsets = []
    for i in range(trouble.times):
        if i:
            trouble.end(redis)
            time.sleep(FLAP_S)
        began = time.monotonic()
        trouble.begin(redis)
        onsets.append((began, time.monotonic()))
        time.sleep(FLAP_S if trouble.times > 1 else ill)
    trouble.end(redis)
    ended = time.monotonic()
    found = asking.result()
    first = np.zeros(len(found.at), np.bool_)
    for began, hurt in onsets:
        first |= (found.at >= began - SLACK_S) & (found.at < hurt + FIRST_S)
    base = found.ms[(found.at < onsets[0][0] - SLACK_S) & (found.at > found.at.min() + 0.5)]
    then = found.ms[~first & (found.at >= onsets[0][0]) & (found.at < ended)]
    again = found.at[(found.source == REDIS) & (found.at > ended)]
    back = float(again.min() - ended) if len(again) else float("inf")
    p99 = float(np.percentile(base, 99))
    section.say(f"{trouble.name}: back after {back:.2f} s")
    failed = int((~found.ok).sum())
    added_first = float(np.percentile(found.ms[first], 99)) - p99
    added_then = float(np.percentile(then, 99)) - p99
    section.figures |= {
        f"{trouble.name}_p99_ms_before": p99,
        f"{trouble.name}_added_p99_ms_first_100_ms": added_first,
        f"{trouble.name}_added_p99_ms_after": added_then,
        f"{trouble.name}_back_s": back,
    }
    section.bars += [
        at_most(f"{trouble.name}: calls failed", failed, 0),
        at_most(f"{trouble.name}: wrong answers", wrong(found.answers, "a"), 0),
    ]
    section.timed += [
        at_most(f"{trouble.name}: added p99 in the first 100 ms, ms", added_first, 25.0),
        at_most(f"{trouble.name}: added p99 after, ms", added_then, 1.0),
        at_most(f"{trouble.name}: s until Redis is used again", back, 2.0),
    ]
    return found.codes()


def _without(section: Section, bundle: os.PathLike[str]) -> None:
    """A server that starts while there is no Redis at all."""
    server = section.rig.serve(
        "alone", bundle=bundle, redis="redis://127.0.0.1:1/0", lru_bytes=0, answers_bytes=0
    )
    server.wait_ready()
    found = Load(section.rig, Order((server.target,), rates=((50.0, 2.0),))).result()
    section.bars += [
        at_most("no Redis at start: calls failed", int((~found.ok).sum()), 0),
        Bar("no Redis at start: the server gets ready", 1.0, 1.0, holds=True),
    ]
    server.process.end()


def _fill(redis: Redis) -> None:
    redis.do("config", "set", "maxmemory-policy", "noeviction")
    redis.do("config", "set", "maxmemory", "1")


def _empty(redis: Redis) -> None:
    redis.do("config", "set", "maxmemory", "0")


_SPOIL = """
local keys, i = redis.call('keys', '*'), tonumber(ARGV[1])
table.sort(keys)
local key, kind = keys[i], i % 4
if kind == 0 then redis.call('set', key, redis.call('get', keys[i % #keys + 1]))
elseif kind == 1 then redis.call('set', key, string.rep('x', 200))
elseif kind == 2 then redis.call('del', key); redis.call('rpush', key, 'x')
else redis.call('set', key, string.rep('x', 5000000)) end
"""


def _poison(redis: Redis) -> None:
    """Every value becomes another key's, garbage, a list, or far too long; one by one, so that Redis itself is quick."""
    count = int(redis.do("dbsize"))
    if not count:
        raise RuntimeError("redis holds nothing to poison")
    for number in range(count, 0, -1):
        redis.do("eval", _SPOIL, "0", str(number))


def _clean(redis: Redis) -> None:
    redis.do("flushall")


def _lock(redis: Redis) -> None:
    redis.do("config", "set", "requirepass", "another")
    subprocess.run(
        [
            "redis-cli",
            "-p",
            str(redis.port),
            "-a",
            "another",
            "--no-auth-warning",
            "client",
            "kill",
            "type",
            "normal",
        ],
        capture_output=True,
        check=False,
    )


def _unlock(redis: Redis) -> None:
    subprocess.run(
        [
            "redis-cli",
            "-p",
            str(redis.port),
            "-a",
            "another",
            "--no-auth-warning",
            "config",
            "set",
            "requirepass",
            "",
        ],
        capture_output=True,
        check=True,
    )


TROUBLES = (
    Trouble("killed", Redis.kill, Redis.start),
    Trouble("frozen", Redis.freeze, Redis.thaw),
    Trouble("flapping", Redis.freeze, Redis.thaw, times=6),
    Trouble("full", _fill, _empty),
    Trouble("poisoned", _poison, _clean),
    Trouble("locked", _lock, _unlock),
)
