"""Real phrases in number: every distinct turn of the dialog sets, then sentences of the other sets, with their vectors.

python -m benchmarks.phrases     encodes them once, resumably, into .cache/phrases
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nlu.errors import InvalidInput
from nlu.normalizer import normalize
from nlu.progress import Bar
from nlu.vectorizer import Vectorizer

DATA = Path("../shared/data")
FOLDER = Path(".cache/phrases")
SHIPPED = Path("statics/shipped/vectorizer.sentence")
DIALOGS = (
    "self_dialogue",
    "topical_chat",
    "ru_movie_dialogs",
    "dailydialog",
    "sgd",
    "dstc2_dialogs",
    "kvret",
)
QUERIES = 2_000
ROWS = 664_000
CHUNK = 4096  # phrases between two writes


def phrases(rows: int = ROWS, *, uncased: bool = True) -> list[str]:
    """The first `rows` distinct phrases, normalised as the server does; dialog turns first, in the order of DIALOGS."""
    return _distinct(chain(_dialogs(), _others()), rows, uncased=uncased)


def turns(*, uncased: bool = True) -> int:
    """How many distinct phrases are turns of dialogs: they are the first ones."""
    return len(_distinct(_dialogs(), None, uncased=uncased))


def vectors(rows: int = ROWS, folder: Path = SHIPPED) -> NDArray[np.float16]:
    """`[rows, dim]` of unit length, memory-mapped; whatever is not encoded yet is encoded first."""
    vectorizer = Vectorizer(folder)
    wanted = phrases(rows, uncased=vectorizer.spec.uncased)
    path = FOLDER / f"{vectorizer.fingerprint[:12]}.f16"
    path.parent.mkdir(parents=True, exist_ok=True)
    width = 2 * vectorizer.dim
    done = path.stat().st_size // width if path.exists() else 0
    with path.open("ab") as file, Bar() as bar:
        file.truncate(done * width)  # a row that a stop cut in two
        for start in range(done, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            encodings = vectorizer.encode_corpus(chunk, tokens=False, workers=os.cpu_count() or 1)
            file.write(np.stack([encoding.sentence for encoding in encodings]).astype("<f2").tobytes())
            file.flush()
            bar.step("phrases encoded", start + len(chunk), len(wanted))
    return np.memmap(path, "<f2", "r", shape=(len(wanted), vectorizer.dim))


def _distinct(texts: Iterable[str], rows: int | None, *, uncased: bool) -> list[str]:
    found: dict[str, None] = {}
    for text in texts:
        try:
            found.setdefault(normalize(text, uncased=uncased).text)
        except InvalidInput:
            continue
        if len(found) == rows:
            break
    return list(found)


def _dialogs() -> Iterator[str]:
    for name in DIALOGS:
        for path in sorted((DATA / name).glob("*.jsonl.gz")):
            if not path.name.startswith("user"):  # single turns of dialogs that are there whole
                yield from _fields(path)


def _others() -> Iterator[str]:
    for path in sorted(DATA.glob("*/*.gz")):
        if path.parent.name not in DIALOGS:
            yield from _fields(path)


def _fields(path: Path) -> Iterator[str]:
    """The texts of one file: turns of a dialog, `text` of a record, every long enough field of a table."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            if not path.name.endswith(".jsonl.gz"):
                yield from (field for field in line.rstrip("\n").split("\t") if " " in field)
                continue
            record = json.loads(line)
            if "turns" in record:
                yield from (turn["text"] for turn in record["turns"])
            elif isinstance(record.get("text"), str):
                yield record["text"]


if __name__ == "__main__":
    print(json.dumps({"vectors": list(vectors().shape)}))
