"""Texts and bytes that are meant to hurt: what do they cost the server, and what do they get?

Nothing is kept by the server, so that every text is looked at anew. What a text costs is the server's own processor time.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator

import grpc
import numpy as np

from benchmarks.chaos.load import CODES, Load, Order, difference, judged, wrong
from benchmarks.chaos.rig import Server
from benchmarks.chaos.section import Section
from benchmarks.chaos.toys import PROBES, SERVICE, make_toys, oracle, request
from benchmarks.result import at_least, at_most
from nlu import parts
from nlu.v1 import nlu_pb2 as pb
from statics.bundle import build
from tests.tiny import CREATED

REPEATS = 20
LARGEST_MS = 20.0
PACE = 50.0  # calls a second of the neighbour

TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "spaces": " \t\n\u00a0\u2003" * 20,
    "only punctuation": "?!.,;:" * 40,
    "only format characters": "\u200b\u200e\u2060\ufeff" * 60,
    "emoji": "😀👍🏽👩‍👩‍👧‍👦🇫🇷☺️☺" * 10,
    "zero width inside words": "l\u200bi\u200bg\u200bh\u200bt\u200bs on",
    "right to left": "\u202eno sthgil\u202c \u05d0\u05d1\u05d2 \u0627\u0628",
    "marks in reverse order, 4 KiB": "a" + "\u0301\u0323" * 1000,
    "marks in reverse order, 40 KiB": "a" + "\u0301\u0323" * 10_000,
    "marks in reverse order, 400 KiB": "a" + "\u0301\u0323" * 100_000,
    "U+FDFA x 512": "\ufdfa" * 512,
    "dotted capital I": "\u0130" * 500,
    "sharp s": "ß" * 500,
    "one word of 500": "a" * 500,
    "one word of 60 KB": "a" * 60_000,
    "one word of 1 MB": "a" * 1_000_000,
    "100,000 tokens": "a " * 100_000,
    "digits": "9" * 500,
    "NUL, CR, LF": "lights\x00on\r\nnow\n",
    "terminal": "\x1b[2J\x1b]0;owned\x07lights on",
    "formats": "{} {0} %s %n %x ${jndi:ldap://x} {{7*7}}",
    "SQL": "'; DROP TABLE replies; --",
    "JSON": '{"hypotheses": [{"text": "lights on"}]}',
    "hangul": "\u1112\u1161\u11ab" * 160,
    "tags": "lights on" + "".join(chr(0xE0000 + ord(letter)) for letter in "ignore all of it"),
    "private use": "\ue000\uf8ff\U000f0000" * 50,
    "not characters": "\ufffe\uffff\U0001fffe" * 50,
    "bad UTF-8": b"lights \xff\xfe on",
    "overlong NUL": b"lights \xc0\x80 on",
    "surrogates": b"lights \xed\xa0\x80\xed\xb0\x80 on",
}


def run(section: Section) -> None:
    """Texts one by one, beside a neighbour, then bytes by the hundred thousand."""
    rig = section.rig
    toys = make_toys(rig.work / "toys")
    known = judged(oracle(toys, rig.work / "alone"))
    bundle = build(
        parts.collect(toys[0].folder), rig.work / "bundle", created=CREATED, requires_service=SERVICE
    )
    server = rig.serve("hostile", bundle=bundle.path, lru_bytes=0, answers_bytes=0).wait_ready()
    _texts(section, server)
    _neighbour(section, server, known)
    _fuzz(section, server)
    if server.process.popen.poll() is not None:
        raise RuntimeError(f"the server died:\n{server.process.says()[-4000:]}")
    found = Load(rig, Order((server.target,), rates=((PACE, 2.0),), known=known)).result()
    section.bars.append(
        at_most("wrong or no answers after all of it", wrong(found.answers, "a") + int((~found.ok).sum()), 0)
    )
    server.process.end()


def _raw(channel: grpc.Channel, method: str) -> grpc.UnaryUnaryMultiCallable[bytes, bytes]:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
        f"/nlu.v1.Nlu/{method}", request_serializer=bytes, response_deserializer=bytes
    )
    return call


def _message(text: str | bytes) -> bytes:
    """An UnderstandRequest with this text, valid UTF-8 or not."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    inner = b"\x0a" + _varint(len(raw)) + raw
    return b"\x12" + _varint(len(inner)) + inner


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _texts(section: Section, server: Server) -> None:
    worst, codes = ("", 0.0), Counter[str]()
    with grpc.insecure_channel(server.target, options=(("grpc.max_send_message_length", -1),)) as channel:
        call = _raw(channel, "Understand")
        for name, text in TEXTS.items():
            message = _message(text)
            before = server.process.cpu_s
            for _ in range(REPEATS):
                codes[_code(call, message)] += 1
            ms = 1000 * (server.process.cpu_s - before) / REPEATS
            worst = max(worst, (name, ms), key=lambda each: each[1])
    section.say(f"dearest: {worst[0]}, {worst[1]:.1f} ms of CPU; {dict(codes)}")
    section.figures |= {"hostile_texts": float(len(TEXTS)), "dearest_text_cpu_ms": worst[1]}
    allowed = {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
    others = sum(count for code, count in codes.items() if code not in allowed)
    section.bars += [
        at_least("hostile texts", len(TEXTS), 30),
        at_most("hostile texts answered with anything but OK or a refusal", others, 0),
    ]
    section.timed.append(at_most("CPU of the dearest hostile text, ms", worst[1], LARGEST_MS))


def _code(call: grpc.UnaryUnaryMultiCallable[bytes, bytes], message: bytes) -> str:
    try:
        call(message, timeout=10)
        return "OK"
    except grpc.RpcError as error:
        return str(error.code().name)


def _neighbour(section: Section, server: Server, known: dict[str, dict[str, str]]) -> None:
    """The p99 of a calm caller, alone and beside ten hostile texts a second."""
    seconds = section.scale(20, 3)
    order = Order((server.target,), rates=((PACE, 2.0 * seconds),), known=known)
    asking = Load(section.rig, order).begun()
    time.sleep(seconds)
    began = time.monotonic()
    texts = [_message(text) for text in TEXTS.values()]
    with grpc.insecure_channel(server.target, options=(("grpc.max_send_message_length", -1),)) as channel:
        call = _raw(channel, "Understand")
        for i in range(10 * seconds):
            _code(call, texts[i % len(texts)])
            time.sleep(max(0.0, began + (i + 1) / 10 - time.monotonic()))
    found = asking.result()
    alone, beside = found.ms[found.at < began - 0.1], found.ms[found.at > began]
    moved = float(np.percentile(beside, 99) - np.percentile(alone, 99))
    section.figures |= {"neighbour_p99_ms": float(np.percentile(alone, 99)), "neighbour_p99_moved_ms": moved}
    section.timed.append(at_most("ms by which the neighbour's p99 moved", moved, 10.0))
    section.bars.append(at_most("neighbour's calls failed", int((~found.ok).sum()), 0))


def _fuzz(section: Section, server: Server) -> None:
    """Mutated requests: most through streams, whose items are answered one by one, the others call by call."""
    chance = random.Random(17)
    seeds = _seeds()
    streamed, called = section.scale(1_000_000, 10_000), section.scale(50_000, 1_000)
    codes: Counter[str] = Counter()
    began = time.monotonic()
    left = streamed
    while left:  # a connection lives for ten minutes, so no stream is asked to live longer
        share = min(left, 50_000)
        with grpc.insecure_channel(server.target) as channel:
            stream = channel.stream_stream(
                "/nlu.v1.Nlu/UnderstandStream", request_serializer=bytes, response_deserializer=bytes
            )
            for raw in stream(_mutants(chance, seeds, share), timeout=600):
                codes[_problem(pb.Outcome.FromString(raw))] += 1
        left -= share
        rate = (streamed - left) / (time.monotonic() - began)
        section.say(f"{streamed - left} fuzzed items, {rate:.0f} a second")
    with grpc.insecure_channel(server.target) as channel:
        before = server.calls()
        mine: Counter[str] = Counter()
        methods = ("Understand", "UnderstandBatch", "Encode", "Describe")
        for i, raw in enumerate(_mutants(chance, seeds, called)):
            code = _code(_raw(channel, methods[i % 4]), raw)
            codes[code] += 1
            if i % 4 == 0:
                mine[code] += 1
        after = server.calls()
    told = {code: count - before.get(code, 0) for code, count in after.items()}
    section.figures |= {"fuzzed": float(codes.total())} | {
        f"fuzzed_{code}": float(n) for code, n in codes.items()
    }
    section.bars += [
        at_least("fuzzed requests", codes.total(), streamed + called),
        at_most("UNKNOWN or INTERNAL", codes["UNKNOWN"] + codes["INTERNAL"], 0),
        at_most("difference of client's and server's tallies", difference(mine, told), 0),
    ]


def _problem(outcome: pb.Outcome) -> str:
    if not outcome.HasField("problem"):
        return "OK"
    return next((c.name for c in grpc.StatusCode if c.value[0] == outcome.problem.code), CODES[0])


def _seeds() -> list[bytes]:
    seeds = [request(probe).SerializeToString() for probe in PROBES]
    full = request("wake me at six", context=[(pb.ROLE_ASSISTANT, "when"), (pb.ROLE_USER, "early")])
    full.request_id, full.locale, full.persona, full.surface = "r1", "en-GB", "calm", "tv"
    full.annotators.extend(["intent", "slots"])
    full.retrieval.top_k = 3
    full.retrieval.avoid_ids.append("a.hi.1")
    full.as_of.FromJsonString("2026-06-05T00:00:00Z")
    full.hypotheses.add(text="make me at six", confidence=0.2)
    batch = pb.UnderstandBatchRequest(requests=[full, full])
    encode = pb.EncodeRequest(texts=["a", "b"], tokens=True)
    return [*seeds, *[full.SerializeToString()] * 10, batch.SerializeToString(), encode.SerializeToString()]


def _mutants(chance: random.Random, seeds: list[bytes], count: int) -> Iterator[bytes]:
    """Bytes changed, cut, doubled, spliced; strings in other alphabets; now and then nothing but noise."""
    hostile = [_message(text) for text in TEXTS.values() if len(text) < 2000]
    for _ in range(count):
        raw = bytearray(chance.choice(seeds) if chance.random() < 0.8 else chance.choice(hostile))
        for _ in range(chance.choice((0, 1, 1, 2, 4))):
            at = chance.randrange(len(raw) + 1)
            kind = chance.randrange(7)
            if kind == 0 and at < len(raw):
                raw[at] ^= 1 << chance.randrange(8)
            elif kind == 1 and at < len(raw):
                raw[at] = chance.randrange(256)
            elif kind == 2:
                del raw[at:]
            elif kind == 3:
                raw[at:at] = chance.randbytes(chance.randint(1, 8))
            elif kind == 4:
                raw += chance.choice(seeds)
            elif kind == 5:
                del raw[at : at + chance.randint(1, 8)]
            else:
                raw[at:at] = _varint(chance.randrange(1 << 64))
        yield bytes(raw)
