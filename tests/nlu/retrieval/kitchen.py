"""What tests of building share: the tiny vectorizer's models with a head of toxicity, and files of replies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from annotators import fit
from annotators.answers import Answers
from annotators.fit import About
from annotators.sentence import SentenceHead
from annotators.table import Head, load
from nlu.retrieval.judge import Judge
from nlu.retrieval.reading import Models
from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer
from tests.tiny import Made

RUDE = ("zzz", "zzzz zz", "zzz zzz z", "z zz", "zz zzz")
POLITE = ("thank you", "good morning", "спасибо", "how nice of you", "come in")


def toxicity(vectorizer: Vectorizer) -> SentenceHead:
    """Zs are rude, all else is not: as much as a vectorizer of letters can tell. Never quite sure."""
    phrases = [*RUDE, *POLITE]
    rows = np.stack([each.sentence for each in vectorizer.encode(phrases, tokens=False)])
    answers = Answers.one(["toxic"] * len(RUDE) + ["acceptable"] * len(POLITE))
    about = About("toxicity", "toxicity", vectorizer.fingerprint, made_by="tests")
    head = fit.fit_sentence(about, phrases, rows, answers).head
    scale = tuple(each / 50 for each in head.spec.scale)
    return replace(head, spec=head.spec.model_copy(update={"scale": scale}))


def heads(made: Made, vectorizer: Vectorizer) -> list[Head]:
    """Those of the tiny bundle, and toxicity."""
    return [*(load(folder) for folder in sorted(made.parts.glob("head.*"))), toxicity(vectorizer)]


@contextmanager
def opened(made: Made, store: Path, *, workers: int = 1, judged: bool = True) -> Iterator[Models]:
    vectorizer = Vectorizer(made.parts / "vectorizer.tiny")
    vectors = VectorStore(store, vectorizer, workers, lambda done, total: None)
    asked = heads(made, vectorizer) if judged else []
    yield Models(vectorizer, vectors, Judge(asked, vectorizer.fingerprint))
    vectors.close()


def written(path: Path, *records: dict[str, Any]) -> Path:
    """JSON lines."""
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def many(
    count: int, words: Sequence[str] = ("tea", "милк", "jam", "мёд", "rye", "oat")
) -> list[dict[str, Any]]:
    """Pairs that all differ, and not by their numbers alone."""

    def said(number: int) -> str:
        return " ".join(words[number // len(words) ** place % len(words)] for place in range(7))

    return [{"prompt": f"{said(i)} {i}?", "reply": f"{said(i * 31 + 7)} {i}."} for i in range(count)]
