"""benchmarks.peers: figures worked out by hand, shots, and a trial elsewhere against the same one here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.others import Learnt
from benchmarks.peer import Predictor, Row, Task, Trial, attempt
from benchmarks.peers import elsewhere, few, measure, merge

ROWS: list[Row] = [
    ("call my sister", ("call",)),
    ("ring the office", ("call",)),
    ("набери маму", ("call",)),
    ("stop the music", ("stop",)),
    ("be quiet", ("stop",)),
    ("тише", ("stop",)),
]
OUTSIDE: Row = ("who painted this", ())


class Letters:
    """A peer that is real and tiny: the label whose texts share the most letters with this one."""

    name = "letters"
    packages: tuple[str, ...] = ("numpy",)

    def fit(
        self, texts: Sequence[str], labels: Sequence[tuple[str, ...]], *, multi: bool, seed: int
    ) -> Predictor:
        known = {name: set[str]() for name in sorted({name for row in labels for name in row})}
        for text, row in zip(texts, labels, strict=True):
            for name in row:
                known[name] |= set(text)

        def scores(texts: Sequence[str]) -> NDArray[np.floating]:
            shared = [
                [len(set(text) & letters) / len(set(text)) for letters in known.values()] for text in texts
            ]
            return np.array(shared)

        return Learnt(tuple(known), scores, encode_s=0.25)


def trial(labels: tuple[str, ...], dev: list[list[float]], test: list[list[float]]) -> Trial:
    """Scores alone; no figure of quality looks at anything else."""
    of_dev, of_test = (np.array(scores, np.float32).reshape(-1, len(labels)) for scores in (dev, test))
    return Trial(labels, of_dev, of_test, fit_s=0.0, fit_wall_s=0.0, encode_s=0.0, score_ms=0.0, versions={})


def test_peers_measure_accuracy_in_scope_and_refusals_by_the_dev_threshold() -> None:
    dev = [ROWS[0]] * 20 + [OUTSIDE]
    task = Task("t", [], dev, [ROWS[0], ROWS[3], ROWS[4], OUTSIDE, OUTSIDE], multi=False)
    # Nineteen of the twenty in-scope dev rows lie above 0.495; the outside row's 0.0 must not pull that down.
    of_dev = [[0.4 + 0.1 * (number > 0), 0.0] for number in range(20)] + [[0.0, 0.0]]
    of_test = [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.55, 0.0], [0.75, 0.0]]
    figures = measure(task, trial(("call", "stop"), of_dev, of_test))
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["auroc"] == 1.0  # both rows of stop lie nearer to it than the row of call does
    assert figures["oos_auroc"] == pytest.approx(5 / 6)  # of six pairs only 0.7 inside, 0.75 outside is amiss
    assert figures["oos_recall"] == 0.0
    assert figures["in_scope_kept"] == 1.0
    stricter = [[0.7 + 0.1 * (number > 0), 0.0] for number in range(20)] + [[0.0, 0.0]]
    figures = measure(task, trial(("call", "stop"), stricter, of_test))
    assert figures["oos_recall"] == 1.0  # under 0.795
    assert figures["in_scope_kept"] == pytest.approx(2 / 3)


def test_peers_measure_a_label_never_learnt_as_an_error() -> None:
    task = Task("t", [], [], [ROWS[0], ROWS[3]], multi=False)
    assert measure(task, trial(("call",), [], [[0.9], [0.9]]))["accuracy"] == 0.5


def test_peers_measure_several_labels_by_thresholds_of_dev() -> None:
    rows: list[Row] = [("a", ("x",)), ("b", ("x", "y")), ("c", ("y",)), ("d", ())]
    scores = [[0.1, 5.0], [0.2, 7.0], [0.05, 7.0], [0.01, 5.5]]
    task = Task("t", [], rows, rows, multi=True)
    assert measure(task, trial(("x", "y"), scores, scores))["macro_f1"] == 1.0
    # x is found at 0.1 and above on dev, so one of its two test rows is missed
    lower = [[0.07, 5.0], *scores[1:]]
    assert measure(task, trial(("x", "y"), scores, lower))["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_peers_few_draws_so_many_of_each_label_anew_for_each_seed() -> None:
    rows: list[Row] = [(f"{label} {number}", (label,)) for label in ("call", "stop") for number in range(50)]
    task = Task("t", rows, [], [], multi=False)
    drawn = [few(task, 5, seed=seed).train for seed in (0, 1, 0)]
    assert Counter(labels for _, labels in drawn[0]) == {("call",): 5, ("stop",): 5}
    assert len(set(drawn[0])) == 10
    assert drawn[0] == drawn[2] != drawn[1]


def test_peers_trial_elsewhere_scores_as_here() -> None:
    task = Task("t", ROWS, [ROWS[0]], [*ROWS, OUTSIDE], multi=False)
    there, here = elsewhere(f"{__name__}:Letters", task, seed=0), attempt(Letters(), task, seed=0)
    assert there.labels == here.labels == ("call", "stop")
    np.testing.assert_array_equal(there.test, here.test)
    np.testing.assert_array_equal(there.dev, here.dev)
    assert there.versions == {"numpy": np.__version__}
    assert there.encode_s == 0.25


def test_peers_trial_elsewhere_says_why_it_failed() -> None:
    with pytest.raises(SystemExit, match="no_such_module"):
        elsewhere("no_such_module:Peer", Task("t", ROWS, [], ROWS, multi=False), seed=0)


def test_peers_results_of_other_commands_stay(tmp_path: Path) -> None:
    results = tmp_path / "peers.json"
    merge(results, "banking77", "tfidf", {"accuracy": 0.5})
    merge(results, "banking77", "frozen", {"accuracy": 0.6})
    merge(results, "banking77", "tfidf", {"accuracy": 0.7})
    merge(results, "clinc150", "tfidf", {"accuracy": 0.8})
    kept = json.loads(results.read_text(encoding="utf-8"))
    assert kept == {
        "banking77": {"tfidf": {"accuracy": 0.7}, "frozen": {"accuracy": 0.6}},
        "clinc150": {"tfidf": {"accuracy": 0.8}},
    }
    assert list(tmp_path.iterdir()) == [results]


def test_peers_results_of_commands_at_the_same_time_all_stay(tmp_path: Path) -> None:
    results = tmp_path / "peers.json"
    peers = [f"peer {number}" for number in range(32)]
    with ThreadPoolExecutor(
        8
    ) as pool:  # each call opens the folder anew, so threads exclude one another as processes do
        list(pool.map(lambda peer: merge(results, "banking77", peer, {}), peers))
    assert sorted(json.loads(results.read_text(encoding="utf-8"))["banking77"]) == sorted(peers)
