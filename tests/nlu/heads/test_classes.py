"""nlu.heads.classes: which rows choose what, and what a head without strangers learns from its own labels."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from annotators.anchors import AnchorsHead
from annotators.fit import About, Fitted, learn
from annotators.sentence import SentenceHead
from nlu.heads import data
from nlu.heads.classes import fit_classes, report_classes
from nlu.heads.config import HeadConfig
from nlu.heads.material import Materials, encode
from nlu.heads.train import plan_of
from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer
from tests.nlu.heads import phrases
from tests.nlu.heads.sprints import ASKED, KNOWN, STRANGE, STRANGE_ASKED, Sprint


@pytest.fixture
def made(bundled: Vectorizer, store: Path, tmp_path: Path) -> Any:
    """Fits a sprint's head; gives what came out, and what went in."""

    def run(sprint: Sprint, **options: Any) -> tuple[Any, Materials, HeadConfig]:
        config = sprint.config(tmp_path, **options)
        with closing(VectorStore(store, bundled, 1, lambda _done, _total: None)) as vectors:
            materials = encode(data.read(config, uncased=True), vectors, tokens=False)
        return (
            fit_classes(config, About("x", "x", bundled.fingerprint), materials, plan_of(config)),
            materials,
            config,
        )

    return run


def reported(made: Any, store: Path, vectorizer: Vectorizer) -> dict[str, Any]:
    fitted, materials, config = made
    head = fitted.head if isinstance(fitted, Fitted) else fitted
    with closing(VectorStore(store, vectorizer, 1, lambda _done, _total: None)) as vectors:
        return report_classes(config, head, fitted, materials, vectors)


def spec(fitted: Any) -> Any:
    return (fitted.head if isinstance(fitted, Fitted) else fitted).spec


def test_classes_score_strangers_where_some_are_given(made: Any) -> None:
    fitted, _, _ = made(Sprint(KNOWN + STRANGE))
    assert spec(fitted).outside is not None
    for options in ({"outside": "none"}, {"multi": True}, {"kind": "boosted"}, {"kind": "context"}):
        assert spec(made(Sprint(KNOWN + STRANGE), **options)[0]).outside is None
    assert spec(made(Sprint(KNOWN))[0]).outside is None


def test_classes_given_strangers_are_better_than_left_out_labels(made: Any) -> None:
    given, asked = (
        made(Sprint(KNOWN + STRANGE), outside="given"),
        made(Sprint(KNOWN + STRANGE), outside="labels"),
    )
    assert spec(asked[0]) == spec(given[0])


def test_classes_without_strangers_learn_from_labels_left_out(made: Any) -> None:
    fitted, materials, config = made(Sprint(KNOWN), outside="labels")
    plain, _, _ = made(Sprint(KNOWN), outside="none")
    head, without = fitted.head, plain.head
    assert isinstance(head, SentenceHead) and head.spec.outside is not None
    assert head.spec.model_copy(update={"outside": None}) == without.spec  # all else is as it would be
    assert np.array_equal(head.weight, without.weight)
    # by hand: one label of five plays the stranger, and no model has seen it
    answers = materials.train.answers(exclusive=True)
    strange = np.isin(answers.codes, np.random.default_rng(0).permutation(3)[::5])
    kept = materials.train.take(np.flatnonzero(~strange).tolist())
    twin = learn(kept.vectors, kept.answers(exclusive=True), plan_of(config), outsiders=materials.train.vectors[strange], outside=True)  # fmt: skip
    assert twin.outside is not None and head.spec.outside == twin.outside.outside
    assert (head.centroids is not None) == head.spec.outside.needs_centroids
    if head.centroids is not None:
        assert head.centroids.shape == (3, materials.train.vectors.shape[1])


def test_classes_left_out_labels_must_leave_two(made: Any) -> None:
    with pytest.raises(
        ValueError, match="labels: found 2, expected at least 3 to leave some out; add labels"
    ):
        made(Sprint(phrases.labelled(9, 0, ["lamp", "music"])), outside="labels")


def test_classes_strangers_hold_thresholds_up_even_where_they_make_no_score(made: Any) -> None:
    strangers = [{"text": text, "label": "oos"} for text in phrases.said("abxy", 30, 4)]
    plain, pushed = made(Sprint(KNOWN))[0], made(Sprint(KNOWN + strangers), outside="none")[0]
    assert np.array_equal(plain.head.weight, pushed.head.weight)
    assert sum(pushed.head.spec.thresholds) > sum(plain.head.spec.thresholds)


def test_classes_dev_rows_are_judged_on_and_not_learnt(made: Any) -> None:
    dev = phrases.labelled(4, 6)
    plain, _, _ = made(Sprint(KNOWN))
    strange = [{"text": "ok", "label": "unheard of"}]
    fitted, materials, _ = made(Sprint(KNOWN, dev=strange + dev))
    assert np.array_equal(plain.head.weight, fitted.head.weight)
    assert len(fitted.learnt.raw) == len(KNOWN) + len(
        dev
    )  # the label that train does not have judges nothing
    known = materials.dev.take(range(1, len(materials.dev)))
    assert np.array_equal(fitted.learnt.raw[len(KNOWN) :], fitted.learnt.model.raw(known.vectors))


def test_classes_report_of_folds_names_the_phrases_that_were_judged(
    made: Any, bundled: Vectorizer, store: Path
) -> None:
    # first in dev comes a row of a label that train does not have; the one after it is labelled wrong
    dev = [
        {"text": "ok", "label": "unheard of"},
        {"text": "klmn mlkn nmkl", "label": "lamp"},
        *phrases.labelled(3, 6),
    ]
    found = reported(made(Sprint(KNOWN, dev=dev)), store, bundled)
    (pair,) = [pair for pair in found["confusions"] if (pair["gold"], pair["predicted"]) == ("lamp", "music")]
    assert "klmn mlkn nmkl" in [phrase["text"] for phrase in pair["phrases"]]
    assert "klmn mlkn nmkl" in [error["text"] for error in found["errors"]]
    assert sum(part["rows"] for part in found["slices"]) == len(KNOWN) + len(dev) - 1


def test_classes_noise_hits_what_heads_hear(made: Any, bundled: Vectorizer, store: Path) -> None:
    sprint = Sprint(KNOWN + STRANGE, ASKED + STRANGE_ASKED)
    plain, typed = (
        part for part in reported(made(sprint), store, bundled)["slices"] if part["slice"] == "noise"
    )
    assert (plain["value"], typed["value"]) == ("as written", "with typing mistakes")
    assert plain["rows"] == typed["rows"] == len(ASKED)
    right = reported(made(sprint), store, bundled)["summary"]["accuracy"]["value"]
    assert plain["accuracy"]["value"] == pytest.approx(right)
    # a pattern that a typing mistake breaks is broken
    spark = [{"text": f"spark {text}", "label": "music"} for text in phrases.said("abcd", 30, 3)]
    anchored = made(Sprint(phrases.labelled(3, 0), spark), kind="anchors", patterns={"music": ("^spark",)})
    plain, typed = (part for part in reported(anchored, store, bundled)["slices"] if part["slice"] == "noise")
    assert plain["accuracy"]["value"] == 1.0 > typed["accuracy"]["value"] > 0.2


def test_classes_of_any_number_count_a_label_that_the_head_has_not(
    made: Any, bundled: Vectorizer, store: Path
) -> None:
    several = Sprint(phrases.several(45, 0), [{"text": "wxyz zyxw", "labels": ["unheard of"]}])
    found = reported(made(several, multi=True, beta=0.3), store, bundled)
    assert [part["accuracy"]["value"] for part in found["slices"]] == [0.0] * len(found["slices"])


def test_classes_anchors_take_patterns_and_beta(made: Any) -> None:
    lines = phrases.labelled(6, 0)
    one, _, _ = made(Sprint(lines), kind="anchors", patterns={"lamp": ("^x",)})
    assert isinstance(one, AnchorsHead)
    assert one.spec.params["patterns"] == {"lamp": ["^x"]}
    strangers = [{"text": text, "label": "oos"} for text in phrases.said("abkl", 20, 4)]
    strict, _, _ = made(Sprint(lines + strangers), kind="anchors", beta=0.1)
    loose, _, _ = made(Sprint(lines + strangers), kind="anchors", beta=9.0)
    assert strict.spec.thresholds[0] > loose.spec.thresholds[0]


def test_classes_report_of_anchors_without_a_test_is_nothing(
    made: Any, bundled: Vectorizer, store: Path
) -> None:
    assert reported(made(Sprint(phrases.labelled(3, 0)), kind="anchors"), store, bundled) == {}


def test_classes_weights_count_in_the_final_head_and_in_folds(made: Any) -> None:
    heavy = [line | {"weight": 50.0} if line["label"] == "music" else line for line in KNOWN]
    plain, weighed = made(Sprint(KNOWN))[0], made(replace(Sprint(KNOWN), train=heavy))[0]
    assert weighed.learnt.raw[:, 1].mean() != plain.learnt.raw[:, 1].mean()
    assert not np.array_equal(weighed.head.weight, plain.head.weight)
