"""Training heads on token vectors: tags by logistic regression, transitions by counting, span scores by Platt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annotators import calibration, linear, prior, thresholds
from annotators.annotator import Encoding, Heard, Span
from annotators.answers import Rows
from annotators.fit import About
from annotators.golden import GOLDEN
from annotators.head import Golden, Requires, Spec
from annotators.linear import Linear, OneOf
from annotators.restore import MARKS
from annotators.token import Scheme, TokenHead, windows

FloatArray = NDArray[np.float32]

FOLDS = 3
REGULARISATIONS = (0.25, 1.0, 4.0, 16.0, 64.0)
_REACH = {"bio": 1, "words": 2}  # where a sentence ends is seen from farther away than what a word is
INFLUENCES = (0.0, 0.25, 0.5, 1.0)  # of transitions; 0: they only forbid
_SURE = 0.8  # score of a golden span


@dataclass(frozen=True, slots=True)
class TaggedEncoding:
    """A phrase for a token head: its Encoding and the gold spans (scores ignored)."""

    text: str
    encoding: Encoding
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Proposed:
    """A span that a head of another fold found."""

    phrase: int
    label: int
    raw: float
    right: bool


@dataclass(frozen=True, slots=True)
class FittedToken:
    """A head, and the spans that heads of other folds found in the same phrases."""

    head: TokenHead
    proposed: tuple[Proposed, ...]
    wanted: NDArray[np.int64]  # [labels] gold spans
    strength: float
    influence: float


def fit_token(
    about: About,
    phrases: Sequence[TaggedEncoding],
    *,
    beta: float = 1.0,
    seed: int = 0,
    scheme: str = "bio",
    restores: bool = False,
) -> FittedToken:
    """Multinomial logistic regression of tags over windows of token vectors.

    Strength, influence of the transitions, calibration and thresholds are chosen on held-out phrases. `restores` says that
    labels are those of annotators.restore. Raises ValueError where there is nothing to learn.
    """
    if restores:
        phrases = [replace(phrase, spans=by_token(phrase)) for phrase in phrases]
    names = tuple(sorted({span.label for phrase in phrases for span in phrase.spans}))
    if not names:
        raise ValueError("spans: found none in any phrase, expected some to learn from; mark them")
    if len(phrases) < 2 * FOLDS:
        raise ValueError(f"phrases: found {len(phrases)}, expected at least {2 * FOLDS}; add phrases")
    kind = Scheme.of(scheme, names)
    reach = _REACH[scheme]
    rows = [windows(_tokens(phrase), reach, edges=restores) for phrase in phrases]
    gold = [tags(phrase, names, runs=kind.runs) for phrase in phrases]
    folds = np.arange(len(phrases)) % FOLDS
    np.random.default_rng(seed).shuffle(folds)

    strength = _strength(rows, gold, folds, len(kind.tags))
    held_out: list[tuple[Rows, Linear]] = [
        (
            np.flatnonzero(folds == fold),
            _fit(rows, gold, np.flatnonzero(folds != fold), len(kind.tags), strength),
        )
        for fold in range(FOLDS)
    ]
    raw = np.concatenate([model.raw(rows[i]) for unseen, model in held_out for i in unseen])
    temperature = calibration.fit_temperature(
        raw, np.concatenate([gold[i] for unseen, _ in held_out for i in unseen])
    )
    params: dict[str, Any] = {"scheme": scheme, "temperature": temperature, "reach": reach}
    if restores:
        params |= {"restores": True, "edges": True}
    spec = Spec(
        name=about.name, kind="token", task=about.task, labels=names, scale=(1.0,) * len(names), shift=(0.0,) * len(names),
        thresholds=(0.0,) * len(names), requires=Requires(vectorizer=about.fingerprint), params=params, made_by=about.made_by,
    )  # fmt: skip
    counted = _transitions(gold, len(kind.tags))
    wanted = np.bincount(
        [names.index(span.label) for phrase in phrases for span in set(phrase.spans)], minlength=len(names)
    )
    trials = {
        influence: _proposed(spec, held_out, counted * np.float32(influence), phrases)
        for influence in INFLUENCES
    }
    influence = max(trials, key=lambda each: _f1(trials[each], int(wanted.sum())))
    proposed = trials[influence]

    scale, shift = _platt(proposed)
    chances = calibration.logistic(np.array([each.raw for each in proposed], np.float32), scale, shift)
    limits = _limits(proposed, chances, wanted, beta)
    model = _fit(rows, gold, np.arange(len(phrases)), len(kind.tags), strength)
    spec = spec.model_copy(
        update={
            "scale": (scale,) * len(names),
            "shift": (shift,) * len(names),
            "thresholds": limits,
            "metrics": {
                "folds_span_f1": _f1(proposed, int(wanted.sum())),
                "phrases": float(len(phrases)),
                "regularisation": strength,
            },
            "prior": _said(names, proposed, chances, limits, len(phrases)),
        }
    )
    transitions = counted * np.float32(influence) if influence else None
    head = TokenHead(spec, model.weight, model.bias, transitions)
    kept = spec.model_copy(update={"golden": _golden_spans(head, phrases)})
    return FittedToken(replace(head, spec=kept), tuple(proposed), wanted, strength, influence)


def tags(phrase: TaggedEncoding, names: Sequence[str], *, runs: bool = True) -> NDArray[np.int64]:
    """Tag numbers [tokens]: a token belongs to the span it overlaps; the first such token is the span's B.

    Without `runs`, each token has its span's label.
    """
    offsets = _offsets(phrase)
    numbers = np.zeros(len(offsets), np.int64)
    for span in phrase.spans:
        inside = np.flatnonzero((offsets[:, 0] < span.end) & (offsets[:, 1] > span.start))
        label = names.index(span.label)
        if runs:
            numbers[inside] = 2 * label + 2
            numbers[inside[:1]] = 2 * label + 1
        else:
            numbers[inside] = label + 1
    return numbers


def by_token(phrase: TaggedEncoding) -> tuple[Span, ...]:
    """The spans of words, with labels of annotators.restore, as spans of tokens: case begins a word, a mark ends it."""
    offsets = _offsets(phrase)
    found: list[Span] = []
    for span in phrase.spans:
        inside = offsets[(offsets[:, 0] < span.end) & (offsets[:, 1] > span.start)].tolist()
        case = span.label.rstrip(MARKS)
        mark = span.label[len(case) :]
        for i, (start, end) in enumerate(inside):
            first, last = i == 0, i == len(inside) - 1
            label = (case if first or case == "AA" else "") + (mark if last else "")
            if label:
                found.append(Span(label, start, end, span.score))
    return tuple(found)


def _strength(
    rows: Sequence[FloatArray], gold: Sequence[NDArray[np.int64]], folds: NDArray[np.int64], tags: int
) -> float:
    """The C with the lowest log-loss of the first fold's tokens."""
    seen, unseen = np.flatnonzero(folds != 0), np.flatnonzero(folds == 0)
    mine, codes = _stacked(rows, gold, seen)
    others, wanted = _stacked(rows, gold, unseen)
    losses: dict[float, float] = {}
    for c, model in zip(
        REGULARISATIONS, linear.path(mine, OneOf(codes, tags), REGULARISATIONS, tolerance=1e-3), strict=True
    ):
        raw = model.raw(others)
        scale = calibration.fit_temperature(raw, wanted)
        chances = calibration.softmax((scale * raw).astype(np.float32))[np.arange(len(wanted)), wanted]
        losses[c] = float(-np.log(np.maximum(chances, 1e-9)).mean())
        if losses[c] > min(losses.values()):
            break
    return min(losses, key=losses.__getitem__)


def _fit(
    rows: Sequence[FloatArray], gold: Sequence[NDArray[np.int64]], seen: Rows, tags: int, c: float
) -> Linear:
    mine, codes = _stacked(rows, gold, seen)
    fitted = linear.fit(mine, OneOf(codes, tags), c)
    bias = fitted.bias.copy()
    bias[np.bincount(codes, minlength=tags) == 0] = -30.0  # what was never seen is never said
    return Linear(fitted.weight, bias)


def _stacked(
    rows: Sequence[FloatArray], gold: Sequence[NDArray[np.int64]], chosen: Rows
) -> tuple[FloatArray, NDArray[np.int64]]:
    return np.concatenate([rows[i] for i in chosen]), np.concatenate([gold[i] for i in chosen])


def _transitions(gold: Sequence[NDArray[np.int64]], tags: int) -> FloatArray:
    """[tags, tags] log of how much likelier the column's tag is after the row's than anywhere, smoothed by one."""
    counts = np.zeros((tags, tags))
    for sequence in gold:
        np.add.at(counts, (np.concatenate([[0], sequence[:-1]]), sequence), 1)
    anywhere = (counts.sum(axis=0) + 1) / (counts.sum() + tags)
    after = (counts + anywhere * tags) / (counts.sum(axis=1, keepdims=True) + tags)
    result: FloatArray = np.log(after / anywhere).astype(np.float32)
    return result


def _proposed(
    spec: Spec,
    held_out: Sequence[tuple[Rows, Linear]],
    transitions: FloatArray,
    phrases: Sequence[TaggedEncoding],
) -> list[Proposed]:
    found: list[Proposed] = []
    for unseen, model in held_out:
        head = TokenHead(spec, model.weight, model.bias, transitions)
        for i in unseen.tolist():
            offsets = _offsets(phrases[i])
            gold = {(span.label, span.start, span.end) for span in phrases[i].spans}
            for label, first, last, raw in head.proposed(_tokens(phrases[i])):
                bounds = (spec.labels[label], int(offsets[first, 0]), int(offsets[last, 1]))
                found.append(Proposed(i, label, raw, bounds in gold))
    return found


def _f1(proposed: Sequence[Proposed], wanted: int) -> float:
    right = sum(each.right for each in proposed)
    return 2 * right / max(1, len(proposed) + wanted)


def _platt(proposed: Sequence[Proposed]) -> tuple[float, float]:
    if not proposed:
        return 1.0, 0.0
    scale, shift = calibration.fit_platt(
        np.array([each.raw for each in proposed], np.float32), np.array([each.right for each in proposed])
    )
    return (scale, shift) if scale > 0 else (1.0, 0.0)  # a surer span must never score lower


def _limits(
    proposed: Sequence[Proposed], chances: FloatArray, wanted: NDArray[np.int64], beta: float
) -> tuple[float, ...]:
    labels = np.array([each.label for each in proposed], np.int64)
    right = np.array([each.right for each in proposed], np.bool_)
    return tuple(
        thresholds.best(chances[labels == label], right[labels == label], float(wanted[label]), beta)
        for label in range(len(wanted))
    )


def _said(
    names: Sequence[str],
    proposed: Sequence[Proposed],
    chances: FloatArray,
    limits: Sequence[float],
    phrases: int,
) -> dict[str, float] | None:
    """Shares of the spans that heads of other folds marked, and of the phrases in which they marked none."""
    marked = [each for each, chance in zip(proposed, chances, strict=True) if chance >= limits[each.label]]
    counts = Counter(names[each.label] for each in marked)
    counts[prior.NONE] += phrases - len({each.phrase for each in marked})
    return prior.shares(counts)


def _golden_spans(head: TokenHead, phrases: Sequence[TaggedEncoding]) -> tuple[Golden, ...]:
    kept: list[Golden] = []
    for phrase in phrases[:: max(1, len(phrases) // (8 * GOLDEN))]:
        spans = head.annotate(Heard.alone(phrase.text, phrase.encoding)).spans
        right = [(s.label, s.start, s.end) for s in spans] == [
            (s.label, s.start, s.end) for s in phrase.spans
        ]
        if spans and right and min(span.score for span in spans) >= _SURE:
            kept.append(
                Golden(
                    text=phrase.text, spans=tuple(f"{s.label}={phrase.text[s.start : s.end]}" for s in spans)
                )
            )
    return tuple(kept[:GOLDEN])


def _tokens(phrase: TaggedEncoding) -> FloatArray:
    if phrase.encoding.tokens is None:
        raise ValueError("token heads are fitted on Encodings with token vectors")
    return phrase.encoding.tokens


def _offsets(phrase: TaggedEncoding) -> NDArray[np.int32]:
    if phrase.encoding.offsets is None:
        raise ValueError("token heads are fitted on Encodings with token vectors")
    return phrase.encoding.offsets
