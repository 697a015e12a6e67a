"""`Writer`: entries and their vectors in, batch by batch, a folder for `Replies.load` out. The same input gives the
same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index.graph import LEVELS_FILE, LINKS_FILE, build_graph
from index.items import EVERYONE, ITEMS_FILE, Items, Judged, batch, micros, writer
from index.layout import INDEX_FILE, MASK_BITS, GraphFiles, Layout, ShardFile, padded, said_name, shard_name
from index.matrix import Matrix
from index.search import prepare_rows

SHARD_ROWS = 1 << 16
GRAPH_FROM = 50_000  # rows from which "auto" makes a graph; fewer are scanned in about a millisecond

Kind = Literal["exact", "hnsw", "auto"]
FloatArray = NDArray[np.float32]
Progress = Callable[[int, int], None]


class BuildInvalid(ValueError):
    """Entries, names or a folder that no index can be built from."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One (prompt, reply) pair. No personas or surfaces means all of them; no times means always."""

    id: str
    text: str
    prompt: str  # "" where the reply is found by its own vector
    personas: tuple[str, ...] = ()
    surfaces: tuple[str, ...] = ()
    valid_from: datetime | None = None
    valid_until: datetime | None = None
    weight: float = 1.0
    emotion: str = ""
    tags: tuple[str, ...] = ()
    labels: tuple[Judged, ...] = ()
    blocked: str = ""


def build(
    entries: Sequence[Entry],
    vectors: FloatArray,
    out: Path,
    *,
    personas: Sequence[str],
    surfaces: Sequence[str],
    said: FloatArray | None = None,
    kind: Kind = "exact",
    shard_rows: int = SHARD_ROWS,
) -> None:
    """The index of `vectors` `[entries, dim]` at once; see `Writer`."""
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise BuildInvalid(
            f"vectors: found shape {vectors.shape}, expected [entries, dim]; remedy: stack them"
        )
    with Writer(
        out, vectors.shape[1], personas=personas, surfaces=surfaces, kind=kind, shard_rows=shard_rows
    ) as index:
        if len(entries) or len(vectors):
            index.add(entries, vectors, said)
        index.finish()


class Writer:
    """An index in the making, as a context. Nothing at `out` changes before `finish`, which replaces an index there
    whole; a folder that holds anything else is refused.

    Memory holds a digest for each distinct vector and id, and one batch.
    """

    def __init__(
        self,
        out: Path,
        dim: int,
        *,
        personas: Sequence[str],
        surfaces: Sequence[str],
        kind: Kind = "exact",
        shard_rows: int = SHARD_ROWS,
    ) -> None:
        if shard_rows < 8 or shard_rows % 8:
            raise BuildInvalid(f"shard_rows: found {shard_rows}, expected a multiple of 8; remedy: 65536")
        self._personas, self._surfaces = bits("persona", personas), bits("surface", surfaces)
        self._out, self._dim, self._kind = out, dim, kind
        check_replaceable(out)
        self._staging = staging_of(out)
        self._shard_rows = shard_rows

    def __enter__(self) -> Self:
        self._staging.mkdir(parents=True)
        self._vectors = Shards(self._staging, self._dim, self._shard_rows, shard_name)
        self._said: Shards | None = None
        self._items = pa.OSFile(str(self._staging / ITEMS_FILE), "wb")
        self._batches = writer(self._items)
        self._labelled: set[bytes] = set()
        self._entries = 0
        self._texts: dict[str, int] = {}  # which vector stands for each reply's text, without `said`
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:  # fmt: skip
        self._items.close()
        self._vectors.close()
        if self._said is not None:
            self._said.close()
        shutil.rmtree(self._staging, ignore_errors=True)

    def add(self, entries: Sequence[Entry], vectors: FloatArray, said: FloatArray | None = None) -> None:
        """One batch: `vectors` `[entries, dim]` were made from the prompts (or the texts, where there is no prompt),
        `said` `[entries, dim]` from the texts; without it, the first vector of each reply stands for its text.

        Equal vectors are stored once, at the place of the first. Raises `BuildInvalid` for an entry and
        `QueryInvalid` for a vector, naming the row.
        """
        check_lengths(entries, vectors, said)
        if self._entries and (said is None) != (self._said is None):
            raise BuildInvalid(
                "said: found in one batch and not in another, expected in all or none; remedy: encode all"
            )
        if said is not None and self._said is None:
            self._said = Shards(self._staging, self._dim, self._shard_rows, said_name)
        hang_on = self._vectors.add(vectors, first_row=self._entries)
        if self._said is None or said is None:
            texts = stand_for(self._texts, entries, hang_on)
        else:
            texts = self._said.add(said, first_row=self._entries)
        self._batches.write_batch(
            record(entries, hang_on, texts, self._personas, self._surfaces, self._labelled)
        )
        self._entries += len(entries)

    def finish(
        self,
        progress: Progress = lambda done, total: None,
        *,
        also: Callable[[Path], object] = lambda folder: None,
    ) -> Layout:
        """Checks the whole as loading will, links the graph if there is to be one (`progress` counts its rows), lets
        `also` add what belongs to the folder, and puts the index in its place."""
        self._batches.close()
        self._items.close()
        shards = self._vectors.close()
        said = [] if self._said is None else self._said.close()
        graph = None
        if shards and (self._kind == "hnsw" or (self._kind == "auto" and self._vectors.rows >= GRAPH_FROM)):
            graph = build_graph(
                Matrix.load(self._staging, shards, self._dim).array, self._staging, progress=progress
            )
        also(self._staging)
        return publish(
            self._staging, self._out, dim=self._dim, items=self._entries, shard_rows=self._shard_rows,
            personas=tuple(self._personas), surfaces=tuple(self._surfaces), shards=shards, said=said, graph=graph,
        )  # fmt: skip


def publish(
    staging: Path,
    out: Path,
    *,
    dim: int,
    items: int,
    personas: tuple[str, ...],
    surfaces: tuple[str, ...],
    shard_rows: int,
    shards: Sequence[ShardFile],
    said: Sequence[ShardFile],
    graph: GraphFiles | None,
) -> Layout:
    """Writes `index.json` over the files of a folder, checks the items, and moves the folder to `out`."""
    with (staging / ITEMS_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows, said_rows = sum(shard.rows for shard in shards), sum(shard.rows for shard in said)
    layout = Layout(
        format=2, dim=dim, padded=padded(dim), rows=rows, items=items, items_sha256=digest, personas=personas,
        surfaces=surfaces, shard_rows=shard_rows, shards=tuple(shards), said_rows=said_rows, said=tuple(said),
        graph=graph,
    )  # fmt: skip
    Items.load(
        staging / ITEMS_FILE,
        sha256=digest,
        rows=items,
        vectors=rows,
        said=said_rows if said else rows,
        part="entries",
    )
    layout.save(staging)
    _replace(out, staging)
    return layout


def staging_of(out: Path) -> Path:
    """Where the next index for `out` is made; what a killed process of this number left there is gone."""
    staging = out.with_name(f".{out.name}.building-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    return staging


def _replace(out: Path, staging: Path) -> None:
    """Two renames, so that whoever is killed here leaves the old index, none or the new one, and never a part of one."""
    old = out.with_name(f"{staging.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)


class Shards:
    """Vectors on their way into shard files: normalised, rounded, each distinct one once."""

    def __init__(self, folder: Path, dim: int, shard_rows: int, name: Callable[[int], str]) -> None:
        self.rows = 0
        self._folder, self._dim, self._shard_rows, self._name = folder, dim, shard_rows, name
        self._numbers: dict[bytes, int] = {}
        self._full: list[ShardFile] = []
        self._file: Any = None
        self._digest = hashlib.sha256()

    @classmethod
    def after(cls, folder: Path, dim: int, shard_rows: int, name: Callable[[int], str], before: Sequence[ShardFile]) -> Shards:  # fmt: skip
        """Goes on where these files, already in the folder, end: full ones stay, the last one is filled up."""
        shards = cls(folder, dim, shard_rows, name)
        stored = Matrix.load(folder, before, dim).array  # what is damaged must not get a digest of its own
        for number, row in enumerate(stored):
            shards._numbers.setdefault(_key(row[:dim]), number)
        shards.rows = len(stored)
        shards._full = [shard for shard in before if shard.rows == shard_rows]
        if len(shards._full) < len(before):
            (folder / before[-1].file).unlink()  # it may be a link to the index before
            shards._open()
            shards._write(stored[-before[-1].rows :].tobytes())
        return shards

    def add(self, vectors: FloatArray, *, first_row: int) -> list[int]:
        """The number of each vector `[n, dim]` among all distinct ones."""
        hang_on = []
        unit = prepare_rows(vectors, self._dim, first_row=first_row).astype("<f2")
        rows = np.zeros((len(unit), padded(self._dim)), "<f2")
        rows[:, : self._dim] = unit
        for row in rows:
            number = self._numbers.setdefault(_key(row[: self._dim]), self.rows)
            if number == self.rows:
                if number % self._shard_rows == 0:
                    self._end()
                    self._open()
                self._write(row.tobytes())
                self.rows += 1
            hang_on.append(number)
        return hang_on

    def close(self) -> list[ShardFile]:
        """All files; nothing can be added any more."""
        self._end()
        return self._full

    def _open(self) -> None:
        self._file = (self._folder / self._name(len(self._full))).open("wb")
        self._digest = hashlib.sha256()

    def _write(self, raw: bytes) -> None:
        self._file.write(raw)
        self._digest.update(raw)

    def _end(self) -> None:
        if self._file is None:
            return
        self._file.close()
        name = self._name(len(self._full))
        rows = (self._folder / name).stat().st_size // (2 * padded(self._dim))
        self._full.append(ShardFile(file=name, rows=rows, sha256=self._digest.hexdigest()))
        self._file = None


def _key(row: NDArray[np.float16]) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def check_lengths(entries: Sequence[Entry], vectors: FloatArray, said: FloatArray | None) -> None:
    for name, rows in (("vectors", vectors), ("said", vectors if said is None else said)):
        if len(rows) != len(entries):
            raise BuildInvalid(
                f"{name}: found {len(rows)} rows, expected {len(entries)}, one for each entry;"
                " remedy: encode these entries, in order"
            )


def stand_for(texts: dict[str, int], entries: Sequence[Entry], vectors: Sequence[int]) -> list[int]:
    """For each entry the first vector of its id; `texts` remembers them."""
    return [texts.setdefault(entry.id, vector) for entry, vector in zip(entries, vectors, strict=True)]


def record(
    entries: Sequence[Entry],
    vectors: list[int],
    said: list[int],
    personas: Mapping[str, int],
    surfaces: Mapping[str, int],
    labelled: set[bytes],
) -> pa.RecordBatch:
    """The rows of these entries; raises `BuildInvalid`, or ValueError for a time without its zone.

    Labels go into the first row of each reply, which `labelled` remembers by a digest: they may be longer than the rest.
    """
    columns: dict[str, list[Any]] = {
        "vector": vectors,
        "said": said,
        "id": [entry.id for entry in entries],
        "text": [entry.text for entry in entries],
        "prompt": [entry.prompt for entry in entries],
        "persona_mask": [_mask(entry.id, "persona", entry.personas, personas) for entry in entries],
        "surface_mask": [_mask(entry.id, "surface", entry.surfaces, surfaces) for entry in entries],
        "valid_from": [entry.valid_from and micros(entry.valid_from) for entry in entries],
        "valid_until": [entry.valid_until and micros(entry.valid_until) for entry in entries],
        "weight": [entry.weight for entry in entries],
        "emotion": [entry.emotion for entry in entries],
        "tags": [list(entry.tags) for entry in entries],
        "labels": [[judged._asdict() for judged in _once(entry, labelled)] for entry in entries],
        "blocked": [entry.blocked for entry in entries],
    }
    try:
        return batch(columns)
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise BuildInvalid(
            f"entries: found {error}, expected text and numbers; remedy: mend the entry"
        ) from error


def _once(entry: Entry, labelled: set[bytes]) -> tuple[Judged, ...]:
    key = name_key(entry.id)
    if key in labelled:
        return ()
    labelled.add(key)
    return entry.labels


def name_key(reply_id: str) -> bytes:
    """What stands for an id where very many are remembered."""
    return hashlib.blake2b(str(reply_id).encode(errors="surrogatepass"), digest_size=12).digest()


def bits(kind: str, names: Sequence[str]) -> dict[str, int]:
    """Name to bit of the mask; raises `BuildInvalid`."""
    if len(set(names)) < len(names) or not all(names) or len(names) > MASK_BITS:
        raise BuildInvalid(
            f"{kind}s: found {list(names)}, expected at most {MASK_BITS} different names; remedy: merge some"
        )
    return {name: 1 << bit for bit, name in enumerate(names)}


def _mask(entry: str, kind: str, names: Sequence[str], known: Mapping[str, int]) -> int:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BuildInvalid(
            f"entry {entry!r}: found {kind} {unknown[0]!r}, expected one of: {', '.join(known) or 'none'};"
            f" remedy: name it in {kind}s"
        )
    return sum(known[name] for name in set(names)) if names else EVERYONE


def check_replaceable(out: Path) -> None:
    """Raises `BuildInvalid` where something else than an index would be lost."""
    if not out.exists():
        return
    names = [path.name for path in out.iterdir()] if out.is_dir() else [out.name]
    own = {INDEX_FILE, ITEMS_FILE, LEVELS_FILE, LINKS_FILE}
    foreign = [name for name in names if name not in own and not name.endswith((".f16", ".safetensors"))]
    if foreign or (names and INDEX_FILE not in names):
        found = foreign[0] if foreign else names[0]
        raise BuildInvalid(f"{out}: found {found!r}, expected an index or nothing; remedy: build elsewhere")
