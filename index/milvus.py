"""`MilvusReplies`: the retrieval of `Replies` over a Milvus collection, for more replies than one machine holds.

`index/push.py` writes an index into a collection, which never changes afterwards, and leaves a pointer to it: the folder
that a bundle carries in the place of the vectors. Both need the `milvus` extra.
"""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any, Literal, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pymilvus import DataType, MilvusClient, MilvusException

from index.items import ALWAYS_FROM, ALWAYS_UNTIL, EPOCH, Judged, ReplyItem, micros
from index.layout import DIGEST, INDEX_FILE, MASK_BITS, IndexInvalid
from index.replies import Hit
from index.search import check_k, prepare

logger = logging.getLogger(__name__)

CONNECT_S = 2.0  # to connect, and to connect again after the server was away
# After an outage gRPC would wait for up to two minutes before it tries an address again.
CHANNEL = {"grpc.initial_reconnect_backoff_ms": 100, "grpc.max_reconnect_backoff_ms": 1000}
SEARCH_S = 0.25  # of a search; a caller waits a second in all
LOAD_S = 30.0  # of a call while loading
FAILURES_TO_PAUSE = 3  # in a row
PAUSE_S = 3.0  # a failing server is left alone this long; longer than connecting again may take

MAX_HITS = 16384  # Milvus returns no more
REMEMBERED_VECTORS = 8192  # 5 MB at 300 wide
# One vector scored twice may differ in the last bits: how it is summed depends on where it lies.
TIE = 1e-6
# This row is no reply but says what the collection is. It is pushed last, so a push that broke off has none.
STAMP_ROW = -1
NOT_IN_NAMES = re.compile("[\x00-\x1f\x7f\ufffd]")  # what a Milvus expression has no escapes for
DTYPES: dict[Any, np.dtype[Any]] = {
    DataType.FLOAT16_VECTOR: np.dtype(np.float16),
    DataType.FLOAT_VECTOR: np.dtype(np.float32),
}
SHOWN = (
    "row", "id", "text", "prompt", "weight", "emotion", "tags", "persona_mask", "surface_mask",
    "valid_from", "valid_until", "labels", "blocked",
)  # fmt: skip
FIELDS = (*SHOWN, "personas", "surfaces", "vector", "said")

Answer = TypeVar("Answer")


class MilvusAway(ConnectionError):
    """Milvus gave no answer, or none in time. The question was good: ask later, or go on without replies."""


class Pointer(BaseModel):
    """`index.json` of a pointer: which collection, what it must hold, and what is known without asking it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["milvus"]
    collection: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,254}$")
    digest: str = Field(pattern=DIGEST)  # of the index.json it was pushed from, which has those of all files
    vectorizer: str
    dim: int = Field(ge=1, le=1 << 15)
    rows: int = Field(ge=0)
    ef: int = Field(ge=0)  # candidates a search keeps while it walks the graph; 0 where it compares every row
    personas: tuple[str, ...] = Field(max_length=MASK_BITS)
    surfaces: tuple[str, ...] = Field(max_length=MASK_BITS)
    boundaries: tuple[int, ...]  # when validity changes, in microseconds since 1970, ascending

    def stamp(self) -> dict[str, object]:
        """What the collection must say of itself."""
        return {name: getattr(self, name) for name in ("digest", "vectorizer", "dim", "rows")}

    def save(self, folder: Path) -> None:
        """The same pointer gives the same bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        (folder / INDEX_FILE).write_bytes(f"{text}\n".encode())


class MilvusReplies:
    """A collection as an `index.replies.Retriever`. Immutable but for whether the server answers; thread-safe."""

    def __init__(self, client: MilvusClient, pointer: Pointer, dtype: np.dtype[Any]) -> None:
        self.dim = pointer.dim
        self.personas = pointer.personas
        self.surfaces = pointer.surfaces
        self._client, self._pointer, self._dtype = client, pointer, dtype
        self._failures, self._again = 0, 0.0
        self._said: dict[int, Any] = {}  # row -> vector of its text, of the rows found last
        self._lock = Lock()

    @classmethod
    def load(cls, folder: Path, *, uri: str, token: str = "", vectorizer: str) -> MilvusReplies:
        """The collection that the pointer in `folder` names, made for this `vectorizer`, or `IndexInvalid`."""
        pointer = read_pointer(folder)
        remedy = "push the index of this vectorizer, and put its pointer into the bundle"
        expect(f"{INDEX_FILE} vectorizer", pointer.vectorizer, vectorizer, remedy)
        if not uri:
            raise IndexInvalid(
                part=INDEX_FILE,
                found="replies in Milvus, and no address of one",
                expected="where it listens",
                remedy="set NLU_MILVUS_URI",
            )
        with answering(pointer.collection):
            client = connect(uri, token)
            if not client.has_collection(pointer.collection, timeout=LOAD_S):
                remedy = "push the index with `nlu index push`, or point NLU_MILVUS_URI at the right server"
                raise IndexInvalid(
                    part=pointer.collection, found="no such collection", expected="the replies", remedy=remedy
                )
            return cls(client, pointer, check_collection(client, pointer, timeout=LOAD_S))

    @property
    def quick(self) -> bool:
        """Never: a search is a call to another machine."""
        return False

    def __len__(self) -> int:
        """Rows, not replies."""
        return self._pointer.rows

    def moment(self, as_of: datetime) -> int:
        """A number for the stretch of time around `as_of` in which the same replies are valid; asks nobody."""
        return bisect_right(self._pointer.boundaries, micros(as_of))

    def search(
        self,
        vector: NDArray[np.float32],
        k: int,
        *,
        persona: str | None,
        surface: str | None,
        as_of: datetime,
        avoid: Collection[str] = (),
        tags: Collection[str] = (),
    ) -> list[Hit]:
        """As `Replies.search`, down to what is refused; `MilvusAway` when the server does not answer.

        A collection pushed from a graph is searched by a graph, and may miss a reply. Similarities are those of
        vectors that were rounded on both sides where the collection keeps float16: they move by less than 0.001.
        """
        check_k(k)
        query = prepare(vector, self.dim)
        allowed = self._allowed(persona, surface, as_of, avoid, tags)
        want = k + 1
        while True:
            hits = self._nearest(query, want, allowed)
            best = _best_rows(hits)
            # As in `Replies`: fewer than wanted are all there are; else the k-th must not tie with one not fetched.
            if len(hits) < want or (len(best) >= k and best[k - 1].similarity - hits[-1].similarity > TIE):
                break
            want *= 4
        self._texts(
            [hit.row for hit in best[:k]]
        )  # now, because a ranker asks for them where nobody should wait
        return best[:k]

    def said(self, hits: Sequence[Hit]) -> NDArray[np.float32]:
        """`[hits, dim]`: vectors of the replies' own texts, of unit length up to rounding.

        A search fetches them too and they are remembered, so hits of late are answered from memory; for others the
        server is asked.
        """
        if not hits:
            return np.empty((0, self.dim), np.float32)
        packed = self._texts([hit.row for hit in hits])
        return np.stack([self._floats(packed[hit.row]) for hit in hits])

    def _texts(self, rows: Sequence[int]) -> dict[int, Any]:
        """The vector of each row's text, as pymilvus returns it.

        Asked for by row: a search finds more rows than it returns, and Milvus Lite 2.5 breaks on float16 in its hits.
        """
        with self._lock:
            known = {row: self._said[row] for row in rows if row in self._said}
        missing = sorted(set(rows).difference(known))
        if not missing:
            return known
        found = self._ask(
            lambda: self._client.query(
                self._pointer.collection,
                filter=f"row in {missing}",
                output_fields=["row", "said"],
                timeout=SEARCH_S,
            )
        )
        fresh = {row["row"]: row["said"] for row in found}
        if len(fresh) < len(missing):
            raise MilvusAway(f"{self._pointer.collection}: found {len(fresh)} of {len(missing)} rows")
        with self._lock:
            self._said.update(fresh)
            while len(self._said) > REMEMBERED_VECTORS:
                del self._said[next(iter(self._said))]
        return known | fresh

    def _allowed(
        self,
        persona: str | None,
        surface: str | None,
        as_of: datetime,
        avoid: Collection[str],
        tags: Collection[str],
    ) -> str:
        """The rule of `index/filters.py` as an expression, which Milvus applies before it searches."""
        now = micros(as_of)
        clauses = [
            'blocked == ""',
            f"array_contains(personas, {_name('persona', persona, self.personas)})",
            f"array_contains(surfaces, {_name('surface', surface, self.surfaces)})",
            f"valid_from <= {now} and valid_until > {now}",
        ]
        if avoid:
            clauses.append(f"id not in [{_quoted(avoid)}]")
        if tags:
            clauses.append(f"array_contains_any(tags, [{_quoted(tags)}])")
        return " and ".join(clauses)

    def _nearest(self, query: NDArray[np.float32], want: int, allowed: str) -> list[Hit]:
        """The `want` best rows, or as many as Milvus gives, best first."""
        want = min(want, MAX_HITS)
        ef = self._pointer.ef
        found = self._ask(
            lambda: self._client.search(
                self._pointer.collection,
                [query.astype(self._dtype)],
                anns_field="vector",
                filter=allowed,
                limit=want,
                output_fields=list(SHOWN),
                search_params={"metric_type": "IP", "params": {"ef": max(ef, want)} if ef else {}},
                timeout=SEARCH_S,
            )
        )
        hits = [
            Hit(_item(row["entity"]), float(row["distance"]), int(row["entity"]["row"])) for row in found[0]
        ]
        return sorted(hits, key=lambda hit: -hit.similarity)

    def _floats(self, value: Any) -> NDArray[np.float32]:
        """A vector as pymilvus returns it: floats, or the bytes of float16."""
        if self._dtype == np.float32:
            return np.asarray(value, np.float32)
        packed = value if isinstance(value, bytes) else b"".join(value)
        return np.frombuffer(packed, "<f2").astype(np.float32)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """The answer, or `MilvusAway`. Callers do not wait for a server that keeps failing: one asks after each pause."""
        name = self._pointer.collection
        if self._failures >= FAILURES_TO_PAUSE:
            if monotonic() < self._again:
                raise MilvusAway(f"{name}: found a server that failed a moment ago, not asked again yet")
            self._again = monotonic() + PAUSE_S
        try:
            answer = question()
        except (MilvusException, grpc.RpcError) as error:
            self._failures += 1
            self._again = monotonic() + PAUSE_S
            if self._failures == FAILURES_TO_PAUSE:
                logger.warning("%s: %d failures in a row, going on without replies", name, self._failures)
            raise MilvusAway(f"{name}: found {_told(error)}") from error
        self._failures = 0
        return answer


def read_pointer(folder: Path) -> Pointer:
    """`index.json` of a pointer, or `IndexInvalid`."""
    path = folder / INDEX_FILE
    if not path.is_file():
        raise IndexInvalid(
            part=INDEX_FILE, found="no file", expected=str(path), remedy="build or pull it again"
        )
    with fitting():
        return Pointer.model_validate_json(path.read_bytes())


@contextmanager
def fitting() -> Iterator[None]:
    """What a `Pointer` cannot hold is `IndexInvalid`."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise IndexInvalid(
            part=f"{INDEX_FILE} {'.'.join(map(str, first['loc']))}".rstrip(),
            found=repr(first["input"])[:80],
            expected=first["msg"],
            remedy="push the index with this version of the code, or into a collection of another name",
        ) from error


def connect(uri: str, token: str) -> MilvusClient:
    """A client whose server has answered; raises the errors that `answering` takes."""
    # It raises every failure and logs it too, with a page of traceback.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    return MilvusClient(uri, token=token, timeout=CONNECT_S, grpc_options=CHANNEL)


def _item(row: Mapping[str, Any]) -> ReplyItem:
    """A row as `push` wrote it, back again."""
    return ReplyItem(
        id=row["id"],
        text=row["text"],
        prompt=row["prompt"],
        weight=row["weight"],
        emotion=row["emotion"],
        tags=tuple(row["tags"]),
        persona_mask=row["persona_mask"],
        surface_mask=row["surface_mask"],
        valid_from=_instant(row["valid_from"]),
        valid_until=_instant(row["valid_until"]),
        labels=tuple(Judged(*judged) for judged in json.loads(row["labels"])),
        blocked=row["blocked"],
    )


def _instant(value: int) -> datetime | None:
    return None if value in (ALWAYS_FROM, ALWAYS_UNTIL) else EPOCH + timedelta(microseconds=value)


def check_collection(client: MilvusClient, pointer: Pointer, *, timeout: float) -> np.dtype[Any]:
    """How the collection keeps its vectors, once it is loaded; `IndexInvalid` unless it is whole and the right one."""
    name, remedy = pointer.collection, "push the index into a collection of another name"
    fields = {
        field["name"]: field["type"] for field in client.describe_collection(name, timeout=LOAD_S)["fields"]
    }
    expect(f"{name} fields that lack", sorted(set(FIELDS).difference(fields)), [], remedy)
    client.load_collection(name, timeout=timeout)
    now = {"consistency_level": "Strong", "timeout": LOAD_S}  # rows that were pushed a moment ago count
    stamps = client.query(name, filter=f"row == {STAMP_ROW}", output_fields=["text"], **now)
    expect(f"{name} stamps", len(stamps), 1, remedy)
    stamp = json.loads(stamps[0]["text"])
    for fact, expected in pointer.stamp().items():
        expect(f"{name} {fact}", stamp.get(fact), expected, remedy)
    counted = client.query(name, filter="", output_fields=["count(*)"], **now)[0]["count(*)"]
    expect(f"{name} rows", counted - 1, pointer.rows, remedy)
    return DTYPES[fields["vector"]]


def _best_rows(hits: Sequence[Hit]) -> list[Hit]:
    """Each reply of the hits, which come best first, by its best row; equal similarities go by weight, then by id."""
    level, above, placed = 0, np.inf, []
    for hit in hits:
        level += above - hit.similarity > TIE
        above = hit.similarity
        placed.append(((level, -hit.item.weight, hit.item.id, hit.row), hit))
    best: dict[str, Hit] = {}
    for _, hit in sorted(placed, key=lambda pair: pair[0]):
        best.setdefault(hit.item.id, hit)
    return list(best.values())


def _name(kind: str, name: str | None, known: tuple[str, ...]) -> str:
    if name is not None and name not in known:
        raise ValueError(
            f"{kind}: found {name!r}, expected one of: {', '.join(known) or 'none'}; remedy: ask for a known {kind}"
        )
    return _quoted([name or ""])


def _quoted(names: Collection[str]) -> str:
    """String literals of an expression. Callers choose these names, so one that no row can have must do no harm."""
    harmless = [NOT_IN_NAMES.sub("\ufffd", name) for name in names]
    return ", ".join(json.dumps(name, ensure_ascii=False) for name in harmless)


def expect(part: str, found: object, expected: object, remedy: str) -> None:
    """`IndexInvalid` unless they are the same."""
    if found != expected:
        raise IndexInvalid(part=part, found=str(found), expected=str(expected), remedy=remedy)


@contextmanager
def answering(collection: str) -> Iterator[None]:
    """A server that does not answer, or with an error, is `IndexInvalid`."""
    try:
        yield
    except (MilvusException, grpc.RpcError) as error:
        raise IndexInvalid(
            part=collection,
            found=_told(error),
            expected="a Milvus server that answers",
            remedy="check its address (NLU_MILVUS_URI), the token (NLU_MILVUS_TOKEN) and its log",
        ) from error


def _told(error: Exception) -> str:
    """pymilvus wraps most errors of gRPC, not all."""
    details = getattr(error, "details", None)
    return str(error.message if isinstance(error, MilvusException) else details() if details else error)[:300]
