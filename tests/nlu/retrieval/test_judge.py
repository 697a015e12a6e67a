"""nlu.retrieval.judge: the same scores as the fleet's, many texts at once."""

from __future__ import annotations

import numpy as np
import pytest

from annotators.annotator import Heard
from annotators.fleet import Fleet
from annotators.sentence import SentenceHead
from nlu.errors import EngineRefused
from nlu.retrieval import judge as module
from nlu.retrieval.judge import AT_LEAST, TOP, Judge
from nlu.vectorizer import Vectorizer
from tests.nlu.retrieval.kitchen import heads
from tests.tiny import Made

TEXTS = ("turn the lights on", "zzz zz", "спасибо", "play a song", "so annoying", "stop")


def test_judge_says_what_the_fleet_says(tiny: Made, vectorizer: Vectorizer) -> None:
    encodings = vectorizer.encode(TEXTS)
    known = heads(tiny, vectorizer)
    fleet = Fleet(known)
    judge = Judge(known, vectorizer.fingerprint)
    names = {head.spec.name for head in known if isinstance(head, SentenceHead)}
    assert names == {"intent", "emotion", "toxicity"} and judge.tells_toxicity
    for text, encoding, opinion in zip(
        TEXTS, encodings, judge(np.stack([e.sentence for e in encodings])), strict=True
    ):
        expected = {
            (answer.name, label.label): label.score
            for answer in fleet.annotate(Heard.alone(text, encoding), wanted=frozenset(names))
            for rank, label in enumerate(answer.labels[:TOP])
            if rank == 0 or label.score >= AT_LEAST
        }
        found = {(judged.head, judged.label): judged.score for judged in opinion.labels}
        assert found == pytest.approx(expected, abs=1e-5) and len(found) == len(opinion.labels)
        (answer,) = fleet.annotate(Heard.alone(text, encoding), wanted=frozenset({"toxicity"}))
        assert opinion.toxicity == pytest.approx(
            next(label.score for label in answer.labels if label.label == "toxic"), abs=1e-5
        )
    rude, polite = (judge(vectorizer.encode([text])[0].sentence[None])[0] for text in ("zzz zz", "спасибо"))
    assert rude.toxicity is not None and polite.toxicity is not None
    assert rude.toxicity > 0.5 > polite.toxicity


def test_judge_keeps_few_labels(tiny: Made, vectorizer: Vectorizer, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.stack([each.sentence for each in vectorizer.encode(TEXTS)])
    monkeypatch.setattr(module, "AT_LEAST", 0.0)
    intents = [head for head in heads(tiny, vectorizer) if head.spec.name == "intent"]
    assert {len(each.labels) for each in Judge(intents, vectorizer.fingerprint)(vectors)} == {3}
    monkeypatch.setattr(module, "TOP", 2)
    for each in Judge(intents, vectorizer.fingerprint)(vectors):
        assert len(each.labels) == 2 and each.labels[0].score >= each.labels[1].score
    monkeypatch.setattr(module, "AT_LEAST", 1.1)
    assert {len(each.labels) for each in Judge(intents, vectorizer.fingerprint)(vectors)} == {1}


def test_judge_without_heads_has_no_opinion_and_heads_of_others_are_refused(
    tiny: Made, vectorizer: Vectorizer
) -> None:
    judge = Judge([], vectorizer.fingerprint)
    assert not judge.tells_toxicity
    assert judge(np.ones((2, 8), np.float32)) == [module.Opinion((), None)] * 2
    with pytest.raises(
        EngineRefused, match="found one of vectorizer .* train the head on this bundle's vectorizer"
    ):
        Judge(heads(tiny, vectorizer), "of another")
