"""What does a head cost? Engines with 3 and with 30 heads answer the same utterances, in turns.

    python -m benchmarks.fleet [--save]

The 30 are the shipped bundle's own heads and copies of them under other names, with a 150-label head and boosted trees, in the
mix that `MIX` states; the 3 are intent, scope and slots. Each utterance goes through `Pipeline.understand`, from text to reply, without
the wire: (a) uncached, so that the vectorizer encodes it; (b) again, with the Encoding from the LRU. Medians over distinct
utterances, and of their ratios; both engines answer each, the order alternating.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from annotators.annotator import Heard, HeardTurn
from annotators.answers import Answers
from annotators.fit import About, Plan, fit_boosted
from annotators.fleet import Fleet
from annotators.head import Requires, Spec
from annotators.learners import BoostedLearner
from annotators.linear import single_threaded
from annotators.sentence import SentenceHead
from annotators.table import Head
from benchmarks.result import at_most, emit
from nlu import content, loading
from nlu.engine import Engine
from nlu.normalizer import normalize
from nlu.serve import pipeline_of
from nlu.settings import Settings, shipped_bundle
from nlu.types import Hypothesis, Source, Turn, Utterance
from statics.verify import verify
from statics.version import service_version

SMALL = ("intent", "scope", "slots")
MIX = {"sentence": 19, "context": 2, "token": 4, "anchors": 2, "boosted": 1, "rules": 2}  # 30 in all
UTTERANCES = 300
LABELS = 150
TREES = 50  # a label


def main() -> None:
    """Answer, in turns; print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    parser.parse_args()
    engine = loading.load(verify(shipped_bundle(), service=service_version(), shared=True))
    with single_threaded(True):  # as `nlu serve` computes
        figures = _measured(engine)
    bar = at_most("30 heads over 3 heads, an uncached utterance", figures["uncached_ratio"], 1.3)
    emit("fleet", figures, [bar])


def _measured(engine: Engine) -> dict[str, float]:
    small = replace(engine, fleet=Fleet([engine.fleet.heads[name] for name in SMALL]))
    large = replace(engine, fleet=Fleet(_thirty(engine)))
    # With a number, so that no cold table has them.
    phrases = [f"{normalize(text).text} {i}" for i, text in enumerate(content.load().phrases()[::4])][
        :UTTERANCES
    ]
    taken = asyncio.run(_understood(small, large, phrases))
    before = HeardTurn("assistant", engine.vectorizer.encode(["anything else"])[0])
    figures = {name: statistics.median(each) for name, each in taken.items()}
    for state in ("uncached", "cached"):  # each utterance against itself, because the machine's speed drifts
        figures[f"{state}_ratio"] = float(
            np.median(np.divide(taken[f"{state}_30_us"], taken[f"{state}_3_us"]))
        )
    figures["one_more_linear_head_us"] = _one_more(large.fleet, phrases, engine)
    for kind in MIX:
        alone = Fleet([next(head for head in large.fleet.heads.values() if head.spec.kind == kind)])
        figures[f"{kind}_us"] = statistics.median(
            _time(alone, Heard.alone(phrase, engine.vectorizer.encode([phrase])[0], [before]))
            for phrase in phrases[:60]
        )
    return figures


async def _understood(small: Engine, large: Engine, phrases: Sequence[str]) -> dict[str, list[float]]:
    """Microseconds of each utterance, by what was measured."""
    settings = Settings(metrics=False, workers=1, answers_bytes=0)
    taken: dict[str, list[float]] = defaultdict(list)
    async with pipeline_of(small, settings) as three, pipeline_of(large, settings) as thirty:
        for number, phrase in enumerate(phrases):
            pair = (("3", three), ("30", thirty))
            for state in ("uncached", "cached"):
                for name, pipeline in pair if number % 2 else reversed(pair):
                    began = time.perf_counter_ns()
                    reply = await pipeline.understand(_asked(phrase), deadline=time.monotonic() + 30)
                    taken[f"{state}_{name}_us"].append((time.perf_counter_ns() - began) / 1000)
                    taken[f"annotate_{state}_{name}_us"].append(reply.timings.annotate / 1000)
                    if (reply.source is Source.MODEL) != (state == "uncached"):
                        raise SystemExit(
                            f"benchmarks.fleet: found an Encoding from {reply.source.value} where it was to be {state}"
                        )
    return taken


def _asked(phrase: str) -> Utterance:
    return Utterance(hypotheses=(Hypothesis(phrase, None),), context=(Turn("assistant", "anything else"),))


def _time(fleet: Fleet, heard: Heard) -> float:
    began = time.perf_counter_ns()
    fleet.annotate(heard)
    return (time.perf_counter_ns() - began) / 1000


def _thirty(engine: Engine) -> list[Head]:
    """The bundle's heads of each kind over and over, under names of their own, and two that it has none of."""
    heads: list[Head] = [_many(engine), _boosted(engine)]
    for kind, count in MIX.items():
        known = [head for head in engine.fleet.heads.values() if head.spec.kind == kind]
        missing = count - sum(head.spec.kind == kind for head in heads)
        heads += [_renamed(known[i % len(known)], i) for i in range(missing)]
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


def _boosted(engine: Engine) -> Head:
    """Trees that have learnt the authored emotions."""
    said = content.load().emotions
    phrases = [normalize(example.text).text for example in said]
    vectors = np.stack([each.sentence for each in engine.vectorizer.encode(phrases, tokens=False)])
    about = About("trees", "emotion", engine.vectorizer.fingerprint)
    answers, plan = (
        Answers.one([example.label for example in said]),
        Plan(learner=BoostedLearner(strengths=(TREES,))),
    )
    return fit_boosted(about, phrases, vectors, answers, plan=plan).head


def _one_more(large: Fleet, phrases: Sequence[str], engine: Engine) -> float:
    """Microseconds that a linear head of the bundle adds to the large fleet."""
    more = large.with_head(_renamed(engine.fleet.heads["emotion"], 99))
    gaps = []
    for number, phrase in enumerate(phrases):
        heard = Heard.alone(phrase, engine.vectorizer.encode([phrase])[0])
        pair = (more, large) if number % 2 else (large, more)  # the first to be asked pays for cold caches
        taken = {fleet is more: _time(fleet, heard) for fleet in pair}
        gaps.append(taken[True] - taken[False])
    return statistics.mean(sorted(gaps)[len(gaps) // 10 : -len(gaps) // 10])


if __name__ == "__main__":
    main()
