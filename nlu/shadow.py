"""Shadow heads: a candidate answers beside the live head of its name; how the two differ is counted, and sampled on wish.

A linear candidate's rows are in the fleet's one product, a few microseconds of the call. All else, and the candidates of
other kinds, is left for the event loop to call when it comes round again: by then the reply has been handed to gRPC, so
nothing here changes, fails or delays it (in a batch, later items wait for the candidates of earlier ones).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from annotators.annotator import Annotation, Span, Status
from annotators.fleet import Answered, Fleet
from annotators.table import Head
from nlu import metrics

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0  # between two writes of the sample, whatever the traffic
_ROW_BEGINS = '{"head": '
_WORD = re.compile(r"\S+")
_PRIVATE = {  # by what gives such a word away
    "email": re.compile(r"\S@\S"),
    "url": re.compile(r"://|\w\.[^\W\d_]{2}"),
}
_DIGIT = re.compile(r"\d")


class Verdict(Enum):
    """How a candidate's answer compares with the live one."""

    SAME = "same"
    FLIP = "flip"  # both say something, and not the same
    ABSTAINS = "abstains"  # only the live head says something
    SPEAKS = "speaks"  # only the candidate does
    ERROR = "error"  # the candidate failed


@dataclass(frozen=True, slots=True)
class Comparison:
    """One turn's live answer and candidate's. Each side is the best label that only this side accepts, with its score;
    None where there is no such label. Spans count as labels where they stand."""

    head: str
    verdict: Verdict
    live: tuple[str, float] | None
    candidate: tuple[str, float] | None

    @property
    def differs(self) -> bool:
        """Whether there is something to look at."""
        return self.verdict not in (Verdict.SAME, Verdict.ERROR)

    def row(self, phrase: str) -> str:
        """A line of the sample."""
        live, candidate = self.live or (None, None), self.candidate or (None, None)
        row = {
            "head": self.head,
            "live": live[0],
            "live_score": live[1],
            "candidate": candidate[0],
            "candidate_score": candidate[1],
            "phrase": phrase,
        }
        return json.dumps(row, ensure_ascii=False) + "\n"


def compare(live: Annotation, candidate: Annotation) -> Comparison:
    """Compare what is accepted; scores of what both accept may differ."""
    mine, theirs = _accepted(live), _accepted(candidate)
    if candidate.status is Status.ERROR:
        verdict = Verdict.ERROR
    elif mine.keys() == theirs.keys():
        verdict = Verdict.SAME
    elif not mine:
        verdict = Verdict.SPEAKS
    else:
        verdict = Verdict.FLIP if theirs else Verdict.ABSTAINS
    return Comparison(
        live.name,
        verdict,
        next((said for key, said in mine.items() if key not in theirs), None),
        next((said for key, said in theirs.items() if key not in mine), None),
    )


def _accepted(annotation: Annotation) -> dict[tuple[str | int, ...], tuple[str, float]]:
    labels = {(label.label,): (label.label, label.score) for label in annotation.labels if label.accepted}
    return labels | {
        (span.label, span.start, span.end): (span.label, span.score) for span in annotation.spans
    }


def observe(fleet: Fleet, answers: Answered, phrase: str, sample: Sample | None) -> None:
    """Count, and sample, how each shadow's answer differs from its live head's. Never raises.

    A live head that failed is nothing to compare with. A phrase that some token head has not read, because it was not
    asked or failed, is not sampled: nobody knows what would have to be masked in it.
    """
    try:
        live = {annotation.name: annotation for annotation in answers.live}
        candidates = answers.shadows()
        comparisons = [
            compare(live[candidate.name], candidate)
            for candidate in candidates
            if live[candidate.name].status is not Status.ERROR
        ]
        for comparison in comparisons:
            _count(comparison)
        differing = [comparison for comparison in comparisons if comparison.differs]
        if sample is None or not differing:
            return
        marked = _marked(fleet, live, candidates)
        if marked is not None:
            redacted = redact(phrase, marked)
            for comparison in differing:
                sample.add(comparison.row(redacted))
    except Exception:  # the reply is out; a mistake here is ours to read about, and nobody else's
        logger.exception("comparing the shadows failed")


def _count(comparison: Comparison) -> None:
    metrics.SHADOW_ANSWERS.labels(comparison.head, comparison.verdict.value).inc()
    if comparison.differs:
        live, candidate = (said[0] if said else "nothing" for said in (comparison.live, comparison.candidate))
        metrics.SHADOW_FLIPS.labels(comparison.head, live, candidate).inc()


def _marked(
    fleet: Fleet, live: Mapping[str, Annotation], candidates: Iterable[Annotation]
) -> list[Span] | None:
    """What the token heads, candidates included, marked in the phrase; None where a live one has not read it."""
    readers = [name for name, head in fleet.heads.items() if _marks(head)]
    if not all(name in live and live[name].status is Status.OK for name in readers):
        return None
    said = [live[name] for name in readers]
    said += [candidate for candidate in candidates if _marks(fleet.shadows[candidate.name])]
    return [span for annotation in said for span in annotation.spans]


def _marks(head: Head) -> bool:
    """Whether a head's spans are names and values; those that restore punctuation and case mark words of any meaning."""
    return head.spec.kind == "token" and not head.spec.params.get("restores")


def redact(phrase: str, spans: Iterable[Span]) -> str:
    """The phrase with spans, and words that are e-mail addresses or URLs, as <label>, and every other digit as #.

    Of marks that overlap, the first (of those the longest) stands for all of them.
    """
    marks = [(span.start, span.end, span.label) for span in spans]
    for word in _WORD.finditer(phrase):
        found = [label for label, pattern in _PRIVATE.items() if pattern.search(word[0])]
        marks += [(*word.span(), label) for label in found[:1]]
    pieces, end_of_last = [], 0
    for start, end, label in sorted(marks, key=lambda mark: (mark[0], -mark[1])):
        if start >= end_of_last:
            pieces += [_DIGIT.sub("#", phrase[end_of_last:start]), f"<{label}>"]
        end_of_last = max(end_of_last, end)
    return "".join([*pieces, _DIGIT.sub("#", phrase[end_of_last:])])


class Sample:
    """The newest differences: JSON lines in memory, and a moment later in a file that only its owner reads.

    The file is replaced whole, at most once a second and on a thread, so it never holds more than `rows` lines nor half a
    line, and a restart goes on with what it finds there. An error is one log line and the end of the sample. Only the
    event loop's thread may touch it, and one process a file.
    """

    def __init__(self, path: Path, rows: int) -> None:
        self._path = path
        self._rows: deque[str] = deque(maxlen=rows)
        self._open, self._unsaved = True, False
        self._closing = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        try:
            self._rows.extend(_stored(path))
            _replace(
                path, self._rows
            )  # at once: a path that cannot be written is known before there is traffic
        except (OSError, ValueError) as error:
            self._stop(error)

    def add(self, row: str) -> None:
        """Keep a line; the oldest makes room."""
        if not self._open:
            return
        self._rows.append(row)
        self._unsaved = True
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write_behind())

    async def close(self) -> None:
        """Write what is not in the file yet."""
        self._closing.set()
        if self._writer is not None:
            await self._writer

    async def _write_behind(self) -> None:
        while self._unsaved:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _PAUSE_S)
            self._unsaved = False
            try:
                await asyncio.to_thread(_replace, self._path, [*self._rows])
            except OSError as error:
                self._stop(error)
        self._writer = None

    def _stop(self, error: Exception) -> None:
        self._open, self._unsaved = False, False
        logger.error("no more samples of shadows: %s", error)


def _stored(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith(_ROW_BEGINS):
                raise ValueError(
                    f"{path}: found other content, expected a sample of shadows; name a file of its own"
                )
            yield line


def _replace(path: Path, rows: Iterable[str]) -> None:
    temporary = path.with_name(f"{path.name}.part")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.writelines(rows)
    os.replace(temporary, path)
