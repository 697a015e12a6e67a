"""How well replies are found and ranked, told from dialogs that nothing was learnt from, with the code that serves.

Every contestant has to find the true reply among the same others: among a hundred, as rankers are trained, and among all
replies of the dialogs, in an index built as any other. Then the dialogs' turns are asked of the index that is served.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.adapter import Adapter
from index.build import Entry, build
from index.replies import Hit, Replies, Retriever
from nlu.engine import Engine
from nlu.features import Said, Situation
from nlu.normalizer import normalize
from nlu.ranker import Ranker
from nlu.retrieval import asking
from nlu.retrieval.dialogs import Exchange
from nlu.retrieval.lessons import Lessons, lessons, opinions
from nlu.retrieval.ranking_measures import candidates, interval, places
from nlu.vector_store import VectorStore

RECALL_AT = (1, 5, 10)
FOUND = 1000  # replies looked at among all; a true one beyond them counts as never found
RERANKED = 100  # of those found, so many go through a ranker
_BEYOND = np.iinfo(np.int64).max

Places = NDArray[np.int64]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A way to order replies: an adapter moves the query, a ranker scores what is found; without one, similarity does."""

    name: str
    adapter: Adapter | None = None
    ranker: Ranker | None = None

    def scores(self, hits: Sequence[Hit], situation: Situation, said: Said) -> NDArray[Any]:
        """[hits], higher is better."""
        if self.ranker is None:
            return np.array([hit.similarity for hit in hits])
        return self.ranker.score(self.ranker.features.table(situation, hits, said))


def contestants(engine: Engine) -> list[Contestant]:
    """Cosine, which all others are compared with, and what the engine has. Rankers see what its adapter finds."""
    entrants = [Contestant("cosine")]
    if engine.adapter is not None:
        entrants.append(Contestant("adapter", engine.adapter))
    linear = Ranker.linear()
    entrants.append(Contestant("linear", engine.adapter, linear))
    if (engine.ranker.spec.kind, engine.ranker.spec.weights) != (linear.spec.kind, linear.spec.weights):
        entrants.append(Contestant("ranker", engine.adapter, engine.ranker))
    return entrants


def evaluate(
    exchanges: Sequence[Exchange],
    engine: Engine,
    store: VectorStore,
    *,
    of: int,
    seed: int,
    persona: str,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """The report, ready for JSON. An estimate is {"value", "low", "high"}: its 95 % interval is over dialogs.
    `persona` asks the index where it has it, as in serving.

    Raises ValueError for dialogs too few to draw `of` candidates from.
    """
    sets = candidates(exchanges, of, seed)  # first of all, so that nothing is encoded in vain
    entrants = contestants(engine)
    told = prepare(exchanges, engine, store, progress)
    few = among(told, sets, entrants, progress)
    with TemporaryDirectory() as folder:
        base = make_base(told, Path(folder) / "index")
        every = among_all(told, base, entrants, progress)
        retriever = base if engine.replies is None else engine.replies
        answers = asking.ask(
            told.situations,
            retriever,
            engine.adapter,
            engine.ranker,
            persona=persona if persona in retriever.personas else None,
            progress=lambda done, total: progress("asking", done, total),
        )
    dialogs = [exchange.dialog for exchange in exchanges]
    report = {
        "exchanges": len(exchanges),
        "dialogs": len(set(dialogs)),
        "replies": len(told.items),
        "among": {"of": of, "contestants": measures(few, dialogs, seed)},
        "among_all": {
            "of": len(told.items),
            "found": FOUND,
            "reranked": RERANKED,
            "contestants": measures(every, dialogs, seed),
        },
        "latency": {
            "rows": len(retriever),
            "index": "the dialogs' replies" if engine.replies is None else "the index served",
            **asking.latency(answers),
        },
    }
    if engine.replies is not None:
        report["coverage"] = asking.coverage(
            answers, exchanges, _phrases(engine.replies, uncased=engine.vectorizer.spec.uncased)
        )
    return report


def prepare(exchanges: Sequence[Exchange], engine: Engine, store: VectorStore, progress: Progress) -> Lessons:
    """The exchanges as a ranker sees them."""
    phrases = list(dict.fromkeys(phrase for each in exchanges for phrase in (*each.context, each.reply)))
    encodings = dict(zip(phrases, store.encode(phrases, tokens=False), strict=True))
    judged = [phrase for each in exchanges for phrase in (each.context[-1], each.reply)]
    said = opinions(judged, encodings, engine.fleet, lambda done, total: progress("judging", done, total))
    return lessons(exchanges, encodings, said)


def make_base(told: Lessons, folder: Path) -> Replies:
    """The dialogs' different replies as an index, loaded as it would be served; ids are phrases."""
    entries = [Entry(id=item.id, text=item.text, prompt="", labels=item.labels) for item in told.items]
    build(entries, told.vectors, folder, personas=(), surfaces=(), said=told.vectors)
    return Replies.load(folder)


def among(
    told: Lessons, sets: NDArray[np.int64], entrants: Sequence[Contestant], progress: Progress
) -> dict[str, Places]:
    """Where each contestant puts the true reply of each set [exchanges, candidates]."""
    scores = {entrant.name: np.empty(sets.shape) for entrant in entrants}
    for i, rows in enumerate(sets):
        situation = told.situations[i]
        plain = told.hits(i, rows)
        for entrant in entrants:
            hits = plain if entrant.adapter is None else _moved(plain, told, entrant.adapter, situation)
            scores[entrant.name][i] = entrant.scores(hits, situation, told.said)
        progress("among candidates", i + 1, len(sets))
    return {name: places(table) for name, table in scores.items()}


def among_all(
    told: Lessons, base: Replies, entrants: Sequence[Contestant], progress: Progress
) -> dict[str, Places]:
    """The same among all replies but those said in the turns sent along: they would answer themselves."""
    found: dict[str, list[int]] = {entrant.name: [] for entrant in entrants}
    for i, (exchange, situation) in enumerate(zip(told.exchanges, told.situations, strict=True)):
        avoid = set(exchange.context) - {exchange.reply}
        searched: dict[bool, list[Hit]] = {}  # once with the adapter, once without
        for entrant in entrants:
            moved = entrant.adapter is not None
            if moved not in searched:
                query = (
                    situation.vector if entrant.adapter is None else entrant.adapter.apply(situation.vector)
                )
                searched[moved] = base.search(
                    query, FOUND, persona=None, surface=None, as_of=datetime.now(UTC), avoid=avoid
                )
            found[entrant.name].append(_place(searched[moved], entrant, situation, base.said, exchange.reply))
        progress("among all", i + 1, len(told.exchanges))
    return {name: np.array(column, np.int64) for name, column in found.items()}


def measures(
    found: Mapping[str, Places], dialogs: Sequence[str], seed: int
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Recall and MRR of each contestant, and what each gains over the first one, exchange by exchange."""
    columns = {name: _columns(column) for name, column in found.items()}
    first = next(iter(columns.values()))

    def estimates(column: Mapping[str, NDArray[np.float64]]) -> dict[str, dict[str, float]]:
        return {key: _estimate(values, dialogs, seed) for key, values in column.items()}

    return {
        name: {"measures": estimates(column)}
        if column is first
        else {
            "measures": estimates(column),
            "gain": estimates({key: values - first[key] for key, values in column.items()}),
        }
        for name, column in columns.items()
    }


def draw(exchanges: Sequence[Exchange], limit: int, seed: int) -> list[Exchange]:
    """At most so many exchanges: dialogs in an order drawn by seed, whole but for the last."""
    by_dialog: dict[str, list[Exchange]] = {}
    for exchange in exchanges:
        by_dialog.setdefault(exchange.dialog, []).append(exchange)
    dialogs = list(by_dialog.values())
    order = np.random.default_rng(seed).permutation(len(dialogs)).tolist()
    return [exchange for i in order for exchange in dialogs[i]][:limit]


def _phrases(replies: Retriever, *, uncased: bool) -> dict[str, str] | None:
    """Phrase of each reply text of a local index; None for one that is kept elsewhere and cannot be listed."""
    if not isinstance(replies, Replies):
        return None
    texts = replies.items.table["text"].unique().to_pylist()
    return {text: normalize(text, uncased=uncased).text for text in texts}


def _moved(hits: Sequence[Hit], told: Lessons, adapter: Adapter, situation: Situation) -> list[Hit]:
    """The same replies with the similarities that the moved query has."""
    similarities = told.said(hits) @ adapter.apply(situation.vector)
    return [
        hit._replace(similarity=similarity)
        for hit, similarity in zip(hits, similarities.tolist(), strict=True)
    ]


def _place(hits: Sequence[Hit], entrant: Contestant, situation: Situation, said: Said, reply: str) -> int:
    """Where the reply stands, from 1, ties against it; a ranker orders the first hits, and the others stay behind them."""
    true = next((i for i, hit in enumerate(hits) if hit.item.id == reply), -1)
    if true < 0:
        return int(_BEYOND)
    if entrant.ranker is not None and true < RERANKED:
        scores = entrant.scores(hits[:RERANKED], situation, said)
    else:
        scores = np.array([hit.similarity for hit in hits])
    return int((scores >= scores[true]).sum())


def _columns(found: Places) -> dict[str, NDArray[np.float64]]:
    """What each exchange adds to each measure."""
    recalls = {f"recall@{k}": (found <= k).astype(np.float64) for k in RECALL_AT}
    return {**recalls, "mrr": 1.0 / found}


def _estimate(values: NDArray[np.float64], dialogs: Sequence[str], seed: int) -> dict[str, float]:
    low, high = interval(values, dialogs, seed)
    return {"value": float(values.mean()), "low": low, "high": high}
