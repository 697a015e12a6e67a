"""Fitting and reporting heads that name labels: sentence, context, anchors, boosted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from annotators.answers import Answers
from annotators.fit import (
    About,
    Dev,
    Fitted,
    Plan,
    centroids_of,
    context_rows,
    fit_boosted,
    fit_context,
    fit_sentence,
    learn,
)
from annotators.fit_anchors import make_anchors
from annotators.table import Head
from nlu.heads import noise, report, verdict
from nlu.heads.config import HeadConfig
from nlu.heads.material import Material, Materials
from nlu.heads.verdict import ClassHead, Verdict
from nlu.vector_store import VectorStore

FloatArray = NDArray[np.float32]

_LEFT_OUT = 5  # one label in so many plays the stranger where nobody else does


def fit_classes(config: HeadConfig, about: About, materials: Materials, plan: Plan) -> Any:
    """A Fitted head, or an anchors head, of the training rows. Raises ValueError for too little data."""
    train = materials.train
    answers = train.answers(exclusive=not config.multi, at_least=1 if config.kind == "anchors" else 2)
    outsiders = materials.outside.vectors if len(materials.outside) else None
    if config.kind == "anchors":
        return make_anchors(
            about, train.phrases, train.vectors, answers,
            outsiders=outsiders, patterns=config.patterns, beta=config.beta,
        )  # fmt: skip
    if config.kind == "context":
        dev = _dev(materials.dev, answers, turns=config.turns)
        return fit_context(
            about, train.phrases, train.encodings, train.contexts, train.golden_turns, answers,
            turns=config.turns, plan=plan, dev=dev,
        )  # fmt: skip
    dev = _dev(materials.dev, answers)
    if config.kind == "boosted":
        return fit_boosted(
            about, train.phrases, train.vectors, answers, plan=plan, outsiders=outsiders, dev=dev
        )
    if config.outside == "labels" and outsiders is None and not config.multi:
        return _with_left_out_labels(about, train, answers, plan, dev)
    return fit_sentence(
        about, train.phrases, train.vectors, answers, plan=plan, outsiders=outsiders,
        outside=config.outside != "none" and not config.multi, dev=dev,
    )  # fmt: skip


def _dev(dev: Material, answers: Answers, *, turns: int = 0) -> Dev | None:
    known = _judging(dev, answers.names)
    if not len(known):
        return None
    rows = context_rows(known.encodings, known.contexts, turns) if turns else known.vectors
    return Dev(rows, Answers(answers.names, known.wanted(answers.names), answers.exclusive))


def _judging(dev: Material, names: Sequence[str]) -> Material:
    """Rows of dev whose labels the head knows."""
    return dev.take(np.flatnonzero(dev.known(names)).tolist())


def _with_left_out_labels(
    about: About, train: Material, answers: Answers, plan: Plan, dev: Dev | None
) -> Any:
    """A head whose score of being out of scope was learnt without anybody who is: some labels play the strangers.

    The method, its slope and its threshold come from a model that does not know those labels; the head knows them all.
    """
    vectors, codes = train.vectors, answers.codes
    strange = np.isin(codes, np.random.default_rng(plan.seed).permutation(len(answers.names))[::_LEFT_OUT])
    known = [label for i, label in enumerate(answers.names) if not strange[codes == i].any()]
    if len(known) < 2 or len(known) == len(answers.names):
        raise ValueError(
            f"labels: found {len(answers.names)}, expected at least 3 to leave some out; add labels or outside phrases"
        )
    kept = np.flatnonzero(~strange)
    part = Answers(tuple(known), train.take(kept.tolist()).wanted(known), True)
    without = learn(vectors[kept], part, plan, outsiders=vectors[strange], outside=True)
    fitted = fit_sentence(about, train.phrases, vectors, answers, plan=plan, dev=dev)
    if without.outside is None:
        return fitted
    outside = without.outside.outside
    centroids = centroids_of(vectors, answers) if outside.needs_centroids else None
    spec = fitted.head.spec.model_copy(update={"outside": outside})
    return Fitted(replace(fitted.head, spec=spec, centroids=centroids), fitted.learnt)


def report_classes(
    config: HeadConfig, head: Head, made: Any, materials: Materials, vectors: VectorStore
) -> dict[str, Any]:
    """Every section that is about labels; none where nothing was measured."""
    rows = _measured(head, materials)
    judged = _judged(head, made, materials, rows)
    if judged is None:
        return {}
    worst = report.classes(judged)
    found: dict[str, Any] = {
        "summary": verdict.summary(judged, beta=config.beta),
        "classes": worst,
        "confusions": report.confusions(judged),
        "coverage": report.coverage(judged),
        "curves": report.curves(judged, worst),
        "reliability": report.reliability(judged),
        "errors": report.errors(judged, rows, materials.train),
        "slices": report.lengths(judged.phrases, _correct(judged)) + _noise(head, materials.test, vectors),
    }
    if isinstance(made, Fitted):
        found["regularisation"] = [{"c": c, "loss": loss} for c, loss in made.learnt.losses.items()]
        aurocs = {} if made.learnt.outside is None else made.learnt.outside.aurocs
        found["outside"] = report.outside(judged, aurocs, _outside_auroc(judged))
    return found


def _measured(head: Head, materials: Materials) -> Material:
    """The test split; without one, what the folds held out and what dev adds to it."""
    if len(materials.test):
        return materials.test
    return materials.train.joined(_judging(materials.dev, head.spec.labels))


def _judged(head: Head, made: Any, materials: Materials, rows: Material) -> Verdict | None:
    if isinstance(head, ClassHead) and len(materials.test):
        return verdict.judge(head, rows, materials.outside_test)
    if isinstance(made, Fitted):
        return verdict.of_folds(head.spec, made.learnt, rows)
    return None  # anchors answer their own phrases with certainty; only a test split could say more


def _correct(judged: Verdict) -> NDArray[np.bool_]:
    return judged.right if judged.spec.exclusive else judged.exact


def _outside_auroc(judged: Verdict) -> float | None:
    inside, strange = judged.strangeness, judged.outside_strangeness
    if inside is None or strange is None or not len(strange):
        return None
    return float(
        roc_auc_score(np.arange(len(inside) + len(strange)) >= len(inside), np.concatenate([inside, strange]))
    )


def _noise(head: Head, test: Material, vectors: VectorStore) -> list[dict[str, Any]]:
    """A sample of the test rows with a typing mistake each."""
    if not isinstance(head, ClassHead) or not len(test):
        return []
    clean = test.take(noise.sample(test.phrases))
    typed = noise.mistyped(clean.phrases)
    rows = [replace(row, phrase=phrase) for row, phrase in zip(clean.rows, typed, strict=True)]
    noisy = Material(rows, vectors.encode(typed, False), clean.contexts)
    nobody = test.take([])
    right = [_correct(verdict.judge(head, each, nobody)) for each in (noisy, clean)]
    return report.noisy(*right)
