"""Dialogs from JSONL to exchanges: what was said, and the reply it got. Rankers learn from them and retrieval is judged by
them.

A line is {"id": "...", "turns": [{"speaker": "...", "text": "..."}, ...]}; other fields are left alone. A file may be gzip'd.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nlu.errors import InvalidInput
from nlu.normalizer import normalize

_MEND = "mend or drop the line"


class DialogsInvalid(ValueError):
    """Dialogs that cannot be read; the message names the file and the line."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A reply and the turns it answers."""

    dialog: str
    context: tuple[str, ...]  # phrases, oldest first; the last one is the query
    reply: str  # phrase
    text: str  # the reply as written


class Skipped(NamedTuple):
    """A turn that the normalizer refuses, so that it is nobody's query or reply."""

    where: str  # file:line
    turn: int  # from 1
    why: str


def read(
    paths: Sequence[Path],
    *,
    uncased: bool,
    context: int,
    skip: Callable[[Skipped], None] = lambda skipped: None,
) -> Iterator[Exchange]:
    """Every turn after the first as a reply to the turn right before it, with at most `context` earlier phrases, the query
    among them; `skip` is told of each turn left out. Raises DialogsInvalid at the first bad line or empty file."""
    if context < 1:
        raise ValueError(f"context: found {context}, expected at least 1, the query itself; raise it")
    for path in paths:
        found = 0
        for where, line in _lines(path):
            dialog, texts = _dialog(where, line)
            for exchange in _exchanges(dialog, texts, where, uncased=uncased, context=context, skip=skip):
                found += 1
                yield exchange
        if not found:
            raise DialogsInvalid(
                f"{path}: found no reply, expected dialogs of at least two turns; name a file that has some"
            )


def split(dialog: str, share: float, salt: str = "") -> bool:
    """Whether a dialog is in the part that gets this share of them: by BLAKE2b of its id, so the same on every machine;
    parts of different salts are independent of each other."""
    if not 0 <= share <= 1:
        raise ValueError(f"share: found {share}, expected 0 to 1; name a part of the whole")
    digest = hashlib.blake2b(f"{salt}\n{dialog}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with the place it stands at."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield f"{path.name}:{number}", line
    except UnicodeDecodeError as error:
        raise DialogsInvalid(
            f"{path.name}:{number}: found the byte {error.object[error.start]:#04x}, expected UTF-8 text; save it as UTF-8"
        ) from error
    except FileNotFoundError as error:
        raise DialogsInvalid(f"{path}: found no such file, expected dialogs; check the path") from error
    except (EOFError, zlib.error, OSError) as error:
        raise DialogsInvalid(
            f"{path.name}:{number + 1}: found {error}, expected a whole file of dialogs; get it again"
        ) from error


def _dialog(where: str, line: str) -> tuple[str, list[str]]:
    """The id and the texts of the turns."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DialogsInvalid(f"{where}: found {error}, expected one JSON object a line; {_MEND}") from error
    if not isinstance(record, dict):
        raise _wrong(where, "", record, "an object with id and turns")
    dialog, turns = record.get("id"), record.get("turns")
    if not isinstance(dialog, str) or not dialog:
        raise _wrong(where, "id: ", dialog, "a name")
    if not isinstance(turns, list) or not turns:
        raise _wrong(where, "turns: ", turns, "a list of turns")
    return dialog, [_text(where, f"turns.{i}", turn) for i, turn in enumerate(turns, 1)]


def _text(where: str, field: str, turn: Any) -> str:
    if not isinstance(turn, dict):
        raise _wrong(where, f"{field}: ", turn, "an object with speaker and text")
    for name in ("speaker", "text"):
        if not isinstance(turn.get(name), str):
            raise _wrong(where, f"{field}.{name}: ", turn.get(name), "a string")
    return str(turn["text"])


def _wrong(where: str, field: str, value: Any, expected: str) -> DialogsInvalid:
    """What kind of value was found, never the value: dialogs are what people said."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "nothing"}
    kind = kinds.get(type(value), "a number")
    found = f"{kind} that is empty" if value in ("", []) else kind
    return DialogsInvalid(f"{where}: {field}found {found}, expected {expected}; {_MEND}")


def _exchanges(
    dialog: str,
    texts: Sequence[str],
    where: str,
    *,
    uncased: bool,
    context: int,
    skip: Callable[[Skipped], None],
) -> Iterator[Exchange]:
    said: list[str] = []  # phrases so far
    adjacent = False  # whether the turn right before is the last of them
    for number, text in enumerate(texts, 1):
        try:
            phrase = normalize(text, uncased=uncased).text
        except InvalidInput as error:
            skip(Skipped(where, number, str(error)))
            adjacent = False
            continue
        if adjacent:
            yield Exchange(dialog, tuple(said[-context:]), phrase, text)
        said.append(phrase)
        adjacent = True
