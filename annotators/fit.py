"""Training heads on frozen vectors, with scikit-learn and without torch.

Every kind goes the same way: choose the regularisation on folds, calibrate and set thresholds on the folds' held-out
scores, fit once more on everything, keep golden phrases. Nothing here ever sees a test split.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

from annotators import calibration, thresholds
from annotators.anchors import AnchorsHead
from annotators.annotator import Encoding, Heard, HeardTurn, Span
from annotators.context import ContextHead, features
from annotators.head import Golden, GoldenTurn, Requires, Spec
from annotators.sentence import SentenceHead
from annotators.token import TokenHead, tags_of, windows

FloatArray = NDArray[np.float32]

FOLDS = 3
REGULARISATIONS = (2.0, 8.0, 32.0)
GOLDEN = 24
_GOLDEN_MARGIN = 0.15
_ANCHOR_SCALE, _ANCHOR_THRESHOLD = 20.0, 0.5


@dataclass(frozen=True, slots=True)
class About:
    """What every head records of itself."""

    name: str
    task: str
    fingerprint: str
    made_by: str = "annotators.fit"


@dataclass(frozen=True, slots=True)
class TaggedEncoding:
    """A phrase for a token head: its Encoding and the gold spans (scores ignored)."""

    text: str
    encoding: Encoding
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Borrowed:
    """Rows of another origin: trained on, but never measured on, and their texts are never kept."""

    vectors: FloatArray  # [rows, dim]
    labels: Sequence[str]


def fit_sentence(
    about: About,
    texts: Sequence[str],
    vectors: FloatArray,
    labels: Sequence[str],
    *,
    outsiders: FloatArray | None = None,
    borrowed: Borrowed | None = None,
    beta: float = thresholds.DEFAULT_BETA,
    regularisations: Sequence[float] = REGULARISATIONS,
    seed: int = 0,
) -> SentenceHead:
    """Multinomial logistic regression on vectors [phrases, dim].

    `outsiders` [phrases, dim] belong to no label: they are not trained on, only held against the thresholds.
    `borrowed` rows are trained on in every fold; regularisation, calibration, thresholds, golden phrases and the folds'
    accuracy are those of the phrases themselves. Raises ValueError where they carry a label that no phrase has.
    """
    names, targets = _targets(labels)
    more = _borrowed(borrowed, names, vectors.shape[1])
    fitted = _fit_linear(vectors, targets, outsiders, beta, regularisations, seed, more)
    spec = _spec(about, "sentence", names, fitted)
    head = SentenceHead(spec, fitted.weight, fitted.bias)
    scores = calibration.softmax(fitted.scale * (vectors @ fitted.weight.T + fitted.bias))
    golden = [Golden(text=texts[i], label=names[targets[i]]) for i in _golden(scores, targets)]
    return SentenceHead(spec.model_copy(update={"golden": tuple(golden)}), head.weight, head.bias)


def fit_context(
    about: About,
    texts: Sequence[str],
    encodings: Sequence[Encoding],
    contexts: Sequence[Sequence[HeardTurn]],
    golden_turns: Sequence[Sequence[GoldenTurn]],
    labels: Sequence[str],
    *,
    turns: int = 2,
    beta: float = thresholds.DEFAULT_BETA,
    seed: int = 0,
) -> ContextHead:
    """Multinomial logistic regression over annotators.context.features."""
    names, targets = _targets(labels)
    rows = np.stack(
        [
            features(encoding.sentence, context, turns)
            for encoding, context in zip(encodings, contexts, strict=True)
        ]
    )
    fitted = _fit_linear(
        rows, targets, None, beta, REGULARISATIONS, seed, _borrowed(None, names, rows.shape[1])
    )
    spec = _spec(about, "context", names, fitted, params={"turns": turns})
    scores = calibration.softmax(fitted.scale * (rows @ fitted.weight.T + fitted.bias))
    golden = tuple(
        Golden(text=texts[i], label=names[targets[i]], context=tuple(golden_turns[i]))
        for i in _golden(scores, targets)
    )
    return ContextHead(spec.model_copy(update={"golden": golden}), fitted.weight, fitted.bias, turns)


def fit_token(
    about: About, phrases: Sequence[TaggedEncoding], *, beta: float = 1.0, seed: int = 0
) -> TokenHead:
    """Multinomial logistic regression of BIO tags over windows of token vectors; thresholds on held-out spans."""
    names = tuple(sorted({span.label for phrase in phrases for span in phrase.spans}))
    rows = [windows(_tokens(phrase)) for phrase in phrases]
    tags = [bio(phrase, names) for phrase in phrases]
    folds = np.arange(len(phrases)) % FOLDS
    np.random.default_rng(seed).shuffle(folds)
    scale, limits = _fit_spans(about, phrases, rows, tags, names, folds, beta)
    model = _logistic(4.0).fit(np.concatenate(rows), np.concatenate(tags))
    weight, bias = _rows(model, len(tags_of(names)))
    spec = Spec(
        name=about.name,
        kind="token",
        task=about.task,
        labels=names,
        scale=(scale,) * len(names),
        shift=(0.0,) * len(names),
        thresholds=limits,
        requires=Requires(vectorizer=about.fingerprint),
        made_by=about.made_by,
    )
    head = TokenHead(spec, weight, bias)
    return TokenHead(spec.model_copy(update={"golden": _golden_spans(head, phrases)}), weight, bias)


def make_anchors(
    about: About,
    texts: Sequence[str],
    vectors: FloatArray,
    labels: Sequence[str],
    *,
    outsiders: FloatArray | None = None,
) -> AnchorsHead:
    """Keep the phrases themselves as anchors; scale and threshold come from leaving each anchor out in turn.

    With one phrase a label there is nothing to leave out, and the defaults stand.
    """
    names, targets = _targets(labels, at_least=1)
    order = np.argsort(targets, kind="stable")
    anchors, owner = vectors[order], targets[order]
    cosines = anchors @ anchors.T
    np.fill_diagonal(cosines, -1.0)
    nearest = cosines.argmax(axis=1)
    hits, raw = owner[nearest] == owner, cosines.max(axis=1)
    if outsiders is not None and len(outsiders):
        strangers = (outsiders @ anchors.T).max(axis=1)
        hits, raw = (
            np.concatenate([hits, np.zeros(len(strangers), np.bool_)]),
            np.concatenate([raw, strangers]),
        )
    scale, shift = calibration.fit_platt(raw, hits) if hits.any() and not hits.all() else (0.0, 0.0)
    if scale <= 0:  # nothing to learn from, or only noise: a nearer anchor must never score lower
        scale, shift = _ANCHOR_SCALE, -_ANCHOR_SCALE / 2
    count = len(names)
    spec = Spec(
        name=about.name,
        kind="anchors",
        task=about.task,
        labels=names,
        scale=(scale,) * count,
        shift=(shift,) * count,
        thresholds=(_ANCHOR_THRESHOLD,) * count,
        requires=Requires(vectorizer=about.fingerprint),
        golden=tuple(
            Golden(text=texts[i], label=labels[i]) for i in order[:: max(1, len(order) // GOLDEN)][:GOLDEN]
        ),
        made_by=about.made_by,
    )
    return AnchorsHead(spec, anchors, owner)


def bio(phrase: TaggedEncoding, names: Sequence[str]) -> NDArray[np.int64]:
    """Tag numbers [tokens]: a token belongs to the span it overlaps; the first such token is the span's B."""
    offsets = phrase.encoding.offsets
    if offsets is None:
        raise ValueError("token heads are fitted on Encodings with token vectors")
    tags = np.zeros(len(offsets), np.int64)
    for span in phrase.spans:
        inside = np.flatnonzero((offsets[:, 0] < span.end) & (offsets[:, 1] > span.start))
        label = names.index(span.label)
        tags[inside] = 2 * label + 2
        tags[inside[:1]] = 2 * label + 1
    return tags


_Rows = tuple[FloatArray, NDArray[np.int64]]  # features [rows, width] and label numbers [rows]


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: FloatArray  # [labels, features]
    bias: FloatArray  # [labels]
    scale: float
    thresholds: tuple[float, ...]
    metrics: dict[str, float]


def _fit_linear(
    rows: FloatArray,
    targets: NDArray[np.int64],
    outsiders: FloatArray | None,
    beta: float,
    regularisations: Sequence[float],
    seed: int,
    more: _Rows,
) -> _Linear:
    labels = int(targets.max()) + 1
    strangers = np.zeros((0, rows.shape[1]), np.float32) if outsiders is None else outsiders
    candidates = {c: _held_out(rows, targets, strangers, c, seed, more) for c in regularisations}
    losses = {
        c: log_loss(targets, calibration.softmax(raw), labels=range(labels))
        for c, (raw, _) in candidates.items()
    }
    best = min(losses, key=lambda c: losses[c])
    raw, raw_strangers = candidates[best]
    scale = calibration.fit_temperature(raw, targets)
    scores = calibration.softmax((scale * np.concatenate([raw, raw_strangers])).astype(np.float32))
    belonging = np.concatenate([targets, np.full(len(strangers), -1, np.int64)])
    limits = thresholds.fit_exclusive(scores, belonging, beta=beta)
    model = _logistic(best).fit(np.concatenate([rows, more[0]]), np.concatenate([targets, more[1]]))
    accuracy = float((scores[: len(targets)].argmax(axis=1) == targets).mean())
    metrics = {"folds_accuracy": accuracy, "phrases": float(len(targets)), "regularisation": best}
    if len(more[1]):
        metrics["borrowed"] = float(len(more[1]))
    return _Linear(*_rows(model, labels), scale, limits, metrics)


def _held_out(
    rows: FloatArray, targets: NDArray[np.int64], strangers: FloatArray, c: float, seed: int, more: _Rows
) -> tuple[FloatArray, FloatArray]:
    """Raw scores of every row, and of every stranger, by a model that did not see it."""
    labels = int(targets.max()) + 1
    raw = np.zeros((len(rows), labels), np.float32)
    raw_strangers = np.zeros((len(strangers), labels), np.float32)
    folds = StratifiedKFold(min(FOLDS, int(np.bincount(targets).min())), shuffle=True, random_state=seed)
    for fold, (train, test) in enumerate(folds.split(rows, targets)):
        seen = np.concatenate([rows[train], more[0]]), np.concatenate([targets[train], more[1]])
        weight, bias = _rows(_logistic(c).fit(*seen), labels)
        raw[test] = rows[test] @ weight.T + bias
        mine = np.arange(len(strangers)) % folds.get_n_splits() == fold
        raw_strangers[mine] = strangers[mine] @ weight.T + bias
    return raw, raw_strangers


def _logistic(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=100, tol=1e-4)


def _rows(model: Any, labels: int) -> tuple[FloatArray, FloatArray]:
    """Weights [labels, features] and bias [labels]; scikit-learn keeps one row for two labels, and none for absent ones."""
    weight, bias = model.coef_.astype(np.float32), model.intercept_.astype(np.float32)
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    full, full_bias = np.zeros((labels, weight.shape[1]), np.float32), np.full(labels, -30.0, np.float32)
    full[model.classes_], full_bias[model.classes_] = weight, bias
    return full, full_bias


def _fit_spans(
    about: About,
    phrases: Sequence[TaggedEncoding],
    rows: Sequence[FloatArray],
    tags: Sequence[NDArray[np.int64]],
    names: tuple[str, ...],
    folds: NDArray[np.int64],
    beta: float,
) -> tuple[float, tuple[float, ...]]:
    """Temperature of the tag scores and a threshold per span label, both on held-out phrases."""
    count = len(tags_of(names))
    held_out: list[tuple[int, FloatArray, FloatArray]] = []
    for fold in range(FOLDS):
        train = np.flatnonzero(folds != fold).tolist()
        model = _logistic(4.0).fit(
            np.concatenate([rows[i] for i in train]), np.concatenate([tags[i] for i in train])
        )
        held_out += [(int(i), *_rows(model, count)) for i in np.flatnonzero(folds == fold)]
    raw = np.concatenate([rows[i] @ weight.T + bias for i, weight, bias in held_out])
    scale = calibration.fit_temperature(raw, np.concatenate([tags[i] for i, _, _ in held_out]))
    open_spec = Spec(
        name=about.name,
        kind="token",
        task=about.task,
        labels=names,
        scale=(scale,) * len(names),
        shift=(0.0,) * len(names),
        thresholds=(0.0,) * len(names),
        requires=Requires(vectorizer=about.fingerprint),
    )
    found: list[tuple[int, float, bool]] = []
    positives = np.zeros(len(names), np.int64)
    for i, weight, bias in held_out:
        gold = {(span.label, span.start, span.end) for span in phrases[i].spans}
        for name, _, _ in gold:
            positives[names.index(name)] += 1
        for span in TokenHead(open_spec, weight, bias).decode(_tokens(phrases[i]), _offsets(phrases[i])):
            found.append((names.index(span.label), span.score, (span.label, span.start, span.end) in gold))
    limits = []
    for label in range(len(names)):
        mine = [(score, hit) for owner, score, hit in found if owner == label]
        scores = np.array([score for score, _ in mine], np.float32)
        hits = np.array([hit for _, hit in mine], np.bool_)
        limits.append(thresholds.best(scores, hits, int(positives[label]), beta) if len(mine) else 0.5)
    return scale, tuple(limits)


def _borrowed(borrowed: Borrowed | None, names: Sequence[str], width: int) -> _Rows:
    if borrowed is None:
        return np.zeros((0, width), np.float32), np.zeros(0, np.int64)
    if strangers := set(borrowed.labels) - set(names):
        raise ValueError(
            f"borrowed rows: found labels {', '.join(sorted(strangers))}, expected some of {', '.join(names)}; map or drop them"
        )
    return borrowed.vectors, np.array([names.index(label) for label in borrowed.labels], np.int64)


def _golden(scores: FloatArray, targets: NDArray[np.int64]) -> list[int]:
    """Rows answered right with room to spare, spread over the labels."""
    ordered = np.sort(scores, axis=1)
    margin = ordered[:, -1] - (ordered[:, -2] if scores.shape[1] > 1 else 0)
    safe = (scores.argmax(axis=1) == targets) & (margin >= _GOLDEN_MARGIN)
    best_of_label = {
        int(label): int(rows[margin[rows].argmax()])
        for label in np.unique(targets)
        for rows in (np.flatnonzero(safe & (targets == label)),)
        if len(rows)
    }
    chosen = list(best_of_label.values())
    return sorted(chosen[:: max(1, len(chosen) // GOLDEN)][:GOLDEN])


def _golden_spans(head: TokenHead, phrases: Sequence[TaggedEncoding]) -> tuple[Golden, ...]:
    golden: list[Golden] = []
    for phrase in phrases[:: max(1, len(phrases) // (4 * GOLDEN))]:
        spans = head.annotate(Heard.alone(phrase.text, phrase.encoding)).spans
        right = [(s.label, s.start, s.end) for s in spans] == [
            (s.label, s.start, s.end) for s in phrase.spans
        ]
        if spans and right and min(span.score for span in spans) >= 0.8:
            golden.append(
                Golden(
                    text=phrase.text, spans=tuple(f"{s.label}={phrase.text[s.start : s.end]}" for s in spans)
                )
            )
    return tuple(golden[:GOLDEN])


def _targets(labels: Sequence[str], *, at_least: int = 2) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Label names and each row's number; raises ValueError where there is too little to learn a label from."""
    counts = Counter(labels)
    names = tuple(sorted(counts))
    if len(names) < 2 <= at_least:
        raise ValueError(
            f"labels: found {len(names)} distinct, expected at least 2; add phrases of another label"
        )
    rarest = min(names, key=counts.__getitem__)
    if counts[rarest] < at_least:
        raise ValueError(
            f"label {rarest!r}: found {counts[rarest]} phrase, expected at least {at_least}; add phrases or drop the label"
        )
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[label] for label in labels], np.int64)


def _spec(
    about: About, kind: Any, names: tuple[str, ...], fitted: _Linear, params: dict[str, Any] | None = None
) -> Spec:
    return Spec(
        name=about.name,
        kind=kind,
        task=about.task,
        labels=names,
        scale=(fitted.scale,) * len(names),
        shift=(0.0,) * len(names),
        thresholds=fitted.thresholds,
        requires=Requires(vectorizer=about.fingerprint),
        params=params or {},
        metrics=fitted.metrics,
        made_by=about.made_by,
    )


def _tokens(phrase: TaggedEncoding) -> FloatArray:
    if phrase.encoding.tokens is None:
        raise ValueError("token heads are fitted on Encodings with token vectors")
    return phrase.encoding.tokens


def _offsets(phrase: TaggedEncoding) -> NDArray[np.int32]:
    if phrase.encoding.offsets is None:
        raise ValueError("token heads are fitted on Encodings with token vectors")
    return phrase.encoding.offsets


# scikit-learn warns when lbfgs stops at max_iter; with frozen vectors the held-out loss has long stopped moving by then.
warnings.filterwarnings("ignore", category=ConvergenceWarning, module="sklearn")
