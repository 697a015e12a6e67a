"""Replies from a file, row by row, each with the place it came from: TSV, JSONL (either may be gzip'd) or Parquet.

Columns: reply, and where wanted prompt or prompts, id, persona or personas, surface or surfaces, valid_from, valid_until,
weight, emotion, tags. In TSV several prompts are parted by " | " and other lists by commas. A file is read as a stream.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any, NamedTuple

from nlu.errors import InvalidInput
from nlu.normalizer import normalize

COLUMNS = (
    "reply", "prompts", "id", "personas", "surfaces", "valid_from", "valid_until", "weight", "emotion", "tags",
)  # fmt: skip
_SINGULAR = {"prompt": "prompts", "persona": "personas", "surface": "surfaces"}
_LISTS = {"prompts": " | ", "personas": ",", "surfaces": ",", "tags": ","}  # what parts them in a cell
_MAX_LINE = 1 << 20  # bytes: a file without line ends must not be read into memory
_MAX_NAME = 200  # code points
_MAX_WEIGHT = 1e6
_AT_ONCE = 1024  # rows of a Parquet file held at once, and rows between two reports of progress
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_MEND = "mend or drop the row"

Progress = Callable[[int, int], None]


class Prompt(NamedTuple):
    """What a user may say, as written and normalised."""

    text: str
    phrase: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a reply, what it answers, and when and by whom it may be said."""

    where: str  # file:line
    text: str
    phrase: str  # the text, normalised
    prompts: tuple[Prompt, ...] = ()  # each phrase once
    id: str = ""  # "" where the file names none
    personas: tuple[str, ...] = ()  # sorted, as the surfaces and tags are
    surfaces: tuple[str, ...] = ()
    valid_from: datetime | None = None
    valid_until: datetime | None = None
    weight: float = 1.0
    emotion: str = ""
    tags: tuple[str, ...] = ()


class Bad(NamedTuple):
    """A row that is none, and what is wrong with it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class RepliesInvalid(ValueError):
    """A file that no index can be built from; the message names the first bad rows."""


class RepliesFile:
    """A file that is read several times and must stay as it is. `progress` is told what is done, and how far it is."""

    def __init__(
        self,
        path: Path,
        *,
        uncased: bool,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self.path, self.uncased, self._progress = path, uncased, progress
        self._state = self._stat()

    def rows(self, what: str) -> Iterator[Row | Bad]:
        """One reading; raises RepliesInvalid as `read` does, and where the file is not what it was."""
        if self._stat() == self._state:
            yield from read(
                self.path,
                uncased=self.uncased,
                progress=lambda done, total: self._progress(what, done, total),
            )
        if self._stat() != self._state:
            raise self.changed()

    def good(self, what: str) -> Iterator[Row]:
        """A reading after one that found no bad row."""
        for row in self.rows(what):
            if isinstance(row, Bad):
                raise self.changed()
            yield row

    def changed(self) -> RepliesInvalid:
        """What to raise where a reading differs from the one before."""
        return RepliesInvalid(
            f"{self.path}: found another file than a moment ago, expected it to stay as it is; run this again"
        )

    def _stat(self) -> tuple[int, int]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise RepliesInvalid(
                f"{self.path}: found {error.strerror}, expected a file of replies; check the path"
            ) from error
        return found.st_size, found.st_mtime_ns


def read(path: Path, *, uncased: bool, progress: Progress = lambda done, total: None) -> Iterator[Row | Bad]:
    """Every row that is not blank, in order. `progress` counts kB of a text file, rows of a Parquet file.

    Raises RepliesInvalid for a file that cannot be read as rows at all.
    """
    for where, record in _records(path, progress):
        yield record if isinstance(record, Bad) else _row(where, record, uncased)


class _Wrong(ValueError):
    """What is wrong with a row: the field, what was found, what was expected."""

    def __init__(self, field: str, found: str, expected: str) -> None:
        super().__init__(f"{field}: found {found}, expected {expected}; {_MEND}")


Record = Mapping[str, Any]  # by the names of COLUMNS, without what is absent


def _records(path: Path, progress: Progress) -> Iterator[tuple[str, Record | Bad]]:
    kind = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    if kind.lower() == ".tsv":
        yield from _table(path, _lines(path, progress))
    elif kind.lower() in (".jsonl", ".ndjson"):
        yield from _json_lines(path, _lines(path, progress))
    elif path.suffix.lower() == ".parquet":
        yield from _parquet(path, progress)
    else:
        raise RepliesInvalid(
            f"{path}: found a file of kind {kind or 'none'!r}, expected .tsv, .jsonl (or either with .gz) or .parquet;"
            " convert or rename it"
        )


def _lines(path: Path, progress: Progress) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1, without a byte order mark or line ends."""
    number = 0
    try:
        size = path.stat().st_size >> 10
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            while line := file.readline(_MAX_LINE):
                number += 1
                if len(line) == _MAX_LINE:
                    raise RepliesInvalid(
                        f"{path.name}:{number}: found a line of {_MAX_LINE} bytes or more, expected a reply; part the lines"
                    )
                text = _decoded(path, number, line)
                if text.strip():
                    yield number, text
                if number % _AT_ONCE == 0:
                    progress(raw.tell() >> 10, size)
            progress(size, size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RepliesInvalid(
            f"{path.name}:{number + 1}: found {error}, expected a whole gzip'd file; pack it again"
        ) from error
    except OSError as error:
        raise RepliesInvalid(
            f"{path}: found {error.strerror}, expected a file of replies; check the path"
        ) from error


def _decoded(path: Path, number: int, line: bytes) -> str:
    if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RepliesInvalid(f"{path.name}:1: found UTF-16, expected UTF-8 text; save it as UTF-8")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RepliesInvalid(
            f"{path.name}:{number}: found the byte {error.object[error.start]:#04x}, expected UTF-8 text; save it as UTF-8"
        ) from error


def _table(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[str, Record | Bad]]:
    columns: list[str] = []
    for number, line in lines:
        where, cells = f"{path.name}:{number}", line.split("\t")
        if not columns:
            columns = _heading(where, line)
        elif len(cells) > len(columns):
            yield (
                where,
                Bad(where, f"found {len(cells)} cells, expected {len(columns)} as in the heading; {_MEND}"),
            )
        else:
            yield (
                where,
                {name: _cell(name, cell) for name, cell in zip(columns, cells, strict=False) if cell.strip()},
            )


def _cell(name: str, cell: str) -> str | list[str]:
    if name not in _LISTS:
        return cell
    return [part for part in cell.split(_LISTS[name]) if part.strip()]


def _heading(where: str, line: str) -> list[str]:
    """Our names of the columns of a heading; raises RepliesInvalid for a first line that is none."""
    if "\r" in line:
        raise RepliesInvalid(
            f"{where}: found lines that end in CR alone, expected LF; save it with other line ends"
        )
    for other, called in ((";", "semicolons"), (",", "commas")):
        cells = [cell.strip().strip('"').lower() for cell in line.split(other)]
        if "\t" not in line and len(cells) > 1 and "reply" in cells:
            raise RepliesInvalid(
                f"{where}: found columns parted by {called}, expected tabs; save it as tab-separated"
            )
    names = [name.strip() for name in line.split("\t")]
    if not any(_column(name) for name in names):
        raise RepliesInvalid(
            f"{where}: found no heading, expected one such as prompt<TAB>reply in the first line; put it there"
        )
    return _columns(where, names)


def _columns(where: str, names: Sequence[str]) -> list[str]:
    """Our names of a file's columns; raises RepliesInvalid for one that is unknown, there twice, or missing."""
    unknown = [name for name in names if not _column(name)]
    if unknown:
        raise RepliesInvalid(f"{where}: {_unknown(unknown[0])}; rename or drop it")
    columns = [_column(name) for name in names]
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise RepliesInvalid(f"{where}: found column {twice[0]!r} twice, expected it once; drop one")
    if "reply" not in columns:
        raise RepliesInvalid(
            f"{where}: found columns {', '.join(names)}, expected reply among them; rename one"
        )
    return columns


def _column(name: str) -> str:
    """Our name of a column, or ""."""
    name = name.lower()
    name = _SINGULAR.get(name, name)
    return name if name in COLUMNS else ""


def _unknown(name: str) -> str:
    return f"found column {name[:80]!r}, expected some of {', '.join(COLUMNS)}"


def _json_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[str, Record | Bad]]:
    for number, line in lines:
        where = f"{path.name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, Bad(where, f"found no JSON ({error}), expected one object a line; {_MEND}")
            continue
        yield where, _named(where, record)


def _named(where: str, record: Any) -> Record | Bad:
    """A JSON object by our names."""
    if not isinstance(record, dict):
        return Bad(where, f"found a JSON {type(record).__name__}, expected an object; {_MEND}")
    named: dict[str, Any] = {}
    for name, value in record.items():
        ours = _column(name)
        if not ours:
            return Bad(where, f"{_unknown(name)}; rename or drop it")
        if ours in named:
            return Bad(where, f"found {ours!r} twice, expected it once; {_MEND}")
        if value is not None:
            named[ours] = value
    return named


def _parquet(path: Path, progress: Progress) -> Iterator[tuple[str, Record | Bad]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(path.name, file.schema_arrow.names)
            total, number = file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=_AT_ONCE):
                for record in batch.rename_columns(columns).to_pylist():
                    number += 1
                    present = {name: value for name, value in record.items() if value is not None}
                    yield f"{path.name}:row {number}", present
                progress(number, total)
    except (pa.ArrowException, OSError) as error:
        raise RepliesInvalid(f"{path}: found {error}, expected a Parquet file; write it again") from error


def _row(where: str, record: Record, uncased: bool) -> Row | Bad:
    try:
        valid_from, valid_until = _instant(record, "valid_from"), _instant(record, "valid_until")
        if valid_from and valid_until and valid_from >= valid_until:
            raise _Wrong("valid_until", str(record["valid_until"]), f"a time after {record['valid_from']}")
        text = _text(record, "reply")
        prompts: dict[str, str] = {}
        for each in _texts(record, "prompts"):
            prompts.setdefault(_phrase("prompt", each, uncased), each)
        return Row(
            where=where,
            text=text,
            phrase=_phrase("reply", text, uncased),
            prompts=tuple(Prompt(each, phrase) for phrase, each in prompts.items()),
            id=_name("id", _text(record, "id")),
            personas=_names(record, "personas"),
            surfaces=_names(record, "surfaces"),
            valid_from=valid_from,
            valid_until=valid_until,
            weight=_weight(record),
            emotion=_name("emotion", _text(record, "emotion")),
            tags=_names(record, "tags"),
        )
    except _Wrong as error:
        return Bad(where, str(error))


def _text(record: Record, name: str) -> str:
    value = record.get(name, "")
    if not isinstance(value, str):
        raise _Wrong(name, _kind(value), "text")
    return value.strip()


def _texts(record: Record, name: str) -> list[str]:
    """A list of texts, or one."""
    value = record.get(name, [])
    values = value if isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, str):
            raise _Wrong(name, _kind(each), "text or a list of texts")
    return [each.strip() for each in values if each.strip()]


def _names(record: Record, name: str) -> tuple[str, ...]:
    return tuple(sorted({_name(name, each) for each in _texts(record, name)}))


def _name(field: str, name: str) -> str:
    if len(name) > _MAX_NAME or not name.isprintable():
        raise _Wrong(field, repr(name[:80]), f"at most {_MAX_NAME} printable characters")
    return name


def _phrase(field: str, text: str, uncased: bool) -> str:
    try:
        return normalize(text, uncased=uncased).text
    except InvalidInput as error:
        what = str(error).removeprefix("text: ").partition("; ")[0]
        raise _Wrong(field, *what.removeprefix("found ").split(", expected ", 1)) from error


def _weight(record: Record) -> float:
    value = record.get("weight", 1.0)
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight <= _MAX_WEIGHT:
        raise _Wrong("weight", repr(value)[:80], f"a number from 0 to {_MAX_WEIGHT:.0f}, such as 0.5")
    return weight


def _instant(record: Record, name: str) -> datetime | None:
    """An ISO 8601 time with its zone, or a date, which is its midnight in UTC."""
    value = record.get(name)
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str) and _DATE.fullmatch(value.strip()):
            value = date.fromisoformat(value.strip())
        if isinstance(value, str):
            value = datetime.fromisoformat(value.strip())
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime.combine(value, time(), UTC)
        if isinstance(value, datetime) and value.utcoffset() is not None:
            return value.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise _Wrong(
        name, repr(record[name])[:80], "a time with its zone, such as 2026-12-24T18:00:00+03:00, or a date"
    )


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", bool: "a truth value", type(None): "nothing", bytes: "bytes"}
    return kinds.get(type(value), f"{value!r}"[:80])
