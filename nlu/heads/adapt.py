"""Training the adapter of the queries (`index/adapter.py`): new phrases with the replies they are to find, the vectorizer
frozen. Read `adapt` from top to bottom.

Every question is softmax over the rows of the index, right ones against all others (InfoNCE, van den Oord et al., 2018; the
full batch, so a new pair's rows are the others' negatives). Of several right rows any will do: the loss is -log of their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from index.adapter import Adapter, Change, Exam, Requires, Residual, Spec, bound
from nlu.heads.questions import BLOCK, Library, Question, new_questions, old_questions, places

FOLDS = 5
# Of the residual that was learnt, the largest that does no harm; where none of them does, the adapter is refused.
LADDER = (1.0, 0.8, 0.6, 0.4, 0.2)
# Chosen on small talk, bank and assistant phrases (docs/adapter.md): with this decay, later steps change nothing.
_TEMPERATURE, _DECAY, _STEPS = 0.05, 0.02, 60
_OLD_WEIGHT = 1.0  # of all old questions together, against all new ones
# Bounds on time: an index may have a million rows. Far rows weigh nothing in a softmax; the exams search all of them.
_MOST_OLD, _MOST_ROWS = 1000, 8192
_RESAMPLES = 2000

FloatArray = NDArray[np.float32]
Progress = Callable[[str, int, int], None]


class AdapterRefused(ValueError):
    """Nothing of what was learnt leaves old content where it is."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for; `max_harm` is an absolute loss of recall."""

    rank: int = 16
    eps: float = 0.3
    max_harm: float = 0.01
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Lesson:
    """All questions at once. Computed in the dtype of `queries` and `rows`."""

    queries: NDArray[np.floating[Any]]  # [questions, dim]
    rows: NDArray[np.floating[Any]]  # [rows, dim]
    right: NDArray[np.floating[Any]]  # [questions, rows] 1 where a row is right and not hidden
    visible: NDArray[np.floating[Any]]  # [questions, rows] 0 where a row is hidden
    weights: NDArray[np.floating[Any]]  # [questions]


def adapt(
    pairs: Mapping[str, Sequence[str]],
    library: Library,
    wanted: Wanted,
    *,
    fingerprint: str,
    progress: Progress,
) -> Adapter:
    """Learn an adapter from `pairs`, as read by `read_pairs`, and judge it on what it did not learn from.

    New content is judged on folds: every phrase by a residual learnt, and scaled, without it. Old content is judged on
    held-out prompts by the very residual that is returned; the same prompts chose its factor. The same input gives the same
    adapter on one machine. Raises ValueError for too little to learn or to judge from, `AdapterRefused` for too much harm.
    """
    new = new_questions(pairs, library)
    if len(new) < FOLDS:
        raise ValueError(
            f"pairs: found {len(new)} phrases with something to find, expected at least {FOLDS};"
            " write several phrases for each reply"
        )
    taught = {reply for replies in pairs.values() for reply in replies}
    kept, held = old_questions(library, taught=taught, most=_MOST_OLD)
    before = places(held, library.rows)
    done = 0

    def learn(questions: Sequence[Question]) -> tuple[Residual, float] | None:
        nonlocal done
        learnt = fit(_lesson(questions, kept, library.rows), wanted)
        done += 1
        progress("learning", done, FOLDS + 1)
        return _harmless(learnt, held, before, library.rows, wanted.max_harm)

    whole = learn(new)
    if whole is None:
        raise AdapterRefused(
            f"old content: found that even {LADDER[-1]} of the residual loses more recall than allowed on {len(held)} held-out"
            f" prompts, expected a loss of at most {wanted.max_harm}; write more phrases, lower --eps, or make the phrases"
            " prompts of the index"
        )
    residual, factor = whole
    after = np.zeros(len(new), np.int64)
    folds = np.arange(len(new)) % FOLDS  # questions come reply by reply, so every fold has some of each
    for fold in range(FOLDS):
        theirs = learn([new[i] for i in np.flatnonzero(folds != fold)])
        asked = np.flatnonzero(folds == fold)
        after[asked] = places([new[i] for i in asked], library.rows, None if theirs is None else theirs[0])
    spec = Spec(
        dim=library.rows.shape[1],
        rank=wanted.rank,
        eps=residual.eps,
        bound=round(bound(residual.eps), 6),
        factor=factor,
        max_harm=wanted.max_harm,
        new=exam(new, places(new, library.rows), after, seed=wanted.seed),
        old=exam(held, before, places(held, library.rows, residual), seed=wanted.seed),
        rows=len(library.rows),
        requires=Requires(vectorizer=fingerprint),
        made_by="nlu index adapt",
    )
    return Adapter(spec, residual)


def fit(lesson: Lesson, wanted: Wanted) -> Residual:
    """The residual that answers the lesson best, by L-BFGS from one that changes nothing: `up` begins at zero."""
    dim = lesson.queries.shape[1]
    down = np.random.default_rng(wanted.seed).standard_normal((wanted.rank, dim)) / np.sqrt(dim)
    found = minimize(
        objective,
        np.concatenate([down.ravel(), np.zeros(dim * wanted.rank)]),
        args=(lesson, wanted.rank, wanted.eps),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": _STEPS},
    )
    return Residual.of(*_unpacked(found.x, wanted.rank, dim), wanted.eps)


def objective(
    theta: NDArray[np.float64], lesson: Lesson, rank: int, eps: float
) -> tuple[float, NDArray[np.float64]]:
    """The loss of `theta`, down and up in a row, and its gradient, derived by hand.

    Loss = sum of weight * (log sum of exp(s / t) over all rows - the same over the right ones) + decay / 2 * |theta|**2,
    with s the cosines of the moved queries and t the temperature.
    """
    queries, rows = lesson.queries, lesson.rows
    down, up = (part.astype(queries.dtype) for part in _unpacked(theta, rank, queries.shape[1]))
    inner = queries @ down.T  # [questions, rank]
    delta = inner @ up.T  # [questions, dim]
    squares = np.einsum("ij,ij->i", delta, delta)[:, None]
    clipped = squares > eps * eps
    shrink = np.where(clipped, eps / np.sqrt(np.where(clipped, squares, 1.0)), 1.0).astype(queries.dtype)
    moved = queries + shrink * delta
    lengths = np.linalg.norm(moved, axis=1, keepdims=True)
    units = moved / lengths

    # A cosine is at most 1, so exp neither overflows nor, at this temperature, vanishes: no maximum is needed.
    weight = np.exp((units @ rows.T - 1.0) / _TEMPERATURE) * lesson.visible  # [questions, rows]
    total, right = weight.sum(axis=1), np.einsum("ij,ij->i", weight, lesson.right)
    loss = float(lesson.weights @ np.log(total / right)) + _DECAY / 2 * float(theta @ theta)

    share = (lesson.weights / _TEMPERATURE)[:, None]
    slope = weight * (share / total[:, None] - lesson.right * (share / right[:, None]))
    d_units = slope @ rows
    d_moved = (d_units - _along(d_units, units)) / lengths  # through the normalisation: what is across stays
    # Through the clip: a residual held at eps can turn but not grow.
    d_delta = shrink * (d_moved - np.where(clipped, _along(d_moved, shrink * delta / eps), 0.0))
    d_up = d_delta.T @ inner
    d_down = (d_delta @ up).T @ queries
    return loss, np.concatenate([d_down.ravel(), d_up.ravel()]).astype(np.float64) + _DECAY * theta


def exam(
    questions: Sequence[Question], before: NDArray[np.int64], after: NDArray[np.int64], *, seed: int
) -> Exam:
    """Two columns of places as measures; intervals by resampling replies with all their questions (paired bootstrap)."""
    _, groups = np.unique([question.group for question in questions], return_inverse=True)
    sizes = np.bincount(groups)
    drawn = np.random.default_rng(seed).multinomial(
        len(sizes), np.full(len(sizes), 1 / len(sizes)), _RESAMPLES
    )

    def change(measure: Callable[[NDArray[np.int64]], NDArray[np.float64]]) -> Change:
        first, second = measure(before), measure(after)
        won = np.bincount(groups, weights=second - first)
        low, high = np.quantile((drawn @ won) / (drawn @ sizes), (0.025, 0.975))
        numbers = (float(first.mean()), float(second.mean()), float(low), float(high))
        return Change(
            **dict(zip(("before", "after", "low", "high"), (round(n, 4) for n in numbers), strict=True))
        )

    return Exam(
        questions=len(questions),
        recall_at_1=change(lambda place: (place <= 1).astype(np.float64)),
        recall_at_10=change(lambda place: (place <= 10).astype(np.float64)),
        mrr=change(lambda place: 1.0 / place),
    )


def _lesson(new: Sequence[Question], kept: Sequence[Question], rows: FloatArray) -> Lesson:
    questions = [*new, *kept]
    queries = np.stack([question.vector for question in questions])
    chosen = _nearest(questions, queries, rows)
    column = np.full(len(rows), -1)
    column[chosen] = np.arange(len(chosen))
    right = np.zeros((len(questions), len(chosen)), np.float32)
    visible = np.ones_like(right)
    for i, question in enumerate(questions):
        columns = column[question.right]
        right[i, columns[columns >= 0]] = 1.0
        if question.hidden >= 0 and column[question.hidden] >= 0:
            visible[i, column[question.hidden]] = 0.0
    weights = np.concatenate(
        [np.full(len(new), 1 / len(new)), np.full(len(kept), _OLD_WEIGHT / len(kept))], dtype=np.float32
    )
    return Lesson(queries, rows[chosen], right, visible, weights)


def _nearest(questions: Sequence[Question], queries: FloatArray, rows: FloatArray) -> NDArray[np.int64]:
    """The rows nearest to any question, and each question's nearest right row."""
    if len(rows) <= _MOST_ROWS:
        return np.arange(len(rows))
    best = np.full(len(rows), -np.inf, np.float32)
    needed = set()
    for start in range(0, len(questions), BLOCK):
        scores = queries[start : start + BLOCK] @ rows.T
        np.maximum(best, scores.max(axis=0), out=best)
        for question, row in zip(questions[start:], scores, strict=False):
            needed.add(int(question.right[row[question.right].argmax()]))
    best[list(needed)] = np.inf
    return np.sort(np.argsort(-best, kind="stable")[: max(_MOST_ROWS, len(needed))])


def _harmless(
    learnt: Residual,
    held: Sequence[Question],
    before: NDArray[np.int64],
    rows: FloatArray,
    max_harm: float,
) -> tuple[Residual, float] | None:
    """The largest step of the ladder that loses no more than `max_harm`, and its factor."""
    for factor in LADDER:
        residual = learnt.scaled(factor)
        after = places(held, rows, residual)
        if all((before <= k).mean() - (after <= k).mean() <= max_harm for k in (1, 10)):
            return residual, factor
    return None


def _unpacked(
    theta: NDArray[np.float64], rank: int, dim: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return theta[: rank * dim].reshape(rank, dim), theta[rank * dim :].reshape(dim, rank)


def _along(vectors: NDArray[np.floating[Any]], units: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """The part of each vector along its unit vector."""
    along: NDArray[np.floating[Any]] = np.einsum("ij,ij->i", vectors, units)[:, None] * units
    return along
