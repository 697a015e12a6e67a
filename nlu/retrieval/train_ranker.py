"""Learning to rank replies, told once: dialogs in, a ranker of trees, its canaries and its report out. No torch.

    nlu index train-ranker dialogs.jsonl.gz --out rankers/ranker.chat

Read, divide by dialogs, encode, look at candidates as the service does, fit, save, and only then look at the test dialogs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlu import canaries
from nlu.engine import Engine
from nlu.features import NAMES, Features, label_name
from nlu.ranker import FILE, Ranker, Requires, Spec
from nlu.retrieval.dialogs import Exchange, Skipped, read, split
from nlu.retrieval.evaluate import Contestant, among, draw, measures, prepare
from nlu.retrieval.judge import Judge
from nlu.retrieval.lambdarank import Fitted, fit
from nlu.retrieval.lessons import Lessons
from nlu.retrieval.ranking_measures import candidates
from nlu.vector_store import VectorStore

FORMAT = 1
TEST_SHARE, HELD_SHARE = 0.2, 0.15  # of the dialogs; of the rest
HARD_SHARE = 0.1  # of the candidates learnt from
RANKED = 20  # replies that the service ranks for five
WORTH = 0.003  # a feature that brings less of the gain is left out
MOST_LABELS = 16  # of a head whose labels are features: of more, each is too rare to learn from
# What dialogs cannot teach. A reply's prompt there is the query itself, which would give it away, and nobody wrote weights.
_UNTAUGHT = ("similarity", "prompt_overlap", "same_mood", "other_mood", "own_voice", "weight")

FloatArray = NDArray[np.float32]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for."""

    candidates: int = 100  # of each exchange, the true reply among them
    context: int = 3  # turns before the query
    seed: int = 0
    limit: int | None = None  # exchanges, of dialogs drawn by seed


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training leaves behind."""

    folder: Path  # the ranker's own, which is what bundles take
    report: dict[str, Any]


def train(
    dialogs: Sequence[Path],
    engine: Engine,
    store: Path,
    out: Path,
    wanted: Wanted,
    *,
    workers: int,
    progress: Progress,
) -> Trained:
    """Train a ranker into the folder `out`, and write its report beside it. Raises DialogsInvalid and ValueError.

    What it learns from are exchanges; nothing of the bundle's own index is looked at. The same input gives the same ranker.
    """
    _check_replaceable(out)
    skipped: list[Skipped] = []
    uncased = engine.vectorizer.spec.uncased
    exchanges = list(read(dialogs, uncased=uncased, context=wanted.context + 1, skip=skipped.append))
    if wanted.limit is not None:
        exchanges = draw(exchanges, wanted.limit, wanted.seed)
    parts = divide(exchanges)
    for part in parts:
        candidates(part, wanted.candidates, wanted.seed)  # before anything is encoded in vain

    def encoding(done: int, total: int) -> None:
        progress("encoding", done, total)

    with closing(VectorStore(store, engine.vectorizer, workers, encoding)) as vectors:
        learnt, held, test = (prepare(part, engine, vectors, progress) for part in parts)

    hard = max(1, round(HARD_SHARE * wanted.candidates))
    names = taught(engine)
    tables = [
        part.table(
            Features.of(names),
            part.sets(wanted.candidates, hard, wanted.seed),
            lambda done, total, what=what: progress(f"features, {what}", done, total),  # type: ignore[misc]
        )
        for what, part in (("learnt from", learnt), ("held out", held))
    ]
    progress("fitting", 0, 2)
    first = fit(tables[0], tables[1], seed=wanted.seed)
    progress("fitting", 1, 2)
    kept = np.flatnonzero(first.gains() >= WORTH)
    fitted = fit(tables[0][:, :, kept], tables[1][:, :, kept], seed=wanted.seed)
    progress("fitting", 2, 2)
    names = [names[i] for i in kept]

    about = {
        "by": "nlu index train-ranker",
        "dialogs": [path.name for path in dialogs],
        "exchanges": {"learnt": len(parts[0]), "held": len(parts[1]), "test": len(parts[2])},
        "trees": fitted.trees,
        "held_ndcg": round(fitted.ndcg, 4),
        **asdict(wanted),
    }
    found = examine(test, _ranker(engine, names, fitted, about, {}), wanted, progress)
    trees = found["among"]["contestants"]["trees"]
    metrics = {f"test {name}": round(each["value"], 4) for name, each in trees["measures"].items()}
    metrics |= {f"test {name} over cosine": round(each["value"], 4) for name, each in trees["gain"].items()}
    ranker = _ranker(engine, names, fitted, about, metrics)
    _save(ranker, engine, out)
    gains = dict(zip(names, fitted.gains().tolist(), strict=True))
    report = {
        "format": FORMAT,
        "ranker": about,
        "vectorizer": engine.vectorizer.fingerprint,
        "skipped_turns": len(skipped),
        **found,
        "features": dict(sorted(gains.items(), key=lambda pair: -pair[1])),
    }
    text = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)
    report_file(out).write_text(text + "\n", encoding="utf-8")
    return Trained(out, report)


def divide(exchanges: Sequence[Exchange]) -> tuple[list[Exchange], list[Exchange], list[Exchange]]:
    """To learn from, to stop by, and to test on: each dialog whole in one of the three, always the same one."""
    parts: tuple[list[Exchange], list[Exchange], list[Exchange]] = ([], [], [])
    for exchange in exchanges:
        test = split(exchange.dialog, TEST_SHARE, "ranker test")
        held = split(exchange.dialog, HELD_SHARE, "ranker held out")
        parts[2 if test else 1 if held else 0].append(exchange)
    dialogs = [len({exchange.dialog for exchange in part}) for part in parts]
    if min(dialogs) < 2:
        raise ValueError(
            f"dialogs: found {', '.join(map(str, dialogs))} to learn from, to stop by and to test on, expected at least 2"
            " of each; give more dialogs"
        )
    return parts


def taught(engine: Engine) -> list[str]:
    """The features that are learnt: those of the dialog itself, and the labels that an index keeps of its replies."""
    heads = [head.spec for head in Judge(engine.fleet.heads.values(), engine.vectorizer.fingerprint).heads]
    return [name for name in NAMES if name not in _UNTAUGHT] + [
        label_name(side, head.name, label)
        for head in heads
        if len(head.labels) <= MOST_LABELS and "." not in head.name
        for side in ("query", "reply")
        for label in head.labels
    ]


def examine(test: Lessons, ranker: Ranker, wanted: Wanted, progress: Progress) -> dict[str, Any]:
    """The test dialogs: the true reply among others at random, and among what a search finds, where it is found at all.

    Every ranker is asked as the service asks it; intervals are over dialogs, gains exchange by exchange.
    """
    entrants = [
        Contestant("cosine"),
        Contestant("linear", ranker=Ranker.linear()),
        Contestant("trees", ranker=ranker),
    ]
    dialogs = np.array([exchange.dialog for exchange in test.exchanges], np.object_)

    def exam(sets: NDArray[np.int64], *, found: bool) -> dict[str, Any]:
        places = among(test, sets, entrants, progress)
        asked = places["cosine"] < sets.shape[1] if found else np.full(len(sets), True)
        theirs = dialogs[asked].tolist()
        told = {name: column[asked] for name, column in places.items()}
        enough = len(set(theirs)) > 1  # for an interval over dialogs
        return {
            "of": sets.shape[1],
            "exchanges": len(theirs),
            "contestants": measures(told, theirs, wanted.seed) if enough else {},
        }

    return {
        "among": exam(test.sets(wanted.candidates, 0, wanted.seed), found=False),
        "among_found": exam(test.nearest(min(wanted.candidates, RANKED), wanted.seed), found=True),
    }


def report_file(out: Path) -> Path:
    """Beside the ranker, since whatever lies inside goes into bundles."""
    return out.with_name(f"{out.name}.report.json")


def _ranker(
    engine: Engine, names: Sequence[str], fitted: Fitted, about: dict[str, Any], metrics: dict[str, float]
) -> Ranker:
    spec = Spec(
        kind="trees",
        features=tuple(names),
        requires=Requires(vectorizer=engine.vectorizer.fingerprint),
        trained=about,
        metrics=metrics,
    )
    return Ranker.trees(spec, fitted.to_onnx())


def _check_replaceable(out: Path) -> None:
    if out.exists() and not (out / FILE).exists():
        raise ValueError(
            f"{out}: found what is no ranker, expected nothing or a ranker to replace; choose another --out"
        )


def _save(ranker: Ranker, engine: Engine, out: Path) -> None:
    """Write the ranker in the place of the one that may be there."""
    shutil.rmtree(out, ignore_errors=True)
    ranker.save(out)
    canaries.write(out, engine.vectorizer)
