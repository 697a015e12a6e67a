"""What does a head cost? Fleets of 3 and of 30 heads answer the same utterances, in turns.

    python -m benchmarks.fleet [--save]

The 30 are the shipped bundle's own heads and copies of them under other names, a 150-label head among them, in the mix that
`MIX` states; the 3 are intent, scope and slots. (a) uncached: the vectorizer's encoding and the fleet's answers; (b) with the
Encoding known, the fleet's answers alone. Medians over distinct utterances; both fleets answer each, the order alternating.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from annotators.annotator import Heard, HeardTurn
from annotators.fleet import Fleet
from annotators.head import Requires, Spec
from annotators.sentence import SentenceHead
from annotators.table import Head
from benchmarks.result import at_most, emit
from nlu import content, loading
from nlu.engine import Engine
from nlu.normalizer import normalize
from nlu.settings import shipped_bundle
from statics.verify import verify
from statics.version import service_version

SMALL = ("intent", "scope", "slots")
MIX = {"sentence": 20, "context": 2, "token": 4, "anchors": 2, "rules": 2}  # with all 30
UTTERANCES = 300
LABELS = 150


def main() -> None:
    """Answer, in turns; print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    parser.parse_args()
    engine = loading.load(verify(shipped_bundle(), service=service_version(), shared=True))
    small = Fleet([engine.fleet.heads[name] for name in SMALL])
    large = Fleet(_thirty(engine))
    phrases = [normalize(text).text for text in content.load().phrases()][::4][:UTTERANCES]
    before = HeardTurn("assistant", engine.vectorizer.encode(["anything else"])[0])

    encode_us: list[float] = []
    small_us: list[float] = []
    large_us: list[float] = []
    for number, phrase in enumerate(phrases):
        began = time.perf_counter_ns()
        encoding = engine.vectorizer.encode([phrase])[0]
        encode_us.append((time.perf_counter_ns() - began) / 1000)
        heard = Heard.alone(phrase, encoding, [before])
        pair = ((small, small_us), (large, large_us))
        for fleet, taken in pair if number % 2 else reversed(pair):
            taken.append(_time(fleet, heard))
    uncached = {
        name: statistics.median(np.add(encode_us, each)) for name, each in (("3", small_us), ("30", large_us))
    }
    figures = {
        "encode_us": statistics.median(encode_us),
        "annotate_3_us": statistics.median(small_us),
        "annotate_30_us": statistics.median(large_us),
        "uncached_3_us": uncached["3"],
        "uncached_30_us": uncached["30"],
        "one_more_linear_head_us": _one_more(large, phrases, engine),
    }
    for kind in MIX:
        alone = Fleet([next(head for head in large.heads.values() if head.spec.kind == kind)])
        figures[f"{kind}_us"] = statistics.median(
            _time(alone, Heard.alone(phrase, engine.vectorizer.encode([phrase])[0], [before]))
            for phrase in phrases[:60]
        )
    emit(
        "fleet",
        figures,
        [at_most("30 heads over 3 heads, an uncached utterance", float(uncached["30"] / uncached["3"]), 1.3)],
    )


def _time(fleet: Fleet, heard: Heard) -> float:
    began = time.perf_counter_ns()
    fleet.annotate(heard)
    return (time.perf_counter_ns() - began) / 1000


def _thirty(engine: Engine) -> list[Head]:
    """The bundle's heads of each kind over and over, under names of their own, and one of many labels."""
    heads: list[Head] = [_many(engine)]
    for kind, count in MIX.items():
        known = [head for head in engine.fleet.heads.values() if head.spec.kind == kind]
        wanted = count - (kind == "sentence")
        heads += [_renamed(known[i % len(known)], i) for i in range(wanted)]
    return heads


def _renamed(head: Head, number: int) -> Head:
    return replace(head, spec=head.spec.model_copy(update={"name": f"{head.spec.name}.{number}"}))


def _many(engine: Engine) -> SentenceHead:
    """A head of LABELS labels; what its weights are does not matter to its cost."""
    rng = np.random.default_rng(0)
    spec = Spec(
        name="many", kind="sentence", task="benchmark", labels=tuple(f"label{i}" for i in range(LABELS)), scale=(1.0,) * LABELS,
        shift=(0.0,) * LABELS, thresholds=(0.5,) * LABELS, requires=Requires(vectorizer=engine.vectorizer.fingerprint),
    )  # fmt: skip
    weight = rng.standard_normal((LABELS, engine.vectorizer.dim)).astype(np.float32)
    return SentenceHead(spec, weight, np.zeros(LABELS, np.float32))


def _one_more(large: Fleet, phrases: Sequence[str], engine: Engine) -> float:
    """Microseconds that a linear head of the bundle adds to the large fleet."""
    more = large.with_head(_renamed(engine.fleet.heads["emotion"], 99))
    gaps = []
    for phrase in phrases:
        heard = Heard.alone(phrase, engine.vectorizer.encode([phrase])[0])
        gaps.append(_time(more, heard) - _time(large, heard))
    return statistics.median(gaps)


if __name__ == "__main__":
    main()
