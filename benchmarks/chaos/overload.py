"""More calls than the server can answer: how many does it still answer in time, and how soon is it itself again?

The model really computes for some 40 ms a phrase, as one of twelve layers does on one core, so that ten times its capacity
is still a rate that one core of callers can offer. To refuse a call costs the server time too, most of it in gRPC's Python;
with a quicker model the same share of capacity is more calls, and refusing them takes more of the core. No phrase comes twice. The same run against a server without admission is the control.
"""

from __future__ import annotations

import threading
import time

import grpc
import numpy as np

from benchmarks.chaos.load import Load, Loaded, Order, difference
from benchmarks.chaos.rig import Server
from benchmarks.chaos.section import Section
from benchmarks.chaos.toys import SERVICE, Toy, request
from benchmarks.result import at_least, at_most
from nlu import parts
from nlu.v1.nlu_pb2_grpc import NluStub
from statics.bundle import build
from tests.tiny import CREATED, make_parts

WORK = 24  # matrix products a phrase
DEADLINE_S = 0.3
STEPS = (0.5, 1.0, 2.0, 5.0, 10.0, 0.5)  # times capacity
FAST_STEPS = (1.0, 5.0, 0.5)
RECOVERED = 0.999


def run(section: Section) -> None:
    """Steps up and down, protected and not."""
    rig = section.rig
    toy = Toy("slow", make_parts(rig.work / "slow", seed=21, work=WORK))
    bundle = build(parts.collect(toy.folder), rig.work / "bundle", created=CREATED, requires_service=SERVICE)
    seconds = section.scale(20, 2)
    protected = _steps(section, "protected", seconds, bundle=bundle.path)
    for step in sorted(protected.keys() - {0.0}):
        section.figures |= {f"{name}_at_{step:g}x": value for name, value in protected[step].items()}
    section.figures["capacity_per_s"] = protected[0.0]["capacity"]
    section.figures["refusal_cpu_ms"] = protected[0.0]["refusal_cpu_ms"]
    section.figures["recovery_s"] = protected[0.0]["recovery_s"]
    for step, least in ((2.0, 0.9), (5.0, 0.9), (10.0, 0.7)):
        if step in protected:
            found = protected[step]
            section.timed += [
                at_least(f"goodput at {step:g}x / capacity", found["goodput"], least),
                at_most(f"p99 of answers at {step:g}x, ms", found["ok_p99_ms"], 1000 * DEADLINE_S),
            ]
    section.timed.append(at_most("s until 99.9 % are answered again", protected[0.0]["recovery_s"], 2.0))
    section.bars.append(
        at_most("difference of client's and server's tallies", protected[0.0]["difference"], 0)
    )
    control = _steps(
        section,
        "unprotected",
        min(seconds, 6),
        bundle=bundle.path,
        module="benchmarks.chaos.unprotected",
        queue=1_000_000,
        in_flight=1_000_000,
    )
    section.figures |= {
        f"control_goodput_at_{step:g}x": found["goodput"] for step, found in control.items() if step
    }
    section.bars.append(at_most("control: goodput at 5x without admission", control[5.0]["goodput"], 0.5))


def _steps(section: Section, name: str, seconds: int, **settings: object) -> dict[float, dict[str, float]]:
    """By step: goodput as a share of capacity, latencies; under 0: capacity, recovery, tallies."""
    times = FAST_STEPS if section.fast else STEPS
    server = section.rig.serve(name, **settings, answers_bytes=0).wait_ready()
    capacity = _capacity(server, 2 if section.fast else 6)
    section.say(f"{name}: capacity {capacity:.1f} calls/s")
    before, spent = server.calls(), server.process.cpu_s
    order = Order(
        (server.target,),
        rates=tuple((step * capacity, float(seconds)) for step in times),
        deadline_s=DEADLINE_S,
        texts="new",
        seed=len(name),
    )
    found = Load(section.rig, order).result(within_s=len(times) * seconds + 120)
    time.sleep(0.5)
    told = {code: count - before.get(code, 0) for code, count in server.calls().items()}
    spent = server.process.cpu_s - spent
    shed = {
        name: value for name, value in server.metrics().items() if name.startswith("nlu_shed_total") and value
    }
    section.say(f"{name}: {dict(found.codes())}, {shed}")
    server.process.end()
    start = float(found.at.min())
    steps: dict[float, dict[str, float]] = {}
    for i, step in enumerate(times[:-1]):
        steps[step] = _step(found, start + i * seconds, seconds, capacity)
        section.say(
            f"{name} {step:g}x: goodput {steps[step]['goodput']:.2f}, answers in {steps[step]['ok_p99_ms']:.0f} ms"
        )
    steps[0.0] = {
        "capacity": capacity,
        "recovery_s": _recovery(found, start + (len(times) - 1) * seconds, seconds),
        # An answer costs what it costs at capacity, where the core does nothing else; the rest went into refusals.
        "refusal_cpu_ms": 1000 * (spent - int(found.ok.sum()) / capacity) / max(1, int((~found.ok).sum())),
        "difference": difference(found.codes(), told),
    }
    return steps


def _step(found: Loaded, begin: float, seconds: float, capacity: float) -> dict[str, float]:
    mine = (found.at >= begin) & (found.at < begin + seconds)
    answered = mine & found.ok & (found.ms <= 1000 * DEADLINE_S)
    refused = mine & ~found.ok
    offered = min(capacity, float(mine.sum()) / seconds)
    return {
        "goodput": float(answered.sum()) / seconds / offered,
        "ok_p50_ms": float(np.percentile(found.ms[answered], 50)) if answered.any() else 0.0,
        "ok_p99_ms": float(np.percentile(found.ms[mine & found.ok], 99)) if (mine & found.ok).any() else 0.0,
        "refused_p99_ms": float(np.percentile(found.ms[refused], 99)) if refused.any() else 0.0,
    }


def _recovery(found: Loaded, begin: float, seconds: float) -> float:
    """Seconds from the end of the overload to the first moment after which 99.9 % are answered."""
    calm = np.sort(found.at[found.at >= begin])
    failed = np.sort(found.at[(found.at >= begin) & ~found.ok])
    for moment in [begin, *failed.tolist()]:
        rest, bad = calm[calm > moment], failed[failed > moment]
        if len(rest) and len(bad) <= (1 - RECOVERED) * len(rest):
            return float(moment - begin)
    return float(seconds)


def _capacity(server: Server, seconds: float) -> float:
    """Answers a second to two callers that always have a question."""
    answers = [0] * 2
    end = time.monotonic() + seconds + 0.5
    counted_from = time.monotonic() + 0.5

    def ask(caller: int) -> None:
        with grpc.insecure_channel(
            server.target, options=(("grpc.use_local_subchannel_pool", 1),)
        ) as channel:
            stub, i = NluStub(channel), 0  # type: ignore[no-untyped-call]
            while time.monotonic() < end:
                i += 1
                stub.Understand(request(f"caller {caller} asks question {i} of his own"), timeout=5)
                answers[caller] += counted_from < time.monotonic() < end

    threads = [threading.Thread(target=ask, args=(caller,)) for caller in range(len(answers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(answers) / seconds
