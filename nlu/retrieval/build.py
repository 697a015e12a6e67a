"""From a file of replies to an index; read `build` from top to bottom.

The file is read twice: once to check it and to find out which rows are one reply, once to encode and write. Vectors go
through a store on disk, so a build that was killed goes on where it was, and the next sprint encodes only what is new.
The same file and bundle give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index import change
from index.build import SHARD_ROWS, Kind, Writer
from index.items import ITEMS_FILE, Items
from index.layout import Layout, read_layout
from nlu import canaries
from nlu.retrieval.near import alike, pairs
from nlu.retrieval.read import Bad, RepliesFile, RepliesInvalid, Row
from nlu.retrieval.reading import ROWS_AT_ONCE, Encode, Models, Reading
from nlu.retrieval.survey import Merge, Survey, banned_by, occasion
from nlu.retrieval.told import Told

Progress = Callable[[str, int, int], None]

TOLD = 10  # bad rows that are shown


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an author chooses."""

    encode: Encode = "prompts"  # what replies are found by; one without a prompt is found by its own vector
    merge: Merge = "same"
    kind: Kind = "auto"
    shards: int | None = None  # at most so many, alike in size
    shard_rows: int = SHARD_ROWS  # where `shards` is not given
    max_toxicity: float = 0.5  # a reply that is toxic with this score or more is blocked
    banned: Sequence[str] = ()  # ids or texts that are blocked
    personas: Sequence[str] | None = None  # None: those of the file
    surfaces: Sequence[str] | None = None
    allow_empty: bool = False


@dataclass(frozen=True)
class Built:
    """What was done."""

    layout: Layout
    rows: int  # of the file
    replies: int  # that are new
    entries: int  # pairs that are new
    merged: int  # texts that became another reply's
    toxic: int  # new replies blocked for it
    banned: int
    judged: bool  # whether toxicity was looked at
    unmatched: tuple[str, ...]  # banned lines that no reply has


def build(
    source: Path,
    out: Path,
    models: Models,
    wanted: Wanted,
    *,
    report: Path,
    progress: Progress = lambda what, done, total: None,
) -> Built:
    """An index of the replies in `source` at `out`, which may hold an older one; merges.jsonl and blocked.jsonl in the
    folder `report`. Raises RepliesInvalid, BuildInvalid or QueryInvalid, and then nothing has changed."""
    check_name(out)
    sweep(out, report)
    file = RepliesFile(source, uncased=models.vectorizer.spec.uncased, progress=progress)
    survey = Survey(wanted.merge, banned_by(wanted.banned, uncased=file.uncased))
    take(file, survey, wanted)
    if wanted.merge == "near":
        merge_near(file, survey, models, progress)
    with Told(report) as told:
        reading = Reading(
            file, survey, models, told, encode=wanted.encode, max_toxicity=wanted.max_toxicity,
            said=wanted.encode != "replies" and survey.prompts > 0,
        )  # fmt: skip
        with Writer(
            out,
            models.vectorizer.dim,
            personas=sorted(survey.personas) if wanted.personas is None else wanted.personas,
            surfaces=sorted(survey.surfaces) if wanted.surfaces is None else wanted.surfaces,
            kind=wanted.kind,
            shard_rows=_shard_rows(survey, wanted),
        ) as index:
            for batch in reading.batches():
                index.add(*batch)
            layout = index.finish(
                lambda done, total: progress("linking the graph", done, total),
                also=lambda folder: canaries.write(folder, models.vectorizer),
            )
        told.keep()
    return _built(layout, survey, reading, models, wanted)


def add(
    folder: Path,
    source: Path,
    out: Path,
    models: Models,
    wanted: Wanted,
    *,
    report: Path,
    progress: Progress = lambda what, done, total: None,
) -> Built:
    """The index in `folder` with the replies in `source` too, at `out`, which may be the same folder. A reply that is there
    already stays as it is and gets what prompts are new. Raises as `build` does, and EngineRefused for an index of another
    vectorizer."""
    check_name(out)
    sweep(out, report)
    canaries.check("index", folder, models.vectorizer)
    layout, items = opened(folder)
    wanted = replace(wanted, personas=layout.personas, surfaces=layout.surfaces)
    file = RepliesFile(source, uncased=models.vectorizer.spec.uncased, progress=progress)
    survey = Survey(wanted.merge, banned_by(wanted.banned, uncased=file.uncased))
    survey.start_with(items, layout, uncased=file.uncased)
    take(file, survey, wanted)
    _check_banned(survey, items)
    if layout.rows and not layout.said and survey.prompts and wanted.encode != "replies":
        raise RepliesInvalid(
            f"{source.name}: found prompts, expected none: this index finds replies by their own vectors alone;"
            " leave them out with --encode replies, or make an index with them by `nlu index build`"
        )
    with Told(report) as told:
        reading = Reading(
            file, survey, models, told, encode=wanted.encode, max_toxicity=wanted.max_toxicity,
            said=bool(layout.said or not layout.rows), items=items,
        )  # fmt: skip
        changed = change.extend(folder, out, reading.batches())
        told.keep()
    return _built(changed, survey, reading, models, wanted)


def take(file: RepliesFile, survey: Survey, wanted: Wanted) -> None:
    """The first reading. Raises RepliesInvalid, which tells the first bad rows and counts all."""
    bad: list[Bad] = []
    count = 0
    for row in file.rows("checking"):
        what = row.what if isinstance(row, Bad) else _stranger(row, wanted) or survey.put(row)
        if what:
            count += 1
            if len(bad) < TOLD:
                bad.append(Bad(row.where, what))
    if bad:
        more = f"\n... and {count - len(bad)} more" if count > len(bad) else ""
        told = "\n".join(map(str, bad))
        raise RepliesInvalid(f"{file.path}: found bad rows, expected none ({count} in all)\n{told}{more}")
    if not survey.rows and not wanted.allow_empty:
        raise RepliesInvalid(f"{file.path}: found no replies, expected some; --allow-empty takes it as it is")


def merge_near(file: RepliesFile, survey: Survey, models: Models, progress: Progress) -> None:
    """Make one of replies that say nearly the same to the same people at the same times; see `near.alike`."""
    close = pairs(
        _vectors(file, survey, models),
        models.vectorizer.dim,
        progress=lambda done, total: progress("comparing replies", done, total),
    )
    asked = {number for pair in close for number in (pair.later, pair.earlier)}
    first: dict[int, Row] = {}
    for row in file.good("looking at close ones"):
        if survey.number(row) in asked:
            first.setdefault(survey.number(row), row)
    for pair in close:
        later, earlier = first[pair.later], first[pair.earlier]
        if occasion(later) == occasion(earlier) and alike(later.phrase, earlier.phrase):
            survey.unite(pair.later, pair.earlier)


def _vectors(file: RepliesFile, survey: Survey, models: Models) -> Iterator[NDArray[np.float32]]:
    """`[replies, dim]` of the replies' own texts, in the order of their numbers."""
    met = 0
    rows = file.good("encoding replies")
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        phrases = []
        for row in chunk:
            if survey.number(row) == met:
                met += 1
                phrases.append(row.phrase)
        if phrases:
            known = models.sentences(phrases)
            yield np.stack([known[phrase] for phrase in phrases])


def _stranger(row: Row, wanted: Wanted) -> str:
    """What is wrong with the personas and surfaces of a row, or ""."""
    for kind, names, known in (
        ("persona", row.personas, wanted.personas),
        ("surface", row.surfaces, wanted.surfaces),
    ):
        unknown = [] if known is None else [name for name in names if name not in known]
        if unknown:
            told = ", ".join(known or ()) or "none"
            return f"{kind}: found {unknown[0]!r}, expected one of: {told}; name it in --{kind}s of `nlu index build`"
    return ""


def _check_banned(survey: Survey, items: Items) -> None:
    """What an index has already stays as it is, so that a ban of it would be in vain."""
    rows = [survey.indexed[number] for number in sorted(survey.banned) if number < len(survey.indexed)]
    allowed = [items.id_of(row) for row in rows if not items.blocked[row]]
    if allowed:
        raise RepliesInvalid(
            f"{allowed[0]!r}: found a reply of the index among the banned, expected new ones alone;"
            " keep it from being said with `nlu index block`"
        )


def _shard_rows(survey: Survey, wanted: Wanted) -> int:
    if wanted.shards is None:
        return wanted.shard_rows
    rows = {
        "prompts": survey.prompts + survey.without_prompt,
        "replies": len(survey),
        "both": survey.prompts + len(survey),
    }[wanted.encode]  # or fewer: equal vectors are stored once
    return max(8, -(-rows // (8 * wanted.shards)) * 8)


def _built(layout: Layout, survey: Survey, reading: Reading, models: Models, wanted: Wanted) -> Built:
    return Built(
        layout=layout,
        rows=survey.rows,
        replies=reading.replies,
        entries=reading.entries,
        merged=reading.merged,
        toxic=reading.toxic,
        banned=reading.banned,
        judged=models.judge.tells_toxicity,
        unmatched=tuple(sorted({line.strip() for line in wanted.banned} - {""} - survey.matched)),
    )


def opened(folder: Path) -> tuple[Layout, Items]:
    """What an index says of itself, and its rows; raises IndexInvalid."""
    layout = read_layout(folder)
    said = layout.said_rows if layout.said else layout.rows
    return layout, Items.load(
        folder / ITEMS_FILE, sha256=layout.items_sha256, rows=layout.items, vectors=layout.rows, said=said
    )


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of each file of a folder; none of a folder that is not there."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        with path.open("rb") as file:
            found[path.name] = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    return found


def pulled(before: Mapping[str, tuple[int, str]], after: Mapping[str, tuple[int, str]]) -> dict[str, int]:
    """Files, with their bytes, that a pod which holds those of `before` fetches."""
    held = {digest for _, digest in before.values()}
    return {name: size for name, (size, digest) in after.items() if digest not in held}


def check_name(out: Path) -> None:
    """An index is a part of a bundle, and parts are known by the names of their folders."""
    kind, _, name = out.name.partition(".")
    if kind != "index" or not name:
        raise ValueError(f"--out: found {out.name!r}, expected a folder called index.NAME; name it so")


def sweep(out: Path, report: Path | None = None) -> None:
    """Remove what builds that were killed left behind of this index and its report."""
    left = [*out.parent.glob(f".{out.name}.*ing-*"), *(report.glob(".*.jsonl.building-*") if report else ())]
    for path in left:
        try:
            os.kill(int(path.name.rpartition("-")[2]), 0)  # asks whether it lives
        except (ProcessLookupError, OverflowError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except (PermissionError, ValueError):
            continue
