"""Labelled phrases from a spreadsheet: TSV, CSV, JSONL, Parquet and CoNLL, each row with the place it came from.

Columns: text, label (or labels), spans, context, split, weight; or tokens and tags. A TSV or CSV without such a heading has
text and label. In TSV and CSV, spans are marked in the text, "wake me at [six](time)", several labels are joined by commas,
and context is "assistant: Shall I call Anna? | user: not now". A file may be gzip'd.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from annotators.restore import spoken
from nlu.errors import InvalidInput
from nlu.heads.config import HeadConfig
from nlu.normalizer import Phrase, normalize
from nlu.types import Turn

SPLITS = ("train", "dev", "test")
_SPLIT_NAMES = {"": "train", "train": "train", "training": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev", "test": "test"}  # fmt: skip
_MARK = re.compile(r"\[([^\[\]]+)\]\(([^()]+)\)")
_LABELS = ("labels", "label", "intent")  # columns that may hold them, the first that does
_BLANKS = re.compile(r"[ \t]+")  # between columns; a no-break space is part of a token
_MAX_FILE = 512 * 2**20  # bytes, unpacked
_MEND = "mend or drop the line"


class Mark(NamedTuple):
    """A labelled stretch of a phrase, in code points, end exclusive."""

    label: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled phrase, normalised. No label at all means that it belongs to none."""

    where: str  # file:line
    split: str
    text: str  # as written
    phrase: str
    labels: tuple[str, ...]
    marks: tuple[Mark, ...] = ()  # in the phrase
    context: tuple[Turn, ...] = ()  # oldest first, normalised
    weight: float = 1.0


class Finding(NamedTuple):
    """Something about the data that its owner should know. An error keeps a head from being trained."""

    severity: str  # error, warning or note
    what: str
    where: str
    found: str
    remedy: str


class Source(NamedTuple):
    """A file that was read."""

    path: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class Dataset:
    """All rows of a head's files, and what could not be read of them."""

    rows: tuple[Row, ...]
    sources: tuple[Source, ...]
    findings: tuple[Finding, ...] = ()
    multi: bool = False

    def split(self, name: str, *, outside: bool = False) -> list[Row]:
        """Rows of one split that belong to a label, or those that belong to none; with `multi` the latter are like any."""
        return [
            row for row in self.rows if row.split == name and (not row.labels and not self.multi) == outside
        ]


class DataInvalid(ValueError):
    """Data that no head can be trained on; the message names the first bad lines."""


def read(config: HeadConfig, *, uncased: bool) -> Dataset:
    """Read every file of the config; bad rows become findings. Raises DataInvalid where a file cannot be read at all."""
    rows: list[Row] = []
    sources: list[Source] = []
    findings: list[Finding] = []
    for split in ("train", "dev", "test", "outside"):
        for path in getattr(config.files, split):
            count = len(rows)
            raw = _bytes(path)
            for where, record in _records(path, raw, config):
                found = _row(where, record, split, config, uncased)
                if isinstance(found, Row):
                    rows.append(found)
                else:
                    findings.append(found)
            sources.append(Source(str(path), hashlib.sha256(raw).hexdigest(), len(rows) - count))
    return Dataset(tuple(rows), tuple(sources), tuple(findings), config.multi)


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE:
            raise DataInvalid(
                f"{path}: found {path.stat().st_size} bytes, expected at most {_MAX_FILE}; split the file"
            )
        return path.read_bytes()
    except OSError as error:
        raise DataInvalid(
            f"{path}: found {error.strerror or error}, expected a file of phrases; check the path"
        ) from error


Record = Mapping[str, Any] | str  # columns by our names, or what is wrong with the line


def _records(path: Path, raw: bytes, config: HeadConfig) -> Iterator[tuple[str, Record]]:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        yield from _parquet(path, raw, config)
    elif kind in (".tsv", ".csv", ".txt"):
        yield from _table(path, _rows(path, _decoded(path, raw), kind), config)
    elif kind in (".jsonl", ".ndjson"):
        yield from _json_lines(path, _decoded(path, raw), config)
    elif kind in (".conll", ".bio"):
        yield from _conll(path, _decoded(path, raw))
    else:
        raise DataInvalid(
            f"{path}: found a file of kind {kind or 'none'!r}, expected .tsv .csv .jsonl .parquet .conll; convert or rename it"
        )


def _decoded(path: Path, raw: bytes) -> str:
    """The text of a file; raises DataInvalid."""
    if path.suffix.lower() == ".gz":
        try:
            with gzip.open(io.BytesIO(raw)) as file:
                raw = file.read(_MAX_FILE + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataInvalid(
                f"{path}: found {error}, expected a whole gzip'd file; pack it again"
            ) from error
        if len(raw) > _MAX_FILE:
            raise DataInvalid(
                f"{path}: found more bytes, expected at most {_MAX_FILE} unpacked; split the file"
            )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataInvalid(
            f"{path}:{line}: found the byte {raw[error.start]:#04x}, expected UTF-8 text; save it as UTF-8"
        ) from error


def _column(name: str, config: HeadConfig) -> str:
    """Our name of a file's column; "" where the config says that another column goes by it."""
    for ours, theirs in config.columns.items():
        if theirs == name:
            return ours
    return "" if name.lower() in config.columns else name.lower()


def _rows(path: Path, text: str, kind: str) -> Iterator[tuple[str, list[str] | str]]:
    """The cells of each row that is not empty, or what is wrong with it."""
    lines = io.StringIO(text, newline="")
    if kind == ".csv":
        reader = csv.reader(lines, strict=True)
    else:  # quotes are part of a TSV's texts
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    while True:
        where = f"{path.name}:{reader.line_num + 1}"  # a cell may go on over lines
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield where, f"a row that is no {kind} ({error})"
            continue
        if any(cell.strip() for cell in cells):
            yield where, cells


def _table(
    path: Path, rows: Iterable[tuple[str, list[str] | str]], config: HeadConfig
) -> Iterator[tuple[str, Record]]:
    heading: list[str] | None = None
    for where, cells in rows:
        if isinstance(cells, str):
            yield where, cells
            continue
        if heading is None:
            heading = _heading(path, cells, config)
            if heading is not None:
                continue
            heading = ["text"] if config.kind == "token" else ["text", "label"]
        if len(cells) > len(heading):
            yield where, f"{len(cells)} cells where the heading has {len(heading)}"
        else:
            yield where, dict(zip(heading, cells, strict=False))


def _heading(path: Path, cells: Sequence[str], config: HeadConfig) -> list[str] | None:
    """Our names of a heading's columns, or None where the first line is none."""
    ours = [_column(cell.strip(), config) for cell in cells]
    if "text" in ours:
        return ours
    if config.columns.get("text"):
        raise DataInvalid(
            f"{path}: found columns {', '.join(cells)}, expected {config.columns['text']!r} among them; check columns"
        )
    return None


def _json_lines(path: Path, text: str, config: HeadConfig) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(text.split("\n"), 1):  # texts may hold what else counts as a line's end
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"{path.name}:{number}", f"a line that is no JSON ({error})"
            continue
        if isinstance(record, dict):
            yield f"{path.name}:{number}", _present(record, config)
        else:
            yield f"{path.name}:{number}", f"a JSON {type(record).__name__} where an object is expected"


def _present(record: Mapping[str, Any], config: HeadConfig) -> dict[str, Any]:
    """A record by our names, without what is null."""
    return {_column(name, config): value for name, value in record.items() if value is not None}


def _parquet(path: Path, raw: bytes, config: HeadConfig) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(raw))
    except (pa.ArrowException, OSError) as error:
        raise DataInvalid(f"{path}: found {error}, expected a Parquet file; write it again") from error
    for number, record in enumerate(table.to_pylist(), 1):
        yield f"{path.name}:{number}", _present(record, config)


def _conll(path: Path, text: str) -> Iterator[tuple[str, Record]]:
    """Blank lines part sentences; the first column is the token, the last its tag."""
    tokens: list[str] = []
    tags: list[str] = []
    first = 1
    for number, line in enumerate([*text.split("\n"), ""], 1):
        cells = _BLANKS.split(line.strip(" \t\r"))
        if cells[0] == "-DOCSTART-":
            continue
        if cells[0]:
            if not tokens:
                first = number
            tokens.append(cells[0])
            tags.append(cells[-1] if len(cells) > 1 else "")
        elif tokens:
            yield f"{path.name}:{first}", {"tokens": tokens, "tags": tags}
            tokens, tags = [], []


class _Bad(ValueError):
    """What is wrong with a line, what was found, and what to do."""


def _row(where: str, record: Record, split: str, config: HeadConfig, uncased: bool) -> Row | Finding:
    try:
        if isinstance(record, str):
            raise ValueError(record)
        return _checked(where, record, split, config, uncased)
    except _Bad as error:
        what, found, remedy = error.args
    except InvalidInput as error:
        what, found, remedy = "text that cannot be said", str(error), _MEND
    except ValueError as error:
        what, found, remedy = "unreadable line", str(error), _MEND
    return Finding("warning" if config.skip_bad else "error", what, where, found, remedy)


def _checked(where: str, record: Mapping[str, Any], split: str, config: HeadConfig, uncased: bool) -> Row:
    text, marks = _text(record, config)
    phrase = normalize(text, uncased=uncased)
    context = tuple(Turn(turn.role, normalize(turn.text, uncased=uncased).text) for turn in _context(record))
    own = str(record.get("split") or "").strip().lower()
    if own not in _SPLIT_NAMES:
        raise _Bad("unknown split", repr(own), f"use one of {', '.join(SPLITS)}")
    return Row(
        where=where,
        split=_SPLIT_NAMES[own] if own or split in ("train", "outside") else split,
        text=text,
        phrase=phrase.text,
        labels=() if split == "outside" else _labels(record, config),
        marks=tuple(_placed(mark, text, phrase) for mark in marks),
        context=context,
        weight=_weight(record),
    )


def _weight(record: Mapping[str, Any]) -> float:
    given = record.get("weight")
    try:
        weight = 1.0 if given in (None, "") else float(given)
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 < weight < 1e6:
        raise _Bad("weight", repr(given), "give a number above 0, or leave it out")
    return weight


def _text(record: Mapping[str, Any], config: HeadConfig) -> tuple[str, tuple[Mark, ...]]:
    """The text as it would be said, and its spans in code points of it."""
    if config.kind == "token" and "tokens" in record:
        return _joined(record["tokens"], record.get("tags"))
    text = record.get("text")
    if text is None:
        raise _Bad("no text", f"columns {', '.join(record)}", "name its column with --columns text=...")
    if not isinstance(text, str):
        raise ValueError(f"text: found {type(text).__name__}, expected a string")
    if config.kind != "token":
        return text, ()
    if config.scheme == "restore":
        words, labels = spoken(text)
        return words, tuple(Mark(*label) for label in labels)
    spans = record.get("spans")
    text, marks = _unmarked(text) if spans in (None, "") else (text, _marks(spans))
    return text, _fitting(text, marks)


def _fitting(text: str, marks: Iterable[Mark]) -> tuple[Mark, ...]:
    """The marks in order; raises ValueError for one that misses the text, or hits what another has."""
    ordered = tuple(sorted(marks, key=lambda mark: mark.start))
    last = 0
    for mark in ordered:
        named = f"span {mark.label} {mark.start}..{mark.end}"
        if not 0 <= mark.start < mark.end <= len(text):
            raise ValueError(f"{named}: outside the text's {len(text)} code points")
        if text[mark.start : mark.end] != text[mark.start : mark.end].strip():
            raise ValueError(f"{named}: begins or ends with a blank")
        if mark.start < last:
            raise ValueError(f"{named}: begins inside the span before it")
        last = mark.end
    return ordered


def _marks(spans: Any) -> list[Mark]:
    """A list of spans, or the same as JSON in a cell."""
    given = json.loads(spans) if isinstance(spans, str) else spans
    if not isinstance(given, list):
        raise ValueError(f"spans: found {given!r}, expected a list")
    return [_mark(each) for each in given]


def _mark(span: Any) -> Mark:
    """{"start", "end", "label"}, as Rasa ("entity") and spaCy write it too, or [start, end, label]."""
    if isinstance(span, list | tuple) and len(span) == 3:
        start, end, label = span
    elif isinstance(span, dict) and {"start", "end"} <= span.keys():
        start, end, label = span["start"], span["end"], span.get("label") or span.get("entity")
    else:
        raise ValueError(f"span: found {span!r}, expected start, end and label")
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(label, str) and label):
        raise ValueError(f"span: found {span!r}, expected whole numbers and a label")
    return Mark(label, start, end)


def _unmarked(text: str) -> tuple[str, list[Mark]]:
    """The text of "wake me at [six](time)", and its spans."""
    plain, marks, position = "", list[Mark](), 0
    for match in _MARK.finditer(text):
        label = match[2].strip()
        if not label:
            raise ValueError(f"span {match[0]!r}: found no label, expected one in the round brackets")
        plain += text[position : match.start()]
        marks.append(Mark(label, len(plain), len(plain) + len(match[1])))
        plain += match[1]
        position = match.end()
    return plain + text[position:], marks


def _joined(tokens: Any, tags: Any) -> tuple[str, tuple[Mark, ...]]:
    """Tokens joined by blanks, and the spans of their BIO tags; an I- without its B- opens a span too."""
    if not (isinstance(tokens, list) and isinstance(tags, list) and len(tokens) == len(tags)):
        raise ValueError("tokens and tags: expected two lists of the same length")
    text, marks = "", list[Mark]()
    for token, tag in zip(map(str, tokens), map(str, tags), strict=True):
        if not token.strip():
            continue
        start = len(text) + bool(text)
        text += " " * bool(text) + token
        if tag == "O":
            continue
        if tag[:2] not in ("B-", "I-") or len(tag) < 3:
            raise ValueError(f"tag: found {tag!r}, expected O, B-label or I-label")
        if tag[0] == "I" and marks and marks[-1].label == tag[2:] and marks[-1].end == start - 1:
            marks[-1] = Mark(tag[2:], marks[-1].start, len(text))
        else:
            marks.append(Mark(tag[2:], start, len(text)))
    return text, tuple(marks)


def _placed(mark: Mark, text: str, phrase: Phrase) -> Mark:
    """A span of the text as a span of the phrase."""
    if phrase.starts is None or phrase.ends is None:
        return mark
    bounds = enumerate(zip(phrase.starts, phrase.ends, strict=True))
    inside = [
        i
        for i, (start, end) in bounds
        if start < mark.end and end > mark.start and not phrase.text[i].isspace()
    ]
    if not inside:
        raise ValueError(
            f"span {mark.label} {mark.start}..{mark.end} ({text[mark.start : mark.end]!r}): nothing of it can be said"
        )
    return Mark(mark.label, inside[0], inside[-1] + 1)


def _labels(record: Mapping[str, Any], config: HeadConfig) -> tuple[str, ...]:
    """The row's labels, () where it belongs to none."""
    if config.kind == "token":
        return ("",)
    found = tuple(dict.fromkeys(_named(record, config)))
    strange = [label for label in found if label in config.outside_labels]
    if len(found) > 1 and (strange or not config.multi):
        remedy = "keep the label, or that it has none" if strange else "keep one, or train with multi"
        raise _Bad("several labels", ", ".join(found), remedy)
    if not found and not config.multi:
        none = config.outside_labels[0]
        raise _Bad("no label", "an empty label", f"label it, or with {none!r} where it belongs to none")
    return () if strange else found


def _named(record: Mapping[str, Any], config: HeadConfig) -> list[str]:
    """What the row's labels are called; several in one string are parted by commas."""
    given = next((record[name] for name in _LABELS if record.get(name) not in (None, "", [])), "")
    if isinstance(given, str):
        given = given.split(",") if config.multi else [given]
    elif not isinstance(given, list):
        given = [given]
    if not all(isinstance(each, str | int) for each in given):
        raise ValueError(f"label: found {given!r}, expected names")
    return [label for each in given if (label := str(each).strip())]


def _context(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Earlier turns, oldest first."""
    given = record.get("context") or ()
    if isinstance(given, str):
        given = [
            dict(zip(("role", "text"), part.split(":", 1), strict=False))
            for part in given.split("|")
            if part.strip()
        ]
    if not isinstance(given, list | tuple):
        raise ValueError(f"context: found {given!r}, expected a list of turns")
    turns = []
    for each in given:
        turn = each if isinstance(each, dict) else {}
        role, said = (
            str(value).strip() for value in (turn.get("role", turn.get("speaker", "")), turn.get("text", ""))
        )
        if role not in ("user", "assistant") or not said:
            raise ValueError(f"context: found {each!r}, expected a role, user or assistant, and a text")
        turns.append(Turn("user" if role == "user" else "assistant", said))
    return tuple(turns)
