"""Two bundles that disagree about everything, signed and released; and what each of them answers, bit for bit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nlu import loading, parts, wire
from nlu.serve import pipeline_of
from nlu.settings import Settings
from nlu.v1 import nlu_pb2 as pb
from statics.bundle import Bundle, build
from statics.publish import publish
from statics.signing import Keyring, generate_key
from statics.store import Store
from tests.tiny import CREATED, make_parts

CHANNEL = "prod"
SERVICE = ">=0.1.0.dev0,<1"

PROBES = tuple(
    """
    lights on|turn the lights on|lamp on|make it bright|play a song|some music|put on jazz|sing|stop|stop it|just stop
    hello|ok|what time|argh|so annoying|you annoy me|wake me at six|meet anna at six|call boris|call me|what can i watch
    switch the lamp on at noon|play music at six please|anna is so annoying|stop the music now|hello boris|wake anna
    включи свет|поставь музыку|хватит|разбуди меня в шесть|позвони анне|привет|что посмотреть|ты меня злишь
    """.strip().replace("\n", "|").replace("    ", "").split("|")
)  # fmt: skip


@dataclass(frozen=True)
class Toy:
    """The parts of one of the two bundles."""

    name: str
    folder: Path


def make_toys(work: Path, *, shape: int = 8, slow: int = 0) -> tuple[Toy, Toy]:
    """Two sets of parts with other vectorizers of one shape, other labels and other replies."""
    return tuple(  # type: ignore[return-value]
        Toy(name, make_parts(work / name, seed=seed, dim=shape, mark=f"{name}.", work=slow))
        for seed, name in ((11, "a"), (12, "b"))
    )


@dataclass
class Releases:
    """Signed releases of toys in one channel of a store, and which toy each digest is."""

    work: Path
    store: Store
    key: Ed25519PrivateKey = field(default_factory=lambda: generate_key()[0])
    seq: int = 0
    toys: dict[str, str] = field(default_factory=dict)  # bundle digest -> name of the toy
    latest: Bundle | None = None

    @property
    def keyring(self) -> Path:
        """The file of trusted keys."""
        path = self.work / "keyring.json"
        if not path.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            Keyring.of(self.key.public_key()).save(path)
        return path

    def make(self, toy: Toy, *, seq: int | None = None, expires: datetime | None = None) -> Bundle:
        """A signed bundle of a toy, not published."""
        self.seq = seq if seq is not None else self.seq + 1
        bundle = build(
            parts.collect(toy.folder),
            self.work / f"release-{self.seq}-{time.time_ns()}",
            channel=CHANNEL,
            seq=self.seq,
            created=CREATED,
            expires=expires,
            requires_service=SERVICE,
            signing_key=self.key,
        )
        self.toys[bundle.digest] = toy.name
        return bundle

    def release(self, toy: Toy) -> Bundle:
        """The next release of the channel."""
        self.latest = self.make(toy)
        publish(self.latest, self.store)
        return self.latest


def request(text: str, *, context: Sequence[tuple[pb.Role, str]] = ()) -> pb.UnderstandRequest:
    """What is asked of a probe: everything there is."""
    return pb.UnderstandRequest(
        hypotheses=[pb.Hypothesis(text=text)],
        context=[pb.Turn(role=role, text=said) for role, said in context],
        raw_scores=True,
        explain=True,
    )


def facts(reply: pb.UnderstandReply) -> bytes:
    """A reply without what belongs to one call or one release: the same question to the same parts, the same bytes."""
    bare = pb.UnderstandReply()
    bare.CopyFrom(reply)
    for name in ("request_id", "timings_ns", "source", "versions"):
        bare.ClearField(name)
    return bare.SerializeToString(deterministic=True)


def oracle(toys: Sequence[Toy], work: Path, probes: Sequence[str] = PROBES) -> dict[str, dict[str, bytes]]:
    """What each toy, alone and undisturbed, answers to each probe: {toy: {probe: facts}}.

    Raises RuntimeError where two toys agree on any head, span or reply of a probe: a mixed answer must show.
    """
    known: dict[str, dict[str, bytes]] = {}
    replies: dict[str, dict[str, pb.UnderstandReply]] = {}
    for toy in toys:
        bundle = build(
            parts.collect(toy.folder), work / f"alone-{toy.name}", created=CREATED, requires_service=SERVICE
        )
        replies[toy.name] = asyncio.run(_answers(bundle, probes))
        known[toy.name] = {probe: facts(reply) for probe, reply in replies[toy.name].items()}
    first, second = (replies[toy.name] for toy in toys)
    for probe in probes:
        if common := _said(first[probe]) & _said(second[probe]):
            raise RuntimeError(f"both toys say {sorted(common)} of {probe!r}; the probe shows nothing")
    return known


async def _answers(bundle: Bundle, probes: Sequence[str]) -> dict[str, pb.UnderstandReply]:
    engine = loading.load(bundle)
    async with pipeline_of(engine, Settings(metrics=False, workers=1, answers_bytes=0)) as pipeline:
        answers = {}
        for probe in probes:
            said = wire.utterance(request(probe), as_of=datetime.now(UTC))
            reply = await pipeline.understand(said, deadline=time.monotonic() + 30)
            answers[probe] = wire.reply_message(reply, said)
        return answers


def _said(reply: pb.UnderstandReply) -> set[str]:
    """Every label, span and reply by name."""
    said = {f"{head.name}={label.label}" for head in reply.annotations for label in head.labels}
    said |= {f"{head.name}:{span.label}" for head in reply.annotations for span in head.spans}
    return said | {candidate.id for candidate in reply.replies}
